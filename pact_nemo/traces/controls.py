"""Controls of an experiment: what RL is conditioned on in place of the task's own trace. A gain that a control keeps is
not due to the trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pact_nemo.environments.base import ToolCall
from pact_nemo.errors import ConfigError
from pact_nemo.objective.gate import uniform
from pact_nemo.traces.spans import TraceTokens

#: ``other_task``: the trace of a task of another scenario group; ``none``: an empty assistant message.
CONTROLS = ("other_task", "none")


def other_trace(
    traces: Mapping[str, TraceTokens],
    groups: Mapping[str, str],
    task_id: str,
    room: int,
    *,
    calls: Mapping[str, Sequence[ToolCall]],
    seed: int,
    step: int,
) -> TraceTokens:
    """The whole trace of another task, drawn by (seed, step, task) alone among those of other scenario groups that fit.
    One with the calls or the text of the task's own trace would show what it is to withhold; it is drawn again, which
    leaves every other draw what it is.

    Args:
        traces: task id -> trace, the task's own among them; cut ones are not drawn.
        groups: task id -> scenario group.
        room: tokens that a trace of this task may have.
        calls: task id -> calls of its whole trace, in order.

    Raises:
        ConfigError: no other trace fits.
    """
    choices = sorted(
        name
        for name, trace in traces.items()
        if groups[name] != groups[task_id] and not trace.cut and 0 < len(trace) <= room
    )
    number: int | str = step
    while choices:
        name = choices[int(uniform("control", seed, number, task_id) * len(choices))]
        same_calls = bool(calls[name]) and calls[name] == calls[task_id]
        if not same_calls and traces[name].token_ids != traces[task_id].token_ids:
            return traces[name]
        choices.remove(name)
        number = f"{step}:{len(choices)}"
    raise ConfigError(
        f"traces.control=other_task: no whole trace of another scenario group and with other calls fits into the {room}"
        f" tokens that {task_id} leaves to it; raise traces.max_tokens, or add tasks with traces"
    )
