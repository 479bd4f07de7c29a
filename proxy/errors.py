"""Every way a request can fail: one class for each kind that is handled differently.

Each has an HTTP status, an OpenAI error `type` and a machine-readable `code`; the dialects convert it to the error
format of their API. Messages are shown to users in a chat window: they never contain prompt text, keys or tracebacks.

Source of the `type` names beyond OpenAI's own (`not_found_error`, `unavailable_error`): `format_error_response` in
llama.cpp tools/server, b11434, so that a client gets the same ones from the proxy and from the model server.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any


class ProxyError(Exception):
    """Base of all errors that reach a client.

    `status` is the HTTP status used while headers can still be sent, `kind` the OpenAI `error.type`, `code` the stable
    machine-readable name, `retry_after_s` the seconds to put in `Retry-After` (None: no such header). A message of over
    `longest` characters is cut: it may quote what a client has sent, which has any length.
    """

    longest = 16_000
    status = 500
    kind = "server_error"
    code = "internal_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        message = message if len(message) <= self.longest else f"{message[: self.longest]} ..."
        message = message.encode(errors="replace").decode()  # a lone surrogate quoted from a client cannot be encoded
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


ERROR_TEXT = "**Error:** "
"""The beginning of an error's text in an answer, for clients that show only what the answer contains."""
MAX_ERROR_TEXT = 500
"""Most characters of such a text."""


def error_text(exc: ProxyError) -> str:
    """The error as a paragraph of the answer that it ends, in Markdown."""
    return f"\n\n{ERROR_TEXT}{' '.join(exc.message.split())[:MAX_ERROR_TEXT]}"


def without_error_text(text: str) -> str:
    """An answer without the paragraph that `error_text` may have appended to it."""
    at = text.rfind(ERROR_TEXT, max(0, len(text) - MAX_ERROR_TEXT - len(ERROR_TEXT)))
    ours = at == 0 or (at > 0 and text[at - 1] == "\n")
    return text[:at].rstrip("\n") if ours and "\n" not in text[at:].rstrip() else text


class BadRequest(ProxyError):
    """The client's request cannot be served; `status` is 400, 404, 405, 413, ..."""

    longest = 2000
    status = 400
    kind = "invalid_request_error"
    code = "invalid_request"

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status


class ModelNotFound(ProxyError):
    """There is no model of this name. `hint` lists the known names; `brief` is the message without it, for APIs whose
    own message has none."""

    status = 404
    kind = "not_found_error"
    code = "model_not_found"

    def __init__(self, message: str, *, hint: str = "", param: str | None = "model") -> None:
        super().__init__(f"{message}; {hint}" if hint else message, param=param)
        self.brief = self.message.removesuffix(f"; {hint}")


class NotFound(ProxyError):
    """There is no such collection or document for the client."""

    longest = 2000
    status = 404
    kind = "not_found_error"
    code = "not_found"


class AccessDenied(ProxyError):
    """The client's API key is missing or unknown (401), or is not for this (403). `code` is `invalid_api_key` or
    `insufficient_scope`."""

    def __init__(self, message: str, *, status: int = 401) -> None:
        known = status != 401
        super().__init__(message, code="insufficient_scope" if known else "invalid_api_key")
        self.status = status
        self.kind = "permission_error" if known else "authentication_error"


class Overloaded(ProxyError):
    """Temporarily unavailable: queue full or timed out, back-off after failed loads, shutting down. Status 429: too
    many of something at one time."""

    status = 503
    kind = "unavailable_error"
    code = "overloaded"

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: int = 1, status: int = 503) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s
        self.status = status
        self.kind = _KINDS[status]


class Cancelled(ProxyError):
    """The request was cancelled by `DELETE /running/{id}`. Its status is one after which no client sends the request
    again by itself, as the official ones do after 408, 409, 429 and 5xx."""

    status = 410
    kind = "cancelled"
    code = "cancelled"

    def __init__(self) -> None:
        super().__init__("This request was cancelled by an administrator of the proxy.")


class StartFailed(ProxyError):
    """A llama-server could not be started; the message contains its exit code and the cause, `log` the end of its log.

    `status` is 503, or 504 with code `model_load_timeout` when it never became healthy.
    """

    status = 503
    kind = "unavailable_error"
    code = "model_load_failed"

    def __init__(self, message: str, *, status: int = 503, code: str | None = None, log: Sequence[str] = ()) -> None:
        super().__init__(message, code=code)
        self.log = log
        self.status = status
        self.retry_after_s = 1 if status == 503 else None


class UpstreamFailed(ProxyError):
    """The model's server closed or refused the connection, sent something unreadable, or timed out (504)."""

    status = 502
    code = "upstream_disconnected"

    def __init__(self, message: str, *, status: int = 502, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status


class UpstreamRefused(ProxyError):
    """The model's server answered with an error. `status` and message are the server's, and `details` are the other
    fields of its error object, such as llama-server's `type` and `n_ctx`."""

    code = "upstream_error"

    def __init__(self, message: str, *, status: int, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.details = details or {}
        self.kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")


class ContextExceeded(UpstreamRefused):
    """The prompt does not fit into the model's context. `tokens` is the prompt's length and `limit` the context's, in
    tokens, as far as the server reports them; the dialects have a message of their own, because clients match it."""

    code = "context_length_exceeded"

    def __init__(
        self, message: str, *, details: Mapping[str, Any] | None = None, tokens: int | None, limit: int | None
    ) -> None:
        super().__init__(message, status=400, details=details)
        self.tokens = tokens
        self.limit = limit


class AgentError(ProxyError):
    """The agent `agent` failed: it raised, hung, or returned something invalid. The message is `agent NAME` followed by
    `reason`; its exception is only logged, as it may contain prompt text."""

    status = 500
    code = "agent_failed"

    def __init__(self, agent: str, reason: str, *, status: int = 500, code: str | None = None) -> None:
        super().__init__(f"agent {agent} {reason}", code=code)
        self.agent = agent
        self.status = status


_KINDS = {404: "not_found_error", 429: "rate_limit_error", 501: "not_supported_error", 503: "unavailable_error"}


class ConfigError(Exception):
    """The configuration is invalid. `problems` lists all problems, each as `file: path: problem`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def own(exc: BaseException) -> BaseException:
    """A copy to raise for one of several who get the same failure. Shared, its traceback would have the frames of all
    of them, and `let_go` would end those that still run."""
    copy = type(exc).__new__(type(exc), *exc.args)
    copy.__dict__.update(exc.__dict__)
    return copy


def let_go(exc: BaseException | None) -> None:
    """Drop what the frames hold that `exc` and its causes passed through. A failure that one of them has kept refers to
    itself so, and megabytes of an answer or a request would stay until the next round of the garbage collector."""
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        traceback.clear_frames(exc.__traceback__)
        exc = exc.__cause__ or exc.__context__
