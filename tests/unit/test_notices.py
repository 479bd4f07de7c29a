"""What llama-server reports while it loads, among the lines of its log."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.backends.llamacpp.notices import LONGEST, MARK, Notices, reports


def report(state: str, stages: list[str], current: str, value: float) -> bytes:
    listed = ", ".join(f'"{stage}"' for stage in stages)
    payload = f'{{"stages": [{listed}], "current": "{current}", "value": {value}}}'
    return MARK + f'{{"state": "{state}", "payload": {payload}}}\n'.encode()


OUTPUT = (
    b"load_model: loading\n"
    + report("loading", ["text_model"], "text_model", 0.25)
    + b"a line that is cut by "
    + report("loading", ["text_model", "mmproj_model"], "mmproj_model", 0.5)
    + b"another one\n"
    + report("ready", [], "", 0)
    + b"model loaded\n"
)


@given(st.lists(st.integers(0, len(OUTPUT)), max_size=6))
def test_reports_are_taken_out_wherever_the_output_is_cut(cuts: list[int]) -> None:
    shares: list[float] = []
    notices, left = Notices(shares.append), b""
    marks = [at for at in range(len(OUTPUT)) if OUTPUT.startswith(MARK, at)]
    places = sorted(cut for cut in cuts if not any(at < cut < at + len(MARK) for at in marks))
    for start, end in zip([0, *places], [*places, len(OUTPUT)], strict=True):
        left += notices(OUTPUT[start:end])
    assert shares == [0.25, 0.75]
    assert left == b"load_model: loading\na line that is cut by another one\nmodel loaded\n"


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[]",
        b'{"state":"loading"}',
        b'{"state":"loading","payload":{"stages":[],"current":"x","value":1}}',
        b'{"state":"loading","payload":{"stages":null,"current":"x","value":1}}',
    ],
)
def test_a_report_of_another_form_is_left_out(line: bytes) -> None:
    shares: list[float] = []
    assert Notices(shares.append)(MARK + line + b"\nnext\n") == b"next\n"
    assert shares == []


def test_an_endless_report_is_not_kept() -> None:
    notices = Notices(lambda share: None)
    for _ in range(3):
        notices(MARK + b"x" * LONGEST)
        assert len(notices._held) <= LONGEST


def test_only_a_program_that_has_the_mark_is_asked_for_reports(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib").mkdir()
    old, new, thin = tmp_path / "old", tmp_path / "new", tmp_path / "bin" / "thin"
    old.write_bytes(b"\x7fELF LLAMA_SERVER_ROUTER_PORT")
    new.write_bytes(b"\x7fELF" + MARK)
    thin.write_bytes(b"\x7fELF")
    link = tmp_path / "link"
    link.symlink_to(thin)
    empty = tmp_path / "empty"
    empty.touch()
    assert [reports(str(file)) for file in (old, new, thin, empty, tmp_path / "none")] == [False, True, *[False] * 3]
    (tmp_path / "lib" / "libllama-server-impl.so").write_bytes(MARK)
    assert reports(str(link)), "its own library has it"
