"""What only BFCL reads of the settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pact_nemo.config.ranges import Ranges
from pact_nemo.environments.bfcl.agentic_data import AGENTIC_CATEGORIES, MEMORY_CATEGORIES, WEB_CATEGORIES
from pact_nemo.environments.bfcl.data import CATEGORIES
from pact_nemo.environments.spec import EnvironmentConfig
from pact_nemo.errors import ConfigError

WINDOWS = ("full", "turn")
MEMORY_KINDS = ("published", "write", "read")
LIVE = "live"


@dataclass
class BFCLConfig(EnvironmentConfig):
    """Which BFCL tasks, and how they are reduced for small machines. The full BFCL: as it comes."""

    ranges: ClassVar[Ranges] = {
        "max_calls": ">= 1",
        "max_user_chars": ">= 1",
        "max_tools": ">= 1",
    }

    #: multi_turn_base, multi_turn_miss_func, multi_turn_miss_param, multi_turn_long_context; memory_kv, memory_rec_sum,
    #: memory_vector; web_search_base, web_search_no_snippet
    categories: list[str] = field(default_factory=lambda: list(CATEGORIES))
    #: "full": whole episodes; "turn": one user turn a task, earlier turns replayed from the ground truth
    window: str = "full"
    max_calls: int | None = None  #: window=turn: keep turns with 1..max_calls ground-truth calls
    #: window=turn: keep turns whose every argument occurs in the user's words or an earlier observation; booleans and
    #: the schema's defaults need not
    grounded_only: bool = False
    max_user_chars: int | None = None  #: window=turn: keep turns whose request is at most this long
    #: offer the needed tools plus seeded distractors, this many in all, in seeded order; None = all of the involved
    #: classes, in BFCL's order. Never fewer than the ground truth needs
    max_tools: int | None = None
    #: also fail episodes that call a tool in a user turn whose ground truth is empty; BFCL's runner ships that check
    #: unused
    irrelevance_check: bool = False
    #: give the checker episodes that stopped before the last user turn was closed; BFCL fails them outright
    judge_unfinished: bool = False

    #: the memory categories. "published": conversations, then questions, for evaluation only; "write": a task is one
    #: conversation, scored by the share of the later answers that its memory holds; "read": a task is one question to a
    #: memory that is always the same
    memory: str = "published"
    #: memory=read: folder ``memory`` of a finished evaluation, whose memories are read; null: the user's own words that
    #: bfcl-eval names as the source of each answer
    memory_snapshots: str | None = None
    encoder: str | None = None  #: memory_vector: folder of all-MiniLM-L6-v2 on this disk; it is never downloaded
    #: web search, for evaluation only. null: off; "live": searches with your SerpAPI key, from SERPAPI_API_KEY, and
    #: fetches pages; a path: a recorded index, without a network
    web_search: str | None = None

    @property
    def agentic(self) -> list[str]:
        """The agentic ones of its categories."""
        return [category for category in self.categories if category in AGENTIC_CATEGORIES]

    def validate(self) -> None:
        """See :class:`~pact_nemo.environments.spec.EnvironmentConfig`."""
        key = "environment_config."
        if isinstance(self.categories, str) or not self.categories:
            raise ConfigError(f"{key}categories={self.categories!r}: must be a non-empty list of names")
        known = CATEGORIES + AGENTIC_CATEGORIES
        for category in self.categories:
            if category not in known:
                raise ConfigError(f"{key}categories: unknown BFCL category {category!r}; known: {', '.join(known)}")
        if self.window not in WINDOWS:
            raise ConfigError(f"{key}window={self.window!r}: must be one of {', '.join(WINDOWS)}")
        reducing = [name for name in ("max_calls", "max_user_chars") if getattr(self, name) is not None]
        reducing += ["grounded_only"] if self.grounded_only else []
        if self.window == "full" and reducing:
            raise ConfigError(f"{key}{f', {key}'.join(reducing)} only apply to {key}window=turn")
        self._check_agentic()

    def _check_agentic(self) -> None:
        key = "environment_config."
        web = [category for category in self.categories if category in WEB_CATEGORIES]
        memory = [category for category in self.categories if category in MEMORY_CATEGORIES]
        if self.memory not in MEMORY_KINDS:
            raise ConfigError(f"{key}memory={self.memory!r}: must be one of {', '.join(MEMORY_KINDS)}")
        if self.agentic and self.window != "full":
            raise ConfigError(f"{key}window={self.window} only applies to multi-turn; leave out {self.agentic[0]}")
        if self.memory_snapshots is not None and (self.memory != "read" or len(memory) != 1):
            raise ConfigError(
                f"{key}memory_snapshots only applies to {key}memory=read and one memory category, the evaluated one"
            )
        if web and self.web_search is None:
            raise ConfigError(
                f"{key}categories: {web[0]} searches the web, which is off: set {key}web_search=live with your SerpAPI"
                f" key in SERPAPI_API_KEY, or {key}web_search=FILE with a recorded index (docs/reference/benchmarks.md)"
            )
        published = web + (memory if self.memory == "published" else [])
        if published and self.max_tools is not None:
            raise ConfigError(f"{key}max_tools: {published[0]} is evaluated with all of its tools; set it to null")
        if "memory_vector" in memory and self.encoder is None:
            raise ConfigError(
                f"{key}categories: memory_vector embeds texts with all-MiniLM-L6-v2, which is never downloaded: put the"
                f" model on this disk and name its folder with {key}encoder, or leave memory_vector out"
            )


def evaluation_only(settings: BFCLConfig) -> str | None:
    """Why the tasks of these settings can't be trained on; None where they can."""
    key, web = "environment_config.", [category for category in settings.categories if category in WEB_CATEGORIES]
    if web:
        return f"{key}categories: {web[0]} can only be evaluated, with tools/evaluate.py; leave it out for training"
    if settings.agentic and settings.memory == "published":
        return (
            f"{key}memory=published: questions build on the conversations before them, so {settings.agentic[0]} can be"
            f" evaluated only, with tools/evaluate.py; set {key}memory=write or {key}memory=read for training"
        )
    return None
