"""What failed, or was left, is let go at once: nothing large waits for the garbage collector."""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from llama_smart_proxy.proxy.http.memory import Memory, allocator_trim, resident_bytes
from tests.integration.test_front_server import Here, serving_here
from tests.support.harness import until
from tests.support.raw_client import BrokenAnswer, connected, post, request
from tests.support.toxic import EVENT_HEAD, Link, Request, Script, chunk, cut_short, plain, token

LARGE = 200_000
"""Bytes. What is smaller is no trouble."""
TEXT = "word " * LARGE
MIB = 2**20
WAYS = {
    "relayed": ("/v1/chat/completions", True),
    "translated": ("/api/chat", True),
    "relayed whole": ("/v1/chat/completions", False),
    "translated whole": ("/api/chat", False),
}


async def waits(link: Link, request: Request) -> None:
    await link.send(EVENT_HEAD + chunk(token("a")) + chunk(b"data: " + b"x" * 2 * MIB))
    await link.gone()


UPSTREAMS: dict[str, Script] = {
    "a frame too long": cut_short(EVENT_HEAD + chunk(token("a")) + chunk(b"data: " + b"x" * 9 * MIB), "close"),
    "a frame too long first": cut_short(EVENT_HEAD + chunk(b"data: " + b"x" * 9 * MIB), "close"),
    "a large error": cut_short(plain(b'{"error":"%b"}' % (b"x" * LARGE * 2), status=500), "close"),
    "cut short": cut_short(EVENT_HEAD + chunk(token("a")) + chunk(b"data: " + b"x" * 2 * MIB), "close"),
    "no JSON": cut_short(EVENT_HEAD + chunk(b"data: {%b\n\n" % (b"x" * 2 * MIB)), "close"),
    "a client that leaves": waits,
}
UPLOADS = {
    "no JSON": b'{"model":"m","messages":[{"role":"user","content":"%b"}]' % TEXT.encode(),
    "a key twice": b'{"model":"m","model":"m","x":"%b"}' % TEXT.encode(),
    "no such model": json.dumps({"model": "nobody", "messages": [{"role": "user", "content": TEXT}]}).encode(),
}


@pytest.fixture
async def here() -> AsyncIterator[Here]:
    async with serving_here(send_stall_s=30) as here:
        yield here


@contextmanager
def collector_off() -> Iterator[Callable[[], list[str]]]:
    """Yields what returns the large objects that only the collector would find."""

    def found() -> list[str]:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        held = {id(one): one for item in gc.garbage for one in gc.get_referents(item)}.values()
        large = [one for one in held if isinstance(one, bytes | bytearray | str) and len(one) > LARGE]
        gc.garbage.clear()
        return [f"{type(one).__name__} of {len(one)}: {one[:40]!r}" for one in large]

    gc.freeze()  # only what is made from here on is looked through
    gc.disable()
    try:
        yield found
    finally:
        gc.unfreeze()
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def over(here: Here) -> None:
    await until(lambda: not here.front.clients and here.upstream.open_links == 0, what="the end of the exchange")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("upstream", UPSTREAMS)
async def test_what_a_failed_answer_held_is_let_go(here: Here, upstream: str, way: str) -> None:
    path, stream = WAYS[way]
    here.upstream.script = UPSTREAMS[upstream]
    body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": TEXT}]}
    with collector_off() as large_garbage:
        async with connected(here.port) as client:
            await client.send(request("POST", path, body))
            if upstream != "a client that leaves":
                with suppress(BrokenAnswer):
                    await client.answer()
            else:
                await until(lambda: bool(here.upstream.requests))
            client.leave()
        await over(here)
        assert large_garbage() == []


@pytest.mark.parametrize("upload", UPLOADS)
async def test_an_upload_that_is_refused_is_let_go(here: Here, upload: str) -> None:
    with collector_off() as large_garbage:
        assert (await post(here.port, "/v1/chat/completions", UPLOADS[upload])).status >= 400
        await over(here)
        assert large_garbage() == []


@pytest.mark.skipif(allocator_trim() is None, reason="this allocator has no such call")
async def test_memory_that_is_free_is_given_back_when_nothing_is_answered() -> None:
    memory = Memory(allocator_trim())
    before = resident_bytes()
    used = [bytes(11_000) for _ in range(15_000)]
    left = used[::500]
    del used
    memory.check(idle=False)
    held = resident_bytes() - before
    assert held > 100 * MIB, "the allocator has given it back by itself: this test shows nothing"
    memory.check(idle=True)
    await until(lambda: resident_bytes() - before < held / 2, what="the memory given back")
    assert left


async def test_an_upload_whose_client_leaves_is_let_go(here: Here) -> None:
    with collector_off() as large_garbage:
        async with connected(here.port) as client:
            await client.send(request("POST", "/v1/chat/completions", {"model": "m", "x": TEXT})[: -LARGE // 2])
            await until(lambda: bool(here.front.clients))
            client.leave()
        await over(here)
        assert large_garbage() == []
