"""Plugins of the replaced projects: how they are imported, what they see of a chat, and what comes back of it."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_smart_proxy import ChatRequest, Chunk, Reply
from llama_smart_proxy.agents.compat.views import OllamaView, OpenAIView, edits, rewritten
from llama_smart_proxy.agents.loader import AgentSource, AgentUnusable
from llama_smart_proxy.proxy.chat import EXTENSIONS, Fold
from llama_smart_proxy.proxy.dialects import ollama, openai

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}
PLUGIN = """
from src.shared.base_agent import BaseAgent
from plugins.NAME.words import WORD

class Plugin(BaseAgent):
    name = WORD
    base = BaseAgent
    async def on_request(self, request):
        return request
"""


@pytest.fixture(autouse=True)
def untouched_modules() -> Iterator[None]:
    """Whatever a test imports under the names of the replaced projects, it leaves nothing of it."""
    before = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] in ("src", "shared", "plugins")}
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("src", "shared", "plugins")]:
        if name not in before:
            del sys.modules[name]


def plugin(folder: Path, name: str = "word_plugin", source: str = PLUGIN, word: str = "word") -> AgentSource:
    (folder / name).mkdir(parents=True)
    (folder / name / "agent.py").write_text(source.replace("NAME", name))
    (folder / name / "words.py").write_text(f"WORD = {word!r}\n")
    return AgentSource(name, folder / name)


def context(server: str = "ollama", api: str = "/api/chat") -> Any:
    return SimpleNamespace(server=server, api=api)


def ollama_request(**body: Any) -> ChatRequest:
    return ollama.CHAT.decode({"model": "m", **copy.deepcopy(body)})


# -- imports -----------------------------------------------------------------------------------------------------------


def test_the_stand_ins_are_there_for_the_import_alone(tmp_path: Path) -> None:
    before = set(sys.modules)
    cls = plugin(tmp_path / "somewhere").load()
    assert (cls.command, cls.__name__) == ("word", "Plugin")
    left = {name for name in set(sys.modules) - before if name.partition(".")[0] in ("shared", "plugins")}
    assert left == set() and "src.shared.base_agent" not in sys.modules


def test_two_plugins_do_not_get_each_others_modules(tmp_path: Path) -> None:
    places = [plugin(tmp_path / word, word=word) for word in ("one", "two")]
    assert [place.load().command for place in places] == ["one", "two"]
    (tmp_path / "one" / "word_plugin" / "words.py").write_text("WORD = 'three'\n")
    assert places[0].load().command == "three", "nor what was there before"


def test_the_real_modules_go_before(tmp_path: Path) -> None:
    (tmp_path / "src" / "shared").mkdir(parents=True)
    (tmp_path / "src" / "__init__.py").touch()
    (tmp_path / "src" / "shared" / "__init__.py").touch()
    (tmp_path / "src" / "shared" / "base_agent.py").write_text("class BaseAgent:\n    real = True\n")
    sys.modules.pop("src", None)  # the folder of that name in this checkout, if something has found it
    sys.path.insert(0, str(tmp_path))
    place = plugin(tmp_path / "plugins")
    cls: Any = place.load()
    assert cls.plugin.base.real is True
    assert "src.shared.base_agent" in sys.modules, "it is theirs, and stays"


def test_packages_of_these_names_are_imported_only_by_who_asks_for_them(tmp_path: Path) -> None:
    for name in ("src", "shared", "plugins"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not asked for')\n")
    sys.modules.pop("src", None)
    sys.path.insert(0, str(tmp_path))
    assert plugin(tmp_path / "mine", "a", "class A:\n    def process_request(self, r): ...\n").load().command == "a"
    with pytest.raises(AgentUnusable, match="not asked for"):
        plugin(tmp_path / "mine", "b").load()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("class A:\n    name = 'a'\n", "contains no class derived from Agent"),
        ("class A:\n    async def on_request(self, r): ...\n", "A has no name, which is the command"),
        (
            "class A:\n    def process_request(self, r): ...\nclass B(A):\n    pass\n",
            "contains several plugins (A, B); keep one",
        ),
        ("class A:\n    def __init__(self, x): ...\n    def process_request(self, r): ...\n", "TypeError: "),
        ("class A:\n    name = '42 words'\n    async def on_request(self, r): ...\n", "its command '42 words' must"),
        ("from src.shared.nothing import x\n", "ModuleNotFoundError: No module named 'src.shared.nothing'"),
    ],
)
def test_what_cannot_be_a_plugin_is_said(tmp_path: Path, source: str, words: str) -> None:
    with pytest.raises(AgentUnusable) as caught:
        plugin(tmp_path, "odd", source).load()
    assert str(caught.value).startswith(words)


def test_of_several_classes_the_one_named_after_the_folder_counts(tmp_path: Path) -> None:
    source = "class Base:\n    def process_request(self, r): ...\nclass OldOne(Base):\n    pass\n"
    assert plugin(tmp_path, "old_one", source).load().__name__ == "OldOne"


def test_it_is_described_by_its_config_json_or_its_docstring(tmp_path: Path) -> None:
    place = plugin(tmp_path, "a", "class A:\n    'Its own.'\n    def process_request(self, r): ...\n")
    assert place.load().__doc__ == "Its own."
    for config, text in (({"description": "Set."}, "Set."), ({"description": 7}, "Its own.")):
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        assert place.load().__doc__ == text


def test_one_that_does_not_look_at_answers_leaves_them_streaming(tmp_path: Path) -> None:
    from llama_smart_proxy import Agent

    assert plugin(tmp_path).load().on_response is Agent.on_response
    both = "class A:\n    name = 'a'\n    async def on_response(self, answer): ...\n"
    assert plugin(tmp_path, "both", both).load().on_response is not Agent.on_response


# -- requests ----------------------------------------------------------------------------------------------------------


def test_an_ollama_client_s_request_is_shown_as_it_was_sent() -> None:
    said = {
        "messages": [{"role": "user", "content": "Hello"}],
        "options": {"temperature": 0.5, "num_ctx": 2048, "seed": 3},
        "format": "json",
        "think": False,
        "keep_alive": "5m",
        "stream": False,
    }
    view = OllamaView(ollama_request(**said), context())
    assert view.shown == {"model": "m", **said}


@pytest.mark.parametrize("copied", [False, True], ids=["in place", "a copy"])
def test_what_is_not_edited_goes_to_the_server_as_the_client_sent_it(copied: bool) -> None:
    messages = [
        {"role": "user", "content": "Look", "images": ["aaaa"]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1.0}}}]},
        {"role": "tool", "content": "7", "tool_name": "f"},
        {"role": "user", "content": "Hello"},
    ]
    said = {"messages": messages, "options": {"num_ctx": 2048, "num_predict": 5.0}, "keep_alive": 60}
    for make in (OllamaView, OpenAIView):
        request = ollama_request(**said)
        view: Any = make(request, context())
        edited = copy.deepcopy(view.shown) if copied else view.shown
        edited["messages"][-1]["content"] = "Goodbye"
        edited["messages"].insert(0, {"role": "system", "content": "Be brief."})
        assert view.take(edited) is None
        _, body = ollama.WIRE.encode(request)
        assert body["messages"][1:-1] == messages[:-1]
        assert [body["messages"][place]["content"] for place in (0, -1)] == ["Be brief.", "Goodbye"]
        assert {name: body[name] for name in ("options", "keep_alive")} == {
            name: said[name] for name in ("options", "keep_alive")
        }


def test_the_text_of_a_message_with_parts_is_edited_and_the_parts_stay() -> None:
    parts = [PICTURE, {"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    for edited, expected in (
        ("three", [{"type": "text", "text": "three"}, PICTURE]),
        ("", [PICTURE]),
        ("one\ntwo", parts),
    ):
        request = ChatRequest({"model": "m", "messages": [{"role": "user", "content": copy.deepcopy(parts)}]})
        view = OllamaView(request, context())
        assert view.shown["messages"][0]["content"] == "one\ntwo"
        view.shown["messages"][0]["content"] = edited
        view.take(None)
        assert request.messages[0]["content"] == expected


def test_a_new_num_ctx_reaches_an_ollama_and_nobody_else() -> None:
    for server, options in (("ollama", {"num_ctx": 4096}), ("remote", {})):
        request = ollama_request(messages=[{"role": "user", "content": "Hi"}], options={"num_ctx": 2048, "top_k": 5})
        view = OllamaView(request, context(server))
        view.shown["options"] |= {"num_ctx": 4096}
        view.take({**view.shown, "documents": ["x"]})
        assert request.body.get("options", {}) == options
        assert ollama.WIRE.encode(request)[1]["options"] == {"num_ctx": 2048, "top_k": 5, **options}
        assert "documents" not in openai.WIRE.encode(request)[1]


def test_settings_in_ollama_s_words_are_understood_by_every_server() -> None:
    request = ChatRequest(
        {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1, "max_completion_tokens": 9}
    )
    view = OllamaView(request, context("llama.cpp"))
    assert view.shown["options"] == {"temperature": 1, "num_predict": 9}
    del view.shown["options"]["temperature"]
    view.shown["options"]["num_predict"] = 3
    view.shown |= {"think": "high", "format": {"type": "object"}, "model": "other", "keep_alive": 5, "stream": False}
    view.take(None)
    assert request.stream is True and request.model == "other"
    assert request.body.keys() == {"model", "messages", "max_tokens", "chat_template_kwargs", "response_format"}
    assert request.body["max_tokens"] == 3
    assert request.body["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "high"}
    assert request.body["response_format"]["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    "edit", [{"options": {"seed": "x"}}, {"options": 7}, {"messages": "Hi"}, {"messages": [7]}, {"think": 7}]
)
def test_what_means_nothing_is_the_plugin_s_fault(edit: dict[str, Any]) -> None:
    view = OllamaView(ollama_request(messages=[{"role": "user", "content": "Hi"}]), context())
    with pytest.raises((TypeError, ValueError)):
        view.take({**view.shown, **edit})


def test_a_question_to_generate_is_a_prompt() -> None:
    request = ollama.GENERATE.decode({"model": "m", "prompt": "Hello", "system": "Be kind."})
    view = OllamaView(request, context(api="/api/generate"))
    assert (view.shown["prompt"], view.shown["system"]) == ("Hello", "Be kind.")
    assert "messages" not in view.shown
    view.take({"prompt": "Goodbye", "system": "Be brief."})
    path, body = ollama.WIRE.encode(request)
    assert (path, body["prompt"], body["system"]) == ("/api/generate", "Goodbye", "Be brief.")


# -- answers -----------------------------------------------------------------------------------------------------------


def answer_of(chunks: list[Chunk]) -> dict[str, Any]:
    whole = Fold()
    for chunk in chunks:
        whole.add(chunk.seen)
    return whole.completion()


def made() -> list[Chunk]:
    """Two answers, interleaved, the second with a tool call, and the count of tokens behind them."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return [
        Chunk.of(reasoning="hm"),
        Chunk.of("a"),
        Chunk.of("b", index=1),
        Chunk.of("a"),
        Chunk({"choices": [{"index": 1, "delta": {"tool_calls": [call]}, "finish_reason": None}]}),
        Chunk.ending(),
        Chunk.ending("tool_calls", index=1),
        Chunk({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}}),
    ]


@pytest.mark.parametrize("texts", [{}, {0: "new"}, {1: "new"}, {0: "", 1: "new"}])
def test_an_answer_is_the_old_one_but_for_the_new_texts(texts: dict[int, str]) -> None:
    before, after = answer_of(made()), answer_of(list(rewritten(made(), texts, {"extra": 1})))
    for number, text in texts.items():
        before["choices"][number]["message"]["content"] = text
    for choice in (*before["choices"], *after["choices"]):
        choice["message"].setdefault("content", "")
    after.pop(EXTENSIONS)
    assert after == {**before, "extra": 1}


def test_an_answer_without_a_text_gets_one() -> None:
    for chunks in ([Chunk.ending()], [Chunk.of(reasoning="hm"), Chunk.ending()], []):
        after = answer_of(list(rewritten(chunks, {0: "new"}, {})))
        assert after["choices"][0]["message"]["content"] == "new"


@pytest.mark.parametrize(
    ("returned", "texts", "added"),
    [
        ({"message": {"content": "new"}}, {0: "new"}, {}),
        ({"message": {"content": "old"}, "response": "new"}, {0: "new"}, {}),
        ({"choices": [{"message": {"content": "new"}}, {"message": {"content": "also"}}]}, {0: "new"}, {}),
        ({"choices": [{"text": "new"}], "more": [1]}, {0: "new"}, {"more": [1]}),
        ({"message": {"role": "assistant", "tool_calls": []}}, {0: ""}, {}),
        ({"done": True}, {}, {}),
        ("new", {0: "new"}, {}),
    ],
)
def test_what_a_hook_returned_is_read(returned: object, texts: dict[int, str], added: dict[str, Any]) -> None:
    reply = Reply(answer_of([Chunk.of("old"), Chunk.ending()]))
    assert edits(returned, reply, {"done": True}) == (texts, added)


@pytest.mark.parametrize("returned", [7, {"message": 7}, {"choices": [[]]}, {"message": {"words": "x"}}])
def test_what_is_no_answer_is_refused(returned: object) -> None:
    with pytest.raises(TypeError):
        edits(returned, Reply(answer_of([Chunk.of("old")])), {})


def test_the_views_are_json() -> None:
    request = ollama_request(messages=[{"role": "user", "content": "Hi", "images": ["aaaa"]}], options={"num_ctx": 5})
    reply = Reply(answer_of(made()))
    for make in (OllamaView, OpenAIView):
        view: Any = make(request, context())
        assert EXTENSIONS not in json.dumps([view.shown, view.answer(reply)])
