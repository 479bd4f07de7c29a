"""Queries: a question made self-contained by the chat before it, and other queries where the first one found nothing.
No I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llama_smart_proxy import ChatRequest, Json, text_of

FEW_WORDS = 2
"""A question with no more words than that is about something said before, if there is anything before."""
LOOKED_AT = 10_000
"""Characters at the beginning and at the end of a text that may be a part of the query."""
CARRIED = 300
"""Characters of an earlier question that are put in front of one that follows."""
TURNS = 4
"""Messages before the question that a model gets to rewrite it."""
TURN = 600
"""Characters of each of them."""
REWRITE_TOKENS = 96
_OPENERS = re.compile(
    r"\W*(?:and|but|or|also|then|so|what about|how about|what if|why not|same|and what|und|aber|oder|auch|dann|"
    r"was ist mit|wie ist es mit|warum nicht|et|mais|ou|alors|y|pero|entonces|e|ma|oppure)\b",
    re.IGNORECASE,
)
_POINTERS = re.compile(
    r"\b(?:it|its|this|that|these|those|they|them|their|there|he|she|him|her|his|one|ones|former|latter|above|"
    r"previous|instead|dies(?:e[rmns]?)?|das|davon|damit|dazu|daf\u00fcr|dort|sie|ihn|ihm|ihr|es|\u00e7a|cela|celui|celle|eso|"
    r"esto|ese|esa|aquel)\b",
    re.IGNORECASE,
)
_POINTING_WORDS = 12
"""A longer question with such a word has most likely said what it is about."""
INSTRUCTION = (
    "Rewrite the last question of the chat below as one search query that can be understood without the chat. Keep its "
    "language and its names. Reply with the query alone, on one line, without quotation marks."
)


def follows_on(question: str) -> bool:
    """Whether a question is understood only with what was said before it: "and on Windows?"."""
    words = question.split()
    if len(words) <= FEW_WORDS or _OPENERS.match(question) is not None:
        return True
    return len(words) <= _POINTING_WORDS and _POINTERS.search(question) is not None


def normalised(question: str) -> str:
    """A question on one line; of a very long text its beginning and its end."""
    if len(question) > 2 * LOOKED_AT:
        question = f"{question[:LOOKED_AT]} {question[-LOOKED_AT:]}"
    return " ".join(question.split())


def earlier_questions(request: ChatRequest) -> list[str]:
    """The user's texts before the last one, the newest first; a text completion has none."""
    users = [text_of(message.get("content")) for message in request.messages if message.get("role") == "user"]
    return [text.strip() for text in reversed(users[:-1]) if text.strip()]


def self_contained(question: str, earlier: Sequence[str], longest: int) -> str:
    """The query for a question: with the last earlier one that is understood by itself, if it follows on."""
    query = normalised(question)
    if earlier and follows_on(query):
        return _with_earlier(query, earlier, longest)
    if len(query) <= longest:
        return query
    half = longest // 2  # of a text with a question, most have that at its beginning or at its end
    return f"{query[: half - 1].rstrip()} {query[-half:].lstrip()}"


def _with_earlier(query: str, earlier: Sequence[str], longest: int) -> str:
    """Nearer ones that follow on themselves ("and on macOS?") are left out: this question replaces them."""
    about = next((text for text in earlier if not follows_on(text)), earlier[0])
    return f"{' '.join(about.split())[:CARRIED]} {query}"[-longest:].strip()


def cheap_rewrites(question: str, earlier: Sequence[str], longest: int) -> list[str]:
    """Other queries for a question that cost nothing: with the question before it, if there is one."""
    query = normalised(question)
    return [_with_earlier(query, earlier, longest)] if earlier else []


def rewriting(request: ChatRequest, model: str, tried: Sequence[str], template: str = "") -> ChatRequest:
    """The request to a model for another query than those that were `tried`. In `template`, `{query}` stands for the
    question."""
    if template:
        content = template.replace("{query}", tried[0]).replace("{{", "{").replace("}}", "}")
    else:
        found_nothing = "".join(f"\nNot again: {query}" for query in tried)
        content = f"{INSTRUCTION}{found_nothing}\n\n{_transcript(request)}\n\nQuery:"
    body: Json = {"model": model, "messages": [{"role": "user", "content": content}]}
    return ChatRequest(body | {"temperature": 0, "max_tokens": REWRITE_TOKENS})


def _transcript(request: ChatRequest) -> str:
    if request.is_text:
        return f"user: {request.last_user_text[-TURN:]}"
    said = [message for message in request.messages if message.get("role") in ("user", "assistant")]
    return "\n".join(f"{one['role']}: {text_of(one.get('content'))[:TURN]}" for one in said[-TURNS - 1 :])


def read_query(text: str, longest: int) -> str:
    """The query in a model's reply: its first line with a word, without a label and quotation marks; empty if there is
    none."""
    lines = (line.strip() for line in text.rpartition("</think>")[2].splitlines())
    line = next((line for line in lines if re.search(r"\w", line)), "")
    line = re.sub(r"^(?:search |rewritten )?query\s*:\s*", "", line, flags=re.IGNORECASE)
    return line.strip("\"'` \u201c\u201d\u201e")[:longest].strip()
