"""The project's CUDA branch on fake tensors: every recipe and pipeline stage runs through it, faults are found, and the
plan says what is measured.
"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from pact_nemo.config.recipes import RECIPES, recipe
from pact_nemo.errors import ConfigError
from pact_nemo.rehearsal import run as rehearsal
from pact_nemo.rehearsal.case import Case, Outcome, check
from pact_nemo.rehearsal.run import describe, rehearse
from tools import rehearse as tool

SAMPLE = ("qwen3_4b_4xh100_bf16", "qwen3_30b_a3b_16xh100_bf16", "llama3p1_70b_64xh100_bf16")
FEW = ("objective.group_size=2",)  # two branches a context: as many lines of code, fewer operations
PHASES = ["built", "scoring", "reference scoring", "update"]


def few_layers(name: str, *, tokens: int = 2048, **more: object) -> list[Case]:
    """One rank of each pipeline stage, a layer each, or one for each of its virtual stages."""
    policy = recipe(name).policy
    stages, layers = policy.pipeline_parallel, policy.pipeline_parallel * (policy.virtual_pipeline or 1)
    return [Case(name, stage, layers=layers, tokens=tokens, words=FEW, **more) for stage in range(stages)]  # type: ignore[arg-type]


def check_outcome(outcome: Outcome) -> None:
    assert not outcome.fault, outcome.fault
    assert [phase.name for phase in outcome.phases] == PHASES
    assert "TreeCoreAttention" in outcome.modules
    for name, where in (("scoring", "built"), ("reference scoring", "scoring"), ("update", "scoring")):
        # a reference that is the base needs no room for its weights, nor the adapters' room
        least = 0.6 if name.startswith("reference") and recipe(outcome.case.recipe).policy.lora.rank else 0.9
        assert outcome.phase(name).peak > least * outcome.phase(where).peak
    assert all(count > 0 for count in outcome.reads.values())


@pytest.fixture(scope="module")
def sample() -> dict[tuple[str, int], Outcome]:
    """One stage of each recipe of the sample: tensor parallelism, experts, the last of four stages."""
    cases = [few_layers(name)[-1] for name in SAMPLE]
    return {(outcome.case.recipe, outcome.case.stage): outcome for outcome in rehearse(cases)}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_rank_scores_and_updates(name: str, sample: dict[tuple[str, int], Outcome]) -> None:
    outcome = sample[name, recipe(name).policy.pipeline_parallel - 1]
    check_outcome(outcome)
    assert ("SequentialMLP" in outcome.modules) == ("a3b" in name)
    text = "\n".join(describe(outcome))
    assert "planned" in text and "numbers read back to the host in an update" in text and "microbatches.py" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_of_every_recipe_scores_and_updates(name: str) -> None:
    for outcome in rehearse(few_layers(name)):
        check_outcome(outcome)


def test_faults_of_the_cuda_branch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor left on the host, a weight of another width, a number read back in every layer."""
    monkeypatch.setattr(rehearsal, "MODULE", "tests.workers.rehearsal_breaks")
    monkeypatch.setenv("PACT_TEST_BREAKS", "device,shape,read")
    case = Case("qwen3_0p6b_1xh100_bf16", layers=1, tokens=512, words=FEW)
    device, shape, read = rehearse([case] * 3)
    assert "at least two devices, cuda:0 and cpu" in device.fault and "pact_nemo/policy/fused.py" in device.fault
    assert "broadcast a dimension of length 1023" in shape.fault and "pact_nemo/policy/fused.py" in shape.fault
    assert describe(device)[1:] == [f"  {line}" for line in device.fault.rstrip().splitlines()]
    assert not read.fault
    lines = [line for line in read.reads if line.startswith("tests/workers/rehearsal_breaks.py")]
    assert len(lines) == 1 and read.reads[lines[0]] == 4  # two rows, forward and recomputed


def test_what_cannot_be_rehearsed_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="pipeline stages 0 to 3, not 4"):
        check(Case("llama3p1_70b_64xh100_bf16", stage=4))
    with pytest.raises(ConfigError, match="6 layers can't be cut into 16 chunks"):
        check(Case("llama3p1_70b_64xh100_bf16", layers=6))

    def start(*words: str) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", ["rehearse.py", *words])
        code = tool.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    refused = start("--recipe", "llama3p1_70b_64xh100_bf16", "policy.tensor_parallel=3")
    assert refused.code == 2 and "can't be split over TP = 3" in refused.err


def test_the_tool_prints_each_stage_and_its_exit_code_is_whether_all_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sample: dict[tuple[str, int], Outcome]
) -> None:
    outcomes = iter(sample.values())
    monkeypatch.setattr(tool, "rehearse", lambda cases: [next(outcomes) for _ in cases])
    monkeypatch.setattr("sys.argv", ["rehearse.py", "--recipe", "qwen3_32b_16xh100_bf16", "--json"])
    assert tool.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["ranks"]
    assert len(found) == 2 and found[0]["phases"][-1]["name"] == "update"
    broken = dataclasses.replace(next(iter(sample.values())), fault="Traceback\nRuntimeError: no")
    monkeypatch.setattr(tool, "rehearse", lambda cases: [broken])
    monkeypatch.setattr("sys.argv", ["rehearse.py", "--recipe", "qwen3_4b_4xh100_bf16"])
    assert tool.main() == 1 and "RuntimeError: no" in capsys.readouterr().out
