"""The options of `rag` in the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llama_smart_proxy.agents.rag.web import WebOptions


def _names(value: Any) -> Any:
    """Splits `a,b` into names; other values are returned unchanged."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


class RagOptions(WebOptions):
    """What is searched, how it is graded, and how it is shown."""

    collection: Annotated[list[str], BeforeValidator(_names)] = Field(
        default=[], description="Collections to search, separated by commas; by default all."
    )
    grader: Literal["scores", "rerank", "llm"] = Field(
        default="scores",
        description="How passages are graded: by the calibrated scores of the search, a reranking model, or a model "
        "that is able to judge.",
    )
    upper: float = Field(default=0.7, ge=0, le=1, description="Confidence from which passages are used alone.")
    lower: float = Field(default=0.3, ge=0, le=1, description="Confidence below which they are not used.")
    max_rounds: int = Field(default=2, ge=1, le=10, description="Most searches with different queries.")
    max_documents: int = Field(default=5, ge=1, le=50, description="Most passages in the context.")
    context_tokens: int = Field(default=4000, ge=100, description="Most tokens of the context, if the model has room.")
    time_s: float = Field(default=30.0, gt=0, description="Time limit in seconds for all of that together.")
    refine: Literal["words", "grade", "off"] = Field(
        default="words",
        description="How the parts of a passage that concern the question are found: by its words, by the embedding "
        "model, or not at all.",
    )
    grader_model: str | None = Field(
        default=None, description="The model for `grader: llm` or `rerank`; the chat's own for `llm`."
    )
    rewrite_model: str | None = Field(
        default=None,
        description="The model that makes queries; else a rule, and the chat's own in need.",
    )
    max_query_length: int = Field(default=500, ge=20, description="Most characters of a query.")
    default_relevance_score: float = Field(
        default=0.5, ge=0, le=1, description="The grade of a passage that the model left out, for `grader: llm`."
    )
    sources: Literal["append", "field", "off"] = Field(
        default="append",
        description="The list of sources: below the answer and as fields of the response, as fields alone, or neither.",
    )
    trace: bool = Field(default=False, description="Show each decision as reasoning of the answer.")
    system_context: str = Field(
        default="", description="The text around the context, with `{context}` and `{query}` for context and question."
    )
    relevance_evaluation_prompt_template: str = Field(
        default="", description="The prompt of `grader: llm`, with `{query}` and `{documents}`."
    )
    query_transformation_prompt_template: str = Field(
        default="", description="The prompt for another query, with `{query}`."
    )

    @model_validator(mode="after")
    def _check(self) -> RagOptions:
        if self.lower > self.upper:
            if {"lower", "upper"} <= self.model_fields_set:
                raise ValueError("lower must not be above upper")
            if "lower" in self.model_fields_set:
                self.upper = self.lower
            else:
                self.lower = self.upper
        if self.system_context and "{context}" not in self.system_context:
            raise ValueError("system_context must contain {context}")
        if self.grader == "rerank" and not self.grader_model:
            raise ValueError("grader: rerank requires grader_model, the name of a reranking model")
        return self
