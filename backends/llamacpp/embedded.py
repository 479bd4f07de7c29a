"""`python -m llama_smart_proxy.backends.llamacpp.embedded`: llama-server's command line on the wheel `xllamacpp`.

Takes the flags listed in `backends.flags`, each with llama-server's meaning and default, and runs llama.cpp's own HTTP
server. Of the environment only `LLAMA_API_KEY` is read, as llama-server reads it; `LLAMA_ARG_*` is not.

Exit status: 0 after SIGTERM or SIGINT, 1 when the server cannot start (no model, corrupt file, port taken, wheel
missing), 2 for a bad command line. Each failure is one line on stderr, beside llama.cpp's own log lines.

Signals act as in llama-server: while the model loads any signal kills. Later the first SIGTERM or SIGINT stops the
server; a live stream then gets no more tokens, and the process stays until its client has gone, 30 s at most. A second
signal ends the process at once.

Source: llama.cpp `tools/server/server.cpp`, build b11434.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llama_smart_proxy.backends.llamacpp.flags import Member, UsageError, parse, usage

DEFAULT_PORT = 8080
AUTO_SLOTS = 4

# A sampler set on the command line beats the one the model file recommends; llama.cpp keeps that as a bit each.
SAMPLER_BITS = {
    "top_k": "TOP_K",
    "top_p": "TOP_P",
    "min_p": "MIN_P",
    "xtc_probability": "XTC_PROBABILITY",
    "xtc_threshold": "XTC_THRESHOLD",
    "temp": "TEMP",
    "penalty_last_n": "PENALTY_LAST_N",
    "penalty_repeat": "PENALTY_REPEAT",
    "mirostat": "MIROSTAT",
    "mirostat_tau": "MIROSTAT_TAU",
    "mirostat_eta": "MIROSTAT_ETA",
}


def complete(fields: dict[str, Any]) -> dict[str, Any]:
    """Adds what llama-server derives: defaults, automatic slots, one batch for embeddings, no echo of web origins.

    Raises: `UsageError` when no model is named.
    """
    done = {"port": DEFAULT_PORT, "cors_origins": "", "cors_credentials": False, **fields}
    if "model.path" not in done:
        raise UsageError("-m FILE is required: the model to load")
    done.setdefault("model_alias", {done["model.path"]})
    if done.get("n_parallel", -1) < 0:
        done |= {"n_parallel": AUTO_SLOTS, "kv_unified": True}
    if "cpuparams.n_threads" in done:
        done.setdefault("cpuparams_batch.n_threads", done["cpuparams.n_threads"])
    if done.get("embedding"):
        done["n_batch"] = min(done.get("n_batch", 2048), done.get("n_ubatch", 512))
    if "timeout" in done:
        done |= dict.fromkeys(("timeout_read", "timeout_write"), done.pop("timeout"))
    if (thinking := done.get("enable_reasoning", -1)) >= 0:
        switch = {"enable_thinking": "true" if thinking else "false"}
        done["default_template_kwargs"] = done.get("default_template_kwargs", {}) | switch
    return done


def to_params(wheel: ModuleType, fields: Mapping[str, Any]) -> Any:
    """A `CommonParams` of `wheel` with the fields set."""
    params = wheel.CommonParams()
    for field, value in fields.items():
        *path, last = field.split(".")
        owner = params
        for name in path:
            owner = getattr(owner, name)
        setattr(owner, last, _native(wheel, field, value))
        if path == ["sampling"] and last in SAMPLER_BITS:
            bit = getattr(wheel.common_params_sampling_config, f"COMMON_PARAMS_SAMPLING_CONFIG_{SAMPLER_BITS[last]}")
            owner.user_sampling_config |= int(bit)
    return params


def _native(wheel: ModuleType, field: str, value: Any) -> Any:
    if isinstance(value, Member):
        return getattr(getattr(wheel, value.enum), value.name)
    if field == "lora_adapters":
        return [wheel.CommonAdapterLoraInfo(path, scale) for path, scale in value]
    return list(value) if isinstance(value, tuple) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until a signal ends it; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", "--usage"} & set(arguments):
        print(usage())
        return 0
    try:
        fields = complete(parse(arguments, os.environ))
    except UsageError as error:
        return _fail(str(error), 2)
    if not Path(fields["model.path"]).is_file():
        return _fail(f"model file not found: {fields['model.path']}")
    try:
        wheel = importlib.import_module("xllamacpp")
    except ModuleNotFoundError:
        return _fail("the wheel xllamacpp is not installed: pip install 'llama-smart-proxy[embedded]'")
    except ImportError as error:
        return _fail(f"the wheel xllamacpp cannot be loaded here: {error}")
    return serve(wheel, fields)


def serve(wheel: ModuleType, fields: Mapping[str, Any]) -> int:
    """Loads the model, serves until the first SIGTERM or SIGINT, then stops; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would only note it until the load is over
    try:
        server = wheel.Server(to_params(wheel, fields))
    except RuntimeError as error:
        return _fail(f"llama.cpp could not start, its own log lines say why: {error}")
    print(f"backends.embedded: ready, listening on {server.listening_address}", file=sys.stderr, flush=True)
    _wait_for_signal()
    del server  # the wheel stops the server here; it returns when the last client has gone
    return 0


def _wait_for_signal() -> None:
    """Returns at the first SIGTERM or SIGINT and leaves both deadly, so that a second one needs no interpreter.

    Python runs handlers in the main thread only, and that one will be busy inside the wheel. The wake-up descriptor is
    written from whichever thread the kernel picked.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    os.read(reader, 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


def _fail(reason: str, status: int = 1) -> int:
    print(f"backends.embedded: {reason}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
