"""BFCL environments and ground-truth traces, as tests ask for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pact_nemo.environments.base import Environment, Task
from pact_nemo.environments.bfcl.data import CATEGORIES
from pact_nemo.environments.bfcl.environment import BFCLEnvironment
from pact_nemo.environments.bfcl.settings import BFCLConfig
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.traces.annotate import Style
from pact_nemo.traces.filters import reject_reason
from pact_nemo.traces.ground_truth import ground_truth_trace
from pact_nemo.traces.schema import Trace


def bfcl_environment(
    categories: Sequence[str] = CATEGORIES,
    window: str = "full",
    *,
    max_observation_chars: int | None = None,
    seed: int = 0,
    quarantine: Quarantine | None = None,
    **settings: Any,
) -> BFCLEnvironment:
    """Single turns are the short, grounded ones."""
    reduced = {"max_calls": 2, "grounded_only": True} if window == "turn" else {}
    own = BFCLConfig(categories=list(categories), window=window, **{**reduced, **settings})
    return BFCLEnvironment(
        own, max_observation_chars, seed, quarantine if quarantine is not None else Quarantine("strict")
    )


def make_traces(
    environment: Environment, tasks: Iterable[Task], *, style: Style = "compact", calls_per_turn: Any = "one"
) -> tuple[list[Trace], Counter[str]]:
    """Verified, filtered traces of tasks in order, and how many tasks got none, by reason."""
    traces, rejected = [], Counter[str]()
    for task in tasks:
        trace = ground_truth_trace(environment, task, style, calls_per_turn)
        reason = "no_calls" if trace is None else reject_reason(trace, task.tools)
        if trace is not None and reason is None:
            traces.append(trace)
        else:
            rejected[str(reason)] += 1
    return traces, rejected


def make_trace(
    environment: Environment, task: Task, *, style: Style = "compact", calls_per_turn: Any = "one"
) -> Trace | None:
    """The one trace of :func:`make_traces`, or None."""
    return next(iter(make_traces(environment, [task], style=style, calls_per_turn=calls_per_turn)[0]), None)
