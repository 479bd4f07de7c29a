"""Laws of the event splitter. The oracle is a parser written line by line from the WHATWG text, and never split."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.dialects.framing import MAX_FRAME, EventSplitter, FrameTooLong
from tests.support.laws import law


def parse_events(data: bytes) -> list[tuple[str, str]]:
    """(event, data) of every event that is dispatched. What follows the last blank line is dropped, as it says."""
    events: list[tuple[str, str]] = []
    kind, lines = "", list[str]()
    *whole, _ = re.split(b"\r\n|\n|\r", data)
    for line in whole:
        name, _, value = line.decode().partition(":")
        value = value.removeprefix(" ")
        if not line:
            if lines:
                events.append((kind or "message", "\n".join(lines)))
            kind, lines = "", []
        elif name == "data":
            lines.append(value)
        elif name == "event":
            kind = value
    return events


EOL = ("\n", "\r\n", "\r")
TEXT = st.text(st.sampled_from('aä€😀 :{}[]"\u2028\u2029\x85\x0b\x0c'), max_size=12)
LINE = st.one_of(
    TEXT.map(lambda text: f"data: {text}"),
    TEXT.map(lambda text: f"data:{text}"),
    TEXT.map(lambda text: f": {text}"),
    st.sampled_from(["data", "event: x", "event: error", "id: 7", "retry: 10", "data: [DONE]", "nonsense"]),
)
# An event's own line ends are of one kind, as any server writes them; events of all kinds are mixed.
EVENT = st.tuples(st.lists(LINE, max_size=4), st.sampled_from(EOL)).map(
    lambda made: "".join(line + made[1] for line in made[0]) + made[1]
)
STREAM = st.tuples(st.lists(EVENT, max_size=6).map("".join), TEXT).map(lambda made: "".join(made).encode())
ANY_BYTES = st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"data: x", b"\xe2\x82\xac", b":"]), max_size=30).map(
    b"".join
)


@st.composite
def pieces(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> list[bytes]:
    data = draw(whole)
    cuts = draw(st.lists(st.integers(0, len(data)), max_size=12).map(sorted))
    return [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]


@given(pieces(STREAM | ANY_BYTES | st.binary(max_size=60)))
@law(2000)
@example([b"data: a\r", b"\n\r", b"\n"])
@example([b"data: a\r", b"\r", b"\n", b"\n"])
def test_no_byte_is_lost_changed_or_passed_on_early(cut: list[bytes]) -> None:
    splitter = EventSplitter()
    went_in = came_out = b""
    for piece in cut:
        went_in += piece
        whole = splitter.push(piece)
        came_out += whole
        assert came_out + splitter.rest == went_in
        assert not whole or re.search(rb"(\n\r?\n|\r\r)\Z", came_out), "a frame that has not ended was passed on"


@given(pieces(STREAM))
@law(2000)
@example([b"data: \xe2", b"\x82\xac\n", b"\n"])
@example([b"data: \r\rdata: \r\r"])
def test_any_split_gives_the_same_events(cut: list[bytes]) -> None:
    splitter = EventSplitter()
    came_out = b"".join(splitter.push(piece) for piece in cut)
    whole = b"".join(cut)
    # a blank line that is the last byte so far may yet be the half of a CRLF: then it stays in `rest`
    assert parse_events(came_out + splitter.rest) == parse_events(whole)
    waiting = splitter.rest.removesuffix(b"\r\r")
    assert not parse_events(waiting), "a whole event was held back"


@given(pieces(STREAM))
@law(300)
def test_byte_by_byte_is_no_different(cut: list[bytes]) -> None:
    whole = b"".join(cut)
    at_once, slowly = EventSplitter(), EventSplitter()
    came_at_once = at_once.push(whole)
    came_slowly = b"".join(slowly.push(bytes([byte])) for byte in whole)
    assert parse_events(came_at_once + at_once.rest) == parse_events(came_slowly + slowly.rest)


def test_event_is_passed_on_with_its_last_byte() -> None:
    splitter = EventSplitter()
    assert splitter.push(b"data: a\n") == b""
    assert splitter.push(b"\ndata: b") == b"data: a\n\n"
    assert splitter.rest == b"data: b"
    assert splitter.push(b"\r\n\r\n") == b"data: b\r\n\r\n"
    assert splitter.rest == b""


def test_line_separators_inside_json_cut_nothing() -> None:
    event = 'data: {"content":"a\u2028b\u2029c\x85d\x0be\x0cf"}\n\n'.encode()
    assert EventSplitter().push(event) == event


@pytest.mark.parametrize("step", [1 << 16, (1 << 16) - 1, MAX_FRAME + 1])
def test_endless_event_is_refused_just_past_the_limit(step: int) -> None:
    splitter, pushed = EventSplitter(), 0
    with pytest.raises(FrameTooLong):
        while pushed < 2 * MAX_FRAME:
            pushed += step
            splitter.push(b"x" * step)
    assert MAX_FRAME < pushed <= MAX_FRAME + step


def test_event_of_the_largest_size_passes() -> None:
    splitter = EventSplitter()
    event = b"data: " + b"x" * (MAX_FRAME - 10) + b"\n\n"
    out = b"".join(splitter.push(event[at : at + 65536]) for at in range(0, len(event), 65536))
    assert out == event
