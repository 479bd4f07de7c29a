"""Status endpoints for operators."""

from __future__ import annotations

import time

from aiohttp import web

from llama_smart_proxy.agents.base import Agent
from llama_smart_proxy.backends.base import Problem
from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.middleware.chain import description
from llama_smart_proxy.proxy.middleware.plugins import HOOKS, Plugin

STARTED = time.monotonic()
_OF_OPERATORS = {"source", "error", "calls", "errors", "mean_latency_ms"}


async def health(http: web.BaseRequest) -> web.Response:
    """`GET /health`: 200 while requests are served, 503 once the proxy is stopping.

    `instances` has one object for each model that has a process or waiting requests, or whose last start failed. The
    status is `degraded` if something that is configured cannot be served; `problems` has the reasons, as found now.
    `proxy` and `upstream` are kept for clients of one of the replaced projects. Clients without scope admin get these
    and the status alone.
    """
    proxy = http[PROXY]
    draining = proxy.draining.is_set()
    status = proxy.router.status()
    problems = await proxy.inspection.problems()
    for instance in status.instances:
        if "stalled" in instance:
            problems.append(Problem(proxy.config.path_of(instance["model"]), f"stalled: {instance['stalled']}"))
    stale = proxy.reloads.problems
    problems += [Problem("configuration", f"not reloaded: {problem}") for problem in stale]
    code = 503 if draining else 200
    public = {
        "status": "unhealthy" if draining else "degraded" if problems else "healthy",
        "proxy": "stopping" if draining else "Ok",
        "upstream": "error" if any("error" in server for server in status.servers) else "Ok",
    }
    if not proxy.grant.is_admin:
        return web.json_response(public, status=code)
    body = public | {
        "problems": [{"where": problem.where, "message": problem.message} for problem in problems],
        "config_stale": bool(stale),
        "version": __version__,
        "uptime_s": round(time.monotonic() - STARTED, 1),
        "instances": status.instances,
        "remotes": status.servers,
        "agents": {
            "loaded": [plugin.name for plugin in proxy.chain.plugins if plugin.loaded is not None],
            "failed": proxy.chain.plugins.broken,
        },
        "downloads": proxy.router.downloads.status(),
        "history": proxy.history.status(),
    }
    return web.json_response(body, status=code)


async def reload_configuration(http: web.BaseRequest) -> web.Response:
    """`POST /admin/reload`: reads the configuration again, and answers when it applies: with what has changed, or, with
    status 400, with all problems for which nothing has."""
    outcome = await http[PROXY].reloads.reload("POST /admin/reload")
    if not outcome.problems:
        return web.json_response({"reloaded": True, **outcome.changes})
    message = f"the configuration was not reloaded: {'; '.join(outcome.problems)}"
    error = {"message": message, "type": "invalid_request_error", "code": "invalid_configuration", "param": None}
    return web.json_response({"error": {**error, "problems": list(outcome.problems)}}, status=400)


async def plugins_listed(http: web.BaseRequest) -> web.Response:
    """`GET /plugins`: every enabled agent that the client may call, with its state and counters. Clients without scope
    admin get neither counters nor errors nor the files."""
    proxy = http[PROXY]
    listed = [_plugin(plugin) for plugin in proxy.chain.plugins if proxy.chain.may_call(plugin.name)]
    if not proxy.grant.is_admin:
        listed = [{name: value for name, value in entry.items() if name not in _OF_OPERATORS} for entry in listed]
    return web.json_response(listed)


def _plugin(plugin: Plugin) -> dict[str, object]:
    """`mean_latency_ms` is the mean time that it added to its requests, side calls included."""
    entry: dict[str, object] = {
        "name": plugin.name,
        "status": "failed" if plugin.error is not None else "loaded",
        "source": plugin.source.label,
    }
    if plugin.error is not None:
        entry["error"] = plugin.error
    if plugin.loaded is not None:
        cls = type(plugin.loaded.agent)
        entry |= {
            "command": f"/{cls.command}" if cls.command is not None else None,
            "description": description(plugin.loaded),
            "hooks": [hook for hook in HOOKS if getattr(cls, hook) is not getattr(Agent, hook)],
            "always": plugin.always,
            "required": plugin.settings.required,
            "on_error": plugin.settings.on_error,
            "options_per_call": sorted(cls.per_call),
            "config_schema": cls.Config.model_json_schema(),
        }
    counts = plugin.counts
    mean_ms = counts.spent_s / counts.calls * 1000 if counts.calls else 0.0
    return entry | {"calls": counts.calls, "errors": counts.failures, "mean_latency_ms": round(mean_ms, 3)}
