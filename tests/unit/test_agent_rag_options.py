"""The options of the agent `rag`, and those of the project that it replaces."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llama_smart_proxy.agents.rag import Rag
from llama_smart_proxy.proxy.config import legacy

OLD: dict[str, Any] = {
    "lightrag_host": "http://lightrag:9621",
    "lightrag_api_key": "",
    "searxng_host": "http://searxng:8080",
    "ollama_base_url": "http://127.0.0.1:11434",
    "rag_threshold": 0.9,
    "max_documents": 5,
    "timeout": 30,
    "llm_model": "qwen2.5-coder:1.5b",
    "circuit_breaker_failure_threshold": 5,
    "circuit_breaker_recovery_timeout": 60.0,
    "circuit_breaker_success_threshold": 3,
    "default_relevance_score": 0.5,
    "max_query_length": 500,
    "system_context": "You have this:\n{context}\nAnswer: {query}",
    "relevance_evaluation_prompt_template": "Rate for '{query}':\n{documents}\n{{\"doc_1\": score}}",
    "query_transformation_prompt_template": "Transform '{query}'.",
    "searxng_safesearch": 1,
}
"""The plugin's own config.json."""


@pytest.mark.parametrize("place", ["agents", "models"])
def test_the_configuration_of_the_old_plugin_is_understood(place: str) -> None:
    entry = {"rag": dict(OLD)}
    data = {"agents": [entry]} if place == "agents" else {"models": {"m": {"agents": [entry]}}}
    remarks = {str(remark.loc[-1]): remark.message for remark in legacy.translate(data, lambda new, old: None)}
    config = Rag.Config(**entry["rag"])
    assert (config.upper, config.lower, config.time_s, config.max_documents) == (0.9, 0.3, 30, 5)
    assert (config.grader, config.grader_model, config.rewrite_model) == ("llm", OLD["llm_model"], OLD["llm_model"])
    assert (config.searxng_host, config.circuit_breaker_failures) == ("http://searxng:8080", 5)
    assert remarks["rag_threshold"] == "is now called upper"
    assert "llama-smart-proxy kb add" in remarks["lightrag_host"] and "this proxy" in remarks["ollama_base_url"]


def test_what_is_set_by_its_new_name_takes_precedence() -> None:
    options: dict[str, Any] = {"upper": 0.5, "rag_threshold": 0.9, "grader": "scores", "llm_model": "m"}
    legacy.translate({"agents": ["help", {"rag": options}]}, lambda new, old: None)
    assert options == {"upper": 0.5, "grader": "scores", "grader_model": "m", "rewrite_model": "m"}


@pytest.mark.parametrize(
    ("options", "lower", "upper"),
    [({}, 0.3, 0.7), ({"upper": 0.2}, 0.2, 0.2), ({"lower": 0.9}, 0.9, 0.9), ({"lower": 0, "upper": 1}, 0, 1)],
)
def test_one_threshold_moves_the_other(options: dict[str, float], lower: float, upper: float) -> None:
    config = Rag.Config.model_validate(options)
    assert (config.lower, config.upper) == (lower, upper)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lower": 0.8, "upper": 0.2}, "lower must not be above upper"),
        ({"system_context": "Answer {query}"}, "must contain {context}"),
        ({"grader": "rerank"}, "requires grader_model"),
        ({"max_rounds": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Rag.Config.model_validate(options)


def test_a_command_names_collections_and_switches_the_web() -> None:
    config = Rag.Config.model_validate({"collection": "manuals, faq", "web": "off"})
    assert config.collection == ["manuals", "faq"] and config.web_is_off
    assert not Rag.Config.model_validate({"web": "on"}).web_is_off
