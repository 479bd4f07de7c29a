"""Converts the content of an item of a Responses request to the content of an OpenAI chat message.

| Responses | OpenAI chat |
|---|---|
| `input_text`, `output_text`, `refusal` | text part |
| `input_image` with `image_url` | `image_url` part |
| `input_file` with a text in `file_data` | text part |
| other `input_file` | `file` part |
| `input_audio`, and parts in the shape of a chat message | the same |

Parts of other types are set aside. Source: the OpenAI API reference, and openai-python 3.57.
"""

from __future__ import annotations

import base64
import re
from typing import Any

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.responses.shape import check, need, unstored

_TEXT_FILE = re.compile(r"data:(?:text/[^;,]+|application/(?:json|xml|yaml|x-yaml))(?:;charset=utf-8)?;base64,", re.I)
_TEXTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
}
"""The field with the text, by the type of the part."""
_SAME = frozenset({"input_audio", "image_url", "file"})


def decode_content(content: Any, path: str, aside: list[Json]) -> str | list[Json]:
    """The content of a message, a string if it is one text; parts of unknown types are appended to `aside`.

    Raises: BadRequest.
    """
    if content is None or isinstance(content, str):
        return content or ""
    decoded = []
    for at, part in enumerate(check(content, list, path)):
        made = _decode_part(check(part, dict, f"{path}[{at}]"), f"{path}[{at}]")
        if made is None:
            aside.append(part)
        else:
            decoded.append(made)
    if not decoded:
        return ""
    return str(decoded[0]["text"]) if len(decoded) == 1 and decoded[0]["type"] == "text" else decoded


def decode_result(output: Any, path: str, aside: list[Json]) -> str | list[Json]:
    """The content of a tool's result; texts are joined by LF, as many servers accept only a string there.

    Raises: BadRequest.
    """
    content = decode_content(output, path, aside)
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        return "\n".join(part["text"] for part in content)
    return content


def decode_texts(parts: Any, path: str) -> str:
    """The joined texts of the summary or the content of a reasoning item. Raises: BadRequest."""
    content = decode_content(parts, path, [])
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def text_key(part: Any) -> str | None:
    """The field with the text of a text part; None if `part` is anything else, valid or not."""
    kind = part.get("type") if isinstance(part, dict) else None
    key = _TEXTS.get(kind) if isinstance(kind, str) else None
    return key if key is not None and isinstance(part.get(key), str) else None


def text_in(part: Any) -> str | None:
    """The text of a text part; None if `part` is anything else, valid or not."""
    key = text_key(part)
    return None if key is None else str(part[key])


def _decode_part(part: Json, path: str) -> Json | None:
    kind = need(part, "type", str, path)
    if kind in _TEXTS:
        return {"type": "text", "text": need(part, _TEXTS[kind], str, path)}
    if kind in _SAME:
        return {"type": kind, kind: part.get(kind)}
    if kind == "input_image":
        return _decode_image(part, path)
    return _decode_file(part, path) if kind == "input_file" else None


def _decode_image(part: Json, path: str) -> Json:
    if part.get("image_url") is None and part.get("file_id") is not None:
        raise unstored("file_id", "no files are stored here; send the image in 'image_url', as a data: URL", path=path)
    image = {"url": need(part, "image_url", str, path)}
    return {"type": "image_url", "image_url": image | ({"detail": part["detail"]} if part.get("detail") else {})}


def _decode_file(part: Json, path: str) -> Json:
    if part.get("file_data") is None:
        name = "file_id" if part.get("file_id") is not None else "file_url"
        raise unstored(name, "no files are stored or fetched here; send it in 'file_data', as a data: URL", path=path)
    data = need(part, "file_data", str, path)
    if (found := _TEXT_FILE.match(data)) is not None:
        try:
            return {"type": "text", "text": base64.b64decode(data[found.end() :], validate=True).decode()}
        except ValueError:
            pass  # neither base64 nor UTF-8: the model's server reports it
    named = {"filename": part["filename"]} if part.get("filename") else {}
    return {"type": "file", "file": {**named, "file_data": data}}
