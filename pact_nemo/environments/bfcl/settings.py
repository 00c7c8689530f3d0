"""What only BFCL reads of the settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from pact_nemo.environments.bfcl.data import CATEGORIES
from pact_nemo.environments.spec import EnvironmentConfig
from pact_nemo.errors import ConfigError

WINDOWS = ("full", "turn")


@dataclass
class BFCLConfig(EnvironmentConfig):
    """Which BFCL tasks, and how they are reduced for small machines. The full BFCL: as it comes."""

    #: names out of :data:`~pact_nemo.environments.bfcl.data.CATEGORIES`
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

    def validate(self) -> None:
        """See :class:`~pact_nemo.environments.spec.EnvironmentConfig`."""
        key = "environment_config."
        if isinstance(self.categories, str) or not self.categories:
            raise ConfigError(f"{key}categories={self.categories!r}: must be a non-empty list of names")
        for category in self.categories:
            if category not in CATEGORIES:
                raise ConfigError(
                    f"{key}categories: unknown BFCL category {category!r}; known: {', '.join(CATEGORIES)}"
                )
        if self.window not in WINDOWS:
            raise ConfigError(f"{key}window={self.window!r}: must be one of {', '.join(WINDOWS)}")
        for name in ("max_tools", "max_calls", "max_user_chars"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{key}{name}={value}: must be at least 1, or null for no limit")
        reducing = [name for name in ("max_calls", "max_user_chars") if getattr(self, name) is not None]
        reducing += ["grounded_only"] if self.grounded_only else []
        if self.window == "full" and reducing:
            raise ConfigError(f"{key}{f', {key}'.join(reducing)} only apply to {key}window=turn")
