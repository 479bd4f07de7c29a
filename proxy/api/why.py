"""Why a request took as long as it did: as sentences, and as figures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from aiohttp import web

from llama_smart_proxy.backends.journal import Step, StepKind
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.chat import Json, RequestRecord
from llama_smart_proxy.proxy.errors import BadRequest, Cancelled
from llama_smart_proxy.proxy.http.headers import PARAMS, RECORD, shown_path
from llama_smart_proxy.proxy.log.access import LEFT, OK, outcome

UNDER_WAY = "under way"
SHORTEST_S = 0.001
"""Seconds below which a part of a request is not mentioned."""


async def why(http: web.BaseRequest) -> web.Response:
    """`GET /admin/why/{id}`: what the request with this `X-Request-Id` waited for and did, under way or one of the last
    ones; see `explained`. Of several with the same id, it is the newest.

    Raises: BadRequest 404.
    """
    request_id, proxy = http[PARAMS]["id"], http[PROXY]
    if under_way := [*proxy.running.find(request_id).values()]:
        return web.json_response(explained(under_way[-1][RECORD], path=shown_path(under_way[-1])))
    record = await proxy.history.find(request_id)
    if record is None:
        kept = f"the {proxy.config.history.requests} most recent ones are (history.requests)"
        message = f"no request with the id {request_id[:100]!r} is known; {kept}"
        raise BadRequest(message, status=404, code="not_found")
    return web.json_response(explained(record))


def explained(record: RequestRecord, *, path: str = "") -> Json:
    """The answer for one request; `path` is that of one under way. Times are seconds, null for what has not happened.

    `sentence` has it all for people. `outcome` is that in the log (`log.access.outcome`), or `under way`.
    `times` are the sums of its `steps` (`queue_s`, `load_s`, `download_s`, `agents_s`), `first_token_s` from its
    arrival, `prefill_s` from when it was sent to the model's server to the first byte of the answer, and `decode_s`
    from there to the last one. A `prefill_s` without a `decode_s` includes it: the answer came as a whole. Each of
    `steps` has its `kind`, `after_s` (after the arrival; null for an agent, of which all parts are added up),
    `seconds`, and its details.
    """
    if (note := record.pending) is not None:
        record = replace(record, steps=[*(record.steps or ())])
        note(record)
    ended_s = record.ended_s or time.monotonic()
    steps = sorted(record.steps or (), key=lambda step: step.began_s)
    times, tokens = _times(record, ended_s), _tokens(record)
    entry: Json = {
        "id": record.request_id,
        "sentence": "",
        "outcome": _outcome(record),
        "status": record.status or None,
        "error": record.error or None,
        "method": record.method,
        "path": record.path or path,
        "api": record.api,
        "key": record.client,
        "model": record.model if record.resolved_s else None,
        "backend": record.backend or None,
        "agents": [*record.agents],
        "total_s": round(ended_s - record.arrived_s, 4),
        "times": {name: None if value is None else round(value, 4) for name, value in times.items()},
        "tokens": tokens,
        "retries": sum(step.kind is StepKind.RETRY for step in steps),
        "steps": [_step(step, record.arrived_s) for step in steps],
    }
    return entry | {"sentence": _sentence(entry, steps)}


def _outcome(record: RequestRecord) -> str:
    if not record.ended_s:
        return UNDER_WAY
    return Cancelled.code if record.cancelled else outcome(record)


def _times(record: RequestRecord, now: float) -> dict[str, float | None]:
    first_s, last_s = record.first_byte_s, record.last_byte_s or now
    loaded_s = max((step.ended_s for step in record.steps or () if step.kind is StepKind.LOAD), default=0.0)
    sent_s = max(record.sent_s, loaded_s) if record.sent_s else 0.0  # a server of others may load after that
    return {
        "queue_s": record.spent_s(StepKind.QUEUE),
        "load_s": record.spent_s(StepKind.LOAD),
        "download_s": record.spent_s(StepKind.DOWNLOAD),
        "agents_s": record.spent_s(StepKind.AGENT),
        "first_token_s": first_s - record.arrived_s if first_s else None,
        "prefill_s": (first_s or now) - sent_s if sent_s else None,
        "decode_s": last_s - first_s if first_s and last_s > first_s else None,
    }


def _tokens(record: RequestRecord) -> Json:
    """Of the server's own counts. `per_second` is that of the decoding."""
    usage, first_s = record.usage or {}, record.first_byte_s
    completion, rate = usage.get("completion_tokens"), None
    if isinstance(completion, int) and completion > 1 and record.last_byte_s > first_s > 0:
        rate = round((completion - 1) / (record.last_byte_s - first_s), 2)
    return {
        "prompt": usage.get("prompt_tokens"),
        "cached": record.cached_tokens,
        "completion": completion,
        "per_second": rate,
    }


def _step(step: Step, arrived_s: float) -> Json:
    after_s = None if step.kind is StepKind.AGENT else round(step.began_s - arrived_s, 4)  # an agent's is a sum
    seconds = round(step.ended_s - step.began_s, 4)
    return {"kind": step.kind.value, "after_s": after_s, "seconds": seconds, **step.detail}


# -- for people --------------------------------------------------------------------------------------------------------


def _sentence(entry: Json, steps: list[Step]) -> str:
    model = f" for {entry['model']}" if entry["model"] else ""
    took = "has taken" if entry["outcome"] == UNDER_WAY else "took"
    head = f"{entry['method']} {entry['path']}{model} {took} {_s(entry['total_s'])}"
    parts = [*(text for step in steps if (text := _described(step))), *_answer(entry)]
    whole = f"{head}: {'; '.join(parts)}." if parts else f"{head}, and waited for nothing."
    return whole + _end(entry)


def _described(step: Step) -> str:
    detail, spent = step.detail, _s(step.ended_s - step.began_s)
    match step.kind:
        case StepKind.QUEUE:
            return f"{spent} in the queue{_behind(detail)}"
        case StepKind.LOAD:
            return f"{spent} until {detail.get('model')} was loaded"
        case StepKind.DOWNLOAD:
            return f"{spent} for the download of {detail.get('model')}"
        case StepKind.EVICT:
            return f"{detail.get('model')} was stopped to make room, as {detail.get('why')}"
        case StepKind.RETRY:
            return f"it was sent again: {detail.get('why')}"
        case StepKind.AGENT:
            return f"{spent} in the agent {detail.get('agent')}" if step.ended_s - step.began_s >= SHORTEST_S else ""


def _behind(detail: Any) -> str:
    text = f" for {detail.get('model')}"
    if detail.get("places"):
        text += f", as {', '.join(detail['places'])} had the places"
    if detail.get("ahead"):
        text += f", with {detail['ahead']} before it"
    if detail.get("behind"):
        text += f" (behind {', '.join(detail['behind'])})"
    return text


def _answer(entry: Json) -> Iterator[str]:
    times, tokens = entry["times"], entry["tokens"]
    prompt = _counted(tokens["prompt"], "of the prompt", tokens["cached"])
    answer = _counted(tokens["completion"], "of the answer")
    if times["prefill_s"] is not None and times["decode_s"] is None:
        yield f"{_s(times['prefill_s'])} at its server{prompt}{answer}"
    elif times["prefill_s"] is not None:
        yield f"{_s(times['prefill_s'])} at its server until the answer began{prompt}"
        rate = f" at {tokens['per_second']:.1f}/s" if tokens["per_second"] else ""
        yield f"{_s(times['decode_s'])} for the answer{answer}{rate}"


def _counted(count: object, what: str, cached: object = None) -> str:
    if not count:  # what is not known is 0 in the store
        return ""
    return f", {count} token{'' if count == 1 else 's'} {what}" + (f", {cached} of them cached" if cached else "")


def _end(entry: Json) -> str:
    known = {
        OK: "",
        LEFT: " Its client left before the end.",
        Cancelled.code: " It was cancelled.",
        UNDER_WAY: " It is under way.",
    }
    if (text := known.get(entry["outcome"])) is not None:
        return text
    how = f"with status {entry['status']}" if entry["status"] >= 400 else "after its answer had begun"
    return f" It failed {how}" + (f" ({entry['error']})." if entry["error"] else ".")


def _s(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
