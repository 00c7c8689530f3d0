"""A PACT mini-batch with all four terms for the tiny models of ``policy_kit``: rollouts, traces and gate are drawn,
everything else is the trainer's own: advantages, tree, streams, denominators, loss."""

from __future__ import annotations

import random

import torch

from pact_nemo.batches.prompt_groups import Gate, PromptGroup, TraceUse, form_group
from pact_nemo.batches.prompt_trees import PromptTree, contexts_needed, grow_tree, tempered
from pact_nemo.batches.streams import Scores, with_streams
from pact_nemo.config.schema import ObjectiveConfig
from pact_nemo.environments.base import Outcome, Task, ToolCall
from pact_nemo.methods.registry import method_named
from pact_nemo.objective.components import CALL, OBSERVATION, OTHER, REASONING
from pact_nemo.objective.schedules import StepClock, TraceSchedule
from pact_nemo.policy.trees import TokenTree
from pact_nemo.rollouts.types import Rollout, Turn
from pact_nemo.traces.spans import TraceTokens
from tests.workers.policy_kit import VOCAB

OBJECTIVE = ObjectiveConfig(group_size=4, anchor_prob=0.4, kl_coef=0.01, sft_coef=0.3, entropy_coef=0.05, dual_clip=3.0)
PACT = method_named("pact", OBJECTIVE)
pact_terms = PACT.loss


def _trace(draw: random.Random) -> TraceTokens:
    lengths = [draw.randint(2, 9) for _ in range(4)]
    component = [kind for kind, n in zip((REASONING, CALL, OTHER, OBSERVATION), lengths, strict=True) for _ in range(n)]
    reasoning = [kind == REASONING for kind in component]
    total = len(component)
    return TraceTokens(
        token_ids=[draw.randrange(VOCAB) for _ in range(total)],
        component=component,
        segment_level=[draw.randint(1, 4) if own else -1 for own in reasoning],
        turn=[0] * total,
        turn_ends=[total],
    )


def _rollout(draw: random.Random, task: Task, prompt: list[int], k: int) -> Rollout:
    first, seen, last = (draw.randint(1, 12) for _ in range(3))
    mask = [1] * first + [0] * seen + [1] * last
    right = draw.random() < 0.5
    turns = [
        Turn(0, first, "t", calls=[ToolCall("f", {"a": 1 if right else 2})], user_turn=0),
        Turn(first + seen, len(mask), "done", user_turn=0),
    ]
    logprobs = [-draw.uniform(0.1, 5.0) * m for m in mask]
    status = "failed" if draw.random() < 0.1 else "ok"
    outcome = None if status == "failed" else Outcome(right, float(right))
    return Rollout(
        task.id, k, prompt, [draw.randrange(VOCAB) for _ in mask], mask, logprobs, turns, outcome, 0, status=status
    )


def make_pact_trees(
    count: int, *, seed: int = 3, objective: ObjectiveConfig = OBJECTIVE, temperature: float = 0.8
) -> list[TokenTree]:
    """The trees of :func:`make_pact_prompts`."""
    return [prompt.tree for prompt in make_pact_prompts(count, seed=seed, objective=objective, temperature=temperature)]


def make_pact_prompts(
    count: int, *, seed: int = 3, objective: ObjectiveConfig = OBJECTIVE, temperature: float = 0.8
) -> list[PromptTree]:
    """``count`` prompts, some anchored, some without a trace; old log-probs, reference and sampler differ from the
    policy's.
    """
    draw = random.Random(seed)
    groups: list[PromptGroup] = []
    method, gate = method_named("pact", objective), Gate(seed, 1, objective.anchor_prob)
    for index in range(count):
        task = Task(
            f"p{index}", f"p{index}", "c", (({"role": "user", "content": "u"},),), (), ((ToolCall("f", {"a": 1}),),)
        )
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(4, 20))]
        rollouts = [_rollout(draw, task, prompt, k) for k in range(objective.group_size)]
        groups.append(form_group(task, rollouts, TraceUse(_trace(draw) if index % 5 != 4 else None), method, gate))
    prompts = [
        grow_tree(group, [7, 8], method, contexts=contexts_needed(group, method, diagnostics=True)) for group in groups
    ]
    noise = torch.Generator().manual_seed(seed)

    def drawn() -> list[torch.Tensor]:
        return [-5.0 - torch.rand(prompt.tree.num_scored, generator=noise) for prompt in prompts]

    scores = Scores(drawn(), drawn(), importance_cap=2.0)
    return tempered(with_streams(prompts, method, TraceSchedule(clock=StepClock(5)), 1, scores), method, temperature)
