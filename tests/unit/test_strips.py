"""Passages fall into strips: sentences, list items, rows, code blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.knowledge.reading.strips import strips
from tests.support.laws import law

CODE = "```sh\nmake. Install\n\n- no item. No sentence\n```"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Restart the daemon now. Then wait for it.", ["Restart the daemon now.", "Then wait for it."]),
        ("Is it ready to be used? It says that it is!", ["Is it ready to be used?", "It says that it is!"]),
        ("A sentence that is\nwrapped. Another that is not.", ["A sentence that is\nwrapped.", "Another that is not."]),
        ("Ask e.g. Doctor Smith. Or Dr. Miller, by phone.", ["Ask e.g. Doctor Smith.", "Or Dr. Miller, by phone."]),
        ("Version 3.5 of the program is out. Ok.", ["Version 3.5 of the program is out. Ok."]),
        ('He said that it is "done." She did not.', ['He said that it is "done."', "She did not."]),
        ("これは最初の文です。これは二番目の文です。", ["これは最初の文です。", "これは二番目の文です。"]),
        ("- one\n- two\n  goes on\n3. three", ["- one", "- two\n  goes on", "3. three"]),
        ("| a | b |\n|---|---|\n| 1 | 2 |", ["| a | b |", "|---|---|", "| 1 | 2 |"]),
        (f"Before it.\n{CODE}\nAfter it.", ["Before it.", CODE, "After it."]),
        ("```\nunclosed. Code", ["```\nunclosed. Code"]),
        ("Manual > Setup\n\nText of it.", ["Manual > Setup", "Text of it."]),
        ("# Head\ntext", ["# Head", "text"]),
        (" \n\n ", []),
    ],
)
def test_a_passage_falls_into_strips(text: str, expected: list[str]) -> None:
    assert strips(text) == expected


@law(2000)
@given(st.text(st.sampled_from('aB. !?\n-*`~|#>0)\t"。'), max_size=60) | st.text(max_size=60))
def test_no_character_is_lost_between_strips(text: str) -> None:
    assert "".join("".join(strips(text)).split()) == "".join(text.split())
