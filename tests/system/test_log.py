"""The log: one order, nothing lost when the process ends, and no reader of it can hold up what is served."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from llama_smart_proxy.proxy.log import EXIT_S, MOST_LINES, _Writer
from tests.support import raw_client
from tests.support.harness import ROOT, environment, running_proxy, until

TIMEOUT_S = 60
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) +([\w.]+): (.*)")
PROGRAM = """
import logging, sys
from llama_smart_proxy.proxy import log
log.configure("info")
logger = logging.getLogger("llama_smart_proxy.proxy.serve")
def answered(number):
    log.access.line("POST", "/v1/chat/completions", 200, "m", 0.0125, f"r-{number}")
"""


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
    return "INFO", "proxy.access", f"POST /v1/chat/completions 200 model=m 12 ms r-{number}"


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
    assert lines[2].startswith("Traceback") and lines[-2] == "ZeroDivisionError: division by zero"


def test_lines_of_requests_are_written_also_while_the_process_is_kept_busy() -> None:
    """And so a SIGKILL takes no more of them than have just been added."""
    with started("answered(1)\nsys.stdin.read()") as process:
        assert process.stderr is not None
        assert texts([process.stderr.readline().rstrip("\n")]) == [access(1)]
        process.kill()
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL


def test_at_warning_there_are_no_lines_of_requests() -> None:
    status, lines = ran('log.configure("warning")\nanswered(1)\nlogger.info("x")\nlogger.warning("y")')
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
    writer = _Writer(writing, "utf-8")
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
