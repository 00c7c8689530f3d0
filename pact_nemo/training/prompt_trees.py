"""Where rollouts and traces meet: prompts, their K rollouts and their trace become token trees with per-term weight
streams.

This is the only place that reads both. It runs after generation has ended, so nothing here can reach the rollout
server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from pact_nemo.config.schema import ObjectiveConfig
from pact_nemo.environments.answers import answer_f1, plain
from pact_nemo.environments.base import Task
from pact_nemo.errors import NumericsError
from pact_nemo.objective.advantages import Normalisation, group_advantages
from pact_nemo.objective.baseline_rewards import ftrl_rewards, solved_by_equality, toolrl_reward
from pact_nemo.objective.baselines import chord_mu
from pact_nemo.objective.gate import anchored
from pact_nemo.objective.loss import LossFn, pact_loss
from pact_nemo.objective.methods import METHODS
from pact_nemo.objective.rewards import turn_rewards
from pact_nemo.objective.schedules import TraceSchedule
from pact_nemo.objective.surrogate import Clip, truncated_importance
from pact_nemo.objective.weights import rl_weights, sft_weights
from pact_nemo.policy.trees import Place, TokenTree, TreeBuilder
from pact_nemo.rollouts.types import Rollout
from pact_nemo.traces.spans import CALL, REASONING, TraceTokens

PROMPT_ONLY, TRACE_CONDITIONED, TRACE = "x", "h", "sft"


@dataclass
class PromptGroup:
    """One prompt of a step with everything the update needs.

    Attributes:
        rollouts: all K, failed ones included (they carry no loss).
        rewards: per rollout, [T_k] turn rewards.
        advantages: per rollout, [T_k] combined advantages A^g + A^l.
        anchored: the gate z, True = prompt-only RL.
        trace: h* as tokens, or None where no verified trace exists (then ``anchored`` is True).
    """

    task: Task
    rollouts: list[Rollout]
    rewards: list[np.ndarray]
    advantages: list[np.ndarray]
    anchored: bool
    trace: TraceTokens | None
    trace_advantage: float = 0.0  #: of the trace as one more sample of the group (LUFFY)
    trace_weight: float = 1.0  #: factor of the trace's SFT weights, in [0, 1]
    control: TraceTokens | None = None  #: what RL is conditioned on in place of h* (``traces.control``); None: on h*


@dataclass
class PromptTree:
    """A group laid out as a token tree, with the scored-token ranges of its parts.

    ``spans[(context, k)]`` is the half-open range, in the tree's scored-token order, of rollout k under ``context``
    (``"x"`` or ``"h"``); ``spans[("sft", 0)]`` that of the trace.
    """

    group: PromptGroup
    tree: TokenTree
    spans: dict[tuple[str, int], tuple[int, int]]
    sft_index: np.ndarray = field(
        default_factory=lambda: np.zeros(0, dtype=np.int64)
    )  #: positions within h* of its scored tokens


def outcome_of(task: Task, rollout: Rollout, objective: ObjectiveConfig) -> float:
    """The outcome reward in [0, 1] (eq. 28): the checker's score, or the F1 of the final message's tagged answer (0
    without one).

    A held-out task without a reference answer keeps the checker's score; a training task always has one where the F1 is
    asked for (:func:`pact_nemo.training.dataset.build_dataset`).
    """
    if objective.outcome == "answer_f1" and task.reference_answer is not None:
        last = rollout.turns[-1] if rollout.turns else None
        said = last is not None and not last.is_tool_turn and rollout.status == "ok"
        return answer_f1(last.visible, task.reference_answer) if said and last is not None else 0.0
    return rollout.outcome.score if rollout.outcome is not None else 0.0


def turn_rewards_of(task: Task, rollout: Rollout, objective: ObjectiveConfig) -> np.ndarray:
    """[T] reward of each assistant turn, by the method's own rule."""
    kind = METHODS[objective.method].rewards
    turns = rollout.turns
    groups = [turn.user_turn for turn in turns]
    malformed = [len(turn.call_errors) for turn in turns]
    expected = task.reference_calls if kind != "outcome" else ()
    reference = [call for calls in expected for call in calls]
    reference_groups = [index for index, calls in enumerate(expected) for _ in calls]
    if kind in ("matching", "outcome"):
        return turn_rewards(
            [turn.calls for turn in turns],
            groups,
            reference,
            reference_groups,
            is_tool_turn=[turn.is_tool_turn for turn in turns],
            malformed=malformed,
            outcome=outcome_of(task, rollout, objective),
            method=objective.matching,
            penalty=objective.call_penalty if kind == "matching" else 0.0,
            outcome_weight=objective.outcome_weight,
        )
    calls = [call for turn in turns for call in turn.calls]
    call_groups = [turn.user_turn for turn in turns for _ in turn.calls]
    if kind == "toolrl":
        rewards = np.zeros(len(turns))
        if turns:
            well_formed = rollout.status == "ok" and not any(malformed)
            rewards[-1] = toolrl_reward(
                calls,
                call_groups,
                reference,
                reference_groups,
                well_formed=well_formed,
                readable=not any(malformed),
                method=objective.matching,
                strict=objective.toolrl_strict,
            )
        return rewards
    questions: dict[Hashable, int]
    if (
        rollout.outcome is not None and rollout.outcome.solved is not None
    ):  # the benchmark has sub-questions of its own, all in one user turn
        flags = iter([*rollout.outcome.solved, *[False] * len(calls)])  # a call that a limit cut off was not executed
        questions = {0: round(rollout.outcome.metrics["questions"])}
    else:
        flags = iter(solved_by_equality(calls, call_groups, reference, reference_groups))
        questions = dict(Counter(reference_groups))
    answer = plain(task.reference_answer or "")
    texts = [plain(turn.visible) for turn in turns]
    return ftrl_rewards(
        [[next(flags) for _ in turn.calls] for turn in turns],
        malformed=malformed,
        empty=[not text for text in texts],
        answered=[bool(answer) and answer in text for text in texts],
        groups=groups,
        questions=questions,
        count_malformed=objective.ftrl_count_malformed,
    )


def form_group(
    task: Task,
    rollouts: list[Rollout],
    trace: TraceTokens | None,
    objective: ObjectiveConfig,
    *,
    seed: int,
    step: int,
    trace_weight: float = 1.0,
    control: TraceTokens | None = None,
) -> PromptGroup:
    """Rewards (eq. 24-28), advantages (eq. 29-32) and the gate (eq. 13) of one prompt."""
    method = METHODS[objective.method]
    rewards = [turn_rewards_of(task, rollout, objective) for rollout in rollouts]
    for rollout, reward in zip(rollouts, rewards, strict=True):
        if not np.all(np.isfinite(reward)):
            raise NumericsError(
                f"the rewards of {task.id}, rollout {rollout.sample}, are not finite: {reward.tolist()}",
                names=["reward"],
            )
    trace = trace if method.teaching is not None else None
    joins = (
        trace is not None and method.teaching == "shaped"
    )  # the expert's solution is one more sample: verified, so its outcome is 1
    result = group_advantages(
        [*rewards, np.array([objective.outcome_weight])] if joins else rewards,
        gamma=objective.gamma,
        normalise=Normalisation(
            objective.advantage_eps, std_floor=objective.advantage_std_floor, divide=objective.advantage_std
        ),
        turn_level=objective.turn_level and method.turn_level,
        combine=objective.combine,
        mask=[rollout.status != "failed" and bool(rollout.turns) for rollout in rollouts] + [True] * joins,
    )
    gate = trace is None or (method.gated and anchored(seed, step, task.id, objective.anchor_prob))
    own = result.combined[: len(rollouts)]
    return PromptGroup(
        task,
        rollouts,
        rewards,
        own,
        gate,
        trace,
        float(result.combined[-1][0]) if joins else 0.0,
        trace_weight,
        control,
    )


def trace_rl(objective: ObjectiveConfig) -> bool:
    """Whether un-anchored prompts' ratios are evaluated under c_h."""
    return objective.trace_rl and METHODS[objective.method].trace_rl


def _usable(rollout: Rollout) -> bool:
    return rollout.status != "failed" and any(rollout.loss_mask)


def has_advantage(group: PromptGroup, k: int) -> bool:
    """Whether rollout k can move the policy: some turn's advantage isn't 0."""
    return _usable(group.rollouts[k]) and bool(np.any(group.advantages[k] != 0))


def grow_tree(
    group: PromptGroup,
    boundary_ids: list[int],
    objective: ObjectiveConfig,
    *,
    contexts: Sequence[str],
    skip_zero_advantage: bool = False,
) -> PromptTree:
    """Lay a group out as one tree: x, its rollouts under x, and, unless the prompt is anchored, h*, the boundary and
    the rollouts under c_h.

    ``skip_zero_advantage``: under c_h, where nothing but the surrogate reads them, only rollouts with an advantage."""
    builder = TreeBuilder(group.rollouts[0].prompt_ids)
    spans: dict[tuple[str, int], tuple[int, int]] = {}
    sft_index = np.zeros(0, dtype=np.int64)

    def add_rollouts(at: Place, context: str, chosen: list[int]) -> None:
        for k in chosen:
            start = builder.num_scored
            add_rollout(builder, group.rollouts[k], at)
            spans[(context, k)] = (start, builder.num_scored)

    everyone = [k for k, rollout in enumerate(group.rollouts) if _usable(rollout)]
    if PROMPT_ONLY in contexts:
        add_rollouts(builder.root, PROMPT_ONLY, everyone)
    if not group.anchored and TRACE_CONDITIONED in contexts:
        assert group.trace is not None
        sft_index = np.flatnonzero(supervised(group.trace))
        conditioned = (
            [k for k in everyone if not skip_zero_advantage or has_advantage(group, k)] if trace_rl(objective) else []
        )
        start = builder.num_scored
        end, _ = add_trace(builder, group.trace, builder.root, shown=bool(conditioned) and group.control is None)
        spans[(TRACE, 0)] = (start, builder.num_scored)
        if conditioned and group.control is not None:
            end = builder.add(group.control.token_ids, [False] * len(group.control), builder.root)
        if conditioned:
            boundary = builder.add(boundary_ids, [False] * len(boundary_ids), end)
            add_rollouts(boundary, TRACE_CONDITIONED, conditioned)
    return PromptTree(group, builder.build(), spans, sft_index)


def add_rollout(builder: TreeBuilder, rollout: Rollout, at: Place) -> Place:
    """Let a rollout begin at the end of a prompt or of a privileged context, with a branch for each of its contexts.
    Each scored token is scored once, after what the model had before it when it was sampled (and the trace, where
    ``at`` lies behind one).

    Returns:
        the end of its last context.
    """
    length = 0
    for start, end, keep in rollout.stretches():
        at = builder.back(at, length - keep)
        at = builder.add(rollout.token_ids[start:end], [bool(m) for m in rollout.loss_mask[start:end]], at)
        length = keep + end - start
    return at


def supervised(trace: TraceTokens) -> np.ndarray:
    """[H] bools: the tokens that the SFT term scores."""
    component = np.asarray(trace.component)
    return (component == CALL) | (component == REASONING)


def add_trace(
    builder: TreeBuilder, trace: TraceTokens, at: Place, *, shown: bool, followed: bool = False
) -> tuple[Place, Place]:
    """Let h* begin at the end of x, with a branch for each context in which a part of it is taught. Scored tokens keep
    the order of h*.

    Args:
        shown: something follows the whole of h*, thoughts included; else what only that would need is left out.
        followed: something follows the last context in which h* is taught.

    Returns:
        the end of h*, if ``shown``; the end of the last context.
    """
    flags, branches = supervised(trace), trace.branches
    bounds = [0, *(branch.start for branch in branches), len(trace)]
    whole = at
    length = 0
    for index, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        last = index == len(branches)
        context = branches[index - 1].context_ids if index else ()
        keep = branches[index - 1].keep if index else 0
        count = end - start
        if not (
            last and (followed or not branches)
        ):  # what comes after the last taught token, and is in no later context, isn't computed
            taught = np.flatnonzero(flags[start:end])
            count = int(taught[-1]) + 1 if len(taught) else 0
            count = count if last else max(count, branches[index].keep - keep - len(context))
        scored = [False] * len(context) + flags[start : start + count].tolist()
        ids = [*context, *trace.token_ids[start : start + count]]
        if shown and not index:  # all of h*, of which the first context is the beginning
            scored += [False] * (len(trace) - count)
            ids = list(trace.token_ids)
        at = builder.add(ids, scored, builder.back(at, length - keep))
        length = keep + len(ids)
        whole = at if not index else whole
    return whole, at


def loss_of(objective: ObjectiveConfig) -> LossFn:
    """The loss of a mini-batch whose streams :func:`fill_streams` filled."""
    low, high = (objective.clip_low, objective.clip_high) if objective.clip else (None, None)
    return partial(pact_loss, clip=Clip(low, high, objective.dual_clip), shaping=objective.shaping)


def set_temperature(prompts: Sequence[PromptTree], objective: ObjectiveConfig, temperature: float) -> None:
    """Have every tree scored and updated as the policy that sampled: rollouts at the temperature they were sampled at.

    pi_theta, pi_old and the reference are so all the tempered policy. The trace is scored at 1: its cross-entropy is
    that of the model itself, which is what a deployed model, at whatever temperature, starts from. LUFFY's trace is a
    sample like the others: its ratio is the tempered one.
    """
    if temperature == 1.0:
        return
    trace = temperature if METHODS[objective.method].teaching == "shaped" else 1.0
    for prompt in prompts:
        values = torch.full((prompt.tree.num_scored,), temperature)
        if (TRACE, 0) in prompt.spans:
            values[slice(*prompt.spans[(TRACE, 0)])] = trace
        prompt.tree.temperatures = values


def contexts_needed(group: PromptGroup, objective: ObjectiveConfig, *, diagnostics: bool) -> list[str]:
    """Which contexts the update forward of this prompt has to run: no context is computed that no term and no
    diagnostic reads.
    """
    contexts = []
    if group.anchored or not trace_rl(objective) or objective.kl_coef > 0 or objective.entropy_coef > 0 or diagnostics:
        contexts.append(PROMPT_ONLY)
    if not group.anchored:
        contexts.append(TRACE_CONDITIONED)
    return contexts


def _token_advantages(rollout: Rollout, advantages: np.ndarray) -> np.ndarray:
    """[n] advantage of each policy-written token of the rollout, in order (turn t's value on all of turn t's
    tokens).
    """
    per_token = np.zeros(len(rollout.token_ids))
    for turn, value in zip(rollout.turns, advantages, strict=True):
        per_token[turn.start : turn.end] = value
    return per_token[np.asarray(rollout.loss_mask, dtype=bool)]


def sampler_logprobs(rollout: Rollout) -> np.ndarray:
    """[n] rollout-engine log-probs of the policy-written tokens."""
    return np.asarray(rollout.sampler_logprobs)[np.asarray(rollout.loss_mask, dtype=bool)]


def fill_streams(
    prompts: list[PromptTree],
    objective: ObjectiveConfig,
    schedule: TraceSchedule,
    step: int,
    *,
    old: list[torch.Tensor] | None,
    reference: list[torch.Tensor] | None,
    importance_cap: float | None,
    num_prompts: int | None = None,
) -> None:
    """Write every tree's streams for one mini-batch; all denominators are counted here, over the whole mini-batch,
    before any forward.

    Args:
        prompts: the mini-batch.
        num_prompts: |B|, where the mini-batch has prompts with nothing to compute, which are not among ``prompts``;
            None = len(prompts).
        old: per tree, [S] log-probs of pi_old in both contexts; None on a single on-policy update, where the loss uses
            its own detached ones.
        reference: per tree, [S] log-probs of the frozen reference (only the prompt-only part is read).
        importance_cap: truncation of the sampler-trainer importance weight; None switches the correction off. Needs
            ``old``.
    """
    size = num_prompts if num_prompts is not None else len(prompts)
    lengths = [[sum(r.loss_mask) for r in p.group.rollouts] for p in prompts]
    usable = [[_usable(r) for r in p.group.rollouts] for p in prompts]
    weigh = partial(
        rl_weights, num_prompts=size, aggregation=objective.aggregation, constant_length=objective.constant_length
    )
    rl = weigh(lengths, usable)
    method = METHODS[objective.method]
    masks = []
    for prompt in prompts:
        if (TRACE, 0) in prompt.spans and prompt.group.trace is not None:
            trace = prompt.group.trace
            component = np.asarray(trace.component)
            if method.teaching == "annealed":
                masks.append(schedule.weights(component, np.asarray(trace.segment_level), np.asarray(trace.turn), step))
            else:
                masks.append(((component == CALL) | (component == REASONING)).astype(np.float64))
        else:
            masks.append(np.zeros(0))
    rl_coef, sft_coef = 1.0, objective.sft_coef
    surrogate = rl
    if method.mixed:
        sft_coef = chord_mu(step, objective.mu_start, objective.mu_end, objective.mu_decay_steps, objective.mu_schedule)
        rl_coef = 1.0 - sft_coef
    elif method.teaching == "shaped":  # the trace is one of K + 1 samples of its group, for surrogate and denominators
        joins = [not p.group.anchored for p in prompts]
        surrogate = weigh(
            [[*row, int(mask.sum())] for row, mask in zip(lengths, masks, strict=True)],
            [[*row, join] for row, join in zip(usable, joins, strict=True)],
        )
    sft = sft_weights(
        masks,
        [p.group.anchored for p in prompts],
        num_prompts=size,
        beta=sft_coef,
        aggregation=objective.sft_aggregation,
    )

    extra = {"phi": ("w_sft_phi",), "shaped": ("w_off",)}.get(method.teaching or "", ())
    if objective.entropy_coef > 0:
        extra = (*extra, "w_entropy")
    names = (
        "advantages",
        "importance",
        "ref_logprobs",
        "w_rl_x",
        "w_rl_h",
        "w_sft_reasoning",
        "w_sft_call",
        "w_kl",
        *extra,
    )
    for i, prompt in enumerate(prompts):
        streams = {name: np.zeros(prompt.tree.num_scored) for name in names}
        streams["importance"][:] = 1.0
        group = prompt.group
        for (context, k), (start, end) in prompt.spans.items():
            here = slice(start, end)
            if context == TRACE:
                weights = group.trace_weight * sft[i][prompt.sft_index]
                if method.teaching == "phi":
                    streams["w_sft_phi"][here] = weights
                    continue
                if method.teaching == "shaped":
                    streams["w_off"][here] = group.trace_weight * surrogate[i][-1]
                    streams["advantages"][here] = group.trace_advantage
                    continue
                reasoning = (
                    np.asarray(group.trace.component)[prompt.sft_index] == REASONING
                    if group.trace is not None
                    else np.zeros(0, bool)
                )
                streams["w_sft_reasoning"][here] = np.where(reasoning, weights, 0.0)
                streams["w_sft_call"][here] = np.where(reasoning, 0.0, weights)
                continue
            rollout = group.rollouts[k]
            streams["advantages"][here] = _token_advantages(rollout, group.advantages[k])
            carries_surrogate = (context == PROMPT_ONLY) == (group.anchored or not trace_rl(objective))
            if carries_surrogate:
                streams["w_rl_x" if context == PROMPT_ONLY else "w_rl_h"][here] = rl_coef * surrogate[i][k]
            if context == PROMPT_ONLY and objective.entropy_coef > 0:
                streams["w_entropy"][here] = objective.entropy_coef * np.asarray(rl[i][k])
            if context == PROMPT_ONLY and reference is not None:
                streams["w_kl"][here] = objective.kl_coef * np.asarray(rl[i][k])
                streams["ref_logprobs"][here] = reference[i][here].double().numpy()
            if importance_cap is not None and old is not None and (PROMPT_ONLY, k) in prompt.spans:
                x_start, x_end = prompt.spans[(PROMPT_ONLY, k)]
                streams["importance"][here] = truncated_importance(
                    old[i][x_start:x_end].double(), torch.from_numpy(sampler_logprobs(rollout)), importance_cap
                ).numpy()
        prompt.tree.streams = {name: torch.from_numpy(value).float() for name, value in streams.items()}
        if old is not None:
            prompt.tree.streams["old_logprobs"] = old[i].float()
