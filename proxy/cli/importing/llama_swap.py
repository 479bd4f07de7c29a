"""llama-swap's configuration as ours.

Source: llama-swap's docs/configuration.md, config.example.yaml and config-schema.json (August 2026).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llama_smart_proxy.proxy.cli.importing.groups import largest_set, processes, staying
from llama_smart_proxy.proxy.cli.importing.models import ModelImport, Names, filters_of
from llama_smart_proxy.proxy.cli.importing.reading import Json, Unreadable
from llama_smart_proxy.proxy.cli.importing.values import mapping, number, text, texts
from llama_smart_proxy.proxy.cli.importing.writing import Note

NEVER_S = -1
SHORTEST_HEALTH_S = 15
_NOT_NEEDED = {
    "logTimeFormat": "not needed: lines of the log have a time, under systemd that of the journal",
    "logRequests": "not needed: each request has a line in the log",
    "logToStdout": "not needed: lines of model servers are in the log when they fail, and in /health",
    "includeAliasesInList": "not needed: aliases are in the field `aliases` of each item of /v1/models",
    "metricsMaxInMemory": "no equivalent",
    "captureBuffer": "no equivalent: the content of requests is not kept",
    "store": "no equivalent: what is kept is in state_dir",
    "ui": "no equivalent: there is no page with activities",
    "performance": "no equivalent",
    "upstream": "no equivalent",
    "profiles": "no equivalent yet",
    "matrix": "no equivalent yet; server_pool.size bounds how many models are loaded",
}
_WITHOUT_EQUIVALENT_IN_PEERS = ("keepalive", "tlsHandshake", "idleConn", "expectContinue")


class Import:
    """`data` is our configuration, and `notes` what is to be known about it. Raises: Unreadable."""

    def __init__(self, theirs: Json) -> None:
        self.data: Json = {}
        self.notes: list[Note] = []
        self._theirs = theirs
        self._names = Names(self._note)
        self._problems: list[str] = []
        self._use = {
            "healthCheckTimeout": self._load_timeout,
            "unloadTimeout": lambda value: self._pool("stop_timeout_s", number(value, 0) or 10),
            "globalTTL": lambda value: self._pool("keep_alive", number(value, 0) or NEVER_S),
            "startPort": lambda value: self._pool("port_start", number(value, 1)),
            "logLevel": self._log_level,
            "sendLoadingState": self._loading_state,
            "apiKeys": self._api_keys,
            "models": self._models,
            "peers": self._peers,
            "selectors": self._selectors,
            "hooks": self._hooks,
            "groups": lambda value: None,
            "routing": self._routing,
        }
        self._translate()

    # -- the whole -------------------------------------------------------------------------------------------------

    def _translate(self) -> None:
        theirs = {"globalTTL": 0, **self._theirs}
        order = [*self._use, *(key for key in theirs if key not in self._use)]
        for key in order:
            if key not in theirs or theirs[key] is None:
                continue
            use: Callable[[Any], None] | None = self._use.get(key)
            try:
                if use is not None:
                    use(theirs[key])
                elif key in _NOT_NEEDED:
                    self._note(key, _NOT_NEEDED[key])
                else:
                    self._note(key, "is not known as a setting of llama-swap, and left out")
            except ValueError as exc:
                self._problems.append(f"{key}{exc}")
        self._size()
        if self._problems:
            raise Unreadable(self._problems)
        order = ["server", "server_pool", "log_level", "llama_cpp", "models", "remotes"]
        self.data = {key: self.data[key] for key in order if self.data.get(key)}

    def _note(self, where: str, what: str, at: tuple[str, ...] = ()) -> None:
        self.notes.append(Note(where, what, at))

    def _pool(self, field: str, value: object) -> None:
        self.data.setdefault("server_pool", {})[field] = value

    def _load_timeout(self, value: object) -> None:
        self._pool("load_timeout_s", max(SHORTEST_HEALTH_S, number(value, 0)))
        self._note(
            "healthCheckTimeout", "counts the seconds without a line in the server's log, not those of the whole load"
        )

    def _log_level(self, value: object) -> None:
        level = text(value).lower()
        self.data["log_level"] = "warning" if level == "warn" else level

    def _loading_state(self, value: object) -> None:
        if value is True:
            self.data.setdefault("server", {})["loading_status"] = "reasoning"

    def _api_keys(self, value: object) -> None:
        self.data.setdefault("server", {})["api_keys"] = list(dict.fromkeys(texts(value)))
        self._note("apiKeys", "may use models here; for more, write {key: ..., scopes: [admin]}")

    def _hooks(self, value: object) -> None:
        preload = mapping(mapping(value).get("on_startup")).get("preload")
        for name in texts(preload):
            own = self._names.known(name.strip())
            if own in self.data.get("models", {}) and "model" not in self.data["models"][own]:
                self.data["models"][own]["preload"] = True
            elif name.strip():
                self._note("hooks.on_startup.preload", f"{name} is no model that is run here, and left out")

    # -- models ----------------------------------------------------------------------------------------------------

    def _models(self, value: object) -> None:
        theirs = mapping(value)
        for name in theirs:
            self._names.add(name, f"models.{name}")
        ttl = number(self._theirs.get("globalTTL") or 0, 0)
        imports = [ModelImport(name, self._names, mapping(model), ttl, self._note) for name, model in theirs.items()]
        counted = Counter(found.program for found in imports if found.program)
        program = counted.most_common(1)[0][0] if counted else ""
        if program and program != "llama-server":
            self.data["llama_cpp"] = {"server": program}
        models = self.data.setdefault("models", {})
        for found in imports:
            for own, entry in found.entries(program):
                models[own] = entry
        if any(not str(model.get("path", "/")).startswith(("/", "~", "${")) for model in models.values()):
            self._note("models", "relative paths start at the folder of this file, not where llama-swap was started")
        if models:
            self._note("models", "their servers inherit a part of the environment; env_passthrough adds names to it")

    def _selectors(self, value: object) -> None:
        """One that always uses its first target is a virtual model."""
        for name, selector in mapping(value).items():
            where, fields = f"selectors.{name}", mapping(selector)
            strategy, targets = text(fields.get("strategy")), texts(fields.get("targets"))
            target = self._names.known(targets[0]) if targets else None
            if strategy != "pin" or not self._is_served(target):
                self._note(where, f"no equivalent yet for {strategy} of {', '.join(targets)}")
                continue
            card = {"title": fields.get("name"), "description": fields.get("description")}
            entry: Json = {"model": target, **{key: text(value) for key, value in card.items() if value}}
            if fields.get("unlisted") is True:
                entry["hidden"] = True
            self.data.setdefault("models", {})[self._names.add(name, where)] = entry

    def _is_served(self, name: str | None) -> bool:
        """Whether a model of that name is among ours, and not a virtual one."""
        found = self.data.get("models", {}).get(name)
        remotes = self.data.get("remotes", {}).values()
        return "model" not in found if found is not None else any(name in remote["models"] for remote in remotes)

    # -- peers -----------------------------------------------------------------------------------------------------

    def _peers(self, value: object) -> None:
        remotes = self.data.setdefault("remotes", {})
        for name, peer in mapping(value).items():
            own = self._names.plain(name, f"peers.{name}")
            remotes[own] = self._peer(f"peers.{name}", own, mapping(peer))

    def _peer(self, where: str, own: str, peer: Json) -> Json:
        at = ("remotes", own)
        url = text(peer.get("proxy")).rstrip("/")
        if not re.match(r"https?://", url):
            raise ValueError(f"{where.removeprefix('peers')}.proxy: must be an http:// or https:// URL")
        entry: Json = {"url": url if re.search(r"/v\d+$", url) else f"{url}/v1"}
        if peer.get("apiKey"):
            entry["api_key"] = text(peer["apiKey"])
        entry["models"] = self._names.of_peer(own, texts(peer.get("models")), where, at)
        times = mapping(peer.get("timeouts"))
        for theirs, ours in (("connect", "connect_timeout_s"), ("responseHeader", "first_byte_timeout_s")):
            if number(times.get(theirs) or 0, 0):
                entry[ours] = times[theirs]
        for theirs in _WITHOUT_EQUIVALENT_IN_PEERS:
            if theirs in times:
                self._note(f"{where}.timeouts.{theirs}", "no equivalent", at)
        filters = filters_of(mapping(peer.get("filters")), f"{where}.filters", at, self._note)
        return entry | ({"filters": filters} if filters else {})

    # -- how many processes ------------------------------------------------------------------------------------------

    def _routing(self, value: object) -> None:
        routing = mapping(value)
        priority = mapping(
            mapping(mapping(mapping(routing.get("scheduler")).get("settings")).get("fifo")).get("priority")
        )
        if priority:
            self._note("routing.scheduler", "no equivalent: requests are served in their order")
        router = mapping(routing.get("router"))
        if mapping(router.get("settings")).get("matrix"):
            self._note("routing.router.settings.matrix", _NOT_NEEDED["matrix"])

    def _size(self) -> None:
        """As many processes as llama-swap would run at one time."""
        if not self.data.get("models"):
            self.data.pop("server_pool", None)
            return
        models: Iterable[str] = mapping(self._theirs.get("models"))
        router = mapping(mapping(self._theirs.get("routing")).get("router"))
        settings = mapping(router.get("settings"))
        by_matrix = settings.get("matrix") if router.get("use") == "matrix" else self._theirs.get("matrix")
        groups: Mapping[str, Any] = mapping(self._theirs.get("groups")) or mapping(settings.get("groups"))
        size = largest_set(mapping(by_matrix)) if by_matrix else processes(list(models), groups)
        self._pool("size", size)
        for name in staying(groups) if not by_matrix else ():
            if (entry := self.data["models"].get(self._names.known(name))) is not None:
                entry["pinned"] = True
        why = f"llama-swap would run {size} of these models at one time"
        more = "; which ones is not configured here: the least recently used one makes room"
        where = "matrix" if by_matrix else "groups" if groups else "models"
        self._note(where, f"server_pool.size: {why}{more if by_matrix or groups else ''}")
