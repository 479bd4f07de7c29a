"""One model of llama-swap as one of ours, and as virtual models over it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from llama_smart_proxy.proxy.cli.importing.reading import Json
from llama_smart_proxy.proxy.cli.importing.servers import Server, is_llama_server, joined, llama_server, split
from llama_smart_proxy.proxy.cli.importing.values import mapping, number, text, texts
from llama_smart_proxy.proxy.config import checked_name
from llama_smart_proxy.proxy.config.filters import PROTECTED

T = TypeVar("T")
Noting = Callable[..., None]
_LOOPBACK = re.compile(r"https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::(?:\$\{PORT\}|\d+))?/?")
_DEFAULT_PROXY = re.compile(r"http://(?:localhost|127\.0\.0\.1):\$\{PORT\}/?")
_KILL = re.compile(r"(?:/\S*/)?kill(?: -(?:s )?(?:SIG)?(?:TERM|15|INT|2))? \$\{PID\}")
"""What a stop command does that is the default here."""
_NO_EQUIVALENT = {
    "metadata": "no equivalent",
    "capabilities": "not needed: what a model can do is read from its file, where there is one",
    "compat": "no equivalent: web sockets are refused",
    "timeouts": "no equivalent for one model; server_pool.first_byte_timeout_s is for all",
    "sendLoadingState": "no equivalent for one model; server.loading_status is for all",
}
_USED = {
    *("cmd", "cmdStop", "name", "description", "env", "proxy", "aliases", "checkEndpoint", "ttl", "unloadTimeout"),
    *("useModelName", "filters", "concurrencyLimit", "unlisted", "healthCheckTimeout"),
}
_LONGEST_TITLE, _LONGEST_DESCRIPTION = 100, 2000
_OF_LLAMA_SERVER = ["openai", "anthropic", "native"]


def _split(command: object) -> list[str]:
    try:
        return split(text(command))
    except ValueError as exc:
        reason = str(exc).removeprefix(": ")
        raise ValueError(f": {reason}") from None


class Names:
    """The names of models: theirs, and those that they have here, where fewer characters are allowed."""

    def __init__(self, note: Noting) -> None:
        self._note = note
        self._ours: dict[str, str] = {}
        self._taken: dict[str, str] = {}

    def plain(self, name: str, where: str) -> str:
        """`name`, or the nearest one that is allowed."""
        try:
            return checked_name(name)
        except ValueError:
            own = re.sub(r"[^A-Za-z0-9._:/@+-]", "-", name).replace("..", ".").lstrip("/")[:255] or "model"
            self._note(where, f"is called {own} here: names consist of A-Z a-z 0-9 . _ : / @ + -")
            return own

    def add(self, name: str, where: str) -> str:
        """A model's name here, which no other one has; another case does not make it another one."""
        own = base = self.plain(name, where)
        number = 2
        while own.lower() in self._taken:
            own, number = f"{base}-{number}", number + 1
        if own != base:
            self._note(where, f"is called {own} here: {base} is taken, upper and lower case being the same")
        self._ours[name] = self._taken[own.lower()] = own
        return own

    def alias(self, name: str, of: str, where: str, at: tuple[str, ...]) -> str | None:
        """A further name of the model `of`; None if that cannot be."""
        try:
            own = checked_name(name)
        except ValueError:
            self._note(where, f"the alias {name!r} is left out: names consist of A-Z a-z 0-9 . _ : / @ + -", at)
            return None
        if self._taken.get(own.lower(), of) != of or own.lower() == of.lower():
            if own.lower() != of.lower():
                self._note(where, f"the alias {own} is left out: it is taken", at)
            return None
        self._ours.setdefault(name, of)
        self._taken[own.lower()] = of
        return own

    def known(self, name: str) -> str | None:
        """The model of that name or alias, by its name here."""
        return self._ours.get(name)

    def of_peer(self, peer: str, names: list[str], where: str, at: tuple[str, ...]) -> list[str]:
        """Those of a peer's models that no model here hides; the others would be refused."""
        hidden = [name for name in names if name.lower() in self._taken]
        for name in hidden:
            self._note(f"{where}.models", f"{name} is left out: a model here has that name", at)
        for name in names:
            for known in (name, f"{peer}/{name}"):
                self._ours.setdefault(known, name)
        return [name for name in names if name not in hidden]


def filters_of(theirs: Json, where: str, at: tuple[str, ...], note: Noting) -> Json:
    """The filters of a model or a peer."""
    strip = [name.strip() for name in text(theirs.get("stripParams") or theirs.get("strip_params")).split(",")]
    found: Json = {
        "strip": [
            name for name in dict.fromkeys(strip) if name and _may_filter(name, f"{where}.stripParams", at, note)
        ],
        "set": _set_of(theirs.get("setParams"), f"{where}.setParams", at, note),
    }
    return {key: value for key, value in found.items() if value}


def _set_of(value: object, where: str, at: tuple[str, ...], note: Noting) -> Json:
    return {name: value for name, value in mapping(value).items() if _may_filter(name, where, at, note)}


def _may_filter(name: str, where: str, at: tuple[str, ...], note: Noting) -> bool:
    if name.split(".")[0] in PROTECTED or not all(name.split(".")):
        note(where, f"{name} is left out: it cannot be filtered", at)
        return False
    return True


class ModelImport:
    """One model. `program` is the llama-server that runs it, empty if another command does. Raises: ValueError."""

    def __init__(self, name: str, names: Names, theirs: Json, ttl: int, note: Noting) -> None:
        self._name = name
        self._names = names
        self._own = names.known(name) or name
        self._at = ("models", self._own)
        self._theirs = theirs
        self._ttl = ttl
        self._noting = note
        self._server: Server | None = None
        self._words = self._get("cmd", _split)
        self._stop = self._get("cmdStop", _split)
        self._server = self._as_llama_server()
        self.program = self._server.program if self._server is not None else ""

    def entries(self, program: str) -> Iterator[tuple[str, Json]]:
        """The model, and the virtual models over it, each with its name. `program` is the llama-server of all."""
        entry = self._source(program)
        if entry is None:
            return
        variants = self._variants()
        entry |= self._card() | self._settings() | self._aliases(variants)
        filters = filters_of(self._get("filters", mapping), "filters", self._at, self._note)
        own = variants.pop(self._name, {})
        if own:
            filters["set"] = {**filters.get("set", {}), **own}
        self._leftovers(own, variants)
        yield self._own, entry | ({"filters": filters} if filters else {})
        for name, changed in variants.items():
            card = {"hidden": True} if self._theirs.get("unlisted") is True else {}
            yield (
                self._names.add(name, f"models.{self._name}"),
                {"model": self._own, "filters": {"set": changed}, **card},
            )

    def _get(self, field: str, read: Callable[..., T], default: object = None, *args: object) -> T:
        """The value of a field of theirs, by its type."""
        value = self._theirs.get(field)
        try:
            return read(default if value is None else value, *args)
        except ValueError as exc:
            raise ValueError(f".{self._name}.{field}{exc}") from None

    def _note(self, where: str, what: str, at: tuple[str, ...] | None = None) -> None:
        self._noting(f"models.{self._name}.{where}", what, self._at)

    # -- what runs it ------------------------------------------------------------------------------------------------

    def _as_llama_server(self) -> Server | None:
        """Its command line as fields, if the proxy runs llama-server just so by itself."""
        stops = not self._stop or _KILL.fullmatch(" ".join(self._stop)) is not None
        here = _LOOPBACK.fullmatch(self._get("proxy", text) or "http://localhost") is not None
        return llama_server(self._words) if stops and here else None

    def _source(self, program: str) -> Json | None:
        if self._server is not None and self._server.program == program:
            if self._server.keyed:
                self._note("cmd", "its API key is left out: each process gets a random one")
            return dict(self._server.fields)
        return self._command()

    def _command(self) -> Json | None:
        proxy, stop = self._proxy(), [] if self._is_plain_kill() else self._stop
        if not self._words or (not proxy and "${PORT}" not in " ".join(self._words)):
            lacks = "neither ${PORT} in cmd nor proxy" if self._words else "no cmd"
            self._noting(f"models.{self._name}", f"is left out: it has {lacks}")
            return None
        entry: Json = {"cmd": joined(self._words)}
        if stop:
            entry["cmd_stop"] = joined(stop)
        if proxy and not _DEFAULT_PROXY.fullmatch(proxy):
            entry["url"] = proxy
        check = self._get("checkEndpoint", text) or "/health"
        if check != "/health":
            entry["check_endpoint"] = check if check == "none" or check.startswith("/") else f"/{check}"
        if self._theirs.get("useModelName"):
            entry["served_name"] = text(self._theirs["useModelName"])
        if is_llama_server(self._words):
            entry["apis"] = list(_OF_LLAMA_SERVER)
        return entry

    def _proxy(self) -> str:
        """Where its server is, as far as that is said."""
        proxy = self._get("proxy", text)
        fixed = re.search(r"(?:^|\s)--(?:listen[-_])?port[ =](\d+)(?:\s|$)", " ".join(self._words))
        if not proxy and fixed is not None and "${PORT}" not in " ".join(self._words):
            proxy = f"http://127.0.0.1:{fixed[1]}"
            self._note("proxy", f"is not there; url is {proxy}, as in cmd")
        return proxy

    def _is_plain_kill(self) -> bool:
        return _KILL.fullmatch(" ".join(self._stop)) is not None

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _card(self) -> Json:
        title, description = self._get("name", text), self._get("description", text)
        card: Json = {
            "title": title[:_LONGEST_TITLE],
            "description": description[:_LONGEST_DESCRIPTION],
            "hidden": self._theirs.get("unlisted") is True,
        }
        return {key: value for key, value in card.items() if value}

    def _settings(self) -> Json:
        found: Json = {}
        env = {}
        for item in self._get("env", texts):
            key, equals, value = item.partition("=")
            if equals and key:
                env[key] = value
            else:
                self._note("env", f"{item!r} is left out: it is not NAME=value")
        if env:
            found["env"] = env | dict(self._server.fields.get("env", {}) if self._server is not None else {})
        ttl = self._get("ttl", number, -1, -1)
        if ttl not in (-1, self._ttl):
            found["keep_alive"] = ttl or -1
        if limit := self._get("concurrencyLimit", number, 0, 0):
            found["concurrent"] = limit
            self._note("concurrencyLimit", "requests beyond it wait; llama-swap answers them with 429")
        if stop := self._get("unloadTimeout", number, 0, 0):
            found["stop_timeout_s"] = stop
        return found

    def _aliases(self, variants: Json) -> Json:
        names = [name for name in self._get("aliases", texts) if name not in variants]
        aliases = [self._names.alias(name, self._own, "models." + self._name, self._at) for name in names]
        kept = [alias for alias in aliases if alias is not None]
        return {"aliases": kept} if kept else {}

    def _variants(self) -> dict[str, Json]:
        """What is set by the name in a request."""
        by_name = mapping(self._get("filters", mapping).get("setParamsByID"))
        where = "filters.setParamsByID"
        return {name: _set_of(value, f"{where}.{name}", self._at, self._note) for name, value in by_name.items()}

    def _leftovers(self, own: Json, variants: dict[str, Json]) -> None:
        for key, value in self._theirs.items():
            if value in (None, "", {}, []) or key in _USED:
                continue
            self._note(key, _NO_EQUIVALENT.get(key, "is no setting of llama-swap, and left out"))
        if any(name not in changed for changed in variants.values() for name in own):
            self._note("filters.setParamsByID", f"what it sets for {self._name} is set for its variants too")
