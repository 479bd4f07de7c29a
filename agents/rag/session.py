"""The retrieval for one question: carries out the steps of `loop`, and records each decision."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

from llama_smart_proxy import BadRequest, ChatRequest, Context, Found, Json, Passage, ProxyError, strips
from llama_smart_proxy.agents.rag import grading, queries, refining
from llama_smart_proxy.agents.rag.loop import Do, Situation, Verdict, begins_round, next_step, verdict_of
from llama_smart_proxy.agents.rag.options import RagOptions
from llama_smart_proxy.agents.rag.web import NONE_CONFIGURED, Web, WebUnavailable

KEPT_SHARE = 0.25
"""Passages below this share of the relevance of the best one are not used beside that. How high it is says little: of
several good ones, each is improbable to be the one that has the answer."""
STRIP_SHARE = 0.5
"""The same for the parts of a passage, for `refine: grade`."""
CANDIDATES = 2
"""Passages that are graded, for each that may be used."""


@dataclass(slots=True)
class Outcome:
    """What the retrieval has led to. `reasons` say why there is less than there could be."""

    passages: list[Passage] = field(default_factory=list)
    verdict: Verdict = Verdict.INCORRECT
    rounds: int = 1
    query: str = ""
    reasons: list[str] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)


class Session:
    """The retrieval for the last question of `request`."""

    def __init__(self, request: ChatRequest, ctx: Context, web: Web) -> None:
        self._request = request
        self._ctx = ctx
        self._config: RagOptions = ctx.config
        self._web = web
        self._question = request.last_user_text
        self._earlier = queries.earlier_questions(request)
        self._query = queries.self_contained(self._question, self._earlier, self._config.max_query_length)
        self._tried = [self._query]
        self._collections: list[str] = []
        self._own: list[Passage] = []
        self._pages: list[Passage] = []
        self._began = time.perf_counter()
        self.outcome = Outcome(query=self._query)

    async def run(self) -> Outcome:
        """Search until there is something to use, or nothing to be found. Failures are part of the outcome."""
        steps = {Do.SEARCH: self._search, Do.REWRITE: self._rewrite, Do.WEB: self._search_web}
        self._now = Situation(False, False, self._config.max_rounds)
        try:
            async with asyncio.timeout(self._config.time_s):
                await self._begin()
                while (step := next_step(self._now)) is not Do.FINISH:
                    await steps[step]()
                await self._refine()
        except TimeoutError as exc:
            self._failed(f"the search took over {self._config.time_s:g} s (time_s)", exc)
        self._conclude()
        return self.outcome

    # -- steps -------------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        if self._earlier and queries.follows_on(queries.normalised(self._question)):
            self._decided("query", "the question is searched for with the one before it", by="rule")
        if self._earlier and self._config.rewrite_model and queries.follows_on(queries.normalised(self._question)):
            await self._rewrite_by_model(self._config.rewrite_model)
        try:
            known = await self._ctx.knowledge.collections()
            self._collections = self._config.collection or known
        except ProxyError as exc:
            self._failed(f"the collections cannot be listed: {exc.message}", exc)
        if not self._collections:
            self.outcome.reasons.append("there is no collection with documents")
        web = bool(self._web.engines(self._config))
        self._now = replace(self._now, has_own=bool(self._collections), has_web=web)

    async def _search(self) -> None:
        await self._ctx.status(f"Searching {', '.join(self._collections[:3])}")
        most = self._config.max_documents * CANDIDATES
        began = time.perf_counter()
        try:
            found = await self._ctx.knowledge.search(self._query, self._collections, limit=most)
            found, grader = await self._graded(found)
        except ProxyError as exc:
            if exc.code == "not_found" and self._config.collection:
                known = ", ".join(await self._ctx.knowledge.collections()) or "none"
                raise BadRequest(f"{exc.message}; collections with documents: {known}", param="collection") from None
            self._failed(f"the documents cannot be searched: {exc.message}", exc)
            self._now = replace(self._now, has_own=False)
            return
        verdict = self._verdict(found)
        self._own = self._usable(found) if verdict is not Verdict.INCORRECT else []
        self._now = replace(self._now, own=verdict)
        self._decided(
            "retrieve", f"{len(found.passages)} passages, confidence {found.confidence:.2f}: {verdict}",
            round=self._now.round, collections=self._collections[:10], found=len(found.passages),
            confidence=round(found.confidence, 4), verdict=str(verdict), grader=grader, **_took(began),
        )  # fmt: skip

    async def _search_web(self) -> None:
        await self._ctx.status("Searching the web")
        began = time.perf_counter()
        try:
            pages = await self._web.search(self._query, self._ctx)
        except WebUnavailable as exc:
            self._failed(f"the web cannot be searched: {exc}", exc)
            self._now = replace(self._now, has_web=False)
            return
        most = pages[: self._config.max_documents * CANDIDATES]
        found, _ = await self._graded(Found(most, grading.any_of([page.relevance for page in most])))
        verdict = self._verdict(found)
        self._pages = self._usable(found) if verdict is not Verdict.INCORRECT else []
        self._now = replace(self._now, pages=verdict)
        self._decided(
            "web", f"{len(pages)} passages, confidence {found.confidence:.2f}: {verdict}", round=self._now.round,
            found=len(pages), confidence=round(found.confidence, 4), verdict=str(verdict), **_took(began),
        )  # fmt: skip

    async def _rewrite(self) -> None:
        """Another query: by a rule, or by a model where that is worth it. One for the web in the first round may be the
        same."""
        next_round = begins_round(self._now)
        cheap = [query for query in self._cheap_rewrites() if query not in self._tried]
        if cheap:
            self._use(cheap[0])
            self._decided("rewrite", "another query, with the question before it", by="rule")
        else:
            model = self._rewriter(next_round=next_round)
            new = model is not None and await self._rewrite_by_model(model)
            if next_round and not new:
                self._now = replace(self._now, exhausted=True)
                return
        self._now = self._now.next_round() if next_round else replace(self._now, rewritten=True)

    def _cheap_rewrites(self) -> list[str]:
        return queries.cheap_rewrites(self._question, self._earlier, self._config.max_query_length)

    def _rewriter(self, *, next_round: bool) -> str | None:
        """The model to be asked for another query, if any. The chat's own is asked only where the web has found
        nothing: a call of it takes as long as an answer, and the documents may just be about something else."""
        needed = next_round and self._now.has_web
        return self._config.rewrite_model or (self._request.model if needed else None)

    async def _rewrite_by_model(self, model: str) -> bool:
        """Returns whether the model has made a new query. Its failure is no reason to fail."""
        await self._ctx.status("Looking for another query")
        began = time.perf_counter()
        template = self._config.query_transformation_prompt_template
        try:
            reply = await self._ctx.complete(queries.rewriting(self._request, model, self._tried, template))
        except ProxyError as exc:
            self.outcome.reasons.append(f"the query could not be rewritten: {exc.message}")
            return False
        query = queries.read_query(reply.text, self._config.max_query_length)
        if not query or query in self._tried:
            return False
        self._use(query)
        self._decided("rewrite", "another query, by a model", by=model, **_took(began))
        return True

    async def _refine(self) -> None:
        began = time.perf_counter()
        passages = [*self._own, *self._pages]
        if self._config.refine == "off" or not passages:
            return
        before = sum(len(passage.text) for passage in passages)
        refined = [await self._refined(passage) for passage in passages]
        own, pages = refined[: len(self._own)], refined[len(self._own) :]
        after = sum(len(passage.text) for passage in refined)
        self._own, self._pages = own, pages
        if after < before:
            text = f"{after} of {before} characters concern the question"
            self._decided("refine", text, before=before, after=after, **_took(began))

    async def _refined(self, passage: Passage) -> Passage:
        grade = None
        if self._config.refine == "grade" and len(passage.text) > refining.SHORT:
            texts = strips(passage.text)
            try:
                grades = dict(zip(texts, await self._ctx.knowledge.grade(self._query, texts), strict=True))
                least = max(grades.values(), default=0.0) * STRIP_SHARE
                grade = lambda strip: float(grades[strip] >= least)  # noqa: E731
            except ProxyError as exc:
                self.outcome.reasons.append(f"passages could not be refined: {exc.message}")
        return replace(passage, text=refining.refined(self._query, passage.heading, passage.text, grade))

    # -- grades ------------------------------------------------------------------------------------------------------

    async def _graded(self, found: Found) -> tuple[Found, str]:
        """As the grader says; if that fails, as the search has scored it."""
        try:
            result, grader = await grading.graded(self._ctx, self._request.model, self._query, found)
        except ProxyError as exc:
            self.outcome.reasons.append(f"passages are graded by their scores, as {self._config.grader} failed: {exc}")
            return found, "scores"
        if grader != self._config.grader and found.passages:
            self.outcome.reasons.append("passages are graded by their scores, as the model's grades cannot be read")
        return result, grader

    def _verdict(self, found: Found) -> Verdict:
        if not found.passages:
            return Verdict.INCORRECT
        return verdict_of(found.confidence, lower=self._config.lower, upper=self._config.upper)

    def _usable(self, found: Found) -> list[Passage]:
        best, *others = found.passages[: self._config.max_documents]
        return [best, *(passage for passage in others if passage.relevance > best.relevance * KEPT_SHARE)]

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _use(self, query: str) -> None:
        self._query = query
        self._tried.append(query)

    def _decided(self, step: str, text: str, **details: Any) -> None:
        self.outcome.trace.append(f"{step}: {text}")
        self._ctx.note(step, **details)

    def _failed(self, reason: str, failure: Exception) -> None:
        self.outcome.reasons.append(reason)
        self.outcome.failures.append(failure)
        self.outcome.trace.append(reason)
        self._ctx.note("failed", reason=type(failure).__name__)

    def _conclude(self) -> None:
        """Own passages first, of which the best ones stay if there are too many with those of the web."""
        outcome, most = self.outcome, self._config.max_documents
        share = most if not self._pages else max(1, most // 2)
        outcome.passages = [*self._own[:share], *self._pages[: most - min(share, len(self._own))]]
        outcome.rounds, outcome.query = self._now.round, self._query
        verdicts = [verdict for verdict in (self._now.own, self._now.pages) if verdict is not None]
        order = (Verdict.CORRECT, Verdict.AMBIGUOUS, Verdict.INCORRECT)
        outcome.verdict = min(verdicts, key=order.index, default=Verdict.INCORRECT)
        if outcome.verdict is not Verdict.CORRECT and self._config.web_is_off:
            outcome.reasons.append("the web is switched off")
        elif outcome.verdict is not Verdict.CORRECT and not self._web.engines(self._config):
            outcome.reasons.append(NONE_CONFIGURED)
        if not outcome.passages and verdicts:
            outcome.reasons.insert(0, "nothing relevant was found")


def _took(began: float) -> Json:
    return {"took_s": round(time.perf_counter() - began, 4)}
