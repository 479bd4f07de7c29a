"""Puts the parts of streamed tool calls in order. No I/O.

Source: OpenAI's API reference for the intended form (the first part has id and name; all have the call's `index`); the
deviations are those of servers: no or equal indexes, indexes from 1, names or ids with every part, ids that change or
come late, arguments as an object, repeated or after an empty object, calls that interleave.
"""

from __future__ import annotations

import re
import secrets
import string
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.chat.fold import CALL_ID_LENGTH, MAX_TOOL_CALLS

_ID_LETTERS = string.ascii_letters + string.digits
_MARKS = re.compile(r'["\\{}]')


class _BraceScan:
    """Decides whether pieces of text are a whole JSON object. Each piece is looked at once, and all of them are parsed
    once: what is not an object when its braces are closed never will be."""

    __slots__ = ("_closed", "_depth", "_escapes", "_is_whole", "_quoted", "_scanned")

    def __init__(self) -> None:
        self._scanned = 0  # pieces of which the following is known
        self._depth = 0  # of braces
        self._closed = False  # there was a closing one
        self._quoted = False  # within a string
        self._escapes = False  # behind a backslash there
        self._is_whole: bool | None = None  # None until all braces are closed

    def is_whole(self, pieces: list[str]) -> bool:
        """Whether `pieces`, to which only further ones were added since the last call, are a whole object."""
        while self._is_whole is None and self._scanned < len(pieces):
            self._scan(pieces[self._scanned])
            self._scanned += 1
        if self._is_whole is None and self._closed and self._depth <= 0 and not self._quoted:
            self._is_whole = _is_object("".join(pieces))
        return self._is_whole is True

    def _scan(self, piece: str) -> None:
        """Follow the braces outside of strings."""
        position = int(self._escapes and piece != "")
        self._escapes = self._escapes and not piece
        while (found := _MARKS.search(piece, position)) is not None:
            position = found.end()
            if found[0] == "\\":
                self._escapes = self._quoted and position == len(piece)
                position += self._quoted
            elif found[0] == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += 1 if found[0] == "{" else -1
                self._closed = self._closed or found[0] == "}"


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


class _Call:
    """One call: `number` is its position in the answer, `held` what is known of it before it is passed on (without the
    arguments), and None afterwards."""

    __slots__ = ("_scan", "arguments", "begun", "given", "held", "id", "name", "number", "unfilled")

    def __init__(self, number: int, identity: str | None) -> None:
        self.number = number
        self.given = identity  # the server's id; None if it gave none
        self.id = identity
        self.name = ""
        self.arguments: list[str] = []
        self.held: Json | None = {}
        self.begun = False  # its first part was written
        self.unfilled = False  # it began with `{}`, which may stand for arguments that follow
        self._scan = _BraceScan()

    @property
    def ready(self) -> bool:
        """Whether it can be passed on: its name is known, unless it has none."""
        return bool(self.held is not None and (self.name or "function" not in self.held))

    @property
    def complete(self) -> bool:
        """Whether its arguments are a whole JSON object, which nothing can continue."""
        return self._scan.is_whole(self.arguments)

    def hold(self, part: Json) -> None:
        """Add `part` to what is held; its arguments are in `arguments`."""
        assert self.held is not None
        function = {**self.held.get("function", {}), **part.get("function", {})}
        self.held |= part
        if function:
            self.held["function"] = function

    def release(self) -> Json:
        """All parts so far as one."""
        held, self.held = self.held, None
        assert held is not None
        if "function" in held:
            held["function"]["arguments"] = "".join(self.arguments)
        return held

    def fill(self) -> list[Json]:
        """The part with the `{}` that turned out to be its arguments; none if it has others."""
        if not self.unfilled or self.held is not None:
            return []
        self.unfilled, self.arguments = False, ["{}"]
        return [{"index": self.number, "function": {"arguments": "{}"}}]


class CallSequence:
    """The tool calls of one choice. Parts leave it one call after the other, numbered from 0, with id and name in the
    first part only, and with arguments as text. Parts of a later call are held while an earlier one is incomplete.

    A part belongs to the call with its id, else to the one with its index, else to the last one. A part with a new id
    and a name begins a call; so does one whose name shows that it cannot continue the call it would belong to. What
    follows whole arguments is left out. With `waits`, `{}` is kept until the next part shows whether others follow.
    """

    def __init__(self, *, waits: bool) -> None:
        self._waits = waits
        self._calls: list[_Call] = []
        self._by_id: dict[str, _Call] = {}
        self._by_index: dict[int, _Call] = {}
        self._open: _Call | None = None

    def pass_on(self, parts: list[Json]) -> tuple[list[Json], bool]:
        """The parts to pass on for `parts`, in order, and whether they differ from these.

        Raises: ValueError for too many calls, TypeError and AttributeError for parts that are not objects.
        """
        passed: list[Json] = []
        changed = False
        for part in parts:
            if part is None:
                continue
            call, own = self._written(part)
            changed = changed or own != _given(part)
            if call is self._open:
                passed += [own, *self._followers()]
            elif call.held is not None:  # not a complete one, that a server repeats
                changed = changed or bool(call.held)
                call.hold(own)
                passed += self._open.fill() if self._open is not None else []
                if call.ready and (self._open is None or self._open.complete):
                    passed += [self._release(call), *self._followers()]
        return passed, changed or len(passed) != len(parts)

    def rest(self) -> list[Json]:
        """The parts still held, at the end of the answer."""
        parts: list[Json] = []
        for call in self._calls:
            parts += [call.release()] if call.held is not None else []
            parts += call.fill()
        return parts

    def _release(self, call: _Call) -> Json:
        self._open = call
        return call.release()

    def _followers(self) -> list[Json]:
        """What is held of the calls that may follow now."""
        return [
            self._release(call) for call in self._calls if call.ready and self._open is not None and self._open.complete
        ]

    def _written(self, part: Json) -> tuple[_Call, Json]:
        """The call of `part`, and the part as OpenAI's reference has it."""
        function = part.get("function")
        rest = {name: value for name, value in part.items() if name not in _FIELDS and value is not None}
        if function is None and ("arguments" in part or "name" in part):
            function = {name: rest.pop(name) for name in ("name", "arguments") if name in rest}
        name, text = _name_and_arguments(function or {})
        call = self._call_of(part, name, text)
        if call.complete and (call.arguments != ["{}"] or text == "{}"):
            text = ""  # a repetition, or a brace too many
        own: Json = {"index": call.number}
        if not call.begun:
            call.begun = True
            call.id = call.id or "".join(secrets.choice(_ID_LETTERS) for _ in range(CALL_ID_LENGTH))
            own |= {"id": call.id, "type": part.get("type") or "function"}
        elif part.get("id") in (call.id, "", None):
            own |= {key: part[key] for key in ("id", "type") if part.get(key)}
        if function is not None:
            own["function"] = {key: value for key, value in function.items() if value is not None and key != "name"}
            own["function"]["arguments"] = text
            if name and not call.name:
                own["function"]["name"] = call.name = name
            if self._waits and text == "{}" and not any(call.arguments):
                call.unfilled, own["function"]["arguments"] = True, ""
            elif text:
                call.unfilled = False
                call.arguments.append(text)
        return call, own | rest

    def _call_of(self, part: Json, name: str, text: str) -> _Call:
        identity = part.get("id") if isinstance(part.get("id"), str) and part["id"] else None
        index = _number(part.get("index"))
        at_index = self._by_index.get(index) if index is not None else None
        known = self._by_id.get(identity) if identity is not None else None
        if known is not None and known is not at_index and index is not None:
            if at_index is not None and at_index.given == identity:
                known = at_index
            elif name and known.name and name != known.name:
                return self._new(identity, index)  # some servers give all calls one id
        if known is None:
            known = at_index if index is not None else (self._calls[-1] if self._calls else None)
            if known is not None and not _continues(known, identity, name, text):
                known = None
            elif known is None and self._calls and not (identity or name):
                known = self._calls[-1]  # nothing begins without a name
        if known is None:
            return self._new(identity, index)
        if index is not None:
            self._by_index[index] = known
        if identity is not None:
            self._by_id[identity], known.given = known, known.given or identity
        return known

    def _new(self, identity: str | None, index: int | None) -> _Call:
        if len(self._calls) >= MAX_TOOL_CALLS:
            raise ValueError("too many tool calls")
        call = _Call(len(self._calls), identity)
        self._calls.append(call)
        if identity is not None:
            if identity in self._by_id:
                call.id = None  # ids are unique
            self._by_id[identity] = call
        if index is not None:
            self._by_index[index] = call
        return call


_FIELDS = frozenset({"index", "id", "type", "function"})


def _given(part: Json) -> Json:
    """`part` without its empty fields."""
    return {name: value for name, value in part.items() if value is not None and value != ""}


def _continues(call: _Call, identity: str | None, name: str, text: str) -> bool:
    """Whether a part with this id (None, or not seen before), name and arguments can continue `call`."""
    if identity is not None and call.given is not None:
        return not name and not call.complete
    if not name or not call.name:
        return True
    return name == call.name and not (text.lstrip().startswith("{") and call.complete)


def _name_and_arguments(function: Json) -> tuple[str, str]:
    name, arguments = function.get("name") or "", function.get("arguments")
    if not isinstance(arguments, str):
        arguments = "" if arguments is None else orjson.dumps(arguments).decode()
    return name + "", arguments


def _number(index: Any) -> int | None:
    if isinstance(index, str) and index.isdecimal() and len(index) < 10:
        return int(index)
    if isinstance(index, float) and index.is_integer():
        return int(index)
    return index if isinstance(index, int) and not isinstance(index, bool) else None
