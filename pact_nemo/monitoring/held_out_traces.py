"""How likely the policy finds expert traces that it never trains on: where that stops to grow, imitation has nothing
left to give.
"""

from __future__ import annotations

import numpy as np

from pact_nemo.batches.prompt_trees import add_trace, supervised
from pact_nemo.chat.template import ChatFormat
from pact_nemo.environments.base import Task
from pact_nemo.objective.latent import TokenSum, trace_log_likelihood
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.policy.trees import TokenTree, TreeBuilder
from pact_nemo.traces.spans import TraceTokens


def measure(policy: MegatronPolicy, chat: ChatFormat, pairs: list[tuple[Task, TraceTokens]]) -> dict[str, float | None]:
    """``held_out/trace_reasoning`` and ``held_out/trace_call``: log pi(h* | x) of held-out traces in nats per token of
    that component, None without such tokens; empty where no trace is measured. Collective; changes nothing.
    """
    if not pairs:
        return {}
    trees: list[TokenTree] = []
    for task, trace in pairs:
        builder = TreeBuilder(chat.prompt_ids(list(task.user_turns[0]), list(task.tools)))
        add_trace(builder, trace, builder.root, shown=False)
        trees.append(builder.build())
    sums = {"reasoning": TokenSum(), "call": TokenSum()}
    for (_, trace), logprobs in zip(pairs, policy.logprobs(trees), strict=True):
        found = trace_log_likelihood(logprobs.numpy(), np.asarray(trace.component)[supervised(trace)])
        sums = {name: sums[name] + found[name] for name in sums}
    return {f"held_out/trace_{name}": value.mean for name, value in sums.items()}


def due(every: int, step: int, last: int) -> bool:
    """Whether to measure after ``step`` finished steps of ``last``: every so many, and after the last one."""
    return every > 0 and (step % every == 0 or step == last)
