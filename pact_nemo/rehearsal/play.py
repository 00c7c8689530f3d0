"""A rank's part of a step: the policy is built, scores, scores under the reference and is updated twice."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pact_nemo.config.schema import Config
from pact_nemo.methods.registry import make_method
from pact_nemo.objective.loss import STREAMS
from pact_nemo.planning.activations import scoring_peak
from pact_nemo.planning.memory import (
    CUDA_CONTEXT,
    NCCL_COMMUNICATOR,
    adapter_working,
    communicators,
    numbers_of,
    stage_memory,
    state_bytes,
)
from pact_nemo.planning.shape import Layout, ModelShape, rank_parameters
from pact_nemo.planning.workload import StepWork
from pact_nemo.policy import attention, bridge, microbatches
from pact_nemo.policy.families import MODEL_TYPES
from pact_nemo.policy.megatron_import import prepare_megatron
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.policy.trees import Segment, TokenTree
from pact_nemo.policy.without_cuda import redirect_rng_state
from pact_nemo.rehearsal import cuda, experts, ranks, weights
from pact_nemo.rehearsal.case import Case, Outcome, Phase, layout_of, rank_of, rehearsed_work
from pact_nemo.rehearsal.engine_products import PRODUCTS
from pact_nemo.rehearsal.observed import READS, Memory, Mode

prepare_megatron()

from megatron.core import parallel_state  # noqa: E402

_original_to_local, _original_local_batches = microbatches.to_local, microbatches.local_batches


def play(case: Case) -> Outcome:
    """Rehearse one rank.

    Raises:
        Exception: whatever the project's own code raises.
    """
    config = case.config()
    layout, hf = layout_of(config, case.recipe), case.hf_config()
    ranks.join(rank_of(layout, case.stage), layout.world)
    mode, memory = Mode(), Memory()
    _redirect(mode)
    work = rehearsed_work(config, layout)
    with tempfile.TemporaryDirectory() as folder:
        architecture = MODEL_TYPES[str(hf["model_type"])].architecture
        (Path(folder) / "config.json").write_text(json.dumps({"architectures": [architecture], **hf}))
        with mode, memory:
            stage = _Stage(case, config, layout, work, memory)
            outcome = stage.run(Path(folder))
    parallel_state.destroy_model_parallel()
    gc.collect()
    return outcome


class _Stage:
    def __init__(self, case: Case, config: Config, layout: Layout, work: StepWork, memory: Memory):
        self.case, self.config, self.layout, self.work = case, config, layout, work
        self.memory = memory
        self.phases: list[Phase] = []
        self.shape = ModelShape.from_hf(case.hf_config())

    def run(self, folder: Path) -> Outcome:
        policy = self._timed(
            "built", lambda: MegatronPolicy(self.config.policy, self.config.optimizer, folder, seed=1, total_steps=10)
        )
        with unset_fake_temporarily():
            trees = [_tree(self.work) for _ in range(self.work.prompts)]
        rows = policy._local_batches(trees, entropy=False)[0]
        tokens = rows[0].tokens.shape[1]
        assert all(row.tokens.shape[1] == tokens for row in rows), "rows of equal trees differ"
        ranks.neighbours_send([tokens // self.layout.hidden_split, 1, self.shape.hidden])
        plan = self._plan(policy, tokens * self.layout.context, len(rows))
        self.phases[0] = self._planned(self.phases[0], plan["built"])
        del rows
        policy.load_reference(folder)
        bare = [TokenTree(tree.segments) for tree in trees]
        self._timed("scoring", lambda: policy.logprobs(bare), plan["scoring"])
        self._timed("reference scoring", lambda: policy.reference_logprobs(bare), plan["reference scoring"])
        loss = make_method(self.config).loss
        with patch.object(microbatches, "not_finite", lambda numbers: []):  # what fake tensors say is made up
            policy.update(trees, loss, entropy=True)  # Adam's moments are made by the first
            READS.clear()
            self._timed("update", lambda: policy.update(trees, loss, entropy=True), plan["update"])
        modules = {type(module).__name__ for chunk in policy.chunks for module in chunk.modules()}
        return Outcome(
            self.case,
            parameters=sum(parameter.numel() for chunk in policy.chunks for parameter in chunk.parameters()),
            modules=tuple(sorted(modules)),
            row_tokens=tokens,
            rows=self.work.prompts // self.layout.data,
            phases=tuple(self.phases),
            reads=dict(READS.most_common()),
        )

    def _timed(self, name: str, action: Any, planned: float | None = None) -> Any:
        self.memory.forget_peak()
        PRODUCTS.clear()
        start = time.perf_counter()
        found = action()
        seconds = time.perf_counter() - start
        operations = sum(self.memory.operations.values())
        in_fp8 = PRODUCTS["fp8"] / max(1, sum(PRODUCTS.values()))
        self.phases.append(Phase(name, float(self.memory.peak), planned, operations, seconds, in_fp8))
        return found

    @staticmethod
    def _planned(phase: Phase, planned: float) -> Phase:
        return dataclasses.replace(phase, planned=planned)

    def _plan(self, policy: MegatronPolicy, tokens: int, rows: int) -> dict[str, float]:
        """What the planner says of the same rank and rows, without CUDA's context and NCCL's buffers."""
        settings = _as_it_runs(policy)
        tree = self.work.full_tree if self.work.conditioned else self.work.anchored_tree
        row = tree * (tokens / tree.tokens)
        memory = stage_memory(self.shape, self.layout, settings, self.work, stage=self.case.stage, cuda=True, row=row)
        outside = CUDA_CONTEXT + NCCL_COMMUNICATOR * communicators(self.layout)
        parameters = rank_parameters(self.shape, self.layout, self.case.stage, settings.lora)
        state = state_bytes(parameters, self.layout, settings)
        numbers = numbers_of(settings, kernels="te")
        forward = scoring_peak(
            self.shape, self.layout, numbers, row, stage=self.case.stage, chunk=settings.logprob_chunk
        )
        if parameters.adapters is not None:
            forward += adapter_working(self.shape, self.layout, numbers, row)
        before = float(state.total)
        beyond = memory.parts.get("scoring, beyond the update", 0.0)
        return {
            "built": float(state.weights + state.gradients) + state.optimizer / 3.0,
            "scoring": before - state.optimizer * 2.0 / 3.0 + forward,
            "reference scoring": before
            - state.optimizer * 2.0 / 3.0
            + (0 if settings.lora.rank else state.weights)
            + forward,
            "update": memory.trainer - outside - beyond,
        }


def _as_it_runs(policy: MegatronPolicy) -> Any:
    return dataclasses.replace(policy.config, fp8=policy.fp8, precision="bf16" if policy.bf16 else "fp32")


def _tree(work: StepWork) -> TokenTree:
    """A prompt's tree of the mean lengths, with a response's first part written by the policy."""
    lengths = work.lengths
    written = int(lengths.written)

    def segment(count: int, scored: int, parent: int) -> Segment:
        return Segment([1] * count, parent, [True] * scored + [False] * (count - scored))

    segments = [segment(lengths.prompt, 0, -1)]
    segments += [segment(lengths.response, written, 0) for _ in range(work.group)]
    if work.conditioned and lengths.trace:
        segments.append(segment(lengths.trace, lengths.trace, 0))
        segments.append(segment(lengths.boundary, 0, len(segments) - 1))
        parent = len(segments) - 1
        segments += [segment(lengths.response, written, parent) for _ in range(work.group)]
    tree = TokenTree(segments)
    tree.streams = {name: torch.ones(tree.num_scored) for name in (*STREAMS, "old_logprobs")}
    return tree


def _redirect(mode: Mode) -> None:
    """Packing is host work on real numbers; what it sends to the GPU becomes fake. Weights come from nowhere."""

    def to_local(batch: Any, *, device: torch.device, **more: Any) -> Any:
        return _original_to_local(batch, device=torch.device("cpu"), **more)

    def local_batches(trees: Any, config: Any, *, device: torch.device, **more: Any) -> Any:
        def send(value: Any) -> Any:
            return mode.from_tensor(value).to(device) if torch.is_tensor(value) else value

        with unset_fake_temporarily():
            found, tokens = _original_local_batches(trees, config, device=device, **more)
        for batch in found:
            batch.tokens = send(batch.tokens)
            batch.streams = {name: send(value) for name, value in batch.streams.items()}
            batch.flat_index = mode.from_tensor(batch.flat_index)
            for name, value in vars(batch.tree).items():
                setattr(batch.tree, name, send(value))
        return found, tokens

    experts.route_evenly()
    redirect_rng_state()  # there is no generator of a GPU
    microbatches.to_local, microbatches.local_batches = to_local, local_batches
    attention.causal_lower_right = cuda.lower_right
    bridge.load_bridge, bridge.load_weights = weights.bridge_of_config, weights.check_names  # type: ignore[assignment]
