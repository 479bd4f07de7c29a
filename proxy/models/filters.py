"""A model whose requests are filtered, as the configuration has it for the model, or for a virtual one over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from llama_smart_proxy.backends.base import Json, Model
from llama_smart_proxy.proxy.config import FiltersConfig


class _Filtered:
    """A `Model` that is another one in all but `prepare`, which applies the filters first."""

    def __init__(self, model: Model, filters: Sequence[FiltersConfig]) -> None:
        self._model = model
        self._filters = filters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prepare(self, body: Json) -> object:
        for filters in self._filters:
            filters.apply(body)
        return self._model.prepare(body)


def filtered(model: Model, of_virtual: FiltersConfig | None = None) -> Model:
    """`model` with its own filters, and then those of the virtual model that was asked for; itself without any."""
    if model.filters is None and of_virtual is None:  # the usual case
        return model
    filters = [found for found in (model.filters, of_virtual) if found is not None]
    return cast(Model, _Filtered(model, filters))
