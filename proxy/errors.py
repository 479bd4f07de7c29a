"""Every way a request can fail, as one small class per remedy.

A class exists only because somebody handles it differently. Each knows the HTTP status it becomes, the OpenAI error
`type` and a machine-readable `code`; the dialects turn it into their own envelope. Messages are written for the person
reading a chat window: they never hold prompt text, keys or tracebacks.

Source of the `type` names beyond OpenAI's own (`not_found_error`, `unavailable_error`): `format_error_response` in
llama.cpp tools/server, b11434, so that a client sees the same ones whether an error is ours or the model server's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ProxyError(Exception):
    """Base of all errors that reach a client.

    `status` is the HTTP status used while headers can still be sent, `kind` the OpenAI `error.type`, `code` the stable
    machine-readable name, `retry_after_s` the seconds to put in `Retry-After` (None: no such header).
    """

    status = 500
    kind = "server_error"
    code = "internal_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        message = message.encode(errors="replace").decode()  # it may quote a client's lone surrogate
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class BadRequest(ProxyError):
    """The client sent something that cannot be served; `status` says what kind of wrong (400, 404, 405, 413, ...)."""

    status = 400
    kind = "invalid_request_error"
    code = "invalid_request"

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status


class ModelNotFound(ProxyError):
    """No source knows this model name; the `hint` lists the names that are known. Some APIs tell only `brief`."""

    status = 404
    kind = "not_found_error"
    code = "model_not_found"

    def __init__(self, message: str, *, hint: str = "", param: str | None = "model") -> None:
        super().__init__(f"{message}; {hint}" if hint else message, param=param)
        self.brief = self.message.removesuffix(f"; {hint}")


class Overloaded(ProxyError):
    """No room now, perhaps later: queue full or timed out, back-off after failed loads, shutting down."""

    status = 503
    kind = "unavailable_error"
    code = "overloaded"

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class StartFailed(ProxyError):
    """A llama-server could not be started; the message carries its exit code and last words.

    `status` is 503, or 504 with code `model_load_timeout` when it never became healthy.
    """

    status = 503
    kind = "unavailable_error"
    code = "model_load_failed"

    def __init__(self, message: str, *, status: int = 503, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.retry_after_s = 1 if status == 503 else None


class UpstreamFailed(ProxyError):
    """The server that holds the model broke off, refused the connection, or went silent (then 504)."""

    status = 502
    code = "upstream_disconnected"

    def __init__(self, message: str, *, status: int = 502, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status


class UpstreamRefused(ProxyError):
    """The server that holds the model answered with an error of its own; `status` and words are the server's, and so
    are the `details`: what else its error object holds, such as the `type` and `n_ctx` of llama-server's."""

    code = "upstream_error"

    def __init__(self, message: str, *, status: int, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.details = details or {}
        self.kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")


class AgentError(ProxyError):
    """The agent called `agent` failed: it raised, hung, or said what is no answer. The message is `agent NAME` and the
    given words; what it raised is in the log."""

    status = 500
    code = "agent_failed"

    def __init__(self, agent: str, words: str, *, status: int = 500, code: str | None = None) -> None:
        super().__init__(f"agent {agent} {words}", code=code)
        self.agent = agent
        self.status = status


_KINDS = {404: "not_found_error", 501: "not_supported_error", 503: "unavailable_error"}


class ConfigError(Exception):
    """The configuration cannot be used. `problems` lists every one as `file: path: problem`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
