"""The fields of a model whose server is started by a command of its own."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from llama_smart_proxy.proxy.config import shapes
from llama_smart_proxy.proxy.config.command_line import split_command
from llama_smart_proxy.proxy.config.section import Section

PLACEHOLDERS = frozenset({"PORT", "HOST", "MODEL_ID", "API_KEY", "PID"})
"""What `${...}` stands for in the fields below, and in `env`, in place of variables of the environment; it is filled in
when a process is started, `PID` in `cmd_stop` alone."""
FILLED = ("cmd", "cmd_stop", "url", "env")
"""The fields with placeholders, in a model that has `cmd`."""
_PLACEHOLDER = re.compile(r"\$\{(" + "|".join(sorted(PLACEHOLDERS)) + r")\}")
_CONTAINERS = {"docker", "podman", "nerdctl", "ssh", "kubectl", "systemctl", "systemd-run", "lxc", "distrobox"}
"""Programs that have a server started by another process than themselves."""


def fill(text: str, values: dict[str, str]) -> str:
    """`text` with its placeholders replaced by their `values`; one without a value stays."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)


def placeholders(*texts: str | None) -> set[str]:
    """The names of the placeholders in `texts`."""
    return {name for text in texts for name in _PLACEHOLDER.findall(text or "")}


def _words(value: object) -> object:
    return split_command(value) if isinstance(value, str) else value


def _check_url(url: str) -> str:
    return url if shapes.http_url(fill(url, {"PORT": "1", "HOST": "127.0.0.1"})) else ""


def _check_path(path: str) -> str:
    if path != "none" and not re.fullmatch(r"/[^\s#]*", path):
        raise ValueError("must be a path such as /health, or none")
    return path


Words = Annotated[
    list[shapes.Text],
    BeforeValidator(_words),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "number", "boolean"]}}]}
    ),
]


class CommandConfig(Section):
    """A server of any kind with an OpenAI-style API, started by the proxy."""

    cmd: Words = Field(
        default_factory=list,
        description="The command that runs the model's server, in place of weights: a program and its arguments, split "
        "as args is; no shell is involved. ${PORT}, ${HOST}, ${MODEL_ID} and ${API_KEY} are filled in.",
    )
    cmd_stop: Words = Field(
        default_factory=list,
        description="The command that ends it, such as `docker stop ${MODEL_ID}`; ${PID} is the process of cmd. What "
        "does not end within stop_timeout_s gets SIGTERM, then SIGKILL.",
    )
    url: Annotated[str, AfterValidator(_check_url)] | None = Field(
        default=None, description="Where its server is reached; by default http://${HOST}:${PORT}, with cmd alone."
    )
    check_endpoint: Annotated[str, AfterValidator(_check_path)] = Field(
        default="/health",
        description="The path at which its server answers 200 once it is ready; none: it is as soon as it accepts "
        "connections.",
    )
    served_name: str | None = Field(default=None, description="The model's name in requests to its server.")
    apis: Annotated[list[Literal["openai", "responses", "anthropic", "native"]], BeforeValidator(shapes.comma_list)] = (
        Field(
            default=["openai"],
            min_length=1,
            description="The APIs that its server has; native is llama-server's own. Clients of others are translated.",
        )
    )

    @property
    def is_elsewhere(self) -> bool:
        """Whether another process than that of `cmd` listens, as far as the configuration shows: a container's."""
        names = {word.rpartition("/")[2] for word in self.cmd[:3]}
        return bool(self.cmd_stop) or not names.isdisjoint(_CONTAINERS)
