"""The house rules that a program can check: who imports whom, how long things are, what is done in one place only."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.nursery import STATE

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("proxy", "agents", "backends")
OURS = "llama_smart_proxy."
"""The one package that is installed; its name is left out below."""
MAX_FILE, MAX_FUNCTION = 400, 40

ROOMS: list[set[str]] = [
    {
        "proxy",
        "proxy.errors",
        "proxy.chat",
        "proxy.log",
        "proxy.store",
        "proxy.fetching",
        "proxy.knowledge.base",
        "backends.http.resolver",
        "backends.journal",
        "backends.threads",
    },
    {"proxy.config", "proxy.dialects"},
    {"agents"},
    {"backends"},
    {"proxy.access", "proxy.http", "proxy.knowledge", "proxy.metrics", "proxy.models", "proxy.tracing"},
    {"proxy.stream"},
    {"proxy.middleware"},
    {"proxy.api"},
    {"proxy.app", "proxy.generation", "proxy.registry", "proxy.reload", "proxy.serve", "proxy.systemd"},
    {"proxy.cli"},
]
"""Low to high. A module imports from its own room, without going round in circles, and from lower ones."""
BACKENDS_MAY_IMPORT = {"proxy.errors", "proxy.config", "proxy.log.redaction"}
FACE = "llama_smart_proxy"
AGENT_MACHINERY = {
    "agents.base": {"proxy.chat"},
    "agents.loader": {"agents.base", "agents.compat"},
    "agents.substitution": {"agents.redact.matching", "proxy.chat"},
    "agents.compat.adapter": {"agents.base", "proxy.chat", "proxy.errors"},
    "agents.compat.views": {
        "agents.base",
        "proxy.chat",
        "proxy.dialects.ollama.fields",
        "proxy.dialects.ollama.options",
        "proxy.errors",
    },
}
"""Modules in `agents` that are no agents, and what of ours each may import."""
TASK_MAKERS = {
    "agents/parallel/members.py",  # whoever is asked; ends with the answer
    "backends/ollama/hosts.py",  # listings in the background
    "backends/openai.py",  # listings in the background
    "backends/pool/instance.py",  # the life of a process
    "backends/pool/watch.py",  # a closer look at a silent server
    "backends/pool/pool.py",  # loads that nobody waits for, and the shutdown
    "backends/weights/downloads.py",  # one for all who wait
    "proxy/knowledge/shelves.py",  # filling an index, for all who search it
    "proxy/knowledge/repeated.py",  # the work on the queue of documents, and looks at watched folders
    "proxy/knowledge/knowledge.py",  # removals whose client may go meanwhile, ended with the knowledge base
    "proxy/api/conversations.py",  # requests for resumable streams that have lost their client
    "proxy/http/response.py",  # waiting for a slow client
    "proxy/knowledge/calibration.py",  # the measurement of a collection, ended with the knowledge base
    "proxy/middleware/afterwards.py",  # hooks after a request
    "proxy/middleware/passage.py",  # a read of an answer, for a task of an agent
    "proxy/middleware/scope.py",  # a request with agents, and whatever they start
    "proxy/models/inspection.py",  # a look at disks and servers, for all who ask
    "proxy/app.py",  # the end of a configuration, after its last request
    "proxy/reload.py",  # a reload, for all who ask
    "proxy/serve.py",  # waiting for the first of two events
}
"""Who may start a task that is not bound to an `await`: each of them holds it and ends it."""
PROVIDERS = ("backends.llamacpp.provider", "backends.llamacpp.model", "backends.ollama", "backends.pool")
"""Who runs models, and how, is known where the pieces are put together; to all others models answer for themselves."""
ASSEMBLY = {"proxy/app.py", "proxy/generation.py", "proxy/registry.py"}
APIS = {"ollama", "openai", "openai-responses", "anthropic", "responses", "native", "llama.cpp", "remote"}
APIS |= {"OLLAMA", "OPENAI", "ANTHROPIC", "RESPONSES", "NATIVE"}
"""Names of APIs and of those who run models: only a dialect, a model or the configuration depends on them."""
MAY_COMPARE = ("proxy/dialects/", "proxy/config/", "backends/")
PROCESS_MAKERS = {"backends/pool/spawn.py", "proxy/cli/simulate.py", "proxy/knowledge/reading/process.py"}


@dataclass(frozen=True)
class Module:
    """One Python file of ours."""

    path: str
    name: str
    source: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name if self.path.endswith("__init__.py") else self.name.rpartition(".")[0]


@cache
def modules(*folders: str) -> tuple[Module, ...]:
    """The modules below these folders, by path."""
    return tuple(map(module_in, sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))))


@cache
def module_in(file: Path) -> Module:
    path = file.relative_to(ROOT)
    source = file.read_text(encoding="utf-8")
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    return Module(path.as_posix(), name, source, ast.parse(source))


def ours() -> tuple[Module, ...]:
    return modules(*PACKAGES)


@cache
def known() -> set[str]:
    """The names of all modules of ours."""
    return {module.name for module in ours()}


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Line and full name of whatever of ours a module imports at run time, wherever in it."""
    typing_only = {
        id(inner)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(module.tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.removeprefix(OURS)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}:{node.lineno}: imports are absolute here"
            base = (node.module or "").removeprefix(OURS)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known() else base


def our_imports(module: Module) -> Iterator[tuple[int, str]]:
    return ((line, name) for line, name in imports(module) if name.partition(".")[0] in PACKAGES)


def room(name: str) -> int | None:
    """The place in the order of the room that a module is in."""
    while name:
        for number, names in enumerate(ROOMS):
            if name in names:
                return number
        name = name.rpartition(".")[0]
        if name == "proxy":  # a new room of `proxy` needs a place of its own
            return None
    return None


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def calls(module: Module) -> Iterator[tuple[ast.Call, str]]:
    """Every call, with what is called as text."""
    return ((node, ast.unparse(node.func)) for node in ast.walk(module.tree) if isinstance(node, ast.Call))


# -- who imports whom --------------------------------------------------------------------------------------------------


def test_every_room_of_the_proxy_has_a_place_in_the_order() -> None:
    assert [module.path for module in ours() if room(module.name) is None] == []


def test_imports_go_downwards() -> None:
    wrong = {
        f"{module.path} imports {name}"
        for module in ours()
        for _, name in our_imports(module)
        if name != "proxy" and (room(name) or 0) > (room(module.name) or 0)
    }
    assert wrong == set()


def test_imports_do_not_go_round_in_circles() -> None:
    graph = {module.name: {name for _, name in our_imports(module)} - {module.name} for module in ours()}
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"among these: {', '.join(sorted(graph))}"
        for name in free:
            del graph[name]


def test_backends_know_errors_configuration_and_redaction_of_the_proxy_and_no_more() -> None:
    wrong = [
        f"{module.path}:{line} imports {name}"
        for module in modules("backends")
        for line, name in imports(module)
        if (name.startswith(("proxy", "agents")) and name not in BACKENDS_MAY_IMPORT)
        or name.startswith("aiohttp.web")
        or (name == "aiohttp" and re.search(r"aiohttp.*\bweb\b", module.source.splitlines()[line - 1]))
    ]
    assert wrong == []


def test_who_runs_a_model_is_asked_by_no_module_of_the_proxy() -> None:
    wrong = [
        f"{module.path}:{line} imports {name}"
        for module in modules("proxy")
        for line, name in imports(module)
        if name.startswith(PROVIDERS) and module.path not in ASSEMBLY
    ]
    assert wrong == []


def test_no_branch_depends_on_which_api_or_which_backend_it_is() -> None:
    def named(node: ast.AST) -> bool:
        constant = isinstance(node, ast.Constant) and node.value in APIS
        return constant or (isinstance(node, ast.Name) and node.id in APIS)

    wrong = [
        f"{module.path}:{node.lineno}: {ast.unparse(node)}"
        for module in modules("proxy")
        if not module.path.startswith(MAY_COMPARE)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Compare) and any(map(named, (node.left, *node.comparators)))
    ]
    assert wrong == []


def test_no_branch_depends_on_the_class_of_a_provider_or_a_model() -> None:
    classes = {
        node.name
        for module in modules("backends")
        for node in module.tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Model", "Remotes", "Ollama", "LlamaCpp", "Provider"))
    }
    wrong = [
        f"{module.path}:{node.lineno}: {ast.unparse(node)}"
        for module in ours()
        for node, called in calls(module)
        if called == "isinstance" and any(isinstance(name, ast.Name) and name.id in classes for name in ast.walk(node))
    ]
    assert {"SpawnedModel", "LlamaCppModel", "OllamaModel", "RemoteModel"} <= classes
    assert wrong == []


def test_agents_import_the_public_face_and_their_own_package_and_no_more() -> None:
    wrong = [
        f"{module.path}:{line} imports {name}"
        for module in modules("agents")
        for line, name in our_imports(module)
        if name not in AGENT_MACHINERY.get(module.name, ())
        and not (module.package != "agents" and f"{name}.".startswith(f"{module.package}."))
    ]
    assert wrong == []


def test_the_public_face_has_what_it_lists() -> None:
    face = importlib.import_module(FACE)
    assert face.__all__ == sorted(face.__all__) and set(face.__all__) <= set(dir(face))
    assert all(getattr(face, name) is not None for name in face.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = face.nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_our_packages_are_not_those_of_other_projects_with_the_same_name(package: str) -> None:
    spec = importlib.util.find_spec(f"{OURS}{package}")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).resolve().is_relative_to(ROOT)


# -- how long things are, and that they are explained ------------------------------------------------------------------


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {module.path: module.source.count("\n") for module in modules(*PACKAGES, "tests")}
    assert {path: length for path, length in lengths.items() if length > MAX_FILE} == {}


def test_no_function_is_longer_than_40_lines() -> None:
    wrong = []
    for module in modules(*PACKAGES, "tests"):
        for node in functions(module):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                length -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            if length > MAX_FUNCTION:
                wrong.append(f"{module.path}:{node.lineno} {node.name}: {length} lines")
    assert wrong == []


def test_every_module_and_every_public_class_and_function_says_what_it_is_for() -> None:
    wrong = [module.path for module in modules(*PACKAGES, "src", "tests") if not ast.get_docstring(module.tree)]
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    wrong += [
        f"{module.path}:{node.lineno} {node.name}"
        for module in ours()
        for node in module.tree.body
        if isinstance(node, definitions) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert wrong == []


# -- what is done in one place, or not at all --------------------------------------------------------------------------


def test_tasks_are_started_only_by_those_who_end_them() -> None:
    makers = ("create_task", "ensure_future")
    wrong = [
        f"{module.path}:{node.lineno}"
        for module in ours()
        for node, called in calls(module)
        if called.rpartition(".")[2] in makers and module.path not in TASK_MAKERS
    ]
    dropped = [
        f"{module.path}:{node.lineno} does not keep the task"
        for module in ours()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).rpartition(".")[2] in makers
    ]
    assert wrong + dropped == []


def test_processes_are_started_in_one_place() -> None:
    makers = re.compile(
        r"subprocess\.\w+|os\.(system|popen|fork\w*|spawn\w+|posix_spawn\w*)|.*create_subprocess_\w+|.*subprocess_(exec|shell)"
    )
    sites = [(module.path, called) for module in ours() for _, called in calls(module) if makers.fullmatch(called)]
    assert {path for path, _ in sites} <= PROCESS_MAKERS
    assert [called for path, called in sites if path == "backends/pool/spawn.py"] == ["subprocess.Popen"]


def done_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """All of a module's code that runs when it is imported."""
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield inner
            yield from done_at_import(inner)


def test_what_a_module_knows_of_its_process_is_known_to_the_tests_that_fork() -> None:
    """A proxy of the tests is forked from a process that has imported everything (`tests/support/nursery.py`)."""
    asking = re.compile(r"(secrets|random|uuid)\.\w+|time\.(time|monotonic)(_ns)?|os\.(getpid|getenv|urandom)|.*\.now")
    found = {
        (f"{OURS}{module.name}", ast.unparse(node.targets[0]))
        for module in ours()
        for node in done_at_import(module.tree)
        if isinstance(node, ast.Assign)
        and any(isinstance(call, ast.Call) and asking.fullmatch(ast.unparse(call.func)) for call in ast.walk(node))
    }
    assert found == set(STATE.items())


def test_a_shell_is_never_asked() -> None:
    wrong = [
        f"{module.path}:{node.lineno}"
        for module in ours()
        for node, _ in calls(module)
        if any(keyword.arg == "shell" for keyword in node.keywords)
    ]
    assert wrong == []


def test_doubles_are_programs() -> None:
    wrong = [
        f"{module.path}:{line} imports {name}"
        for module in modules(*PACKAGES, "tests")
        for line, name in imports(module)
        if name.startswith(("unittest", "mock", "pytest_mock"))
    ]
    assert wrong == []


def test_nothing_is_caught_without_a_name() -> None:
    bare = [
        f"{module.path}:{node.lineno}"
        for module in ours()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []
