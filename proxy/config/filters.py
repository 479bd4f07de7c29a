"""Fields of requests that are removed or set on their way to a model's server."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from llama_smart_proxy.proxy.config import shapes
from llama_smart_proxy.proxy.config.section import Section

PROTECTED = frozenset({"model", "messages", "prompt", "input", "stream"})
"""What a request is about, and how it is answered: the proxy itself depends on these."""


def _field(name: str) -> str:
    """The name of a field of a request; a dot goes one level down."""
    first, *more = name.split(".")
    if not all((first, *more)):
        raise ValueError("must be the name of a field, such as temperature or chat_template_kwargs.enable_thinking")
    if first in PROTECTED:
        raise ValueError(f"must not be one of {', '.join(sorted(PROTECTED))}: requests depend on it")
    return name


FieldName = Annotated[str, AfterValidator(_field)]


class FiltersConfig(Section):
    """Fields of requests to a model, by their names in the API in which its server is asked; a dot goes one level
    down."""

    strip: Annotated[list[FieldName], BeforeValidator(shapes.comma_list)] = Field(
        default_factory=list, description="Fields that are removed."
    )
    set: dict[FieldName, Any] = Field(
        default_factory=dict, description="Fields that are set, also in place of the client's; after `strip`."
    )

    def apply(self, body: dict[str, Any]) -> None:
        """Remove and set the fields of a request's body. What is inside of its values is replaced, never modified."""
        for name in self.strip:
            _change(body, name.split("."), None)
        for name, value in self.set.items():
            _change(body, name.split("."), (value,))


def _change(body: dict[str, Any], path: list[str], value: tuple[Any] | None) -> None:
    """Give the field at `path` another value, or remove it. What has to be a mapping for it becomes one."""
    *outer, last = path
    for name in outer:
        inner = body.get(name)
        if not isinstance(inner, dict) and value is None:
            return
        body[name] = body = dict(inner) if isinstance(inner, dict) else {}
    if value is None:
        body.pop(last, None)
    else:
        body[last] = value[0]
