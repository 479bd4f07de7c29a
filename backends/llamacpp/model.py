"""A model in a llama-server of our own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import ClassVar

from llama_smart_proxy.backends.base import Feature, ModelInfo, Residence
from llama_smart_proxy.backends.llamacpp.arguments import flags_of, tags_of
from llama_smart_proxy.backends.llamacpp.headers import Headers
from llama_smart_proxy.backends.pool.launcher import PoolModel
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.pool.spawned import SpawnedModel
from llama_smart_proxy.backends.weights.models_dir import ModelFile
from llama_smart_proxy.proxy.config import ModelConfig

KIND = "llama.cpp"
TOOL_FLAGS = {"--tools", "--mcp-servers-config", "--mcp-servers-json", "-ag", "--agent"}
"""Source: llama.cpp tools/server/README.md, b11434: these flags switch on `/tools`."""


class LlamaCppModel(SpawnedModel):
    """`Model` for a GGUF file in llama-server. `remove` deletes its files; without it, it cannot be deleted. `aliases`
    are further ones than the configured."""

    codec: ClassVar[str] = KIND
    speaks = frozenset({"openai", "anthropic", "native"})
    features = frozenset({Feature.LOADING, Feature.TOKENS, Feature.FILES, Feature.PROGRESS})

    def __init__(
        self,
        pool: Pool,
        model: PoolModel,
        config: ModelConfig,
        headers: Headers,
        remove: Callable[[LlamaCppModel], Awaitable[None]] | None = None,
        *,
        aliases: Sequence[str] = (),
    ) -> None:
        super().__init__(pool, model, kind=KIND, aliases=[*config.aliases, *aliases])
        self.config = config
        self.filters = config.filters
        self.tags = tags_of(config.args)
        self.features = self.features | _optional_features(config)
        self._headers = headers
        self._remove = remove
        self.file: ModelFile | None = None
        """What the last scan of `models_dir` found, for a model from there."""
        self.rescan: Callable[[], Awaitable[bool]] | None = None
        """Makes `file` a recent one. Returns whether its disk answers."""

    async def delete(self, headers: Sequence[tuple[str, str]]) -> None:
        if self._remove is None:
            await super().delete(headers)
        else:
            await self._remove(self)

    async def info(self) -> ModelInfo:
        """Raises: `StartFailed` when the system has no more threads."""
        answers = self.rescan is None or await self.rescan()
        return await self._headers.info(self.name, self.config, self.file, wait=answers)

    @property
    def card(self) -> ModelInfo:
        return self._headers.card(self.name, self.config, self.file)

    async def residence(self) -> Residence | None:
        """`size_vram` is 0: llama-server does not report how much of the model it put on a GPU."""
        residence = await super().residence()
        if residence is None:
            return None
        info = await self.info()
        trained = info.metadata.get(f"{info.metadata.get('general.architecture')}.context_length")
        each = trained // (self.config.parallel or 1) if isinstance(trained, int) else 0
        return replace(residence, context_length=info.num_ctx or each)


def _optional_features(config: ModelConfig) -> frozenset[Feature]:
    """The features that the configuration of the model switches on."""
    enabled = {
        Feature.RESUMABLE: config.resumable_streams,
        Feature.TOOLS: not TOOL_FLAGS.isdisjoint(flags_of(config.args)),
    }
    return frozenset(feature for feature, on in enabled.items() if on)
