"""Planned against measured: peaks of the CPU allocator over forward and backward of small models, to 5 %; weights and
optimizer, exactly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.planning.activations import Numbers, in_flight, stale_inputs, training_peak
from pact_nemo.planning.memory import communication_bytes, state_bytes
from pact_nemo.planning.shape import Layout, ModelShape, rank_parameters
from pact_nemo.planning.workload import Lengths, tree
from pact_nemo.policy.config import PolicyConfig
from tests.workers import memory_kit
from tests.workers.memory_kit import run

REPO = Path(__file__).resolve().parents[1]
SHORT, BRANCHY = (100, 150, 80, 3), (300, 40, 60, 8)  # prompt, response, trace, K


def planned(found: dict[str, Any], case: dict[str, Any], *, world: int = 1, stage: int = 0) -> float:
    policy = PolicyConfig(**{"logprob_chunk": 128, **case["policy"]})
    prompt, response, trace, group = case["tree"]
    row = tree(
        Lengths(prompt, response, trace, policy_share=1.0, boundary=0), group, prompt_only=True, conditioned=bool(trace)
    )
    shape, layout, numbers = ModelShape.from_hf(found["hf"]), Layout.of(policy, world), Numbers.of(policy.precision)
    rows = case.get("trees", 1)
    peak = training_peak(shape, layout, policy, numbers, row, stage=stage, micro_batches=rows)
    between = (
        communication_bytes(shape, layout, numbers, row, cuda=False, flying=in_flight(layout, stage, rows))
        if layout.pipeline > 1
        else 0.0
    )
    return peak.total + between


CASES = [
    *[
        ("llama", "narrow", SHORT, precision, recompute)
        for precision in ("fp32", "bf16")
        for recompute in ("none", "selective", "full")
    ],
    *[
        ("llama", "deep", BRANCHY, precision, recompute)
        for precision in ("fp32", "bf16")
        for recompute in ("none", "full")
    ],
    *[
        (family, "wide", SHORT, precision, "none")
        for family in ("qwen2", "qwen3", "tied", "qwen3_moe")
        for precision in ("fp32", "bf16")
    ],
    *[("qwen3_moe", "wide", SHORT, precision, "full") for precision in ("fp32", "bf16")],
]


# products in bf16 are slow on a CPU; one case of them tells that the dtype is counted
@pytest.mark.parametrize(
    "family,shape,lengths,precision,recompute",
    [
        pytest.param(*case, marks=pytest.mark.slow if case[3] == "bf16" and case[1:] != CASES[3][1:] else ())
        for case in CASES
    ],
)
def test_the_activation_peak_is_within_5_percent_of_the_measured_one(
    family: str, shape: str, lengths: tuple[int, ...], precision: str, recompute: str
) -> None:
    case = {
        "family": family,
        "shape": shape,
        "tree": lengths,
        "policy": {"precision": precision, "recompute": recompute},
    }
    found = run(case)
    error = planned(found, case) / found["peak"] - 1
    print(
        f"{family} {shape} {lengths} {precision} {recompute}: measured {found['peak'] / 1e6:.2f} MB, planned"
        f" {100 * error:+.2f} %"
    )
    assert abs(error) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("family", ["tied", "qwen3_moe"])
def test_weights_gradients_and_optimizer_are_exact(family: str, precision: str, distributed: bool) -> None:
    case = {
        "family": family,
        "shape": "deep",
        "tree": (8, 4, 0, 1),
        "policy": {"precision": precision, "distributed_optimizer": distributed},
    }
    found = run(case)
    policy, layout = PolicyConfig(**case["policy"]), Layout(1)
    state = state_bytes(rank_parameters(ModelShape.from_hf(found["hf"]), layout, 0), layout, policy)
    assert (state.weights, state.optimizer) == (found["weights"], found["optimizer"])
    # the gradient buffer is padded: parameters to 64 elements, buckets to a multiple that suits the ranks
    assert 0 <= found["gradients"] - state.gradients <= 4 * 64 * found["tensors"] + 4096


def launched(cases: list[dict[str, Any]], ranks: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Per rank, what :func:`run` gives for each case."""
    for index, case in enumerate(cases):
        case["folder"] = str(folder / str(index))
        memory_kit.make_model(case["family"], memory_kit.SHAPES[case["shape"]], folder / str(index))
    out = folder / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(REPO / "tests" / "workers" / "memory_kit.py"), json.dumps(cases), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=REPO)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[dict[str, Any]]] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_two_ranks_peaks_and_state(tmp_path: Path) -> None:
    """TP 2 with sequence parallelism, PP 2 with two micro-batches in flight, DP 2 with sharded optimizer state.

    Gloo keeps copies of what it gathers until its threads come to releasing them, another amount in every run: a few
    percent of these peaks, which is why TP gets 10 %, and a fifth of the small one of TP 2 with full recompute, which
    is not here.
    """
    layouts: list[dict[str, Any]] = [
        {"tensor_parallel": 2, "sequence_parallel": True, "recompute": "none"},
        {"pipeline_parallel": 2, "recompute": "full", "micro_batch_tokens": 1100},
        {"recompute": "none"},
    ]
    cases = [
        {"family": "llama", "shape": "deep", "tree": SHORT, "trees": trees, "policy": {"precision": precision, **more}}
        for more, trees in zip(layouts, (1, 4, 2), strict=True)
        for precision in ("fp32", "bf16")
    ]
    found = launched(cases, 2, tmp_path)
    for index, case in enumerate(cases):
        policy = PolicyConfig(**case["policy"])
        layout = Layout.of(policy, 2)
        shape = ModelShape.from_hf(found[0][index]["hf"])
        optimizer = 0
        for rank in range(2):
            stage = rank if layout.pipeline == 2 else 0
            mine = found[rank][index]
            error = planned(mine, case, world=2, stage=stage) / mine["peak"] - 1
            print(f"rank {rank} {case['policy']}: measured {mine['peak'] / 1e6:.2f} MB, planned {100 * error:+.2f} %")
            assert abs(error) < (0.1 if layout.tensor > 1 else 0.05)
            state = state_bytes(rank_parameters(shape, layout, stage), layout, policy)
            assert state.weights == mine["weights"]
            assert abs(state.optimizer / mine["optimizer"] - 1) < (
                0.001 if layout.data > 1 else 1e-12
            )  # shards begin at padded boundaries
            optimizer += mine["optimizer"]
        if layout.data == 2:
            whole = state_bytes(rank_parameters(shape, Layout(1), 0), Layout(1), policy)
            assert optimizer == whole.optimizer  # both shards together, to the byte


def test_pipeline_stages_hold_fewer_micro_batches_the_later_they_come() -> None:
    assert [in_flight(Layout(4, pipeline=4), stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(Layout(4, pipeline=4), 0, 2) == 2
    # interleaved, two chunks a stage: 2 * 3 + 4 + 1 warm-up chunk passes on the first of four stages
    assert in_flight(Layout(4, pipeline=4, virtual=2), 0, 8) == 5.5


def test_chunks_of_later_stages_still_hold_inputs_whose_rows_are_done() -> None:
    """As rehearsals of 70B show, whose chunks keep their last input and its gradient."""
    layout = Layout(64, tensor=4, pipeline=4, virtual=4)
    assert [stale_inputs(layout, stage, 8) for stage in range(4)] == [1, 1, 2, 2]
    assert stale_inputs(layout, 3, 64) == 2 and stale_inputs(layout, 3, 4) == 1
    assert [stale_inputs(Layout(4, pipeline=4, virtual=2), stage, 8) for stage in range(4)] == [0, 0, 1, 1]
    assert stale_inputs(Layout(4, pipeline=4), 0, 8) == 0
