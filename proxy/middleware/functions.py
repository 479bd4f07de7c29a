"""Functions of an agent that the model may call: their description for the model, and the loop of calls."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from llama_smart_proxy.agents.base import Agent
from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Fold, Json

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.middleware.context import AgentContext

logger = logging.getLogger(__name__)

MAX_ROUNDS = 8
"""Answers with calls in one request; the one after that gets no functions."""
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


class Function:
    """A function that the model may call. The model gets its docstring, and the names, types and defaults of its
    parameters. A parameter `self` is the agent, and `ctx` the context.

    Raises: TypeError for a function without annotations that JSON can express.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name: str = function.__name__
        self._function = function
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        self._own = {parameter.name for parameter in parameters} & {"self", "ctx"}
        fields: dict[str, Any] = {
            parameter.name: (
                str if parameter.annotation is parameter.empty else parameter.annotation,
                ... if parameter.default is parameter.empty else parameter.default,
            )
            for parameter in parameters
            if parameter.name not in self._own
        }
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=False)
        self._model: type[BaseModel] = create_model(self.name, __config__=config, **fields)
        self._fields = list(fields)

    @property
    def tool(self) -> Json:
        """In OpenAI's shape."""
        schema = self._model.model_json_schema()
        schema.pop("title", None)
        for described in schema.get("properties", {}).values():
            described.pop("title", None)
        description = inspect.getdoc(self._function) or ""
        return {
            "type": "function",
            "function": {"name": self.name, "description": description, "parameters": schema},
        }

    async def result(self, arguments: str, ctx: AgentContext) -> str:
        """What the model gets for a call: the function's result as text, or what is wrong. A plain function runs in a
        thread."""
        own = {"self": ctx.active.loaded.agent, "ctx": ctx}
        try:
            given = self._model.model_validate_json(arguments or "{}")
            values = {name: getattr(given, name) for name in self._fields} | {name: own[name] for name in self._own}
            if inspect.iscoroutinefunction(self._function):
                made = await self._function(**values)
            else:
                made, error = await run_in_thread(lambda: _tried(self._function, values))
                if error is not None:
                    raise error
        except ValidationError as exc:
            problems = exc.errors(include_url=False, include_input=False, include_context=False)
            return f"error: wrong arguments: {json.dumps(problems, default=str)}"
        except Exception as exc:  # agent code may raise anything; the model goes on from that
            logger.warning("agent %s: the function %s failed", ctx.name, self.name, exc_info=exc)
            return f"error: {type(exc).__name__}: {exc}"
        except BaseException as exc:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise RuntimeError(f"the function {self.name} raised {type(exc).__name__}") from exc
        return made if isinstance(made, str) else json.dumps(made, default=str, ensure_ascii=False)


def _tried(function: Callable[..., Any], values: Json) -> tuple[Any, BaseException | None]:
    """The function's result and None, or None and what it raised, which a future may not take."""
    try:
        return function(**values), None
    except BaseException as exc:
        return None, exc


def functions_of(cls: type[Agent]) -> dict[str, Function]:
    """The functions in `cls.tools`, by name. Raises: as `Function`."""
    made = [Function(function) for function in cls.tools]
    return {function.name: function for function in made}


def offer(request: ChatRequest, functions: Mapping[str, Function]) -> None:
    """Add the functions to the tools of a chat. Of two with one name the client's stays."""
    if not request.is_text:
        names = {_name(tool) for tool in request.tools}
        request.tools = [*request.tools, *(function.tool for name, function in functions.items() if name not in names)]


async def with_calls(
    answer: AsyncIterator[Chunk], ctx: AgentContext, functions: Mapping[str, Function]
) -> AsyncIterator[Chunk]:
    """The answer, in which calls of `functions` are done, and the model is asked again with the results, until it
    answers. The user gets all texts; calls of the client's own tools are passed on."""
    request = ctx.request.copy()
    own = {_name(tool) for tool in request.tools if _is_own(tool, functions)}
    usage: Json = {}
    for number in range(MAX_ROUNDS + 1):
        folded, rest = Fold(), list[Chunk]()
        async for chunk in answer:
            folded.add(chunk.seen)
            if rest or chunk.tool_calls or chunk.finish_reason or (chunk.usage and not chunk.choice):
                rest.append(chunk)
            else:
                yield chunk
        whole = folded.completion()
        usage = _sum(usage, whole.get("usage")) if number else whole.get("usage") or {}
        message = whole["choices"][0]["message"]
        calls = message.get("tool_calls") or []
        if not calls or any(_name(call) not in own for call in calls):
            foreign = {at: new for new, at in enumerate(at for at, call in enumerate(calls) if _name(call) not in own)}
            for chunk in rest:
                if chunk.usage is not None and number:
                    chunk.data["usage"] = usage
                if len(foreign) == len(calls) or _keeps_calls(chunk, foreign):
                    yield chunk
            return
        for chunk in rest:
            if chunk.text or chunk.reasoning:
                yield Chunk.of(chunk.text, reasoning=chunk.reasoning)
        _identify(calls, number)
        results = [functions[_name(call)].result(call["function"]["arguments"], ctx) for call in calls]
        _add_results(request, message, calls, await asyncio.gather(*results))
        if number == MAX_ROUNDS - 1:
            request.tools = [tool for tool in request.tools if _name(tool) not in own]
        answer = ctx.chat(request)


def _is_own(tool: Json, functions: Mapping[str, Function]) -> bool:
    """Whether a tool of the request is one of the functions, and not the client's of the same name."""
    return _name(tool) in functions and tool == functions[_name(tool)].tool


def _keeps_calls(chunk: Chunk, foreign: Mapping[int, int]) -> bool:
    """Remove the agent's calls from a chunk that also has calls of the client's tools: `foreign` maps their numbers to
    new ones. The model will make the others again. Returns whether anything is left."""
    if not chunk.tool_calls:
        return True
    numbered = [(call.get("index", at), call) for at, call in enumerate(chunk.tool_calls)]
    calls = [{**call, "index": foreign[number]} for number, call in numbered if number in foreign]
    chunk.data["choices"][0]["delta"]["tool_calls"] = calls
    return bool(calls or chunk.finish_reason or chunk.text)


def _identify(calls: list[Json], number: int) -> None:
    for position, call in enumerate(calls):
        call["id"] = call.get("id") or f"call_{number}_{position}"


def _add_results(request: ChatRequest, message: Json, calls: list[Json], results: list[str]) -> None:
    told = {"role": "assistant", "content": message.get("content") or "", "tool_calls": calls}
    answers = [
        {"role": "tool", "tool_call_id": call["id"], "name": _name(call), "content": result}
        for call, result in zip(calls, results, strict=True)
    ]
    request.messages = [*request.messages, told, *answers]
    for name in ("tool_choice", "n"):  # a call that was required has been made; of one choice
        request.body.pop(name, None)


def _sum(usage: Json, more: Json | None) -> Json:
    more = more or {}
    return {**usage, **more, **{name: (usage.get(name) or 0) + (more.get(name) or 0) for name in _COUNTS}}


def _name(tool: Json) -> str:
    function = tool.get("function")
    return str(function.get("name") or "") if isinstance(function, dict) else ""


def calling(agent: Agent, ctx: AgentContext, functions: Mapping[str, Function]) -> Callable[[Any], Any]:
    """The hook for answers of an agent with functions: its own one gets the answer in which the calls are done."""

    async def hook(source: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
        done: Any = with_calls(source, ctx, functions)
        answer: Any = agent.on_response(done, ctx)
        async with aclosing(done), aclosing(answer):
            async for chunk in answer:
                yield chunk

    return hook
