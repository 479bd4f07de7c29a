"""Usage per day, key and model, and the most recent requests, without anything of what they said.

Written behind: a request that has ended is appended to a list, and once a second the store's thread writes what is in
it. What cannot be written waits, within limits, and nothing of it is counted twice.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson

from llama_smart_proxy.backends.journal import Step, StepKind
from llama_smart_proxy.proxy.chat import Json, RequestRecord
from llama_smart_proxy.proxy.errors import Cancelled
from llama_smart_proxy.proxy.log.access import LEFT, OK, outcome
from llama_smart_proxy.proxy.store.schema import Row, Sql, Unavailable
from llama_smart_proxy.proxy.store.store import Store

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
"""How long a request that has ended waits to be written, which is what `kill -9` loses at most."""
NEWEST = 1000
"""Requests that stay in memory, also those that failed before their model was known."""
FLUSH_REQUESTS = 256
"""So many are written at once."""
MAX_NEW = 4096
"""Requests that may wait for the thread."""
MAX_WAITING = MAX_NEW
"""Recent requests, and lines of usage, that may wait for a database that cannot be used now."""
MAX_ENTRY = 3072
"""Bytes of one recent request; steps beyond that are left out."""
RETRY_S = 2.0
"""Seconds between two attempts to write what could not be written."""
MAX_STEPS = 100
"""Steps of one recent request."""
MAX_TEXT = 200
"""Characters of a path or a name."""
COLUMNS = ("day", "key", "model", "api")
"""What usage is counted by."""
COUNTS = ("requests", "errors", "prompt_tokens", "completion_tokens", "cached_tokens", "seconds")
NO_ERRORS = (OK, LEFT, Cancelled.code)
"""The outcomes of requests that are not counted as errors."""
_TIMES = ("resolved_s", "sent_s", "first_byte_s", "last_byte_s", "ended_s")
_ADD = (
    f"INSERT INTO usage ({', '.join((*COLUMNS, *COUNTS))}) VALUES ({', '.join('?' * 10)}) "
    f"ON CONFLICT ({', '.join(COLUMNS)}) DO UPDATE SET "
    + ", ".join(f"{name} = usage.{name} + excluded.{name}" for name in COUNTS)
)
_INSERT = "INSERT INTO requests (id, at_s, key, model, status, entry) VALUES (?, ?, ?, ?, ?, ?)"


@dataclass(slots=True)
class _Batch:
    """What is written in one transaction: counts to add, by what they are counted by, and recent requests."""

    usage: dict[tuple[str, str, str, str], list[float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.usage or self.rows)


class History:
    """Observes requests that use a model (`observe`), and answers what they were.

    At most `most` recent requests are kept, and usage for `days` days. `dropped` is how many requests could not be kept
    or counted.
    """

    def __init__(self, store: Store, *, most: int, days: int) -> None:
        self._store = store
        self._new: list[RequestRecord] = []
        self._newest: deque[RequestRecord] = deque(maxlen=NEWEST)
        self._next = _Batch()
        self._batch = _Batch()  # being written; it stays as it is until that is known to be done
        self._number = 1
        self._writer = secrets.token_hex(8)
        self._since_trim: int | None = None
        self._trimmed_day = ""
        self._retrying = False
        self.dropped = 0
        self.problem = ""
        """Why nothing can be written now."""
        self.configure(most=most, days=days)
        store.on_close = self._flush

    def configure(self, *, most: int, days: int) -> None:
        """Change the limits."""
        self._most, self._days = most, days

    @property
    def waiting(self) -> int:
        """Recent requests that are still to be written."""
        return len(self._new) + len(self._next.rows) + len(self._batch.rows)

    def status(self) -> Json:
        """How many requests wait and were lost, and why nothing can be written now, for operators."""
        problem = {"problem": self.problem} if self.problem else {}
        return {"waiting": self.waiting, "dropped": self.dropped, **problem}

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended, if it used a model or failed. Takes well under a microsecond."""
        if not record.resolved_s and record.status < 400:
            return
        new = self._new
        if len(new) >= MAX_NEW:
            self.dropped += 1
            return
        new.append(record)
        if len(new) == 1:
            self._wake(FLUSH_S)
        elif len(new) == FLUSH_REQUESTS:
            self._wake(0.0)

    def _wake(self, delay_s: float) -> None:
        try:
            self._store.submit(self._flush, delay_s)
        except RuntimeError:  # the system has no more threads now
            self.dropped += len(self._new)
            self._new.clear()

    # -- what is asked -------------------------------------------------------------------------------------------------

    async def usage(self, by: Sequence[str], since: str = "", until: str = "") -> list[Json]:
        """The sums of usage by these of `COLUMNS`, from the day `since` to the day `until` (YYYY-MM-DD, empty for no
        limit). Raises: `Unavailable`."""
        columns = ", ".join(name for name in COLUMNS if name in by)
        sums = ", ".join(f"sum({name})" for name in COUNTS)
        query = f"SELECT {f'{columns}, ' if columns else ''}{sums} FROM usage WHERE day >= ? AND day <= ?"
        query += f" GROUP BY {columns} ORDER BY {columns}" if columns else ""
        rows = await self._read(lambda sql: sql.execute(query, (since, until or "~")))
        names = [*(name for name in COLUMNS if name in by), *COUNTS]
        found = [dict(zip(names, row, strict=True)) for row in rows if row[-1] is not None]
        return [{**line, **{name: _number(line[name]) for name in COUNTS}} for line in found]

    async def requests(
        self, *, limit: int = 100, request_id: str = "", model: str = "", key: str = "", status: str = ""
    ) -> list[Json]:
        """The most recent requests, newest first, with this id, model, key or status (`404`, `4xx`). Raises:
        `Unavailable`."""
        wanted: list[tuple[str, Any]] = []
        for column, value in (("id", request_id), ("model", model), ("key", key)):
            if value:
                wanted.append((f"{column} = ?", value))
        if status:
            least = int(status[0]) * 100 if status.endswith("xx") else int(status)
            wanted += [("status >= ?", least), ("status <= ?", least + 99 if status.endswith("xx") else least)]
        where = f" WHERE {' AND '.join(condition for condition, _ in wanted)}" if wanted else ""
        query = f"SELECT entry FROM requests{where} ORDER BY serial DESC LIMIT ?"
        values = [*(value for _, value in wanted), limit]
        rows = await self._read(lambda sql: sql.execute(query, values))
        return [orjson.loads(entry) for (entry,) in rows]

    async def find(self, request_id: str) -> RequestRecord | None:
        """The newest request with this id, as clients choose ids; None if there is none, or not any more."""
        for records in (list(self._new), list(self._newest)):
            for record in reversed(records):
                if record.request_id == request_id:
                    return record
        with suppress(Unavailable):
            return next(map(record_of, await self.requests(request_id=request_id, limit=1)), None)
        return None

    async def _read(self, work: Callable[[Sql], list[Row]]) -> list[Row]:
        self._store.submit(self._flush)  # what has ended just now is a part of it
        return await self._store.run(work)

    # -- in the store's thread -----------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Write what there is."""
        self._take()
        while self._batch or self._next:
            if not self._batch:
                self._batch, self._next = self._next, _Batch()
            batch = self._batch
            try:
                self._store.do(self._write, essential=False)
            except Unavailable as exc:
                self._retry_later(exc)
                return
            except Exception as exc:
                logger.error("%d recent requests, and their usage, cannot be stored", len(batch.rows), exc_info=exc)
                self.dropped += len(batch.rows)
            self.problem = ""
            self._number += 1
            self._batch = _Batch()
        if self._new:
            self._wake(FLUSH_S)

    def _retry_later(self, exc: Unavailable) -> None:
        if not self.problem:
            logger.warning("usage and recent requests cannot be written, and are kept for a while: %s", exc)
        self.problem = str(exc)
        if not self._retrying:
            self._retrying = True
            self._store.submit(self._retry, RETRY_S)

    def _retry(self) -> None:
        self._retrying = False
        self._flush()

    def _take(self) -> None:
        """Move the new requests into the next batch. Their counts are parsed here, if they were not before."""
        count = len(self._new)
        records = self._new[:count]
        self._newest.extend(records)
        del self._new[:count]
        since_1970 = time.time() - time.monotonic()
        batch = self._next
        for record in records:
            usage = _counted(record)  # which gives up the end of the answer, and of a short one all of it
            if record.slot:
                try:
                    self._add(record, since_1970 + record.arrived_s, usage)
                except Exception as exc:
                    logger.error("the request %s cannot be stored", record.request_id, exc_info=exc)
                    self.dropped += 1
        if (excess := len(batch.rows) - MAX_WAITING) > 0:
            self.dropped += excess
            del batch.rows[:excess]

    def _add(self, record: RequestRecord, at_s: float, usage: tuple[int, int, int]) -> None:
        batch, model, how = self._next, record.model[:MAX_TEXT], outcome(record)
        if self._most:
            entry = _entry(record, at_s, model, how, usage)
            batch.rows.append((record.request_id, at_s, record.client, model, record.status, entry))
        line = (_day(int(at_s) // 900), record.client, model, record.api)
        sums = batch.usage.get(line)
        if sums is None and len(batch.usage) < MAX_WAITING:
            sums = batch.usage[line] = [0, 0, 0, 0, 0, 0.0]
        if sums is not None:
            sums[0] += 1
            sums[1] += how not in NO_ERRORS
            sums[2] += usage[0]
            sums[3] += usage[1]
            sums[4] += usage[2]
            sums[5] += record.ended_s - record.arrived_s

    def _write(self, sql: Sql) -> None:
        batch = self._batch
        done = sql.execute("SELECT number FROM batches WHERE writer = ?", (self._writer,))
        if done and done[0][0] >= self._number:
            return  # it was committed, although the connection was lost before that was known
        # sorted: of two proxies that lock the same lines in different orders, Postgres fails one
        sql.many(_ADD, [(*line, *counts) for line, counts in sorted(batch.usage.items())])
        sql.many(_INSERT, batch.rows)
        sql.execute(
            "INSERT INTO batches (writer, number, at_s) VALUES (?, ?, ?) "
            "ON CONFLICT (writer) DO UPDATE SET number = excluded.number, at_s = excluded.at_s",
            (self._writer, self._number, time.time()),
        )
        self._trim(sql, len(batch.rows))

    def _trim(self, sql: Sql, added: int) -> None:
        """Remove what is too old: requests by the hundred, usage once a day."""
        if self._since_trim is None or self._since_trim + added > max(100, self._most // 20):
            self._since_trim = 0
            newest = "SELECT coalesce(max(serial), 0) FROM requests"
            sql.execute(f"DELETE FROM requests WHERE serial <= ({newest}) - ?", (self._most,))
        self._since_trim += added
        now = time.time()
        today, oldest = (time.strftime("%Y-%m-%d", time.localtime(now - days * 86400)) for days in (0, self._days))
        if today != self._trimmed_day:
            self._trimmed_day = today
            sql.execute("DELETE FROM usage WHERE day < ?", (oldest,))
            sql.execute("DELETE FROM batches WHERE at_s < ?", (now - 7 * 86400,))


def _counted(record: RequestRecord) -> tuple[int, int, int]:
    """Tokens of the prompt, of the answer, and those of the prompt that were cached; 0 where they are not known."""
    usage = record.usage or {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return _tokens(prompt), _tokens(completion), _tokens(record.cached_tokens)


def _tokens(count: object) -> int:
    return int(count) if isinstance(count, int | float) and 0 <= count < 2**53 else 0


def _number(value: Any) -> float | int:
    """Postgres sums up to its own kind of number."""
    number = float(value)
    return int(number) if number.is_integer() else round(number, 3)


@lru_cache(maxsize=4)
def _day(quarter: int) -> str:
    """The local day of this quarter of an hour since 1970, which begins with one in every time zone."""
    return time.strftime("%Y-%m-%d", time.localtime(quarter * 900))


def _entry(record: RequestRecord, at_s: float, model: str, how: str, usage: tuple[int, int, int]) -> bytes:
    """One recent request as JSON: `at` in seconds since 1970, all other times in seconds since then."""
    began_s = record.arrived_s
    entry: Json = {
        "id": record.request_id,
        "at": int(at_s * 1e3) / 1e3,
        "method": record.method,
        "path": record.path[:MAX_TEXT].encode("ascii", "replace").decode(),
        "api": record.api,
        "key": record.client,
        "model": model,
        "backend": record.backend,
        "agents": [name[:MAX_TEXT] for name in record.agents[:20]] if record.agents else (),
        "status": record.status,
        "outcome": how[:MAX_TEXT],
        "prompt_tokens": usage[0],
        "completion_tokens": usage[1],
        "cached_tokens": usage[2],
        "resolved_s": _after(record.resolved_s, began_s),
        "sent_s": _after(record.sent_s, began_s),
        "first_byte_s": _after(record.first_byte_s, began_s),
        "last_byte_s": _after(record.last_byte_s, began_s),
        "ended_s": _after(record.ended_s, began_s),
        "steps": (),
    }
    if not record.steps:
        return orjson.dumps(entry)
    entry["steps"] = steps = [_step(step, record) for step in record.steps[:MAX_STEPS]]
    data = orjson.dumps(entry, default=str)
    while steps and len(data) > MAX_ENTRY:
        del steps[len(steps) // 2 :]
        data = orjson.dumps({**entry, "cut": True}, default=str)
    return data


def _after(time_s: float, began_s: float) -> float | None:
    return int((time_s - began_s) * 1e6) / 1e6 if time_s else None  # `round` takes a microsecond


def record_of(entry: Json) -> RequestRecord:
    """The record of a recent request, with times of a clock at which it arrived in its first second."""
    record = RequestRecord(1.0, request_id=entry["id"])
    record.client = entry["key"]
    for name in ("method", "path", "api", "model", "backend", "agents", "status"):
        setattr(record, name, entry[name])
    for name in _TIMES:
        setattr(record, name, 1.0 + entry[name] if entry[name] is not None else 0.0)
    record.error = "" if entry["outcome"] in (OK, LEFT) else entry["outcome"]
    record.cancelled = record.error == Cancelled.code
    record.counted = {name: entry[name] for name in ("prompt_tokens", "completion_tokens")}
    record.counted["prompt_tokens_details"] = {"cached_tokens": entry["cached_tokens"]}
    for step in entry["steps"]:
        kind, began_s, ended_s, detail = step.pop("kind"), step.pop("began_s"), step.pop("ended_s"), step
        record.note(StepKind(kind), 1.0 + began_s, 1.0 + ended_s, **detail)
    return record


def _step(step: Step, record: RequestRecord) -> Json:
    began_s, ended_s = (round(time_s - record.arrived_s, 6) for time_s in (step.began_s, step.ended_s))
    return {"kind": str(step.kind), "began_s": began_s, "ended_s": ended_s, **step.detail}
