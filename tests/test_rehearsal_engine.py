"""Transformer Engine's branch of the policy, by its stand-in: spec, names, FP8 contexts, experts; and that the
stand-in's signatures are the real ones.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from pathlib import Path

import pytest
import torch

from pact_nemo.config.recipes import RECIPES, recipe
from pact_nemo.errors import ConfigError
from pact_nemo.rehearsal import engine_layers, engine_stand_in, observed
from pact_nemo.rehearsal.case import Case, Outcome, check
from pact_nemo.rehearsal.run import rehearse
from tests.test_rehearsal import FEW, check_outcome, few_layers
from tests.workers.engine_signatures import signature

SIGNATURES = json.loads((Path(__file__).parent / "fixtures" / "transformer_engine_signatures.json").read_text())
OWN = {
    **{name: getattr(engine_layers, name) for name in ("Linear", "LayerNormLinear", "GroupedLinear")},
    "RMSNorm": engine_stand_in.Norm,
    "Fp8Padding": engine_stand_in.Padding,
    "Fp8Unpadding": engine_stand_in.Unpadding,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_stand_in_has_the_signatures_of_transformer_engine(name: str) -> None:
    owner, _, function = name.rpartition(".")
    found = OWN.get(owner) or getattr(engine_stand_in, owner or function)
    if owner == "activation_recompute_forward":
        function = ""
    wrapped = inspect.unwrap(getattr(found, function) if owner and function else found)
    tree = ast.parse(textwrap.dedent(inspect.getsource(wrapped)))
    node = next(each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef))

    def plain(arguments: list[list[str | None]]) -> list[tuple[str | None, object]]:
        return [(argument, _value(default)) for argument, default in arguments]

    assert plain(signature(node.args)) == plain(SIGNATURES[name])


def _value(default: str | None) -> object:
    try:
        return None if default is None else repr(ast.literal_eval(default))
    except ValueError:
        return default


SAMPLE = [
    few_layers("llama3p1_70b_64xh100_fp8", transformer_engine=True)[1],  # a stage in the middle: all of it in FP8
    few_layers("llama3p1_70b_64xh100_fp8", transformer_engine=True)[3],  # its last layer is the model's, which is not
    dataclasses.replace(
        few_layers("qwen3_30b_a3b_16xh100_bf16", transformer_engine=True)[0],
        layers=4,
        words=(*FEW, "policy.fp8=tensorwise"),
    ),
    dataclasses.replace(  # adapters read the gathered output of a norm, which FP8 then rounds for the product
        few_layers("qwen3_32b_8xh100_lora", transformer_engine=True)[0],
        layers=4,
        words=(*FEW, "policy.fp8=tensorwise"),
    ),
]


@pytest.fixture(scope="module")
def sample() -> list[Outcome]:
    return rehearse(SAMPLE)


def test_layers_are_transformer_engines_and_fp8_is_where_it_belongs(sample: list[Outcome]) -> None:
    for outcome, share in zip(sample, (1.0, 0.75, 0.5, 0.5), strict=True):
        check_outcome(outcome)
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TreeCoreAttention"} <= set(outcome.modules)
        assert outcome.phase("scoring").in_fp8 == outcome.phase("update").in_fp8 == share
        assert outcome.phase("reference scoring").in_fp8 == 0.0
    assert "TEGroupedMLP" in sample[2].modules and "LoRALinear" in sample[3].modules


def test_attention_of_transformer_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy.attention=te can't be rehearsed"):
        check(Case("qwen3_4b_4xh100_bf16", words=("policy.attention=te", "policy.share_prefix=false")))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_of_every_recipe_runs_on_transformer_engines_layers(name: str) -> None:
    for outcome in rehearse(few_layers(name, transformer_engine=True)):
        check_outcome(outcome)
        assert "TELayerNormColumnParallelLinear" in outcome.modules
    assert recipe(name).policy.pipeline_parallel == outcome.case.stage + 1


def check_plan(outcome: Outcome) -> None:
    """Too low a plan is an out-of-memory error on somebody's cluster."""
    check_outcome(outcome)
    phase = outcome.phase("update")
    assert phase.planned is not None
    error = phase.planned / phase.peak - 1
    print(f"{outcome.case.recipe}, stage {outcome.case.stage}: planned {100 * error:+.1f} %")
    assert -0.02 < error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_is_at_most_two_percent_below_the_peak_at_full_depth(name: str) -> None:
    """The first and the last pipeline stage, rows of the recipe's own length, Transformer Engine's layers."""
    stages = sorted({0, recipe(name).policy.pipeline_parallel - 1})
    for outcome in rehearse([Case(name, stage, transformer_engine=True) for stage in stages]):
        check_plan(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("virtual", [2, 4])
def test_the_plan_holds_on_every_stage_of_interleaved_ones(virtual: int) -> None:
    """Chunks of a layer, which are mostly what passes between stages."""
    words = (f"policy.virtual_pipeline={virtual}",)
    cases = [
        Case("llama3p1_70b_64xh100_bf16", stage, layers=4 * virtual, transformer_engine=True, words=words)
        for stage in range(4)
    ]
    for outcome in rehearse(cases):
        check_plan(outcome)


def test_what_one_kernel_computes_takes_room_for_its_result_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that torch.compile would fuse, and a product that adds to its float32 sum."""
    monkeypatch.setattr(observed, "_on_gpu", lambda tensor: isinstance(tensor, observed.FakeTensor))
    memory = observed.Memory()
    with observed.Mode(), memory:
        rows = torch.empty(1024, 1024, dtype=torch.bfloat16)
        assert memory.peak == memory.now == rows.nbytes

        @observed.compiled
        def fused(x: torch.Tensor) -> torch.Tensor:
            return (x.float() * 2.0).sin().to(x.dtype)

        found = fused(rows)
        assert memory.peak == memory.now == 2 * rows.nbytes
        again = found.float()
        assert memory.peak == 2 * rows.nbytes + again.nbytes
