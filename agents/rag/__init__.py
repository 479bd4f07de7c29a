"""The agent `rag`, which bases answers on documents: corrective RAG (CRAG)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from llama_smart_proxy import (
    Agent,
    ChatRequest,
    Chunk,
    ChunkStream,
    Context,
    ProxyError,
    UpstreamFailed,
    background_kind,
    first_text_part,
    without_sources,
)
from llama_smart_proxy.agents.rag import citing, prompt
from llama_smart_proxy.agents.rag.options import RagOptions
from llama_smart_proxy.agents.rag.session import Outcome, Session
from llama_smart_proxy.agents.rag.web import Web

ANSWER_TOKENS = 512
"""Tokens of the model's context that are left for the answer, if the request does not limit it."""
BYTES_PER_TOKEN = 4


class Rag(Agent):
    """Answers from your documents, and from the web where they do not have the answer. The sources are numbered, cited
    in the answer, and listed below it.

    Passages are searched and graded: clearly relevant ones are used, doubtful ones together with web pages, and where
    the documents are about something else, the query is rewritten and only the web is searched. If nothing is found,
    the question is answered without a context.
    """

    command = "rag"
    per_call = frozenset({"collection", "web", "grader", "max_rounds", "max_documents", "sources", "trace"})

    class Config(RagOptions):
        """The options of `rag` in the configuration."""

    def __init__(self, config: RagOptions) -> None:
        super().__init__(config)
        self.web = Web(config)

    async def close(self) -> None:
        await self.web.close()

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        if not _applies(request):
            return None
        outcome = await Session(request, ctx, self.web).run()
        if outcome.failures and not outcome.passages and ctx.required:
            raise UpstreamFailed("; ".join(outcome.reasons), status=503, code="no_context")
        _remove_lists(request)
        sources = await _injected(request, ctx, prompt.numbered(outcome.passages), outcome)
        ctx.state["outcome"], ctx.state["sources"] = outcome, sources
        ctx.note("inject", sources=len(sources), verdict=str(outcome.verdict), rounds=outcome.rounds)
        for source in sources:
            await ctx.event("source", citing.event_of(source))
        await ctx.status(_summary(sources, outcome))
        return None

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        outcome: Outcome | None = ctx.state.get("outcome")
        if outcome is None:
            async for chunk in stream:
                yield chunk
            return
        sources: Sequence[prompt.Source] = ctx.state["sources"]
        if ctx.config.trace:
            for line in (*outcome.trace, _summary(sources, outcome)):
                yield Chunk.progress(line)
        pieces: list[str] = []
        ended = False
        async for chunk in stream:
            if text := chunk.text:
                pieces.append(text)
            if chunk.finish_reason and not ended:
                ended = True
                lines = _list_of("".join(pieces), sources, chunk, ctx)
                listed = [Chunk.sources(lines)] if lines else []
                last = _with_sources(chunk, "".join(pieces), sources, outcome, ctx)
                # The proxy sends the end behind the list; but of several choices, each is over with its end.
                for one in (*listed, last) if (ctx.request.body.get("n") or 1) != 1 else (last, *listed):
                    yield one
                continue
            yield chunk


def _applies(request: ChatRequest) -> bool:
    """Whether there is a question of a person. Chat UIs ask for titles and tags with prompts of their own."""
    text = request.last_user_text
    return bool(text.strip()) and background_kind(text) is None and background_kind(request.system) is None


def _remove_lists(request: ChatRequest) -> None:
    """Remove the lists of sources below earlier answers. The proxy does so in every chat, but not without slash
    commands."""
    for message in request.messages:
        content = message.get("content") if message.get("role") == "assistant" else None
        if isinstance(content, str):
            message["content"] = without_sources(content)
        elif isinstance(content, list) and content and first_text_part(content[-1:]) is not None:
            content[-1]["text"] = without_sources(content[-1]["text"])


async def _injected(
    request: ChatRequest, ctx: Context, sources: list[prompt.Source], outcome: Outcome
) -> list[prompt.Source]:
    """Put the context into `request`; returns the sources that fit, of which the worst are left out if need be."""
    config: RagOptions = ctx.config
    question = request.last_user_text
    while sources:
        text = prompt.grounded(question, sources, config.system_context)
        if (len(text) - len(question)) // BYTES_PER_TOKEN <= config.context_tokens:
            request.last_user_text = text
            if await _fits(request, ctx):
                return sources
        request.last_user_text = question
        worst = min(sources, key=lambda source: (source.relevance, -source.number))
        outcome.reasons.append(f"{worst.name} does not fit into the model's context")
        sources = prompt.without(sources, worst)
    return []


async def _fits(request: ChatRequest, ctx: Context) -> bool:
    """Whether the model's context has room for an answer. What keeps that from being known is reported by the model."""
    try:
        room = await ctx.room(request)
    except ProxyError:
        return True
    return room is None or room >= _answer_tokens(request)


def _answer_tokens(request: ChatRequest) -> int:
    limits = [request.body.get(name) for name in ("max_completion_tokens", "max_tokens")]
    given = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(given, default=ANSWER_TOKENS)


def _summary(sources: Sequence[prompt.Source], outcome: Outcome) -> str:
    if sources:
        return f"Answering from {len(sources)} source{'s' if len(sources) > 1 else ''}"
    return f"Answering without sources: {'; '.join(outcome.reasons) or 'nothing relevant was found'}"


def _list_of(text: str, sources: Sequence[prompt.Source], chunk: Chunk, ctx: Context) -> list[str]:
    """The lines to be appended: none to JSON, to tool calls, and to an answer without text."""
    form = ctx.request.body.get("response_format")
    plain = not isinstance(form, dict) or form.get("type") in (None, "text")
    if ctx.config.sources != "append" or not text.strip() or not plain or chunk.finish_reason == "tool_calls":
        return []
    cited = {source.number for _, _, source in citing.citations(text, sources)}
    return citing.listed([source for source in sources if not cited or source.number in cited])


def _with_sources(chunk: Chunk, text: str, sources: Sequence[prompt.Source], outcome: Outcome, ctx: Context) -> Chunk:
    """The chunk that ends the answer, with the sources as fields."""
    if ctx.config.sources == "off":
        return chunk
    found = citing.citations(text, sources)
    cited = {source.number for _, _, source in found}
    data = chunk.data
    data["x_sources"] = [citing.described(source, source.number in cited) for source in sources]
    data["x_rag"] = {"verdict": str(outcome.verdict), "rounds": outcome.rounds, "reasons": outcome.reasons}
    if found:
        choice = data["choices"][0]
        choice["delta"] = {**(choice.get("delta") or {}), "annotations": citing.url_citations(found)}
    return chunk
