"""What `kb` finds in folders, and how it measures answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.cli.kb_add import Found, walked
from llama_smart_proxy.proxy.cli.kb_eval import Question, measures, questions
from llama_smart_proxy.proxy.cli.remote import RemoteError


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_folders_are_walked_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    names = ("b/2.md", "b/1.md", "a.md", "c.txt", ".git/config", ".hidden.md", "b/.x/y.md", "node_modules/z.md")
    tree(tmp_path, *names)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = [one.source.removeprefix(f"{tmp_path}/") for one in walked([str(tmp_path)], [])]
    assert found == ["a.md", "c.txt", "b/1.md", "b/2.md"]
    assert [Path(one.source).name for one in walked([str(tmp_path)], ["?.md", "x*"])] == ["a.md", "1.md", "2.md"]


def test_what_is_named_itself_is_taken_whatever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, ".hidden.md")
    monkeypatch.chdir(tmp_path)
    named = [".hidden.md", "gone.md", "https://example.org/a"]
    expected = [f"{tmp_path}/.hidden.md", f"{tmp_path}/gone.md", "https://example.org/a"]
    assert [one.source for one in walked(named, ["*.txt"])] == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_cannot_be_read_is_found_with_its_reason(tmp_path: Path) -> None:
    tree(tmp_path, "a.md", "locked/b.md")
    (tmp_path / "locked").chmod(0)
    try:
        assert [*walked([str(tmp_path)], [])][-1] == Found(str(tmp_path / "locked"), "Permission denied")
    finally:
        (tmp_path / "locked").chmod(0o700)


def result(filename: str, text: str, source: str = "") -> dict[str, Any]:
    return {"filename": filename, "file_id": "file-1", "x_source": source, "content": [{"text": text}]}


@pytest.mark.parametrize(
    ("question", "rank"),
    [
        (Question("q", document="b.md"), 2),
        (Question("q", document="docs/b.md"), 2),
        (Question("q", document="ocs/b.md"), 0),
        (Question("q", document="file-1"), 1),
        (Question("q", answer="the  ANSWER is"), 2),
        (Question("q", document="a.md", answer="answer"), 0),
        (Question("q", document="c.md"), 0),
    ],
)
def test_the_rank_is_that_of_the_first_passage_with_document_and_answer(question: Question, rank: int) -> None:
    results = [result("a.md", "nothing"), result("b.md", "The\nanswer is 4.", "/srv/docs/b.md")]
    assert question.rank(results) == rank


def test_measures_are_those_of_the_literature() -> None:
    measured = measures([1, 2, 0, 10], found=[0.9, 0.8, 0.7], missed=[0.1, 0.8])
    assert measured["questions"] == 5
    assert [measured[f"hit@{most}"] for most in (1, 5, 10)] == [0.25, 0.5, 0.75]
    assert measured["mrr"] == pytest.approx((1 + 0.5 + 0.1) / 4)
    assert measured["confidence_auc"] == pytest.approx(4.5 / 6, abs=1e-4)
    assert set(measures([], [], []).values()) == {0, None}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", ":2: is no line of JSON"),
        ('{"document": "a"}', ":2: must be"),
        ("[1]", ":2: must be"),
        ('{"question": 1}', ":2: must"),
    ],
)
def test_a_question_that_is_none_is_named_by_its_line(tmp_path: Path, line: str, text: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f'{{"question": "q", "answer": null}}\n{line}\n')
    with pytest.raises(RemoteError, match=text) as failure:
        list(questions(str(file)))
    assert failure.value.status == 2
