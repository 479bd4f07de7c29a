"""Adapts a plugin of the replaced projects to the agent interface."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llama_smart_proxy.agents.base import Agent, Context
from llama_smart_proxy.agents.compat.standins import BaseAgent
from llama_smart_proxy.agents.compat.views import OllamaView, OpenAIView, View, edits, rewritten
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, ChunkStream, Fold, Json, Reply
from llama_smart_proxy.proxy.errors import UpstreamFailed

MAX_THREADS = 16
"""Maximum number of threads of one plugin. A thread that hangs stays: Python cannot end it."""
ANSWER_LIMIT = 64 * 2**20
"""Approximate maximum size in bytes of an answer that is collected."""
_VIEW = "view"


class Misfit(Exception):
    """A plugin of the replaced projects cannot be used; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class Form:
    """One of the two plugin interfaces: the names of its hooks, and their view of a chat."""

    request: str
    response: str
    view: Callable[[ChatRequest, Context], View]


FORMS = (Form("on_request", "on_response", OllamaView), Form("process_request", "process_response", OpenAIView))


def manifest(folder: Path) -> Json | None:
    """The `config.json` beside a plugin; None if there is none. Raises: Misfit if it cannot be read."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as exc:
        raise Misfit(f"config.json cannot be read: {exc}") from exc
    if not isinstance(data, dict):
        raise Misfit("config.json is not an object")
    return data


def adapted(classes: Collection[type], path: Path) -> list[type[Agent]]:
    """The plugin among `classes`, which the file or folder `path` defines, as an agent; empty if none of them has the
    hooks of a plugin. Its only object is created here.

    Raises: Misfit; any exception of the plugin's constructor.
    """
    for form in FORMS:
        found = [cls for cls in classes if _is_plugin(cls, form)]
        if len(found) > 1:  # one of the projects had the class named after its folder
            expected = _name_of(path).replace("_", "").lower()
            found = [cls for cls in found if cls.__name__.lower() == expected] or found
        if len(found) > 1:
            raise Misfit(f"contains several plugins ({', '.join(sorted(cls.__name__ for cls in found))}); keep one")
        if found:
            return [_agent_of(found[0], form, path)]
    return []


class _Plugin(Agent):
    """Runs the hooks of a plugin as in its original project."""

    plugin: ClassVar[Any]
    form: ClassVar[Form]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._threads = asyncio.Semaphore(MAX_THREADS)

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        view = ctx.state[_VIEW] = self.form.view(request, ctx)
        if not _overrides(type(self.plugin), self.form.request):
            return None
        return view.take(await self._run(self.form.request, view.shown))

    async def _run(self, name: str, *args: Json) -> Any:
        """The result of the hook. A plain function runs in a thread, as it may block."""
        hook = getattr(self.plugin, name)
        if inspect.iscoroutinefunction(hook):
            return await hook(*args)
        result = await self._in_thread(hook, args)
        return await result if inspect.isawaitable(result) else result

    async def _in_thread(self, hook: Callable[..., Any], args: tuple[Json, ...]) -> Any:
        """Run the hook in a daemon thread. Not in an executor: its threads are joined at exit, so that one that hangs
        would block the exit. If the request ends first, the call continues, and its result is dropped."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            self._threads.release()
            if future.done():
                return
            if error is not None:
                future.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
            else:
                future.set_result(result)

        def run() -> None:
            result, error = None, None
            try:
                result = hook(*args)
            except BaseException as exc:  # re-raised in the request
                error = exc
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, result, error)

        await self._threads.acquire()
        try:
            threading.Thread(target=run, daemon=True, name=f"plugin {self.plugin.__class__.__name__}").start()
        except RuntimeError:
            self._threads.release()
            raise
        return await future


class _RewritingPlugin(_Plugin):
    """A plugin with a response hook. It gets the whole answer, so nothing is streamed before that is complete."""

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        chunks, whole, size = [], Fold(), 0
        async for chunk in stream:
            size += chunk.size
            if size > ANSWER_LIMIT:
                raise UpstreamFailed(f"the answer is over {ANSWER_LIMIT // 2**20} MiB", code="upstream_error")
            whole.add(chunk.seen)
            chunks.append(chunk)
        reply, view = Reply(whole.completion()), ctx.state[_VIEW]
        answer = view.answer(reply)
        given = dict(answer)
        hook = getattr(self.plugin, self.form.response)
        args = (view.shown, answer) if _takes_two(hook) else (answer,)
        returned = await self._run(self.form.response, *args)
        texts, added = edits(answer if returned is None else returned, reply, given)
        json.dumps(added)  # raises here, as a failure of the plugin, if it cannot be sent
        for chunk in rewritten(chunks, texts, added):
            yield chunk


def _agent_of(cls: type, form: Form, path: Path) -> type[Agent]:
    plugin = cls()
    name = getattr(plugin, "name", None) if form is FORMS[0] else _name_of(path)
    if not isinstance(name, str):
        raise Misfit(f"{cls.__name__} has no name, which is the command that it is called by")
    described = (manifest(path) or {}).get("description") if form is not FORMS[0] and path.is_dir() else None
    base = _RewritingPlugin if _overrides(cls, form.response) else _Plugin
    text = described if isinstance(described, str) else cls.__doc__ or ""
    fields = {"plugin": plugin, "form": form, "command": name.lower(), "__doc__": text}
    agent: type[Agent] = type(cls.__name__, (base,), fields)
    return agent


def _name_of(path: Path) -> str:
    return path.stem if path.suffix == ".py" else path.name


def _is_plugin(cls: type, form: Form) -> bool:
    hooks = [name for name in (form.request, form.response) if _overrides(cls, name)]
    return bool(hooks) and not (issubclass(cls, Agent) or inspect.isabstract(cls) or cls.__name__.startswith("_"))


def _overrides(cls: type, hook: str) -> bool:
    """Whether the class defines this hook, other than by the stand-in for its base class."""
    return callable(getattr(cls, hook, None)) and getattr(cls, hook) is not getattr(BaseAgent, hook, None)


def _takes_two(hook: Callable[..., Any]) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(hook).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Parameter.VAR_POSITIONAL in kinds or sum(kind in positional for kind in kinds) > 1
