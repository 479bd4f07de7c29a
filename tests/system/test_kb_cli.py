"""The command `kb` against a running proxy: what it sends, what it leaves out, and what it prints."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from llama_smart_proxy.proxy.cli.main import main
from tests.support.harness import ROOT, Proxy, environment, free_port, running_proxy, until
from tests.support.knowledge import ADMIN, ANN, CATS, PUMPS, asked, client_of


class Kb:
    """Runs `kb` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.err = ""

    def __call__(self, *words: str, status: int = 0) -> str:
        found = main(["kb", *words])
        out, self.err = self._capsys.readouterr()
        assert found == status, (out, self.err)
        return out

    def json(self, *words: str, status: int = 0) -> Any:
        return json.loads(self(*words, "--json", status=status))


@pytest.fixture
def kb(known: Proxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Kb:
    monkeypatch.setenv("LSP_URL", known.url)
    monkeypatch.setenv("LSP_API_KEY", ADMIN)
    return Kb(capsys)


def started(argv: list[str], proxy: Proxy, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    env = environment({"LSP_URL": proxy.url, "LSP_API_KEY": ADMIN})
    return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=stderr)


def tree(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_md", ".md")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_folder_is_added_searched_listed_and_removed(kb: Kb, tmp_path: Path) -> None:
    tree(tmp_path, pump_md=PUMPS, animals__cats_md=CATS)
    assert kb("add", str(tmp_path), "--collection", "a") == "2 added, 0 changed, 0 unchanged, 0 not readable\n"
    first, *_ = kb("search", "seven seconds red button", "--collection", "a").splitlines()
    assert first.startswith(f"1. {tmp_path}/pump.md (")
    assert len(kb.json("search", "red button", "--collection", "a", "--limit", "1")["data"]) == 1
    rows = [re.split(r"\s{2,}", line) for line in kb("list", "a").splitlines()]
    assert rows[0][:3] == ["NAME", "STATUS", "PIECES"]
    assert {(row[0], row[1], row[-1]) for row in rows[1:]} == {
        ("pump.md", "completed", f"{tmp_path}/pump.md"),
        ("cats.md", "completed", f"{tmp_path}/animals/cats.md"),
    }
    assert kb("rm", "a", "cats.md") == "cats.md: removed\n"
    assert [json.loads(line)["name"] for line in kb("list", "a", "--json").splitlines()] == ["pump.md"]
    assert "a" in [store["name"] for store in kb.json("list")]
    assert kb("rm", "a") == "a: removed\n"
    assert "a" not in [store["name"] for store in kb.json("list")]
    kb("search", "x", "--collection", "a", status=1)
    assert kb.err.count("\n") == 1 and "'a'" in kb.err


async def test_what_has_not_changed_is_not_sent_again(kb: Kb, known: Proxy, tmp_path: Path) -> None:
    tree(tmp_path, **{f"n{number}_md": f"Number {number}." for number in range(20)})
    assert kb.json("add", str(tmp_path), "--collection", "b")["added"] == 20
    (tmp_path / "n3.md").write_text("Number three.")
    (tmp_path / "new.md").write_text("New.")
    answer = kb.json("add", str(tmp_path), "--collection", "b")
    assert answer == {"added": 1, "changed": 1, "unchanged": 19, "unreadable": {}, "complete": True}
    [collection] = [store["id"] for store in kb.json("list") if store["name"] == "b"]
    await until(lambda: f"GET /knowledge/{collection}" in known.log.rpartition("PUT")[2], what="the end of the log")
    assert known.log.count(f"PUT /knowledge/{collection}") == 22
    assert "Number three." in json.dumps(kb.json("search", "three", "--collection", "b"))
    assert len(kb("list", "b", "--json").splitlines()) == 21


def test_each_file_that_cannot_be_read_is_named_with_its_reason_and_stops_nothing(kb: Kb, tmp_path: Path) -> None:
    tree(tmp_path, a_md="Good.", z_md="Good, too.")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7\nnothing")
    (tmp_path / "large.txt").write_bytes(b"x" * (2**20 + 1))
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(2**33)
    (tmp_path / "na\nme.md").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere")
    answer = kb.json("add", str(tmp_path), str(tmp_path / "missing.md"), "--collection", "c", status=1)
    assert (answer["added"], answer["complete"]) == (3, True)
    reasons = {source.removeprefix(f"{tmp_path}/"): reason for source, reason in answer["unreadable"].items()}
    assert reasons.keys() == {"broken.pdf", "large.txt", "huge.txt", "na\nme.md", "pipe", "gone.md", "missing.md"}
    assert "knowledge.max_file_mib" in reasons["large.txt"] and reasons["huge.txt"] == reasons["large.txt"]
    assert reasons["pipe"] == "it is no file"
    assert reasons["missing.md"] == reasons["gone.md"] == "No such file or directory"
    assert reasons["broken.pdf"]
    out = kb("add", str(tmp_path), "--collection", "c", status=1)
    assert f"{tmp_path}/large.txt: the file is larger than 1 MiB" in out
    assert out.endswith("0 added, 1 changed, 2 unchanged, 6 not readable\n"), "what cannot be read is tried again"
    assert reasons["broken.pdf"] in kb("list", "c")


async def test_what_was_stopped_by_ctrl_c_is_continued_by_the_same_command(
    kb: Kb, known: Proxy, known_folder: Path, tmp_path: Path
) -> None:
    tree(tmp_path, **{f"n{number:03}_md": f"Number {number}." for number in range(60)})
    (known_folder / "gate").touch()  # nothing is embedded for now
    argv = [sys.executable, "-m", "llama_smart_proxy", "kb", "add", str(tmp_path), "--collection", "d"]
    process = started(argv, known)

    async def some_are_sent() -> bool:
        answer = await asked(known, "GET", "/knowledge/d")
        return answer.status == 200 and answer.body.count(b"\n") >= 10

    try:
        await until(some_are_sent)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        process.kill()
        (known_folder / "gate").unlink()
    assert (process.returncode, out) == (130, b"") and b"run the same command to continue" in err
    answer = kb.json("add", str(tmp_path), "--collection", "d")
    assert answer["unchanged"] >= 10 and answer["added"] + answer["unchanged"] == 60
    documents = [json.loads(line) for line in kb("list", "d", "--json").splitlines()]
    assert len(documents) == 60 and {document["status"] for document in documents} == {"completed"}


async def test_a_terminal_shows_a_bar(known: Proxy, tmp_path: Path) -> None:
    tree(tmp_path, **{f"n{number}_md": f"Number {number}." for number in range(3)})
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = started([sys.executable, "-m", "llama_smart_proxy", "kb", "add", str(tmp_path)], known, stderr=theirs)
    try:
        out, _ = await asyncio.to_thread(process.communicate)
        shown = os.read(ours, 100_000)
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    assert process.returncode == 0 and out.startswith(b"3 added")
    assert b"adding: 100%" in shown and b"3/3" in shown


async def test_what_documents_wait_for_is_printed(tmp_path: Path) -> None:
    config = {
        "remotes": {"gone": {"url": f"http://127.0.0.1:{free_port()}", "models": ["words"]}},
        "knowledge": {"embedding_model": "words"},
        "state_dir": str(tmp_path / "state"),
    }
    tree(tmp_path, a_md="Good.")
    async with running_proxy(config) as proxy:
        process = started([sys.executable, "-m", "llama_smart_proxy", "kb", "add", str(tmp_path / "a.md")], proxy)
        try:
            assert process.stderr is not None
            line = await asyncio.to_thread(process.stderr.readline)
            assert line.startswith(b"reading waits: ") and b"cannot connect to" in line
            process.send_signal(signal.SIGINT)
            await asyncio.to_thread(process.communicate)
        finally:
            process.kill()
        assert process.returncode == 130


def test_no_wait_returns_while_documents_are_read(kb: Kb, known_folder: Path, tmp_path: Path) -> None:
    tree(tmp_path, a_md="Good.")
    (known_folder / "gate").touch()
    try:
        out = kb("add", str(tmp_path), "--collection", "e", "--no-wait")
        assert out == "1 added, 0 changed, 0 unchanged, 0 not readable; they are being read now\n"
        assert json.loads(kb("list", "e", "--json"))["status"] == "in_progress"
    finally:
        (known_folder / "gate").unlink()
    assert kb.json("add", str(tmp_path), "--collection", "e")["unchanged"] == 1
    assert json.loads(kb("list", "e", "--json"))["status"] == "completed"


def test_another_key_adds_to_its_own_collections_alone(
    kb: Kb, known: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, a_md=PUMPS)
    kb("add", str(tmp_path), "--collection", "f")
    monkeypatch.setenv("LSP_API_KEY", ANN)
    kb("add", str(tmp_path), "--collection", "f", status=4)
    assert json.loads(kb("list", "f", "--json"))["source"] == ""  # a path shows the operator's machine
    assert "1. a.md (" in kb("search", "red button", "--collection", "f")
    assert kb.json("add", str(tmp_path), "--collection", "mine")["added"] == 1
    with client_of(known, ANN) as ann:
        assert "mine" in [store.name for store in ann.vector_stores.list()]
    kb("rm", "f", status=4)
    assert kb("rm", "mine", "a.md") == "a.md: removed\n"


def test_questions_are_counted_by_the_rank_of_their_document(kb: Kb, tmp_path: Path) -> None:
    tree(tmp_path / "docs", pump_md=PUMPS, cats_md=CATS)
    kb("add", str(tmp_path / "docs"), "--collection", "g")
    lines = [
        {"question": "how long to hold the red button", "document": "pump.md", "answer": "seven  SECONDS"},
        {"question": "when does a cat hunt", "document": "cats.md"},
        {"question": "how much does the pump weigh", "document": "cats.md", "answer": "twelve"},
        {"question": "who won the match"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    measured = kb.json("eval", str(file), "--collection", "g")
    assert measured["questions"] == 4
    assert measured["hit@1"] == measured["hit@10"] == measured["mrr"] == pytest.approx(2 / 3, abs=1e-4)
    assert measured["confidence_found"] > measured["confidence_missed"]
    assert "mrr" in kb("eval", str(file), "--collection", "g")


class Site(BaseHTTPRequestHandler):
    """A web server with one page, whose text can be changed."""

    text: ClassVar[str] = "The first edition of the almanac."

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/page" else 404)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, *args: object) -> None:
        pass


def test_a_page_is_fetched_by_the_proxy_and_added_again_when_it_has_changed(
    kb: Kb, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        try:
            page, gone = (f"http://127.0.0.1:{site.server_port}/{name}" for name in ("page", "gone"))
            answer = kb.json("add", page, gone, "http://10.0.0.1/", "--collection", "pages", status=1)
            assert answer["added"] == 1
            assert answer["unreadable"].keys() == {gone, "http://10.0.0.1/"}
            assert answer["unreadable"][gone] == "the page cannot be fetched: its server answered 404"
            assert "its address is not a public one" in answer["unreadable"]["http://10.0.0.1/"]
            assert kb("search", "almanac", "--collection", "pages").startswith(f"1. {page} (")
            assert kb.json("add", page, "--collection", "pages")["unchanged"] == 1
            Site.text = "The second edition of the almanac."
            assert kb.json("add", page, "--collection", "pages")["changed"] == 1
            assert "second edition" in kb("search", "almanac", "--collection", "pages")
            monkeypatch.setenv("LSP_API_KEY", ANN)  # private hosts are for administrators
            refused = kb.json("add", page, "--collection", "own", status=1)["unreadable"]
            assert refused.keys() == {page} and "is not fetched from" in refused[page]
        finally:
            site.shutdown()


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["rm", "none"], 1, "'none'"),
        (["rm", "none", "document"], 1, "'none'"),
        (["list", "none"], 1, "'none'"),
        (["search", "x", "--collection", "none"], 1, "'none'"),
        (["search", "", "--collection", "none"], 1, "query must be"),
        (["add", "/nowhere", "--collection", "a/b"], 2, "a/b: no path can have this name"),
        (["add", "/nowhere", "--collection", ""], 2, "the name is empty"),
        (["rm", ""], 2, "the name is empty"),
        (["rm", "none", ""], 2, "the name is empty"),
        (["eval", "/nowhere.jsonl"], 2, "/nowhere.jsonl: No such file"),
        (["add", "/nowhere", "--url", "127.0.0.1:1"], 3, "no proxy is running at"),
        (["add", "/nowhere", "--key", "wrong"], 4, "is not accepted"),
    ],
)
def test_a_command_that_fails_has_one_line_of_reason_and_its_status(
    kb: Kb, words: list[str], status: int, text: str
) -> None:
    assert kb(*words, status=status) == "" and text in kb.err and kb.err.count("\n") == 1
