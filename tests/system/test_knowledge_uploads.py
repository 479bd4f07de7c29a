"""Uploads to the knowledge base: written while they arrive, within limits, and never left behind half."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import Proxy, session_proxy, until
from tests.support.knowledge import ADMIN, KEYS, asked, files_below, knowing
from tests.support.raw_client import Answer, RawClient, ask, connected

MIB = 2**20
HEAD = (
    "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    "Content-Type: multipart/form-data; boundary=b\r\n{more}\r\n\r\n"
)
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nassistants\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n'
END = b"\r\n--b--\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def known(folder: Path) -> Iterator[Proxy]:
    settings = knowing(folder, server={"api_keys": KEYS})
    settings["knowledge"]["max_file_mib"] = 64
    with session_proxy(settings) as proxy:
        yield proxy


def kept(folder: Path) -> list[Path]:
    """Contents of documents, and what is left of uploads."""
    return files_below(folder / "state" / "knowledge")


def head(more: str) -> bytes:
    return HEAD.format(key=ADMIN, more=more).encode()


async def posted(port: int, body: bytes, kind: str = "multipart/form-data; boundary=b", more: str = "") -> Answer:
    raw = head(f"Content-Length: {len(body)}\r\nConnection: close{more}")
    return await ask(port, raw.replace(b"multipart/form-data; boundary=b", kind.encode(), 1) + body)


async def begun(client: RawClient, body: bytes, more: str) -> None:
    await client.send(head(more) + body)


async def test_an_upload_takes_the_memory_of_a_few_pieces(known: Proxy, folder: Path) -> None:
    size, piece = 48 * MIB, bytes(range(256)) * 1024
    body_size = len(PURPOSE) + len(FILE % b"big") + size + len(END)
    await posted(known.port, PURPOSE + FILE % b"small" + b"x" * MIB + END)  # threads and the like have their memory
    before = known.peak_rss_bytes()
    async with connected(known.port) as client:
        await begun(client, PURPOSE + FILE % b"big", f"Content-Length: {body_size}")
        for _ in range(size // len(piece)):
            await client.send(piece)
        await client.send(END)
        answer = await client.answer()
    assert answer.status == 200 and answer.json()["bytes"] == size
    assert known.peak_rss_bytes() - before < size / 2
    content = await asked(known, "GET", f"/v1/files/{answer.json()['id']}/content")
    assert content.body == piece * (size // len(piece))


@pytest.mark.parametrize("more", ["Content-Length: 30000000", "Transfer-Encoding: chunked"])
async def test_an_upload_whose_client_leaves_is_not_kept(known: Proxy, folder: Path, more: str) -> None:
    before = kept(folder)
    part = PURPOSE + FILE % b"half" + b"x" * (3 * MIB)
    async with connected(known.port) as client:
        await begun(client, part if "Length" in more else b"%x\r\n%b\r\n" % (len(part), part), more)
        await until(lambda: len(kept(folder)) > len(before), what="the file of the upload")
    await until(lambda: kept(folder) == before, what="its removal")


async def test_a_put_whose_client_leaves_is_not_kept(known: Proxy, folder: Path) -> None:
    made = await asked(known, "POST", "/v1/vector_stores", {"name": "puts"})
    assert made.status == 200
    before = kept(folder)
    async with connected(known.port) as client:
        line = "PUT /knowledge/puts?source=/a/b.md HTTP/1.1\r\nHost: localhost\r\n"
        more = f"Authorization: Bearer {ADMIN}\r\nContent-Length: 30000000\r\n\r\n"
        await client.send(f"{line}{more}".encode() + b"x" * (3 * MIB))
        await until(lambda: len(kept(folder)) > len(before), what="the file of the upload")
    await until(lambda: kept(folder) == before, what="its removal")


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (PURPOSE + b"--b--\r\n", 400, "no file"),
        (FILE % b"a" + b"x" + END, 400, "no purpose"),
        (PURPOSE + FILE % b"a" + b"x", 400, "not complete"),
        (PURPOSE + FILE % b"a" + b"x\r\n" + FILE % b"b" + b"y" + END, 400, "one file"),
        (PURPOSE + (FILE % b"a").replace(b'"file"', b'"image"') + b"x" + END, 400, "one file"),
        (PURPOSE.replace(b"assistants", b"x" * 100_000) + FILE % b"a" + END, 413, "too long"),
        (PURPOSE.replace(b'"purpose"', b'"expires_after[anchor]"') + PURPOSE + FILE % b"a" + END, 400, "not supported"),
        (PURPOSE * 1001 + FILE % b"a" + END, 413, "fields"),
        (b"x" * (3 * MIB) + b"\r\n" + PURPOSE + FILE % b"a" + END, 413, "besides its file"),
        (PURPOSE + FILE % b"a" + b"x" * (65 * MIB) + END, 413, "knowledge.max_file_mib"),
        (b"\x00\xff" * 1000, 400, "not complete"),
        (b"", 400, "not complete"),
    ],
)
async def test_what_is_no_form_with_one_file_is_refused_and_leaves_nothing(
    known: Proxy, folder: Path, body: bytes, status: int, text: str
) -> None:
    before = kept(folder)
    answer = await posted(known.port, body)
    assert (answer.status, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    assert text in answer.json()["error"]["message"]
    assert kept(folder) == before


@pytest.mark.parametrize(
    ("kind", "more", "status"),
    [
        ("application/json", "", 400),
        ("multipart/form-data", "", 400),
        ("multipart/mixed; boundary=b", "", 400),
        ("multipart/form-data; boundary=b", "\r\nContent-Encoding: gzip", 415),
    ],
)
async def test_other_kinds_of_bodies_are_refused(known: Proxy, kind: str, more: str, status: int) -> None:
    assert (await posted(known.port, PURPOSE + FILE % b"a" + b"x" + END, kind, more)).status == status


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"../../../../etc/cron.d/x", "x"),
        (b"C:\\\\windows\\\\system32\\\\x.md", "x.md"),
        (b"..", "unnamed"),
        (b"", "unnamed"),
        (b"a\x00b.md", "ab.md"),
        ("ü文.md".encode(), "ü文.md"),
        (b"x" * 5000 + b".md", "x" * 252 + ".md"),
    ],
)
async def test_no_name_of_a_file_leads_out_of_the_folder(known: Proxy, folder: Path, name: bytes, shown: str) -> None:
    before = files_below(folder)
    answer = await posted(known.port, PURPOSE + FILE % name + name + b"." + END)
    assert (answer.status, answer.json()["filename"]) == (200, shown)
    new = set(files_below(folder)) - set(before)
    assert all(file.is_relative_to(folder / "state") for file in new)
    assert not any(file.name in (shown, "x") for file in new)  # no name of a client is one on the disk


async def test_uploads_of_several_clients_are_whole(known: Proxy) -> None:
    async def one(number: int) -> bool:
        data = bytes([number]) * (2 * MIB + number)
        made = (await posted(known.port, PURPOSE + FILE % b"n" + data + END)).json()
        content = await asked(known, "GET", f"/v1/files/{made['id']}/content")
        return content.body == data

    assert all(await asyncio.gather(*map(one, range(8))))


async def test_what_is_deleted_leaves_nothing_on_the_disk(known: Proxy, folder: Path) -> None:
    before = kept(folder)
    ids = [(await posted(known.port, PURPOSE + FILE % b"n" + b"the same" + END)).json()["id"] for _ in range(2)]
    for place, file in enumerate(ids):
        answer = await asked(known, "DELETE", f"/v1/files/{file}")
        assert answer.json()["deleted"] is True
        other = (await asked(known, "GET", f"/v1/files/{ids[1]}/content")).body
        assert (other == b"the same") is (place == 0)
    assert kept(folder) == before
