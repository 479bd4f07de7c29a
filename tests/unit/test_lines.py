"""Laws of the line splitter, and of frames: what is cut out of a stream does not depend on how it arrived."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.dialects.framing import MAX_FRAME, EventSplitter, FrameTooLong, LineSplitter, event_data
from tests.support.laws import law, splits
from tests.unit.test_framing import EVENT, parse_events

LINES = st.lists(st.text('{}"a€😀\u2028\x85\x0b', max_size=8), max_size=8).map(lambda lines: "\n".join(lines).encode())


@given(st.data(), LINES)
@law(1000)
def test_lines_come_out_whole_and_unchanged_however_they_arrive(data: st.DataObject, stream: bytes) -> None:
    splitter = LineSplitter()
    passed = [splitter.push(piece) for piece in data.draw(splits(stream))]
    assert b"".join(passed) + splitter.rest == stream
    assert all(piece == b"" or piece.endswith(b"\n") for piece in passed)
    frames = [frame for piece in [*passed, splitter.rest] for frame in splitter.split(piece)]
    assert b"".join(frames) == stream
    lines = [frame.removesuffix(b"\n") for frame in frames if frame.strip()]
    assert lines == [line for line in stream.split(b"\n") if line.strip()]


def test_a_line_over_the_limit_is_refused_and_one_below_passes() -> None:
    splitter = LineSplitter()
    almost = b"x" * (MAX_FRAME - 1)
    assert splitter.push(almost) == b""
    assert splitter.push(b"\ny") == almost + b"\n"
    assert splitter.push(b"x" * (MAX_FRAME - 1)) == b""
    with pytest.raises(FrameTooLong):
        splitter.push(b"z")


@given(st.data(), st.lists(EVENT, max_size=6).map("".join))
@law(1000)
def test_the_data_of_events_is_what_the_standard_says(data: st.DataObject, stream: str) -> None:
    splitter = EventSplitter()
    frames: list[bytes] = []
    for piece in data.draw(splits(stream.encode())):
        frames += splitter.split(splitter.push(piece))
    found = [found.decode() for frame in frames if (found := event_data(frame)) is not None]
    expected = [data for _, data in parse_events(stream.encode())]
    # A CR at the very end may be half of a CRLF, so the event before it is still held back.
    assert found == expected[: len(found)]
    assert len(expected) - len(found) <= stream.endswith("\r")


@pytest.mark.parametrize(
    ("whole", "expected"), [(b"\n", False), (b"\r\n", False), (b'{"a":1}\n', True), (b"\n\n{}\n", True)]
)
def test_blank_lines_are_no_content(whole: bytes, expected: bool) -> None:
    assert LineSplitter().has_content(whole) is expected
