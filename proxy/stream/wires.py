"""How a model's server is asked, in the API that it speaks."""

from __future__ import annotations

from llama_smart_proxy.backends.base import Model
from llama_smart_proxy.proxy.chat import ChatRequest
from llama_smart_proxy.proxy.dialects import anthropic, ollama, openai
from llama_smart_proxy.proxy.dialects.base import Wire
from llama_smart_proxy.proxy.errors import UpstreamRefused

_WIRES = {"llama.cpp": openai.LLAMA_CPP, "ollama": ollama.WIRE, "openai": openai.WIRE}


def wire_of(model: Model) -> Wire:
    """How to ask for a streamed answer there, whatever API the request came in."""
    return _WIRES[model.codec]


def native_wire(family: str, model: Model) -> Wire | None:
    """How to ask for one in the API of that family, so that the answer is what a client of it gets without agents; None
    if the server does not speak it."""
    if family not in model.speaks:
        return None
    if family == "anthropic":
        return anthropic.WIRE
    return openai.OWN_WIRE if family == "openai" else wire_of(model)


def without_thoughts(request: ChatRequest, refused: UpstreamRefused) -> bool:
    """Take back the wish that the model think, if that is what the server refused; whether it was."""
    if "does not support thinking" not in refused.message:
        return False
    wishes = ("chat_template_kwargs", "reasoning_effort", "think", "thinking_budget_tokens")
    return any([request.body.pop(wish, None) is not None for wish in wishes])
