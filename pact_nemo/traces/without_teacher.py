"""Expert traces without a teacher, from what an environment has."""

from __future__ import annotations

from typing import Literal, cast

from pact_nemo.environments.base import Environment, RecordsAnswers, Task
from pact_nemo.environments.spec import ExpertTraces
from pact_nemo.traces.annotate import Style
from pact_nemo.traces.ground_truth import ground_truth_trace
from pact_nemo.traces.recorded import recorded_trace
from pact_nemo.traces.schema import Trace


def expert_trace(
    kind: ExpertTraces, environment: Environment, task: Task, style: Style, calls_per_turn: Literal["one", "all"]
) -> Trace | None:
    """A trace of one task, unfiltered; ``verified`` is the checker's verdict.

    Args:
        kind: what the environment's spec says.
        style, calls_per_turn: of the annotator; a search for recorded answers writes one call a turn.

    Returns:
        None where the environment has none for this task; or where another user answers in each episode, because
        calls alone don't tell what was said between them.
    """
    if task.any_turn:
        return None
    if kind == "ground_truth":
        return ground_truth_trace(environment, task, style, calls_per_turn)
    if kind == "recorded":
        return recorded_trace(cast(RecordsAnswers, environment), task, style)
    return None
