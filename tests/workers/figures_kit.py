"""Seconds and rates that others published, and those that were measured on an H200, each beside what the planner makes
of it.

NeMo-RL v0.3 on OpenMathInstruct-2 (NVIDIA's developer blog on NeMo-RL with Megatron-Core, August 2025, table 1):
seconds of policy training, log-probs of both policies, generation, at 795, 398, 3,283 and 3,251 generated tokens a
sample. Layouts of training are the page's; vLLM over 4 GPUs (1 for 8B) and a prompt of 150 tokens are assumed. Its
refit (14 s at 70B) goes from GPU to GPU, ours through files: not compared. Whole steps are v0.4's, without their refit.
The H200's are those of ``docs/evidence/gpu/``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_nemo.checkpoints.embedded import EMBEDDED_CONFIG
from pact_nemo.config.recipes import recipe
from pact_nemo.planning.compute import Pass, pass_seconds
from pact_nemo.planning.generation import ServerPlan
from pact_nemo.planning.hardware import Hardware, gpu
from pact_nemo.planning.shape import Layout, ModelShape
from pact_nemo.planning.timing import phases, scoring_seconds, update_seconds
from pact_nemo.planning.workload import Lengths, Row, StepWork, causal_pairs
from pact_nemo.policy.config import PolicyConfig

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "gpu"
LLAMA_70B = ModelShape.from_hf(recipe("llama3p1_70b_64xh100_bf16").shape)
LLAMA_8B = ModelShape(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocab=128256,
    tied=False,
    positions=131072,
)
QWEN_1P7B = ModelShape.from_hf(recipe("qwen3_1p7b_4xh100_bf16").shape)
QWEN_32B = ModelShape.from_hf(recipe("qwen3_32b_16xh100_bf16").shape)
QWEN_30B_A3B = ModelShape.from_hf(recipe("qwen3_30b_a3b_16xh100_bf16").shape)
POLICY = PolicyConfig(precision="bf16", micro_batch_tokens=4096, attention="te", share_prefix=False)


@dataclass(frozen=True)
class Figure:
    """One published or measured number.

    Attributes:
        name: what it is of.
        published: seconds, or tokens a second and GPU.
        planned: the same of the planner, with a GPU's constants.
        constants: of ``Hardware``, that were fitted to it among others.
    """

    name: str
    published: float
    planned: Callable[[Hardware], float]
    gpu: str = "H100"
    constants: tuple[str, ...] = ()

    def error(self, **constants: float) -> float:
        """Relative, of the plan, with these constants in place of the planner's own."""
        return self.planned(dataclasses.replace(gpu(self.gpu), **constants)) / self.published - 1.0


def grpo(response: int, limit: int = 4096) -> StepWork:
    """NeMo-RL's GRPO on OpenMathInstruct-2: 64 prompts x 32 samples, 4 updates, old policy and reference scored; a
    prompt of about 150 tokens and one sample that runs into the limit of the sequence."""
    lengths = Lengths(150, response, 0, policy_share=1.0, longest=limit - 150)
    return StepWork(
        lengths, prompts=64, group=32, updates=4, conditioned=0.0, score_old=True, reference=True, shared=False
    )


def _phase(
    shape: ModelShape, layout: Layout, server: ServerPlan, work: StepWork, name: str
) -> Callable[[Hardware], float]:
    def planned(hardware: Hardware) -> float:
        found = phases(shape, layout, POLICY, hardware, work, server)
        if name == "step":
            return sum(value for phase, value in found.items() if phase != "refit")
        return found["old-policy scoring"] + found["reference scoring"] if name == "scoring" else found[name]

    return planned


def _tokens(layout: Layout, sequences: int, length: int) -> Callable[[Hardware], float]:
    """Of Megatron-Bridge's Llama-3-70B in FP8: tokens a second and GPU."""
    row = Row(sequences * length, sequences * length, sequences * causal_pairs(length, length), calls=sequences)
    policy = dataclasses.replace(POLICY, fp8="tensorwise")
    one = Pass(row, sequences // layout.data, train=True, fp8=True)

    def planned(hardware: Hardware) -> float:
        return row.tokens / pass_seconds(LLAMA_70B, layout, policy, hardware, one) / layout.world

    return planned


H200_WORK = StepWork(Lengths(4200, 1600, 2800, 0.6), prompts=4, group=8, updates=1, conditioned=0.5, reference=True)
H200_POLICY = dataclasses.replace(recipe("qwen3_1p7b_4xh100_bf16").policy, fp8_bf16_layers=1)


def _measured_update(**settings: Any) -> Callable[[Hardware], float]:
    policy = dataclasses.replace(H200_POLICY, **settings)
    work = dataclasses.replace(H200_WORK, shared=policy.share_prefix)
    return lambda hardware: update_seconds(QWEN_1P7B, Layout(1), policy, hardware, work)


def _measured_gain(fp8: str) -> Callable[[Hardware], float]:
    """How many times as fast as in bf16 the update is: an error of both leaves it alone."""
    return lambda hardware: _measured_update()(hardware) / _measured_update(fp8=fp8)(hardware)


def _reference(hardware: Hardware) -> float:
    return scoring_seconds(QWEN_1P7B, Layout(1), H200_POLICY, hardware, H200_WORK)["reference scoring"]


def _small(name: str) -> Callable[[Hardware], float]:
    """The second step of the measured run of the embedded model; prompts and traces have their mean lengths on the
    benchmark (``docs/cluster/performance.md``), responses the step's."""
    shape, policy = ModelShape.from_hf(EMBEDDED_CONFIG), PolicyConfig(precision="bf16", micro_batch_tokens=4096)
    work = StepWork(
        Lengths(171, 60, 79, policy_share=0.9),
        prompts=16,
        group=8,
        updates=2,
        conditioned=0.69,
        score_old=0.5,
        score_prompt_only=0.5,
        reference=True,
    )

    def planned(hardware: Hardware) -> float:
        if name == "update":
            return update_seconds(shape, Layout(1), policy, hardware, work)
        return sum(scoring_seconds(shape, Layout(1), policy, hardware, work).values())

    return planned


def figures() -> list[Figure]:
    """All of them."""
    four = ServerPlan(16, 4, 256, 0.6)
    rows: list[tuple[str, ModelShape, Layout, ServerPlan, StepWork, dict[str, float]]] = [
        (
            "8B on 8",
            LLAMA_8B,
            Layout(8),
            ServerPlan(8, 1, 256, 0.6),
            grpo(795),
            dict(update=28, scoring=18, rollout=58),
        ),
        (
            "70B on 64",
            LLAMA_70B,
            Layout(64, tensor=4, pipeline=4, sequence_parallel=True),
            four,
            grpo(398),
            dict(update=28, scoring=18, rollout=84),
        ),
        (
            "32B on 64",
            QWEN_32B,
            Layout(64, tensor=4, pipeline=2, sequence_parallel=True),
            four,
            grpo(3283),
            dict(update=68, scoring=40, rollout=96),
        ),
        (
            "30B-A3B on 64",
            QWEN_30B_A3B,
            Layout(64, tensor=2, expert=8, sequence_parallel=True),
            four,
            grpo(3251),
            dict(update=50, scoring=23, rollout=78),
        ),
        (
            "32B on 32",
            QWEN_32B,
            Layout(32, tensor=4, pipeline=4, sequence_parallel=True),
            ServerPlan(8, 4, 256, 0.6),
            grpo(3206 - 150),
            dict(step=393.0),
        ),
        ("8B on 16", LLAMA_8B, Layout(16, pipeline=2), ServerPlan(16, 1, 256, 0.6), grpo(1060 - 150), dict(step=97.7)),
    ]
    dense = ("reached_bf16",)
    of: dict[tuple[str, str], tuple[str, ...]] = {
        ("8B on 8", "rollout"): ("decode_overhead",),
        ("30B-A3B on 64", "update"): ("reached_experts",),
        ("30B-A3B on 64", "scoring"): ("reached_experts",),
        **{(name, phase): dense for name in ("8B on 8", "70B on 64", "32B on 64") for phase in ("update", "scoring")},
    }
    found = [
        Figure(
            f"{name} H100, {phase}",
            value,
            _phase(shape, layout, server, work, phase),
            "H100",
            of.get((name, phase), ()),
        )
        for name, shape, layout, server, work, published in rows
        for phase, value in published.items()
    ]
    fp8 = ("fp8_bytes",)
    long = Layout(64, tensor=4, pipeline=8, virtual=5, sequence_parallel=True)
    short = Layout(32, tensor=4, pipeline=4, virtual=5, sequence_parallel=True)
    found += [
        Figure("70B FP8 pre-training, tokens/s/GPU", 1602, _tokens(long, 128, 8192)),
        Figure("70B FP8 SFT, tokens/s/GPU", 1638, _tokens(short, 32, 4096)),
    ]
    step = json.loads((EVIDENCE / "trainer.json").read_text())["checks"]["step"]
    recipes = json.loads((EVIDENCE / "fp8.json").read_text())["checks"]["recipes"]
    found += [
        Figure("1.7B on an H200, update", recipes["bf16"]["update"], _measured_update(), "H200", dense),
        Figure(
            "the same, separate sequences, local layers",
            step["separate"]["update"],
            _measured_update(share_prefix=False),
            "H200",
            dense,
        ),
        Figure("the same, tree, local layers", step["tree"]["update"], _measured_update(), "H200"),
        # 0.467 s of it were its weights' way from pageable memory, which is page-locked now
        Figure("the same, reference scoring", recipes["bf16"]["score"] - 0.467, _reference, "H200"),
        *(
            Figure(
                f"the same, {name}, times as fast as bf16",
                recipes["bf16"]["update"] / recipes[name]["update"],
                _measured_gain(name),
                "H200",
                fp8,
            )
            for name in ("tensorwise", "blockwise")
        ),
    ]
    small = {
        row["step"]: row
        for row in json.loads((EVIDENCE / "recipe.json").read_text())["metrics"]
        if row["stage"] == "rl"
    }
    found += [
        Figure("135M on an H200, update of 16 prompts", small[2]["time/update"], _small("update"), "H200", ("launch",)),
        Figure("the same, scoring", small[2]["time/score"], _small("scoring"), "H200", ("launch",)),
    ]
    return found
