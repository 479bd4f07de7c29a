"""What the agent `parallel` makes of several answers: grades, a majority, a text of drafts, sections. No proxy."""

from __future__ import annotations

from llama_smart_proxy.agents.parallel.members import Event, Member, Usage, members_of
from llama_smart_proxy.agents.parallel.merging import (
    best,
    judges_of,
    majority,
    normalised,
    question_of,
    read_grade,
    synthesis,
)
from llama_smart_proxy.agents.parallel.sections import Sections, closing
from llama_smart_proxy.proxy.chat import ChatRequest
from llama_smart_proxy.proxy.errors import UpstreamFailed


def test_grades_are_read_from_whatever_stands_around_them() -> None:
    for text, grade in {
        "7": 7, "Grade: 8/10": 8, '{"grade": 9}': 9, "I'd say 10.": 10, "7.5 out of 10": 7.5, "no idea": None,
        "0": None, "100": None, "It has 3 parts, so 9": 3,
        "On a scale of 1-10: 6": 6, "from 1 to 10 it is an 8": 8, "<think>2 or 3?</think>4": 4,
    }.items():  # fmt: skip
        assert read_grade(text) == grade, text
    assert [judges_of(place, 2) for place in (0, 1)] == [[1], [0]]
    assert [judges_of(place, 4) for place in range(4)] == [[1, 2], [2, 3], [3, 0], [0, 1]]
    assert judges_of(0, 1) == []
    assert (best([None, 3.0, 3.0]), best([None, None])) == (1, 0)


def test_answers_are_compared_by_what_they_come_to() -> None:
    assert normalised("So it is.\n**Paris!**\n") == normalised("paris") == "paris"
    assert normalised("That makes 1,000 in all.") == normalised("1000.0") == "1000.0"
    assert normalised('{"answer": "Rome"}') == "rome"
    assert (
        normalised('{"x": 1, "y": 2}') == normalised('```json\n{"y": 2, "x": 1}\n```') != normalised('{"x": 1, "y": 3}')
    )
    assert normalised('{"city": "Rome"}') == normalised("**The answer is Rome.**\n```") == "rome"
    assert normalised("2-3 GPT4") == "3.0" and normalised("?!") == "?!"
    assert majority(["x", "the answer: 4", "4", "y"]) == (1, 2)
    assert majority(["x", "y"]) == (0, 1)


IN_PARTS = {"role": "user", "content": [{"type": "text", "text": text} for text in ("Compare:", "this and that")]}


def test_answers_are_merged_as_turns_of_the_chat() -> None:
    members = [Member("m", "m", pieces=[f"answer {n}"]) for n in range(2)]
    request = ChatRequest({"model": "m", "messages": [{"role": "user", "content": "Why?"}], "tools": [], "n": 2})
    merged = synthesis(request, "boss", members)
    assert merged.model == "boss" and "tools" not in merged.body and "n" not in merged.body
    roles = [message["role"] for message in merged.messages]
    assert roles == ["user", "assistant", "user", "assistant", "user"], "in turns, as templates require"
    texts = [message["content"] for message in merged.messages]
    assert texts[:2] == ["Why?", "answer 0"] and texts[3] == "answer 1", "nothing surrounds them that could be repeated"
    assert len(request.messages) == 1
    (message, *_) = synthesis(ChatRequest({"messages": [IN_PARTS]}), "boss", members).messages
    assert message == IN_PARTS
    begun = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because "}]
    assert synthesis(ChatRequest({"messages": begun}), "boss", members).messages[1]["content"] == "Because answer 0"
    text_only = ChatRequest({"model": "m", "prompt": "Once", "echo": True, "max_tokens": 3})
    merged = synthesis(text_only, "boss", members)
    assert set(merged.body) == {"model", "messages", "max_tokens"} and merged.messages[0]["content"] == "Once"


def test_a_judge_is_shown_what_was_said_before() -> None:
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    request = ChatRequest({"messages": [*messages, {"role": "user", "content": "Why?"}]})
    assert question_of(request) == "user: One?\nassistant: Two.\n\nThe question:\nWhy?"
    assert question_of(ChatRequest({"messages": messages[:1]})) == "One?"
    assert question_of(ChatRequest({"messages": [IN_PARTS]})) == "Compare:\nthis and that"
    assert question_of(ChatRequest({"prompt": "Once"})) == "Once"


def test_sections_follow_one_another_and_none_leaks_into_the_next() -> None:
    first, second, third, fourth = members = members_of(["a", "b", "b", "c"])
    sections = Sections(members)
    failure = UpstreamFailed("gone")

    def tell(event: Event) -> str:
        event.record()
        return sections.add(event.member, event.text) if event.text else sections.done(event.member)

    told = [
        tell(Event(fourth, failure=failure)),
        tell(Event(second, "```py\nx")),
        tell(Event(first, "one ")),
        tell(Event(second, " = 1")),
        tell(Event(second, failure=failure)),
        tell(Event(first, "two")),
        tell(Event(third, "~~~\nthree")),
        tell(Event(third)),
        tell(Event(first)),
        sections.end(),
    ]
    assert told == [
        "", "### b #1\n\n```py\nx", "", " = 1", "\n```\n\n*gone*\n\n### a\n\none ", "two", "", "",
        "\n\n### b #2\n\n~~~\nthree", "\n~~~\n\n### c\n\n*gone*",
    ]  # fmt: skip


def test_a_block_of_code_is_ended_as_it_began() -> None:
    for text, ending in {
        "x": "", "```\nx\n```": "", "````md\n```\nx": "\n````", "~~~\nx\n```": "\n~~~", "```\n``` py": "\n```",
    }.items():  # fmt: skip
        assert closing(text) == ending, text


def test_a_prompt_that_is_read_once_counts_once() -> None:
    usage = Usage()
    usage.add_shared([None, *({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12} for _ in range(3))])
    usage.add({"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2})
    (chunk,) = usage.chunks()
    assert chunk.usage == {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    assert Usage().chunks() == []
