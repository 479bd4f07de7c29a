"""Validators that fields share: names, flags, lists written as text, addresses.

They return the value, possibly normalized, or raise ValueError.
"""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from llama_smart_proxy.proxy.config.command_line import split_args

_NAME = re.compile(r"[A-Za-z0-9._:/@+-]{1,255}")
_START, _REST = "[A-Za-z0-9_]", "[A-Za-z0-9_-]"
_PART = rf"{_START}(?:{_REST}|\.){{0,79}}"
_OLLAMA_NAME = re.compile(rf"(?:(?:{_START}(?:{_REST}|[.:]){{0,349}}/)?{_START}{_REST}{{0,79}}/)?{_PART}(?::{_PART})?")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'+.^_`|~-]{1,128}\*?")
_NEVER_FORWARDED = frozenset({"authorization", "connection", "content-length", "host", "transfer-encoding", "upgrade"})
_ITEM = TypeVar("_ITEM")
OWN_VARIABLE = re.compile(
    r"LSP_.* | LLAMA_API_KEY | LLAMA_SERVER_.* | LLAMA_ARG_(HOST|PORT|REUSE_PORT|API_.*|SSL_.*|MODEL|MODEL_URL|ALIAS)",
    re.VERBOSE,
)
"""Variables that would change where a server of the pool is reached, its key or its model, and those of the proxy."""


def checked_name(name: str) -> str:
    """A name that is safe in a URL, a log line and a command line."""
    if not _NAME.fullmatch(name):
        raise ValueError("a name is 1 to 255 of the characters A-Z a-z 0-9 . _ : / @ + -")
    if ".." in name or name.startswith("/"):
        raise ValueError("a name has no '..' in it and does not begin with '/'")
    return name


def is_ollama_name(name: str) -> bool:
    """Whether a model could have this name in Ollama: `[host/][user/]model[:tag]`. Source: its types/model/name.go."""
    return _OLLAMA_NAME.fullmatch(name) is not None


def quoted(value: object) -> object:
    """Reject numbers and booleans where the exact text matters: YAML parses 1.10 as 1.1."""
    if isinstance(value, int | float):
        raise ValueError("reads as a number or a boolean; put it in quotes")
    return value


def switch(value: object) -> object:
    """`on` and `off`, which YAML reads as booleans; anything else unchanged."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return lower(value)


def comma_list(value: object) -> object:
    """`"a, b"` as `["a", "b"]`: lists are often one text in an environment variable."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, dict) else value


def one_or_many(value: object) -> object:
    """Text as a list with only that in it, commas included."""
    return [value] if isinstance(value, str) else value


def without_nul(text: str) -> str:
    """Text that a process can be given."""
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    return text


def begins_with_flag(args: list[str]) -> list[str]:
    """Arguments of llama-server, which takes only flags and their values."""
    if args and not args[0].startswith("-"):
        raise ValueError("must begin with a flag: the name of the program and its variables do not belong here")
    return args


def lower(value: object) -> object:
    """Text in lower case; anything else unchanged, for the validation that follows."""
    return value.lower() if isinstance(value, str) else value


def named_entries(value: object) -> object:
    """Agents as a list of `{name, options}`, from names and one-key mappings, or from one mapping of all."""
    if isinstance(value, str):
        value = comma_list(value)
    entries: Any = [{name: options} for name, options in value.items()] if isinstance(value, dict) else value
    return [_named_entry(entry) for entry in entries] if isinstance(entries, list) else entries


def false_is_none(value: object) -> object:
    """`false` and `off` as None."""
    return None if value is False or value == "off" else value


def _named_entry(entry: object) -> object:
    if isinstance(entry, str):
        return {"name": entry}
    if isinstance(entry, dict) and len(entry) == 1 and "name" not in entry:
        [(name, options)] = entry.items()
        return {"name": name, "options": options}
    return entry


def loopback(host: str) -> str:
    """A loopback IP address; `localhost` becomes 127.0.0.1, as it could resolve differently for each side."""
    address = "127.0.0.1" if host.lower() == "localhost" else host.strip("[]")
    try:
        if ipaddress.ip_address(address).is_loopback:
            return address
    except ValueError:
        pass
    raise ValueError("must be a loopback address (127.0.0.1 or ::1): only the proxy connects to these processes")


def with_scheme(host: str) -> str:
    """`host` as a URL: names and addresses without a scheme get http."""
    if "://" in host:
        return host
    try:
        return f"http://{bracketed(str(ipaddress.ip_address(host)))}"
    except ValueError:
        return f"http://{host}"


def bracketed(host: str) -> str:
    """`host` as in a URL: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def address(host: str) -> str:
    """A name, or an IP address in its shortest form, without brackets."""
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def origin(text: str) -> str:
    """The origin of a web page as browsers write it: `scheme://host:port` in lower case, without a scheme's own port;
    or `null`, or `*` for any."""
    text = text.lower().rstrip("/")
    found = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?", text)
    if text in ("*", "null"):
        return text
    if found is None:
        raise ValueError("must be the origin of a page, such as https://chat.example or http://chat.example:8080")
    scheme, host, port = found.groups()
    return f"{scheme}://{host}{'' if (scheme, port) in (('http', ':80'), ('https', ':443')) else port or ''}"


def host_name(text: str) -> str:
    """A name as a `Host` header has it, in lower case and punycode and without a port; or `*` for any, or `*.` and a
    domain for all names below that."""
    name = text.strip().lower().removesuffix(".")
    with suppress(UnicodeError):
        name = name if name.isascii() else name.encode("idna").decode("ascii")
    if not re.fullmatch(r"\*|(?:\*\.)?[a-z0-9_-][a-z0-9._-]*", name):
        raise ValueError("must be a host name without scheme and port, such as chat.example, or *.chat.example, or *")
    return name


def http_url(url: str) -> str:
    """An http or https URL of a server, without a trailing slash."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("is not a valid URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError("must be an http:// or https:// URL with a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain a user name or password")
    if parts.query or parts.fragment or re.search(r"\s", url):
        raise ValueError("must not contain '?', '#' or white space")
    return url.rstrip("/")


def base_url(url: str) -> str:
    """The base URL of an OpenAI-compatible server, without a trailing slash; one without a path ends in `/v1`."""
    url = http_url(url)
    endpoint = re.search(r"/(chat/completions|completions|embeddings)$", url)
    if endpoint is not None:
        raise ValueError(f"must be the base URL, without {endpoint[0]}")
    return url if urlsplit(url).path else f"{url}/v1"


def ollama_host(host: str) -> str:
    """A host's name, address or URL, unchanged."""
    http_url(with_scheme(host))
    return host


def header(name: str) -> str:
    """The name of a header that may be forwarded, or the beginning of some and `*`."""
    if not _HEADER.fullmatch(name):
        raise ValueError("must be the name of a header, or its beginning and *")
    if name.lower() in _NEVER_FORWARDED:
        raise ValueError("is never forwarded; api_key is the key that a server gets")
    return name


def variable_name(name: str) -> str:
    """A name that a variable of a process can have."""
    if not name or "=" in name:
        raise ValueError("a variable has a name, without '='")
    return without_nul(name)


def passthrough(name: str) -> str:
    """The name of a variable, or a pattern with `*` and `?`, that server processes may inherit."""
    if not re.fullmatch(r"[A-Za-z0-9_*?]+", name):
        raise ValueError("must be the name of a variable, or a pattern with * and ?")
    if OWN_VARIABLE.fullmatch(name):
        raise ValueError("is set or kept back by the proxy itself")
    return name


Name = Annotated[str, BeforeValidator(quoted), AfterValidator(checked_name)]
Text = Annotated[str, AfterValidator(without_nul)]
Args = Annotated[
    list[Text],
    BeforeValidator(split_args),
    AfterValidator(begins_with_flag),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "number", "boolean"]}}]}
    ),
]
Texts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=2000)]],
    BeforeValidator(one_or_many),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Environment = Annotated[
    dict[Annotated[str, AfterValidator(variable_name)], Text | None],
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["string", "number", "boolean", "null"]}}),
]
Passthrough = Annotated[
    list[Annotated[str, AfterValidator(passthrough)]],
    BeforeValidator(comma_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Hosts = Annotated[
    list[Annotated[str, AfterValidator(ollama_host)]],
    BeforeValidator(comma_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Header = Annotated[str, AfterValidator(header)]
Address = Annotated[str, AfterValidator(address)]
Origins = Annotated[
    list[Annotated[str, AfterValidator(origin)]],
    BeforeValidator(comma_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
HostNames = Annotated[
    list[Annotated[str, AfterValidator(host_name)]],
    BeforeValidator(comma_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Entries = Annotated[
    list[_ITEM],
    BeforeValidator(named_entries),
    WithJsonSchema({"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}}),
]
