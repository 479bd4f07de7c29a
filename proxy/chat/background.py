"""Recognises the background prompts of chat UIs, by how their templates begin. No I/O."""

from __future__ import annotations

import re
from typing import Literal

BackgroundKind = Literal[
    "title", "tags", "follow_ups", "queries", "image_prompt", "autocomplete", "emoji", "adapted"
]  # fmt: skip
BACKGROUND_PROMPTS: dict[BackgroundKind, tuple[str, ...]] = {
    "title": (
        r"### Task:\s+Generate a concise, \d-\d word title\b",
        r"### Task:\s+Generate a concise title summarizing the chat",
        r"(?:Please generate|Provide) a concise, 5-word-or-less title for the conversation",
        r"Please generate a concise title \(max \d+ characters\) for a conversation",
        r"Analyze this conversation and provide:\s+1\. The detected language",
        r"Based on the chat history, give this conversation a (?:name|title)\.",
        r"Generate a concise, descriptive title for this conversation based on",
        r"You are a professional conversation summarizer\. Generate a concise title",
        r"You are an assistant skilled in conversation\. You need to summarize .{0,40} into a title",
        r"You are an AI conversation titles assistant",
        r"You are a chat thread titling assistant",
    ),
    "tags": (r"### Task:\s+Generate \d-\d broad tags",),
    "follow_ups": (
        r"### Task:\s+Suggest \d-\d relevant follow-up",
        r"### Task:\s+Predict \d-\d useful messages this user might naturally send next",
    ),
    "queries": (
        r"### Task:\s+Analyze the chat history to determine the necessity of generating",
        r"You are an AI question rephraser\b",
    ),
    "image_prompt": (r"### Task:\s+Generate a detailed prompt for a[mn]? image generation",),
    "autocomplete": (r"### Task:\s+You are an autocompletion system",),
    "emoji": (r"Your task is to reflect the speaker's likely facial expression",),
    "adapted": (r"### Task:\s(?s:.{0,4000}?)\n<chat_history>",),
}
"""Regular expressions for the beginnings of the prompts of each kind, in the system prompt or the user's text.

Those without `### Task:` are titles of LibreChat, Chatbox, n8n, Lobe, Cherry Studio, big-AGI and Hugging Face's
chat-ui, in this order, and queries of Cherry Studio and Perplexica; the others are Open WebUI's, 0.5 to 0.12, and
`adapted` are its templates in other words. Its prompt for a question over documents begins with `### Task:` as well,
but is a question of the user.
"""
LONGEST = 5000
"""So many characters decide."""
_FIRST_WORDS = ("### Task:", "Please g", "Provide a", "Analyze", "Based on", "Generate a", "You are a", "Your task")
"""How all of them begin: nearly all other texts are known by that."""
_ANY = re.compile("|".join(f"(?P<{kind}>{'|'.join(starts)})" for kind, starts in BACKGROUND_PROMPTS.items()))


def background_kind(text: str) -> BackgroundKind | None:
    """The kind of background prompt that a system prompt or a user's text is by its beginning; None if it is none."""
    if not text.startswith(_FIRST_WORDS):
        if not text[:1].isspace():
            return None
        text = text[:LONGEST].lstrip()
    found = _ANY.match(text, 0, LONGEST)
    return None if found is None else found.lastgroup  # type: ignore[return-value]
