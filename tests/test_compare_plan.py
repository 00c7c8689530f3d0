"""A plan of runs: what it refuses before anything runs, its order, and what is kept of runs when their weights are
gone.
"""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pact_nemo.checkpoints.manifest import write_manifest
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import to_yaml
from pact_nemo.errors import ConfigError, DataError, PactError
from pact_nemo.report.stats import mean, paired_bootstrap
from tests.fixtures.run_folders import make_run
from tools.comparisons import plan as plans
from tools.comparisons import running
from tools.comparisons.picture import starts_svg
from tools.comparisons.plan import Arm, Block, Cell, Plan, cells, check_kept, load_plan, results_of, start_words
from tools.comparisons.results import read_results, table
from tools.comparisons.runner import config_of, weights_of
from tools.comparisons.running import run_plan

ROOT = Path(__file__).resolve().parents[1]
PLAN = Plan(
    name="small",
    baseline="sft",
    seeds=[1, 2],
    starts={"sft4": Arm("sft", ["warmup.steps=4"]), "sft12": Arm("sft", ["warmup.steps=12"])},
    arms={"sft": Arm("sft", ["warmup.steps=10"]), "pact": Arm("pact")},
    grid=[Block(["sft4"], ["pact"], [1]), Block(["sft4", "sft12"], ["sft", "pact"])],
)


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "conf" / "plans").glob("*.yaml")), ROOT / "examples" / "shop" / "plan.yaml"],
    ids=lambda path: path.stem,
)
def test_every_plan_that_comes_along_can_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_plan(path)
    assert (
        plan.name == (path.stem if path.stem != "plan" else path.parent.name)
        and plan.question
        and plan.prediction
        and len([*cells(plan)]) > 1
    )


@pytest.mark.parametrize(
    "kept",
    [
        p
        for p in sorted((ROOT / "docs" / "evidence").iterdir())
        if (ROOT / "conf" / "plans" / f"{p.name}.yaml").is_file()
    ],
    ids=lambda path: path.name,
)
def test_a_plan_goes_on_from_the_results_that_come_along(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that changes must be named in the plans whose runs had the old one."""
    monkeypatch.chdir(ROOT)
    plan = load_plan(ROOT / "conf" / "plans" / f"{kept.name}.yaml")
    check_kept(plan, kept)
    known = {cell.id for cell in [*cells(plan), *(Cell("published", name, plan.start_seed) for name in plan.starts)]}
    assert {file.stem for file in kept.glob("*.json")} <= known


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: p\nnonsense: 1", "nonsense"),
        ("name: p/q\narms: {a: {}}\ngrid: [{arms: [a]}]", r"name: 'p/q'"),
        ("name: p\narms: {a: {}}\ngrid: [{arms: [b]}]", r"grid\[0\].arms: \['b'\]; known: a"),
        ("name: p\narms: {a: {}}\ngrid: [{starts: [s], arms: [a]}]", r"grid\[0\].starts: \['s'\]; known: published"),
        ("name: p\narms: {a: {method: ppo}}\ngrid: [{arms: [a]}]", "a: no settings file ppo_bfcl"),
        ("name: p\narms: {a: {set: [trainer.stepz=3]}}\ngrid: [{arms: [a]}]", "a: .*stepz"),
        ("name: p\narms: {a: {}}\nbaseline: b\ngrid: [{arms: [a]}]", "baseline=b is no arm"),
        ("name: p\nstarts: {published: {}}\narms: {a: {}}\ngrid: [{arms: [a]}]", "give that start another name"),
        ("name: p\narms: {a: {}}", "at least one run"),
        (
            "name: p\nbenchmark: own\nset: [agent.tools=x.py]\narms: {a: {set: [traces.path=talk.jsonl]}}\n"
            "grid: [{arms: [a]}]",
            "a: traces.path=talk.jsonl: no such file",
        ),
        ("name: [p\narms", "plan.yaml: while parsing"),
        ("name: p\narms: {a: {}, a: {}}\ngrid: [{arms: [a]}]", "plan.yaml: while constructing"),
        ("name: p\narms: {a: {}}\ngrid: [{arms: [a], seeds: []}]", r"grid\[0\].seeds is empty"),
        ("name: p\nset: [run.seed=7]\narms: {a: {}}\ngrid: [{arms: [a]}]", "a: run.seed=7: .* its own run.seed"),
        ("name: p\narms: {a: {set: [run.label=b]}}\ngrid: [{arms: [a]}]", "a: run.label=b: .* its own run.label"),
        (
            "name: p\nstarts: {s: {}}\narms: {a: {set: [model.path=/m]}}\ngrid: [{starts: [s], arms: [a]}]",
            "a: model.path=/m: .* its own model.path",
        ),
        ("name: p\nbenchmark: own\nset: [agent.toolz=x.py]\narms: {a: {}}\ngrid: [{arms: [a]}]", "a: .*toolz"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_runs(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_plan(tmp_path / "plan.yaml")


def test_a_table_is_of_the_plan_s_own_results(tmp_path: Path) -> None:
    """Files of before the plan was changed are named, and in no mean."""
    for cell in (Cell("published", "sft4", 0), Cell("sft4", "pact", 1), Cell("sft4", "pact", 2)):
        place(tmp_path / "runs", cell, 9)
    small = replace(PLAN, starts={"sft4": PLAN.starts["sft4"]}, grid=[Block(["sft4"], ["pact"])])
    run_plan(small, tmp_path / "runs", tmp_path / "kept")
    shorter = replace(small, grid=[Block(["sft4"], ["pact"], [1])])
    results, others = results_of(shorter, tmp_path / "kept")
    assert [(r.arm, r.seed) for r in results] == [("sft4", 0), ("pact", 1)]
    assert others == ["sft4-pact-seed2.json"]
    with pytest.raises(ConfigError, match="was made with other settings"):
        results_of(replace(small, set=["optimizer.lr=1e-6"]), tmp_path / "kept")


def test_runs_come_seed_by_seed_and_once() -> None:
    assert [cell.id for cell in cells(PLAN)] == [
        "sft4-pact-seed1",
        "sft4-sft-seed1",
        "sft12-sft-seed1",
        "sft12-pact-seed1",
        "sft4-sft-seed2",
        "sft4-pact-seed2",
        "sft12-sft-seed2",
        "sft12-pact-seed2",
    ]


def place(root: Path, cell: Cell, passed: int, plan: Plan = PLAN) -> None:
    """A finished run where the plan looks for it, with the settings that it asks for."""
    if cell.start == "published":
        arm, folder, words = plan.starts[cell.arm], root / "starts" / cell.arm, []
    else:
        hf = next((root / "starts" / cell.start).glob("*/hf"))
        arm, folder, words = plan.arms[cell.arm], root / cell.id, start_words(cell.start, hf.resolve())
    run = make_run(folder, seed=cell.seed, passed=(0, 3, passed))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"method": arm.method}))
    config = load_config(
        [config_of(arm.method, plan.benchmark, plan.preset)], [f"run.seed={cell.seed}", *words, *arm.set]
    )
    (run / "config.yaml").write_text(to_yaml(config))
    for name in running.WEIGHTS:
        (run / name).mkdir(exist_ok=True)


def test_results_stay_when_the_weights_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, kept = tmp_path / "runs", tmp_path / "evidence"
    passes = {"sft4": 4, "sft12": 9}
    for name, count in passes.items():
        place(root, Cell("published", name, 0), count)
    for cell in cells(PLAN):
        place(root, cell, passes[cell.start] + {"sft": 3, "pact": 5}[cell.arm] + cell.seed)
    said: list[str] = []
    results = run_plan(PLAN, root, kept, note=said.append)
    assert len(results) == 10 == len(list(kept.glob("*.json")))
    assert not list(root.glob("sft*/*/hf")) and len(list(root.glob("starts/*/*/hf"))) == 2
    assert not list(root.glob("**/checkpoints")) and not list(root.glob("**/exports"))
    found = {(r.start, r.arm, r.seed): r for r in read_results(kept)}
    assert found["sft12", "pact", 2].score() == pytest.approx(16 / 24) and found[
        "published", "sft4", 0
    ].score() == pytest.approx(4 / 24)
    assert (
        len(found["sft4", "pact", 1].curves["reward/success"])
        == len(found["sft4", "pact", 1].curves["reward/mean"])
        > 0
    )
    text = table(results, "sft")
    again = replace(found["sft12", "pact", 2], words=["optimizer.lr=1e-4", "warmup.steps=0", "optimizer.lr=3e-5"])
    # of a key that is named twice the last one counts
    assert "| sft12 | pact | pact | 2 | 0.667 | `optimizer.lr=3e-5` |" in table([again], "")
    assert "| sft12 | 0.375 | pact | 2 | **0.646** | 0.029 | +0.083 |" in text
    assert text.index("| sft4 | 0.167 | pact") < text.index("| sft12 | 0.375 | pact")
    picture = ElementTree.fromstring(starts_svg(results))
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    trial = replace(found["sft12", "pact", 2], arm="pact_1e4")  # from one start only
    assert starts_svg([*results, trial]) == starts_svg(results)
    same = [result for result in results if result.score() == results[0].score()]
    assert "</svg>" in starts_svg(same) and "</svg>" in starts_svg([])
    # a second time nothing is run, also where the run folders are gone
    monkeypatch.setattr(running, "run_one", lambda *_: pytest.fail("a run was started"))
    assert len(run_plan(PLAN, tmp_path / "elsewhere", kept, note=said.append)) == 10
    (kept / "sft4-pact-seed1.json").write_text(json.dumps({"plan": "small"}))
    with pytest.raises(DataError, match="sft4-pact-seed1.json: no result of this version"):
        read_results(kept)


def small(root: Path, kept: Path, plan: Plan, passed: int = 5) -> None:
    for name in plan.starts:
        place(root, Cell("published", name, plan.start_seed), passed, plan)
    for cell in cells(plan):
        place(root, cell, passed + 2, plan)
    run_plan(plan, root, kept, note=lambda _: None)


ONE = replace(PLAN, seeds=[1], starts={"sft4": PLAN.starts["sft4"]}, grid=[Block(["sft4"], ["pact"])])


@pytest.mark.parametrize(
    ("change", "file"),
    [
        ({"arms": {**ONE.arms, "pact": Arm("pact", ["optimizer.lr=9e-4"])}}, "sft4-pact-seed1.json was"),
        ({"arms": {**ONE.arms, "pact": Arm("matchtir")}}, "sft4-pact-seed1.json was"),
        ({"set": ["trainer.batch_size=4", "trainer.mini_batch_size=4"]}, "published-sft4-seed0.json was"),
        ({"starts": {"sft4": Arm("sft", ["warmup.steps=48"])}}, "published-sft4-seed0.json was .* of its arms"),
    ],
)
def test_results_of_other_settings_are_not_taken_for_the_plans(
    change: dict[str, Any], file: str, tmp_path: Path
) -> None:
    small(tmp_path / "runs", tmp_path / "kept", ONE)
    for older in (False, True):  # of before digests were kept: by the words
        for path in (tmp_path / "kept").glob("*.json"):
            row = json.loads(path.read_text())
            path.write_text(json.dumps({**row, "settings": ""} if older else row))
        run_plan(ONE, tmp_path / "none", tmp_path / "kept", note=lambda _: None)  # as they are: nothing to run
        with pytest.raises(ConfigError, match=file):
            run_plan(replace(ONE, **change), tmp_path / "runs", tmp_path / "kept", note=lambda _: None)


def test_a_settings_file_that_changed_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are the same; what a method's file says isn't."""
    small(tmp_path / "runs", tmp_path / "kept", ONE)
    monkeypatch.setattr(plans, "config_of", lambda *_: config_of("matchtir", "bfcl", "smollm2_135m-cpu"))
    with pytest.raises(ConfigError, match="was made with other settings"):
        run_plan(ONE, tmp_path / "none", tmp_path / "kept", note=lambda _: None)


def test_arms_begin_from_the_weights_that_the_kept_results_began_from(tmp_path: Path) -> None:
    """The run folders are gone, as in a fresh clone, and the start is trained again: on another machine, say."""
    kept, plan = tmp_path / "kept", replace(ONE, grid=[Block(["sft4"], ["sft"])])
    small(tmp_path / "first", kept, plan)
    again = tmp_path / "again"
    place(again, Cell("published", "sft4", 0), 9, ONE)
    place(again, next(cells(ONE)), 9, ONE)
    with pytest.raises(ConfigError, match=r"another starting policy than the one of .*published-sft4-seed0\.json"):
        run_plan(ONE, again, kept, note=lambda _: None)
    same = tmp_path / "same"
    place(same, Cell("published", "sft4", 0), 5, ONE)
    place(same, next(cells(ONE)), 9, ONE)
    assert len(run_plan(ONE, same, kept, note=lambda _: None)) == 3
    hf = next((same / "starts" / "sft4").glob("*/hf"))
    row = json.loads((kept / "published-sft4-seed0.json").read_text())
    (hf / "model.safetensors").write_bytes(b"weights")
    write_manifest(hf, 0)
    assert weights_of(hf) != row["weights"] == ""


def test_arms_of_two_makings_of_a_start_are_not_mixed(tmp_path: Path) -> None:
    """The start's own result was deleted, and it is made again: its arms' results still know the first one."""
    kept, plan = tmp_path / "kept", replace(ONE, grid=[Block(["sft4"], ["sft"])])

    def weigh(root: Path, content: bytes) -> None:
        place(root, Cell("published", "sft4", 0), 5, ONE)
        hf = next((root / "starts" / "sft4").glob("*/hf"))
        (hf / "model.safetensors").write_bytes(content)
        write_manifest(hf, 0)

    weigh(tmp_path / "first", b"one")
    for cell in cells(ONE):
        place(tmp_path / "first", replace(cell, arm="sft"), 7, ONE)
    run_plan(plan, tmp_path / "first", kept, note=lambda _: None)
    (kept / "published-sft4-seed0.json").unlink()
    weigh(tmp_path / "second", b"other")
    place(tmp_path / "second", next(cells(ONE)), 7, ONE)
    with pytest.raises(ConfigError, match=r"sft4-sft-seed1\.json began from another starting policy"):
        run_plan(ONE, tmp_path / "second", kept, note=lambda _: None)


def test_several_runs_go_on_at_once_and_a_start_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, kept, together = tmp_path / "runs", tmp_path / "evidence", threading.Barrier(3)
    for cell in [*(Cell("published", name, 0) for name in PLAN.starts), *cells(PLAN)]:
        place(root, cell, 5)
    original, started = running.run_one, []

    def meets(config: Path, seed: int, folder: Path, words: list[str]) -> Path:
        started.append(folder.name)
        if folder.name not in PLAN.starts and len(started) - len({*started} & {*PLAN.starts}) <= 6:
            together.wait(20)  # broken, unless three are here at once
        return original(config, seed, folder, words)

    monkeypatch.setattr(running, "run_one", meets)
    assert len(run_plan(PLAN, root, kept, jobs=3, note=lambda _: None)) == 10
    assert len(started) == len({*started}) == 10


def test_no_run_starts_when_the_budget_is_spent_and_a_failure_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, kept = tmp_path / "runs", tmp_path / "evidence"
    for name in PLAN.starts:
        place(root, Cell("published", name, 0), 5)
    first = next(cells(PLAN))
    place(root, first, 7)
    original = running.run_one

    def fails(config: Path, seed: int, folder: Path, words: list[str]) -> Path:
        if folder.name not in (first.id, *PLAN.starts):
            raise PactError("exit code 1")
        return original(config, seed, folder, words)

    monkeypatch.setattr(running, "run_one", fails)
    with pytest.raises(PactError, match="exit code 1"):
        run_plan(PLAN, root, kept, note=lambda _: None)
    assert (kept / f"{first.id}.json").is_file()
    said: list[str] = []
    assert len(run_plan(replace(PLAN, hours=1e-6), root, kept, note=said.append)) == 2
    assert "7 runs are left; raise hours" in said[-1]


def test_the_interval_is_over_tasks_and_seeds() -> None:
    draw = np.random.default_rng(3)
    tasks, seeds = 80, 4
    shift = draw.normal(0, 0.3, size=seeds)  # what a seed does to all of its tasks
    ours = {str(t): [float(0.2 + shift[s] + draw.normal(0, 0.1)) for s in range(seeds)] for t in range(tasks)}
    theirs = {str(t): [0.0] * seeds for t in range(tasks)}
    low, high = paired_bootstrap(ours, theirs)
    centre = mean([mean(values) for values in ours.values()])
    assert low < centre < high and (high - low) / 2 == pytest.approx(1.96 * shift.std() / np.sqrt(seeds), rel=0.25)
    narrow = paired_bootstrap({task: values[:1] for task, values in ours.items()}, {task: [0.0] for task in theirs})
    assert narrow[1] - narrow[0] < (high - low) / 4
    common = {task: [value + float(shift[s]) for s, value in enumerate(values)] for task, values in theirs.items()}
    paired = paired_bootstrap({task: [value + 0.1 for value in values] for task, values in common.items()}, common)
    assert paired == pytest.approx((0.1, 0.1))  # the same seeds on both sides: what a seed does to both is no chance


@pytest.mark.parametrize("method", ["pact", "sft", "grpo", "matchtir", "luffy", "chord", "toolrl"])
def test_an_own_agent_has_the_budget_of_pact_with_every_method(method: str) -> None:
    config = load_config([config_of(method, "own", "smollm2_135m-cpu")], ["agent.tools=shop.py", "traces.path=x"])
    assert config.environment == "own" and config.method == method
    assert config.warmup.steps + (config.trainer.steps or 0) == 18
