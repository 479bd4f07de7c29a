"""The decisions of corrective RAG (CRAG, Yan et al., arXiv 2401.15884), as a state machine without I/O.

Each round searches the collections and grades what was found. Passages that are clearly relevant are used; where it is
unclear, web pages are added; where they are clearly not, the query is rewritten and only web pages are used. If they do
not answer the query either, the next round begins with another query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Verdict(StrEnum):
    """What was found, as graded."""

    CORRECT = "correct"
    AMBIGUOUS = "ambiguous"
    INCORRECT = "incorrect"


class Do(StrEnum):
    """The next step."""

    SEARCH = "search"
    """Search the collections with the query."""
    REWRITE = "rewrite"
    """Make another query."""
    WEB = "web"
    """Search the web with the query."""
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Situation:
    """What has happened so far.

    `own` and `pages` are the verdicts about the collections and about web pages in this round, None before that. A
    source that failed counts as `INCORRECT`, and is not used again (`has_own`, `has_web`). `rewritten` is whether the
    query is new in this round; `exhausted` whether there is no other query any more.
    """

    has_own: bool
    has_web: bool
    rounds: int
    round: int = 1
    own: Verdict | None = None
    pages: Verdict | None = None
    rewritten: bool = False
    exhausted: bool = False

    def next_round(self) -> Situation:
        """The beginning of another round, with a new query."""
        return replace(self, round=self.round + 1, own=None, pages=None, rewritten=True)


def verdict_of(confidence: float, *, lower: float, upper: float) -> Verdict:
    """The action that a confidence between 0 and 1 leads to."""
    if confidence >= upper:
        return Verdict.CORRECT
    return Verdict.AMBIGUOUS if confidence >= lower else Verdict.INCORRECT


def next_step(now: Situation) -> Do:
    """The step that follows. `REWRITE` in a round whose sources have all been searched begins the next round."""
    if now.has_own and now.own is None:
        return Do.SEARCH
    own = now.own or Verdict.INCORRECT
    if own is Verdict.CORRECT:
        return Do.FINISH
    can_search_web = now.has_web and now.pages is None
    if own is Verdict.AMBIGUOUS:
        return Do.WEB if can_search_web else Do.FINISH
    if can_search_web:
        return Do.WEB if now.rewritten or now.exhausted else Do.REWRITE
    if now.pages in (Verdict.CORRECT, Verdict.AMBIGUOUS) or not (now.has_own or now.has_web):
        return Do.FINISH
    return Do.REWRITE if now.round < now.rounds and not now.exhausted else Do.FINISH


def begins_round(now: Situation) -> bool:
    """Whether a new query is for another round, rather than for the web in this one."""
    return not (now.has_web and now.pages is None)
