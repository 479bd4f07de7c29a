"""The log: one order, nothing lost when the process ends, and no reader of it can hold up what is served."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from urllib.parse import quote

import orjson
import pytest

from llama_smart_proxy.proxy.log import EXIT_S, MOST_CHARACTERS, MOST_LINES, MOST_TRACED, Writer, shown
from tests.support import raw_client, toxic
from tests.support.e2e_support import Fakes, fakes
from tests.support.harness import ROOT, environment, running_proxy, until

__all__ = ["fakes"]  # fixtures
TIMEOUT_S = 200.0
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) +([\w.]+): (.*)")
PROGRAM = """
import logging, sys
from llama_smart_proxy.proxy import log
from llama_smart_proxy.proxy.chat import RequestRecord
log.configure("info", "text")
logger = logging.getLogger("llama_smart_proxy.proxy.serve")
def answered(number):
    record = RequestRecord(1.0, 1.001, {}, f"r-{number}", "POST", "/v1/chat/completions", "openai")
    record.model, record.backend, record.status = "m", "llama.cpp", 200
    record.first_byte_s, record.ended_s = 1.01, 1.0125
    log.access.line(record)
"""


ACCESS = "POST /v1/chat/completions 200 model=m backend=llama.cpp dialect=openai first=10ms total=12ms"


def started(program: str) -> subprocess.Popen[str]:
    """A process with a log, which then does what `program` says."""
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", PROGRAM + program]
    return subprocess.Popen(argv, cwd=ROOT, env=environment(), stdin=pipe, stderr=pipe, text=True)


def ran(program: str) -> tuple[int, list[str]]:
    """Its exit status and the lines it wrote."""
    with started(program) as process:
        _, said = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, said.splitlines()


def texts(lines: list[str]) -> list[tuple[str, str, str]]:
    """Level, name and text of each line."""
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), lines
    return [(found[1], found[2], found[3]) for found in matches if found]


def access(number: int) -> tuple[str, str, str]:
    return "INFO", "proxy.access", f"{ACCESS} r-{number}"


def test_lines_of_requests_and_other_records_are_in_one_order_under_short_names() -> None:
    status, lines = ran("""
answered(1)
answered(2)
logger.info("a %s", "record")
answered(3)
logger.warning("odd: %s", "\\ud800\\u00fc")
logging.getLogger("else.where").error("x")
logger.debug("not shown")
answered(4)
""")
    assert status == 0
    assert texts(lines) == [
        access(1),
        access(2),
        ("INFO", "proxy.serve", "a record"),
        access(3),
        ("WARNING", "proxy.serve", "odd: \\ud800ü"),
        ("ERROR", "else.where", "x"),
        access(4),
    ]


@pytest.mark.parametrize("status", [0, 1, 2])
def test_nothing_is_lost_at_an_exit(status: int) -> None:
    ended, lines = ran(f"[answered(number) for number in range(2000)]\nsys.exit({status})")
    assert ended == status
    assert texts(lines) == [access(number) for number in range(2000)]


def test_what_was_logged_stands_before_the_traceback_that_ends_the_process() -> None:
    status, lines = ran("answered(1)\nraise RuntimeError('the end')")
    assert status == 1
    assert texts(lines[:1]) == [access(1)]
    assert lines[1].startswith("Traceback") and lines[-1] == "RuntimeError: the end"


def test_a_traceback_in_the_log_stands_where_it_was_logged() -> None:
    _, lines = ran("""
answered(1)
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("failed")
answered(2)
""")
    assert texts([*lines[:2], lines[-1]]) == [access(1), ("ERROR", "proxy.serve", "failed"), access(2)]
    assert lines[2].startswith("  Traceback") and lines[-2] == "  ZeroDivisionError: division by zero"


def test_lines_of_requests_are_written_also_while_the_process_is_kept_busy() -> None:
    """And so a SIGKILL takes no more of them than have just been added."""
    with started("answered(1)\nsys.stdin.read()") as process:
        assert process.stderr is not None
        assert texts([process.stderr.readline().rstrip("\n")]) == [access(1)]
        process.kill()
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL


def test_at_warning_there_are_no_lines_of_requests() -> None:
    status, lines = ran('log.configure("warning", "text")\nanswered(1)\nlogger.info("x")\nlogger.warning("y")')
    assert (status, texts(lines)) == (0, [("WARNING", "proxy.serve", "y")])


def test_a_record_may_be_made_while_another_one_is() -> None:
    status, lines = ran("""
class Odd:
    def __str__(self):
        logger.info("within")
        return "odd"
logger.info("%s", Odd())
""")
    assert (status, [text for _, _, text in texts(lines)]) == (0, ["within", "odd"])


def test_a_reader_that_stops_holds_up_nobody_and_is_told_what_is_missing() -> None:
    reading, writing = os.pipe()
    writer = Writer(writing, "utf-8", lambda lost: f"WARNING proxy.log: {lost} lines could not be written\n")
    for number in range(2 * MOST_LINES):
        writer.hold(f"{number} {'x' * 100}\n")
        if number % 1000 == 0:
            writer.write()  # returns, though nobody reads
    with open(reading) as reader:
        lines: list[str] = []
        for line in reader:
            lines.append(line)
            if "lines could not be written" in line:
                break
    numbers = [int(line.split()[0]) for line in lines[:-1]]
    assert numbers == list(range(len(numbers))) and MOST_LINES <= len(numbers) < 2 * MOST_LINES
    assert f"WARNING proxy.log: {2 * MOST_LINES - len(numbers)} lines" in lines[-1]
    os.close(writing)


def test_a_process_whose_log_nobody_reads_ends_all_the_same() -> None:
    with started("[answered(number) for number in range(9000)]\nlogger.warning('x')") as process:
        assert process.wait(EXIT_S + TIMEOUT_S) == 0


def test_what_no_one_catches_is_a_record_too() -> None:
    _, lines = ran("""
import threading, warnings
class Odd:
    def __del__(self):
        raise ValueError("sk-c4nary-5f2d")
thread = threading.Thread(target=lambda: 1 / 0, name="mine")
thread.start()
thread.join()
Odd()
warnings.warn("odd")
""")
    found = texts([line for line in lines if not line.startswith("  ")])
    assert found[0] == ("ERROR", "proxy.log.beside", "the thread mine failed")
    assert found[1][:2] == ("ERROR", "proxy.log.beside") and found[1][2].startswith("an exception was ignored: ")
    assert found[2][:2] == ("WARNING", "py.warnings") and "UserWarning: odd" in found[2][2]
    assert "  ZeroDivisionError: division by zero" in lines and "  ValueError: ***" in lines


# -- what others have written ------------------------------------------------------------------------------------------

FORGED = "2026-01-01 00:00:00,000 INFO    proxy.serve: forged"
ODD = [
    *map(
        chr, [*range(0x20), *range(0x7F, 0xA0), *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070)]
    ),
    *("\u061c", "\u180e", "\ufeff", "\ufff9", "\U000e0001", "\ue000", "\ud800", "\udc9b", "\u0378"),
]
HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\x08\x7f\u202eevil\u2066\u200f\x85\u2028\u2029\r"


def test_characters_that_are_not_printable_are_escaped_and_all_others_stay() -> None:
    for character in ODD:
        line = shown(f"a{character}b")
        assert line.isprintable() and line.startswith("a\\") and line.endswith("b") and line.isascii()
    for text in ("plain", "Stra\u00dfe \u0434\u0430 \u4f60\u597d \u0634 \U0001f600", "back\\slash", ""):
        assert shown(text) == text


@pytest.mark.parametrize("length", [MOST_CHARACTERS, MOST_CHARACTERS + 1, 10**6])
def test_a_line_has_a_limit(length: int) -> None:
    assert len(shown("x" * length)) <= MOST_CHARACTERS + 30
    assert len(shown("\0" * length)) <= 4 * MOST_CHARACTERS + 30


def test_no_record_can_look_like_another_one() -> None:
    _, lines = ran(f"""
answered(1)
odd = {HOSTILE + chr(10) + FORGED!r}
logger.warning("odd: %s", odd)
try:
    raise ExceptionGroup(odd, [ValueError(odd + odd * 2000), RuntimeError("\\n".join([odd] * 2000))])
except Exception:
    logger.exception(odd)
answered(2)
""")
    own = [line for line in lines if not line.startswith("  ")]
    assert len(texts(own)) == 4 and FORGED not in own
    assert all(line.isprintable() for line in lines) and max(map(len, lines)) < 5 * MOST_CHARACTERS
    assert len(lines) <= MOST_TRACED + 10


def test_what_ends_the_process_is_printed_escaped() -> None:
    _, lines = ran(f"raise RuntimeError({HOSTILE!r})")
    assert lines[-1].startswith("RuntimeError: \\x1b") and all(line.isprintable() for line in lines)


RAISES = """
from llama_smart_proxy import Agent
class Raises(Agent):
    async def on_request(self, request, ctx):
        raise ValueError(request.last_user_text)
"""


async def test_names_texts_and_errors_of_others_reach_the_log_escaped(fakes: Fakes) -> None:
    text = f"{HOSTILE}\n{FORGED}"
    refusal = toxic.plain(orjson.dumps({"error": {"message": text, "type": text}}), 500)
    broken = toxic.stream(toxic.token("x"), toxic.event({"error": {"message": text}}))
    (fakes.folder / "raises.py").write_text(RAISES)
    file = fakes.folder / f"{HOSTILE}{FORGED}.gguf".replace("/", "")
    file.write_bytes(b"no GGUF file")
    gguf = fakes.folder / "\x1b[31m.gguf"
    gguf.symlink_to(fakes.model()["path"])
    models = {
        "far": {"model": "m", "agents": ["raises"]},
        "dies": fakes.model(EXIT="3@loaded", fields={"path": str(gguf)}),
    }
    async with toxic.raw_upstream() as upstream:
        config = fakes.config({**models, "none": fakes.model(fields={"path": str(file)})})
        config |= {"remotes": {"up": {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}}}
        config |= {"agents_dirs": [str(fakes.folder)]}
        async with running_proxy(config, clean_log=False) as proxy:
            for script in (refusal, broken, toxic.head(302, [("Location", f"http://{HOSTILE}/".replace("\r", ""))])):
                upstream.script = script
                for path in ("/v1/chat/completions", "/v1/messages", "/api/chat", "/v1/embeddings"):
                    for model in ("m", "far", "dies", "none", text):
                        body = {"model": model, "messages": [{"role": "user", "content": text}], "input": text}
                        await raw_client.post(proxy.port, path, {**body, "max_tokens": 9, "stream": True})
            for path in ("/v1/models/%1b%5b31m%0a", "/%E2%80%AE", f"/slots?model={quote(text)}", "/" + "x" * 12_000):
                await raw_client.get(proxy.port, path)
            await raw_client.post(proxy.port, "/api/pull", {"model": text})
            lines = proxy.log.splitlines()
    assert "agent raises failed" in proxy.log and "\\x1b[31m.gguf" in proxy.log
    assert all(line.isprintable() for line in lines), [line for line in lines if not line.isprintable()]
    assert not any(line.startswith(FORGED) for line in lines)
    assert max(map(len, lines)) < 5 * MOST_CHARACTERS


# -- the proxy ---------------------------------------------------------------------------------------------------------


async def test_sigterm_loses_no_line() -> None:
    async with running_proxy({}) as proxy:
        for _ in range(20):
            assert (await raw_client.get(proxy.port, "/health")).status == 200
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0
        await until(lambda: "stopped" in proxy.log, what="the last line")
    lines = texts(proxy.log.splitlines())
    asked = [number for number, (_, name, _) in enumerate(lines) if name == "proxy.access"]
    assert len(asked) == 20
    assert asked[-1] < lines.index(
        ("INFO", "proxy.serve", "SIGTERM: draining for up to 30 s; a second Ctrl-C or SIGTERM stops at once")
    )
