"""FTRL (arXiv 2508.08791): the reward of each turn by the sub-questions that it solves, group-normalised sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pact_nemo.environments.answers import plain
from pact_nemo.environments.base import Task
from pact_nemo.methods.base import Method
from pact_nemo.methods.rewards import group_of, reference_of, written_by
from pact_nemo.objective.baseline_rewards import ftrl_rewards, solved_by_equality
from pact_nemo.objective.rewards import CallsOf
from pact_nemo.rollouts.types import Rollout


@dataclass
class FTRLConfig:
    """Settings of FTRL's reward."""

    count_malformed: bool = False  #: malformed calls beside readable ones count among the calls of their turn


class FTRL(Method):
    """A reward per turn; the advantage is that of their sum."""

    source: ClassVar[str] = "arXiv 2508.08791: reward of each turn by the sub-questions it solves, group-normalised sum"
    Config: ClassVar[type] = FTRLConfig
    defaults: ClassVar[Mapping[str, object]] = {"aggregation": "token-mean"}
    reward_settings: ClassVar[tuple[str, ...]] = ()

    def turn_rewards(self, task: Task, rollout: Rollout) -> np.ndarray:
        """[T] by the benchmark's own sub-questions, or by equality with reference calls where it has none."""
        turns = rollout.turns
        flags, questions = _solved(rollout, written_by(task, rollout), reference_of(task))
        answer = plain(task.reference_answer or "")
        texts = [plain(turn.visible) for turn in turns]
        return ftrl_rewards(
            [[next(flags) for _ in turn.calls] for turn in turns],
            malformed=[len(turn.call_errors) for turn in turns],
            empty=[not text for text in texts],
            answered=[bool(answer) and answer in text for text in texts],
            groups=[group_of(task, turn.user_turn) for turn in turns],
            questions=questions,
            count_malformed=self.config.count_malformed,
        )


def _solved(rollout: Rollout, written: CallsOf, reference: CallsOf) -> tuple[Iterator[bool], dict[Hashable, int]]:
    """Whether each call solved an open sub-question, and the number of sub-questions of each user turn."""
    if rollout.outcome is not None and rollout.outcome.solved is not None:
        # sub-questions of the benchmark's own, all in one user turn; a call that a limit cut off was not executed
        flags = [*rollout.outcome.solved, *[False] * len(written.calls)]
        return iter(flags), {0: round(rollout.outcome.metrics["questions"])}
    by_equality = solved_by_equality(written.calls, written.groups, reference.calls, reference.groups)
    return iter(by_equality), dict(Counter(reference.groups))
