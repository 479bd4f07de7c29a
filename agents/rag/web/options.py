"""The options of web search, a part of the agent's `Config`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, model_validator

from llama_smart_proxy import Options

Seconds = Annotated[float, Field(gt=0, le=3600)]


def _domain(text: str) -> str:
    name = text.strip().lower().removeprefix("*.").strip(".")
    if not name or any(char in name for char in "/:@ *"):
        raise ValueError(f"{text!r} must be a domain such as example.com, which includes those below it")
    return name.encode("idna").decode() if not name.isascii() else name


def _host(text: str) -> str:
    url = (text if "://" in text else f"http://{text}").rstrip("/") if text else ""
    if url and not url.startswith(("http://", "https://")):
        raise ValueError("must be the URL of a SearXNG, such as http://127.0.0.1:8888")
    return url


def _engines(value: object) -> object:
    """YAML reads `on` and `off` as truth values; a command gives names with commas."""
    if value in (False, "off", "no", "false"):
        return ["off"]
    if value in (True, "on", "auto", "yes", "true", ""):
        return []
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


Domain = Annotated[str, AfterValidator(_domain)]


class WebOptions(Options):
    """Where the web is searched, and how much of it is read."""

    web: Annotated[list[Literal["off", "searxng", "ddgs"]], BeforeValidator(_engines)] = Field(
        default_factory=list,
        description="Engines of web search, tried in this order: searxng (requires searxng_host), ddgs (requires "
        "`pip install 'llama-smart-proxy[web]'`); or off. By default searxng, if searxng_host is set.",
    )
    searxng_host: Annotated[str, AfterValidator(_host)] = Field(
        default="", description="URL of a SearXNG. Its settings.yml must list json below search.formats."
    )
    searxng_safesearch: int = Field(default=1, ge=0, le=2, description="0 off, 1 moderate, 2 strict.")
    searxng_language: str = Field(default="auto", max_length=20, description="Language of results, such as de.")
    searxng_categories: str = Field(default="general", max_length=200, description="Categories, separated by commas.")
    web_pages: int = Field(default=4, ge=0, le=10, description="Most pages read per search; 0 uses snippets alone.")
    web_passages: int = Field(default=6, ge=1, le=50, description="Most passages that a search returns.")
    web_timeout_s: float = Field(
        default=15.0, gt=0, le=20, description="Seconds for a search with its pages, at most 20."
    )
    web_page_timeout_s: Seconds = Field(default=10.0, description="Seconds for one page.")
    web_allow_domains: list[Domain] = Field(default_factory=list, description="If set, no other results are used.")
    web_deny_domains: list[Domain] = Field(default_factory=list, description="Results that are not used.")
    cache_ttl: float = Field(default=600.0, ge=0, le=86400, description="Seconds for which searches are remembered.")
    circuit_breaker_failures: int = Field(
        default=5,
        ge=1,
        validation_alias=AliasChoices("circuit_breaker_failures", "circuit_breaker_failure_threshold"),
        description="Failures in a row after which an engine is left alone.",
    )
    circuit_breaker_recovery_s: Seconds = Field(
        default=60.0,
        validation_alias=AliasChoices("circuit_breaker_recovery_s", "circuit_breaker_recovery_timeout"),
        description="Seconds after which it is tried again.",
    )
    circuit_breaker_successes: int = Field(
        default=3,
        ge=1,
        validation_alias=AliasChoices("circuit_breaker_successes", "circuit_breaker_success_threshold"),
        description="Successes in a row after which it is used as before.",
    )

    @property
    def engines(self) -> list[str]:
        """The names of the engines, in order."""
        if self.web_is_off:
            return []
        return list(dict.fromkeys(self.web)) or (["searxng"] if self.searxng_host else [])

    @property
    def web_is_off(self) -> bool:
        """Whether the web is not to be searched at all."""
        return "off" in self.web

    @model_validator(mode="after")
    def _searxng_has_a_host(self) -> WebOptions:
        if "searxng" in self.web and not self.searxng_host:
            raise ValueError("web: searxng requires searxng_host")
        return self
