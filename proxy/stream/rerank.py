"""Grades of texts for a query, by a reranking model.

Source: llama.cpp tools/server, b11434, `/v1/rerank`; the same as Jina's API, which other servers have as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import UpstreamFailed

PATH = "/v1/rerank"


async def rerank(
    model: str, query: str, texts: Sequence[str], post: Callable[[str, Json], Awaitable[Json]]
) -> list[float]:
    """One score per text, the higher the better; their range depends on the model. `post` sends a body to a path of the
    server of `model`. Raises: UpstreamFailed for an answer of another form, and as `post`."""
    if not texts:
        return []
    answer = await post(PATH, {"model": model, "query": query, "documents": list(texts), "top_n": len(texts)})
    scores: dict[int, float] = {}
    results = answer.get("results")
    for result in results if isinstance(results, list) else ():
        index, score = map(result.get, ("index", "relevance_score")) if isinstance(result, dict) else (None, None)
        if isinstance(index, int) and isinstance(score, int | float):
            scores[index] = float(score)
    if any(index not in scores for index in range(len(texts))):
        raise UpstreamFailed("the model server's answer does not have a score for each text", code="upstream_error")
    return [scores[index] for index in range(len(texts))]
