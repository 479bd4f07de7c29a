"""What the client of a stream gets while it waits: headers, signs of life, and status lines.

One timer serves all of them. A request whose answer begins within a second costs an entry in a dictionary.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web
from multidict import MultiMapping

from llama_smart_proxy.backends.base import Feature, Model
from llama_smart_proxy.backends.names import LONGEST_NAME
from llama_smart_proxy.backends.progress import Progress
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.chat.status import status_line
from llama_smart_proxy.proxy.config import ServerConfig
from llama_smart_proxy.proxy.dialects.base import ClientCodec, Dialect
from llama_smart_proxy.proxy.errors import ProxyError
from llama_smart_proxy.proxy.http.response import ResponseWriter
from llama_smart_proxy.proxy.stream.decoder import Progressed

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds from the beginning of a wait to the headers, and between two looks at what there is to send."""
SIGN_S = 4.0
"""Seconds between two signs of life."""
STATUS_S = 2.0
"""Seconds after which the same status line is sent again, with the time so far."""
THOUGHT_S = 5.0
"""Seconds between two status lines in the reasoning, where all of them stay."""
SLACK_S = 0.05
"""Looks that are due within so many seconds are taken together."""
KINDS = ("status", "notification", "source", "citation")
"""The kinds of events. Source: Open WebUI 0.12.4."""
_now = time.monotonic
_OPEN_WEBUI = "x-openwebui-"


class Waits:
    """The clients that wait for a stream, in the order in which they are looked at next."""

    def __init__(self, config: ServerConfig) -> None:
        self.stall_s = config.send_stall_s
        self.thinks = config.loading_status != "off"
        """Whether clients without events get status lines as reasoning."""
        self._early = config.early_headers
        self._events = config.status_events
        self._waiting: dict[Wait, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def count(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, wait: Wait) -> None:
        """Look at `wait` in a second, and every second from then on."""
        if self._early:
            wait.due_s = _now() + LOOK_S
            self._waiting[wait] = None
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def remove(self, wait: Wait) -> None:
        """Look at it no more."""
        self._waiting.pop(wait, None)

    def shows_events(self, headers: MultiMapping[str]) -> bool:
        """Whether the client with these headers shows events."""
        if self._events != "auto":
            return self._events == "on"
        for name in headers:
            if name[:12].lower() == _OPEN_WEBUI:
                return True
        client = headers.get("User-Agent", "")
        return client[:4] == "Open" and client[4:].lstrip(" -").startswith("WebUI")

    def _look(self) -> None:
        self._timer = None
        now = _now()
        for wait in list(self._waiting):
            if wait.due_s > now + SLACK_S:
                break
            del self._waiting[wait]
            try:
                again = wait.look(now)
            except Exception as exc:  # the fault of a backend's description must not silence all others
                logger.error("a client waits without signs of life: the description of its wait failed", exc_info=exc)
                continue
            if again:
                wait.due_s = now + LOOK_S
                self._waiting[wait] = None
        if self._waiting:
            soonest = next(iter(self._waiting)).due_s
            self._timer = asyncio.get_running_loop().call_later(max(soonest - _now(), 0), self._look)


class Wait:
    """One client, and its `response`, while it waits for a stream: from the arrival of its request to the first piece
    of the answer, and again when an agent reports by `status` what it waits for.

    `codec` is that of its endpoint, if that has one. A request for a whole answer has a `Wait` that is never started.
    `shows` is whether a model of that name may be named to the client.
    """

    due_s = 0.0
    """When it is looked at next, by `time.monotonic()`."""
    model = ""
    _events: bool | None = None  # whether the client shows events, once that was looked up
    _progress: Progress | None = None
    _said = ""  # by an agent
    _reading = ""  # how far the server has read the prompt
    _shown = ""  # the status line that the client shows
    _text = ""  # that, without the time
    _since_s = _sent_s = _thought_s = 0.0

    def __init__(
        self,
        waits: Waits,
        http: web.BaseRequest,
        dialect: Dialect,
        codec: ClientCodec | None,
        shows: Callable[[str], bool],
    ) -> None:
        self.response = ResponseWriter(http, waits.stall_s)
        self._waits = waits
        self._dialect = dialect
        self._codec = codec
        self._shows = shows
        self._held: list[bytes] = []  # events of agents before the headers

    def start(self, model: object) -> None:
        """The wait begins, for an answer of `model`, as the request names it."""
        self.model = model[:LONGEST_NAME] if isinstance(model, str) else ""
        self.response.on_begin = self._over
        self._waits.add(self)

    def end(self) -> None:
        """The request has ended, or is answered without a stream."""
        self.response.on_begin, self.response.ended = None, True
        self._waits.remove(self)

    async def fail(self, exc: ProxyError) -> web.StreamResponse:
        """End the stream with `exc` in place of an answer."""
        return await self.response.fail(exc, self._dialect)

    @property
    def shows_events(self) -> bool:
        """Whether the client shows events."""
        if self._events is None:
            shows = self._codec is not None and self._codec.has_events and self.response.on_begin is not None
            self._events = shows and self._waits.shows_events(self.response.http.headers)
        return self._events

    def asks(self) -> Progress | None:
        """From now on the request waits for the model: its progress, None if the client does not wait for a stream."""
        if self.response.on_begin is None:
            return None
        self._said = self._reading = ""
        self._progress = Progress(self._shows)
        return self._progress

    def asks_for_reports(self, model: Model, body: Json) -> Progressed | None:
        """Let `body` ask the server of `model` how far it has read the prompt, if the client is shown that. Returns
        what gets the reports; None if the server is not asked, or by the client itself."""
        if Feature.PROGRESS not in model.features or not self.shows_events or "return_progress" in body:
            return None
        body["return_progress"] = True
        return self._read

    def _read(self, report: Json) -> None:
        done, total = report.get("processed"), report.get("total")
        if isinstance(done, int) and isinstance(total, int) and 0 < done <= total:
            self._reading = f"Reading your prompt: {100 * done // total} %"

    def status(self, text: str) -> None:
        """From now on the client waits for `text`, which an agent says; empty if it does so no more."""
        if self.response.ended or self.response.on_begin is None:
            return
        self._said, self._reading = text, ""
        if self.response.begun and not self.response.waiting and text:
            self.response.waiting = True
            self._since_s = 0.0
            self._waits.add(self)

    async def event(self, kind: str, data: Json) -> int:
        """Send an event of an agent to a client that shows events, as soon as it has its headers. Returns its size in
        bytes. Raises: TypeError for data that JSON cannot express."""
        if self._codec is None or not self.shows_events or self.response.ended or self.response.on_begin is None:
            return 0
        frame = self._codec.event(kind, data)
        if not self.response.opened:
            self._held.append(frame)
        elif not self.response.feed(frame):
            await self.response.drained()
        return len(frame)

    def look(self, now: float) -> bool:
        """Send what is due. Returns whether to look again."""
        if self.response.ended:
            return False
        self._since_s = self._since_s or now - LOOK_S
        with suppress(ConnectionError):  # then its handler is being cancelled
            response = self.response
            if not response.opened:
                if not self._sign():
                    return False
                response.open(200, [("content-type", self._dialect.stream_type), ("cache-control", "no-cache")])
                self._flush()
            elif response.unread:
                return True
            if frame := self._due(now):
                self._sent_s = now
                response.feed(frame)
            return True
        return False

    def _due(self, now: float) -> bytes:
        waited_s = now - self._since_s
        quiet_s = now - self._sent_s + SLACK_S
        if self.shows_events:
            text = self._described(waited_s)
            if text != self._text:
                self._text = self._shown = text
                return self._status(text, done=False)
            if quiet_s < STATUS_S:
                return b""
            self._shown = f"{text} ({waited_s:.0f} s)"
            return self._status(self._shown, done=False)
        if self._waits.thinks and self._codec is not None and not self.response.begun:
            text = self._described(waited_s)
            if text != self._text and now - self._thought_s + SLACK_S >= THOUGHT_S:
                self._text, self._thought_s = text, now
                if thought := self._codec.thought(self.model, status_line(text)):
                    return thought
        return self._sign() if quiet_s >= SIGN_S else b""

    def _described(self, waited_s: float) -> str:
        """What the client waits for."""
        known = self._said or self._reading or (self._progress.text if self._progress is not None else "")
        text = " ".join(known.split()).encode(errors="replace").decode()  # agents may report half a character
        return text or f"Waiting for {self.model or 'the model'}, {waited_s:.0f} s"

    def _status(self, text: str, *, done: bool) -> bytes:
        assert self._codec is not None
        return self._codec.event("status", {"description": text, "done": done} | ({"hidden": True} if done else {}))

    def _sign(self) -> bytes:
        return self._codec.sign_of_life(self.model) if self._codec is not None else self._dialect.sign_of_life

    def _over(self) -> None:
        """The first piece follows at once."""
        self._waits.remove(self)
        if self._shown:
            self.response.feed(self._status(self._shown, done=True))
            self._shown = self._text = ""
        if self._held:
            self._flush()

    def _flush(self) -> None:
        for frame in self._held if self.response.opened else ():
            self.response.feed(frame)
        self._held.clear()
