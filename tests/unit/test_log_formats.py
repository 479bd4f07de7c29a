"""The forms of the log's lines: each is one line, is read by its own rules, and gives back what was put in."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.log.access import AccessLog
from llama_smart_proxy.proxy.log.formats import Form, Json, Logfmt, Text, form_for, is_coloured, is_journal
from llama_smart_proxy.proxy.log.writer import Writer
from tests.support.laws import law

PAIR = re.compile(r'([a-z_]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s"=\\]+))(?: |$)')
"""A pair of logfmt, by its grammar: a value is bare, or in quotes with escapes."""
HOSTILE = 'a"b\\c=d e\nlevel=error msg=forged \x1b[2J\u202e\x85\ud800'


def parsed(line: str) -> dict[str, str]:
    """The pairs of a line of logfmt; fails if there is anything else in it."""
    assert line.endswith("\n") and line.count("\n") == 1 and line[:-1].isprintable()
    found, at = {}, 0
    while at < len(line) - 1:
        pair = PAIR.match(line, at, len(line) - 1)
        assert pair, line[at:]
        quoted = pair[2]
        found[pair[1]] = pair[3] if quoted is None else quoted.replace('\\"', '"').replace("\\\\", "\\")
        at = pair.end()
    return found


class Lines(Writer):
    """Keeps the lines that it gets."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def hold(self, line: str) -> None:
        self.lines.append(line)


def access_line(form: Form, **fields: object) -> str:
    """The line of a request with these fields of its record."""
    record = RequestRecord(1.0, request_id="r-1", method="POST", path="/v1/messages", api="anthropic", status=200)
    record.ended_s = 2.0
    for name, value in fields.items():
        setattr(record, name, value)
    log, writer = AccessLog(), Lines()
    log.connect(writer, form)
    log.line(record)
    return writer.lines[0]


FULL = {
    "model": "m", "backend": "llama.cpp", "client": "alice", "agents": ["think", "redact"], "first_byte_s": 1.5,
    "counted": {"prompt_tokens": 11, "completion_tokens": 3},
}  # fmt: skip


def full(form: Form) -> str:
    line_fields = dict(FULL)
    record = RequestRecord(1.0)
    record.note(StepKind.QUEUE, 1.0, 1.1, ahead=2)
    record.note(StepKind.LOAD, 1.1, 1.35, model="m")
    return access_line(form, steps=record.steps, **line_fields)


def test_the_line_of_a_request_has_what_is_known_of_it() -> None:
    values = parsed(full(Logfmt()))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", values.pop("ts"))
    assert values == {
        "level": "info", "logger": "proxy.access", "msg": "request", "method": "POST", "path": "/v1/messages",
        "status": "200", "model": "m", "backend": "llama.cpp", "dialect": "anthropic", "key": "alice",
        "agents": "think,redact", "queue_ms": "100", "load_ms": "250", "ttft_ms": "500", "total_ms": "1000",
        "tokens_in": "11", "tokens_out": "3", "outcome": "ok", "id": "r-1",
    }  # fmt: skip
    same = json.loads(full(Json()))
    assert {name: str(value) for name, value in same.items() if name != "ts"} == values
    words = full(Text(timed=False)).split()
    assert words[:5] == ["INFO", "proxy.access:", "POST", "/v1/messages", "200"] and words[-1] == "r-1"
    assert {"model=m", "agents=think,redact", "queue=100ms", "load=250ms", "first=500ms", "in=11", "out=3"} < set(words)


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({}, "ok"),
        ({"status": 499}, "client_left"),
        ({"status": 503, "error": "overloaded"}, "overloaded"),
        ({"error": "upstream_incomplete"}, "upstream_incomplete"),  # within a stream
        ({"status": 404}, "error"),
        ({"status": 404, "sent_s": 1.4}, "upstream_error"),  # passed on as it was
        ({"status": 400, "error": HOSTILE}, "error"),  # an agent may raise any code
    ],
)
def test_the_outcome_is_the_code_of_the_error(fields: dict[str, object], outcome: str) -> None:
    assert parsed(access_line(Logfmt(), **fields))["outcome"] == outcome


@law(2000)
@given(st.text(max_size=80), st.text(max_size=80))
def test_whatever_is_logged_is_one_line_and_is_read_as_it_was(message: str, line: str) -> None:
    for form in (Logfmt(), Json(), Text(), Text(coloured=True)):
        made = form.record(0.0, logging.WARNING, "proxy.x", message, [])
        assert made.endswith("\n") and made.count("\n") == 1
    for form in (Logfmt(), Json()):
        made = form.record(0.0, logging.ERROR, "proxy.x", message, [line, line])
        assert made.count("\n") == 1
        found = parsed(made) if isinstance(form, Logfmt) else json.loads(made)
        assert found["level"] == "error" and found["logger"] == "proxy.x"
        if message.isprintable() and line.isprintable():
            assert found["msg"] == message
            assert found["exc"] in (f"{line}\n{line}", f"{line}\\n{line}")


@pytest.mark.parametrize("name", ["path", "model", "client", "method", "backend"])
def test_no_part_of_a_request_can_look_like_another(name: str) -> None:
    for form in (Logfmt(), Json(), Text()):
        line = access_line(form, **{name: HOSTILE})
        assert line.count("\n") == 1 and line[:-1].isprintable()
    values = parsed(access_line(Logfmt(), **{name: HOSTILE}))
    assert values["level"] == "info" and values["msg"] == "request" and values["outcome"] == "ok"
    assert json.loads(access_line(Json(), **{name: HOSTILE}))["level"] == "info"


def test_secrets_in_a_path_are_blanked() -> None:
    assert "c4nary" not in access_line(Logfmt(), path="/v1/models/sk-c4nary-5f2d")


# -- where the log goes ------------------------------------------------------------------------------------------------


def test_the_journal_adds_the_time_and_reads_priorities(tmp_path: Path) -> None:
    file = tmp_path / "stderr"
    with file.open("w") as stream:
        status = os.fstat(stream.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}", "FORCE_COLOR": "1"}
        for wanted in ("auto", "text", "logfmt", "json"):
            form = form_for(wanted, environ, stream.fileno())
            for level, mark in ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (10, "<7>")):
                lines = form.record(0.0, level, "proxy.x", "text", ["one", "two"]).splitlines()
                assert all(line.startswith(mark) for line in lines), wanted
                assert "1970" not in "".join(lines) and '"ts"' not in "".join(lines) and "\x1b" not in "".join(lines)
            assert access_line(form).startswith("<6>")
        elsewhere = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"}
        assert form_for("auto", elsewhere, stream.fileno()).record(0.0, 20, "x", "y", []).startswith("ts=1970")


def test_without_a_stderr_there_is_no_journal() -> None:
    assert not is_journal("1:2", None) and not is_journal("1:2", 10_000)


@pytest.mark.parametrize(
    ("environ", "terminal", "coloured"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm"}, False, False),
        ({"TERM": "dumb"}, True, False),
        ({}, True, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "0", "TERM": "xterm"}, True, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colours_are_for_terminals_and_as_customary(environ: dict[str, str], terminal: bool, coloured: bool) -> None:
    assert is_coloured(environ, terminal) == coloured


def test_a_terminal_gets_text_and_all_else_logfmt() -> None:
    ours, theirs = os.openpty()
    try:
        assert isinstance(form_for("auto", {"TERM": "xterm"}, theirs), Text)
        assert "\x1b[" in form_for("auto", {"TERM": "xterm"}, theirs).record(0.0, 20, "x", "y", [])
    finally:
        os.close(ours)
        os.close(theirs)
    assert isinstance(form_for("auto", {}, None), Logfmt)
    assert isinstance(form_for("json", {}, sys.__stdout__.fileno() if sys.__stdout__ else None), Json)
