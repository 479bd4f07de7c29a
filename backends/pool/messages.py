"""Parts of messages about a process: how it ended, and what it printed, without secrets."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping

from llama_smart_proxy.proxy.log.redaction import redacted

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
"""Also matches names that are hardly those of secrets, such as `TOKENIZERS_PARALLELISM`: a value that is blanked in a
log does no harm. Which variables a server inherits is decided more exactly, by `launcher.is_kept_back`."""


def describe_exit(returncode: int) -> str:
    """`exited with code 3`, `was killed by SIGSEGV`. A shell in between turns signal n into code 128 + n."""
    if returncode < 0:
        hint = " (out of memory?)" if -returncode == signal.SIGKILL else ""
        return f"was killed by {_signal_name(-returncode)}{hint}"
    hint = f" ({_signal_name(returncode - 128)})" if 128 < returncode < 128 + 32 else ""
    return f"exited with code {returncode}{hint}"


def without_secrets(text: str, env: Mapping[str, str], *secrets: str) -> str:
    """`text` with `secrets`, every value of `env` whose name looks like that of one, and what the log does not show,
    replaced by `***`: clients get what a server printed before it ended, which may be its arguments."""
    named = [value for name, value in env.items() if SECRET_NAME.search(name) and len(value) >= 4]
    for secret in (*secrets, *named):
        text = text.replace(secret, "***")
    return redacted(text)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
