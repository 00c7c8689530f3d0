"""How likely the policy finds expert traces that it never trains on: where that stops to grow, imitation has nothing
left to give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pact_nemo.objective.latent import TokenSum, trace_log_likelihood
from pact_nemo.policy.trees import TokenTree, TreeBuilder
from pact_nemo.training.prompt_trees import add_trace, supervised

if TYPE_CHECKING:
    from pact_nemo.training.run import TrainingRun


def measure(run: TrainingRun) -> dict[str, float | None]:
    """``held_out/trace_reasoning`` and ``held_out/trace_call``: log pi(h* | x) of held-out traces in nats per token of
    that component, None without such tokens; empty where no trace is measured. Collective; changes nothing.
    """
    pairs = run.dataset.held_out_traces
    if not pairs:
        return {}
    trees: list[TokenTree] = []
    for task, trace in pairs:
        builder = TreeBuilder(run.chat.prompt_ids(list(task.user_turns[0]), list(task.tools)))
        add_trace(builder, trace, builder.root, shown=False)
        trees.append(builder.build())
    sums = {"reasoning": TokenSum(), "call": TokenSum()}
    for (_, trace), logprobs in zip(pairs, run.policy.logprobs(trees), strict=True):
        found = trace_log_likelihood(logprobs.numpy(), np.asarray(trace.component)[supervised(trace)])
        sums = {name: sums[name] + found[name] for name in sums}
    return {f"held_out/trace_{name}": value.mean for name, value in sums.items()}


def due(every: int, step: int, last: int) -> bool:
    """Whether to measure after ``step`` finished steps of ``last``: every so many, and after the last one."""
    return every > 0 and (step % every == 0 or step == last)
