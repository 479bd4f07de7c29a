"""The sources of an answer, as clients get them. No I/O.

Numbers are assigned before the answer and never change, so that `[n]` in the stream is relayed as it comes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llama_smart_proxy import Json
from llama_smart_proxy.agents.rag.prompt import Source

_CITED = re.compile(r"\[\s*(?:source\s*)?\d{1,3}(?:\s*[,;]\s*(?:source\s*)?\d{1,3})*\s*\]", re.IGNORECASE)
_RUN = re.compile(rf"(?<![\w\])])(?:{_CITED.pattern})+(?!\()", re.IGNORECASE)
"""Citations beside each other. What follows a word is an index in code, what `(` follows is a link."""
_NUMBER = re.compile(r"\d+")


def citations(text: str, sources: Sequence[Source]) -> list[tuple[int, int, Source]]:
    """Every citation of one of `sources` in an answer: where it begins and ends, and the source."""
    by_number = {source.number: source for source in sources}
    return [
        (found.start(), found.end(), by_number[int(number)])
        for run in _RUN.finditer(text)
        for found in _CITED.finditer(text, *run.span())
        for number in _NUMBER.findall(found[0])
        if int(number) in by_number
    ]


def web_url(source: Source) -> str:
    """The URL of a source on the web; empty for a document, which may have come from a path of this machine."""
    url = source.passage.url
    return url if url.startswith(("http://", "https://")) else ""


def location(source: Source) -> str:
    """The URL of a source; of another document, its path in the API of this proxy."""
    passage = source.passage
    return web_url(source) or (f"/v1/files/{passage.document_id}/content" if passage.document_id else "")


def described(source: Source, cited: bool) -> Json:
    """An item of `x_sources`."""
    passage = source.passage
    known: Json = {
        "id": source.number,
        "title": source.name,
        "document": passage.document,
        "url": web_url(source),
        "collection": passage.collection,
        "file_id": passage.document_id,
        "heading": passage.heading,
    }
    present: Json = {key: value for key, value in known.items() if value}
    return present | {"relevance": round(source.relevance, 4), "cited": cited}


def url_citations(found: Sequence[tuple[int, int, Source]]) -> list[Json]:
    """OpenAI's annotations of a message. Source: the OpenAI API reference, `url_citation`."""
    return [
        {
            "type": "url_citation",
            "url_citation": {"start_index": start, "end_index": end, "title": source.name, "url": location(source)},
        }
        for start, end, source in found
    ]


def listed(sources: Sequence[Source]) -> list[str]:
    """The lines of the list below an answer."""
    shown = []
    for source in sources:
        url = web_url(source)
        shown.append(f"[{source.number}] {source.name}" + (f" ({url})" if url and url != source.name else ""))
    return shown


def event_of(source: Source) -> Json:
    """The source for Open WebUI, which takes `[1]` for the first one with an id of its own (`metadata.source`). Source:
    Open WebUI 0.12.4, Citations.svelte."""
    url = web_url(source)
    shown: Json = {"source": url or f"{source.number}: {source.name}", "name": source.name}
    return {
        "source": {"name": source.name, **({"url": url} if url else {})},
        "document": ["\n\n".join(source.texts)],
        "metadata": [shown | ({"external": True} if url else {})],
    }
