"""Controls of an experiment: what RL is conditioned on in place of the task's own trace. A gain that a control keeps is
not due to the trace.
"""

from __future__ import annotations

from collections.abc import Mapping

from pact_nemo.errors import ConfigError
from pact_nemo.objective.gate import uniform
from pact_nemo.traces.spans import TraceTokens

#: ``other_task``: the trace of a task of another scenario group; ``none``: an empty assistant message.
CONTROLS = ("other_task", "none")


def other_trace(
    traces: Mapping[str, TraceTokens], groups: Mapping[str, str], task_id: str, room: int, *, seed: int, step: int
) -> TraceTokens:
    """The whole trace of another task, drawn by (seed, step, task) alone among those of other scenario groups that fit.

    Args:
        traces: task id -> trace; cut ones are not drawn.
        groups: task id -> scenario group.
        room: tokens that a trace of this task may have.

    Raises:
        ConfigError: no other trace fits.
    """
    choices = sorted(
        name
        for name, trace in traces.items()
        if groups[name] != groups[task_id] and not trace.cut and 0 < len(trace) <= room
    )
    if not choices:
        raise ConfigError(
            f"traces.control=other_task: no whole trace of another scenario group fits into the {room} tokens that"
            f" {task_id} leaves to it; raise traces.max_tokens, or add tasks with traces"
        )
    return traces[choices[int(uniform("control", seed, step, task_id) * len(choices))]]
