"""The named stage before RL: SFT on expert traces under the prompt alone, so that the model emits calls at all.

It is the same for every method that is compared, reported apart (``stage: warmup``), and left out with
``warmup.steps=0``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pact_nemo.batches.prompt_trees import add_trace, supervised
from pact_nemo.config.schema import Config
from pact_nemo.data.tasks import prompts_of_step
from pact_nemo.environments.base import Task
from pact_nemo.errors import PactError, ServerLost
from pact_nemo.monitoring import held_out_traces
from pact_nemo.monitoring.diagnostics import loss_record
from pact_nemo.objective.components import CALL, REASONING
from pact_nemo.objective.loss import batch_loss
from pact_nemo.objective.surrogate import Clip
from pact_nemo.objective.weights import sft_weights
from pact_nemo.policy.trees import TokenTree, TreeBuilder
from pact_nemo.traces.closings import Closing, closing_ids
from pact_nemo.traces.spans import TraceTokens, without_closing
from pact_nemo.training.evaluation import due_between, score_between
from pact_nemo.training.stopwatch import Stopwatch

if TYPE_CHECKING:
    from pact_nemo.training.run import TrainingRun


def sft_tree(
    prompt_ids: list[int], trace: TraceTokens, weights: np.ndarray, closing: Closing, share: float
) -> TokenTree:
    """``[x; h*; closing]`` with the SFT weight of each scored token, each in the context that the policy will have
    there.

    Args:
        weights: [len(h*)] weights of the trace tokens.
        closing: see :func:`closing_ids`; its taught tokens share the weight ``share`` equally, and count as call.
    """
    component, mask = np.asarray(trace.component), supervised(trace)
    taught = closing.taught
    closing_weights = np.full(sum(taught), share / max(sum(taught), 1))
    scored = torch.from_numpy(np.concatenate([weights[mask], closing_weights])).float()
    zeros = torch.zeros_like(scored)
    reasoning = torch.from_numpy(np.concatenate([component[mask] == REASONING, np.zeros(sum(taught), dtype=bool)]))
    streams = {name: zeros for name in ("advantages", "ref_logprobs", "w_rl_x", "w_rl_h", "w_kl")}
    streams["importance"] = torch.ones_like(scored)
    streams["w_sft_reasoning"] = torch.where(reasoning, scored, zeros)
    streams["w_sft_call"] = torch.where(reasoning, zeros, scored)
    builder = TreeBuilder(prompt_ids)
    _, end = add_trace(builder, trace, builder.root, shown=False, followed=bool(closing.ids))
    if closing.ids and trace.closing_cut is not None:  # said without earlier thoughts in sight
        end = builder.back(end, trace.sft_length - trace.closing_cut.keep)
        context = trace.closing_cut.context_ids[: len(trace.closing_cut.context_ids) - closing.opening]
        end = builder.add(context, [False] * len(context), end)
    builder.add(closing.ids, taught, end)
    return replace(builder.build(), streams=streams)


def warm_up(run: TrainingRun, evaluate: Callable[[TrainingRun, str], object]) -> None:
    """Evaluate the untouched model as ``base``, run the stage with its own learning rate, refit, and freeze the result
    as the KL reference.
    """
    stage, state = run.config.warmup, run.state
    if state.warmup_step >= stage.steps:  # left out, or done before a resume
        return
    evaluate(run, "base")
    run.sharing.trainer(drop=True)
    run.recorder.spend(run.sharing.taken())
    tasks, seed = run.dataset.warmup_tasks(stage.max_tasks), _seed(run.config)
    with run.progress.phase("warm-up", total=stage.steps - state.warmup_step) as phase:
        while state.warmup_step < stage.steps:
            run.checkpoints.leave_if_asked()
            watch = Stopwatch(run.progress)
            record = sft_step(run, prompts_of_step(tasks, state.warmup_step, stage.batch_size, seed))
            state.warmup_step += 1
            if held_out_traces.due(run.config.diagnostics.trace_every, state.warmup_step, stage.steps):
                record |= held_out_traces.measure(run.policy, run.chat, run.dataset.held_out_traces)
            lost = None
            if due_between(run, state.warmup_step, stage.steps):
                lost = score_meanwhile(run, record, watch)
            times = {**watch.times, **run.sharing.taken(), "time/total": watch.total()}
            run.recorder.step("warmup", record | times)
            phase.advance()
            if lost is not None:
                run.checkpoints.give_up(lost)
    ends: dict[str, Callable[[], object]] = {
        "refit": run.weights.refit,
        "KL reference": run.weights.freeze_reference,
        "checkpoint": run.checkpoints.save,
    }
    for part, action in ends.items():
        with run.progress.phase(part, brief=True):
            try:
                action()
            except ServerLost as error:
                run.checkpoints.give_up(error)


def _seed(config: Config) -> str:
    """Of the order of the stage's tasks, and of the trace that each of them uses."""
    seed = config.warmup.seed
    return f"warmup:{config.run.seed if seed is None else seed}"


def score_meanwhile(run: TrainingRun, record: dict[str, Any], watch: Stopwatch) -> PactError | None:
    """Refit the servers in the middle of the stage and add the held-out score to the record; see
    :func:`score_between`.
    """
    try:
        with watch("refit", lambda: run.sharing.seconds):
            run.weights.refit()
    except ServerLost as error:
        return error
    lost = score_between(run, "warmup", run.state.warmup_step, record, watch)
    run.sharing.trainer(drop=True)
    return lost


def sft_step(run: TrainingRun, batch: list[Task]) -> dict[str, Any]:
    """One optimizer step of component-aware SFT, every prefix level active, mean over traces of the weighted token
    mean.
    """
    config = run.config
    stage = config.warmup
    chosen = [run.dataset.trace_for(task.id, _seed(config), run.state.warmup_step) for task in batch]
    traces = [trace for trace in chosen if trace is not None]  # the stage's tasks all have one
    if stage.closing is not None:  # the stage's own message closes them
        traces = [without_closing(trace) for trace in traces]
    masks = []
    for trace in traces:
        component = np.asarray(trace.component)
        in_some_level = np.asarray(trace.segment_level) >= 0
        masks.append(
            stage.reasoning_weight * ((component == REASONING) & in_some_level)
            + stage.call_weight * (component == CALL)
        )
    weights = sft_weights(masks, [False] * len(batch), num_prompts=len(batch), beta=1.0)
    prompts = [run.chat.prompt_ids(list(task.user_turns[0]), list(task.tools)) for task in batch]
    closing = closing_ids(run.chat, stage.closing)
    trees = [sft_tree(x, h, w, closing, 1.0 / len(batch)) for x, h, w in zip(prompts, traces, weights, strict=True)]
    loss_fn = partial(batch_loss, surrogate=Clip())  # no token is in a surrogate
    return loss_record([run.policy.update(trees, loss_fn, lr=stage.lr)])
