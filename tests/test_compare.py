"""The comparison of methods: interval, table, resumption and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from omegaconf import OmegaConf

from pact_nemo import checkout
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import to_yaml
from pact_nemo.errors import ConfigError, PactError
from pact_nemo.report.stats import paired_bootstrap
from pact_nemo.runtime.versions import versions
from tests.fixtures.run_folders import make_run
from tools import compare
from tools.compare import collect, replaced, table
from tools.comparisons import results
from tools.comparisons.results import Result, read_result

ROOT = Path(__file__).resolve().parents[1]


def test_the_interval_covers_the_difference_and_shrinks_with_pairing() -> None:
    rng = np.random.default_rng(1)
    easy = rng.random(200)
    baseline = {str(i): [float(value)] for i, value in enumerate(easy)}
    better = {str(i): [float(value) + 0.1, float(value) + 0.1] for i, value in enumerate(easy)}
    assert paired_bootstrap(better, baseline) == pytest.approx(
        (0.1, 0.1)
    )  # every task gains the same: nothing is left to chance
    noisy = {key: [value[0] + 0.1 + float(rng.normal(0, 0.2))] for key, value in baseline.items()}
    low, high = paired_bootstrap(noisy, baseline)
    expected = 1.96 * np.std([noisy[key][0] - baseline[key][0] for key in baseline]) / np.sqrt(200)
    assert low < 0.1 < high and (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert paired_bootstrap(noisy, baseline) == (low, high)
    assert paired_bootstrap({"a": [1.0]}, {"b": [1.0]}) == (0.0, 0.0)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "compare.py"), *words], capture_output=True, text=True, timeout=120
    )


def test_collecting_makes_a_table_and_replaces_it_in_place(tmp_path: Path) -> None:
    for seed, count in ((1, 9), (2, 12)):
        make_run(tmp_path / "runs", seed=seed, passed=(0, 3, count))
        make_run(tmp_path / "runs", method="grpo", seed=seed, passed=(0, 3, 5))
    make_run(tmp_path / "runs", seed=3, finished=False)
    out = tmp_path / "results.md"
    assert (
        run("--collect", str(tmp_path / "runs"), "--out", str(out), "--picture", str(tmp_path / "c.svg")).returncode
        == 0
    )
    text = out.read_text()
    picture = ElementTree.parse(tmp_path / "c.svg").getroot()
    shapes = {kind: list(picture.iter(f"{{http://www.w3.org/2000/svg}}{kind}")) for kind in ("circle", "path")}
    assert len(shapes["circle"]) == 4 and len(shapes["path"]) == 2  # a dot per finished run, a curve per method
    assert {dot.get("fill") for dot in shapes["circle"]} == {line.get("stroke") for line in shapes["path"]}
    pact = next(line for line in text.split("\n") if line.startswith("| pact | 2 |"))
    assert "| 0.000 | 0.125 | **0.438** | +0.312 | 0.088 | +0.229 |" in pact  # (9 + 12) / 48, 3 / 24, grpo 5 / 24
    assert "| grpo | 1 | 0.000 | 0.125 | 0.208 |" in text
    out.write_text("# Mine\n\nwords\n" + text + "more words\n")
    assert run("--collect", str(tmp_path / "runs"), "--out", str(out)).returncode == 0
    assert out.read_text().startswith("# Mine\n\nwords\n") and out.read_text().endswith("more words\n")
    assert out.read_text().count("**0.438**") == 1
    out.write_text("no marks")
    refused = run("--collect", str(tmp_path / "runs"), "--out", str(out))
    assert refused.returncode == 1 and "add the two comments" in refused.stderr and out.read_text() == "no marks"


def test_failed_episodes_other_tasks_and_sampled_decoding_are_told(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs", seed=seed, tasks=6, passed=(0, 1, 2)) for seed in (1, 2)]
    summary = json.loads((runs[0] / "summary.json").read_text())
    summary["eval"]["after"]["failed"] = 2
    (runs[0] / "summary.json").write_text(json.dumps(summary))
    text = table(collect(tmp_path / "runs"), "pact", "x")
    assert "**2 of 6 episodes of pact, seed 1, failed**" in text and "different tasks" not in text
    assert "6 held-out tasks a run, greedy decoding," in text
    file = runs[1] / "eval" / "after.jsonl"
    file.write_text(file.read_text().replace("multi_turn_base_0#1", "multi_turn_base_77#1"))
    config = runs[1] / "config.yaml"
    settings = OmegaConf.load(config)
    OmegaConf.update(settings, "evaluation", {"temperature": 1.0, "samples": 2})
    config.write_text(OmegaConf.to_yaml(settings))
    text = table(collect(tmp_path / "runs"), "pact", "x")
    assert "**The runs were scored on different tasks**; 5 are common to all." in text
    assert "6 held-out tasks a run, 1 or 2 episodes each, greedy decoding or temperature 1, the" in text


def difference_in(text: str, method: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {method} |")).split(" | ")[7]


def test_seeds_are_paired_by_seed_and_few_have_no_interval(tmp_path: Path) -> None:
    """What a seed does to both methods alike is no difference: seeds 1 to 4 against 2 to 5."""
    for seed in (1, 2, 3, 4):
        make_run(tmp_path / "a", seed=seed, passed=(0, 3, 4 * seed + 1))
    for seed in (2, 3, 4, 5):
        make_run(tmp_path / "a", method="grpo", seed=seed, passed=(0, 3, 4 * seed))
    text = table(collect(tmp_path / "a"), "grpo", "x")
    assert difference_in(text, "pact").startswith("+0.042 [")  # one of 24 tasks, at seeds 2, 3 and 4
    assert difference_in(table({"pact": collect(tmp_path / "a")["pact"]}, "grpo", "x"), "pact") == "–"
    make_run(tmp_path / "b", seed=1, passed=(0, 3, 6))
    make_run(tmp_path / "b", method="grpo", seed=1, passed=(0, 3, 5))
    assert difference_in(table(collect(tmp_path / "b"), "grpo", "x"), "pact") == "+0.042"


def test_other_held_out_tasks_are_said_and_only_the_common_ones_compared(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        make_run(tmp_path, seed=seed, passed=(0, 3, 9), tasks=24)
        run = make_run(tmp_path, method="grpo", seed=seed, passed=(0, 3, 9), tasks=12)
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("max_eval: null", "max_eval: 12"))
    text = table(collect(tmp_path), "grpo", "x")
    assert difference_in(text, "pact") == "+0.000 [+0.000, +0.000]"  # the same nine of the same twelve pass
    assert "**The methods were evaluated differently**: tasks.max_eval." in text and "12 to 24 held-out tasks" in text


def test_a_run_made_twice_is_not_two_seeds(tmp_path: Path) -> None:
    for number in ("1", "2"):
        make_run(tmp_path / number, seed=1)
    with pytest.raises(PactError, match="are both pact with seed 1"):
        collect(tmp_path)


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    for method in ("pact", "grpo"):
        folder = make_run(tmp_path / f"{method}-seed1", method=method, seed=1)
        (folder / "config.yaml").write_text(
            to_yaml(load_config(ROOT / "conf" / f"{method}_bfcl-smollm2_135m-cpu.yaml", ["run.seed=1"]))
        )
    done = run("--root", str(tmp_path), "--seeds", "1")
    assert done.returncode == 0, done.stderr
    assert "run 2/2: grpo, seed 1" in done.stdout and "| pact | 1 |" in done.stdout
    other = run("--root", str(tmp_path), "--seeds", "1", "--", "trainer.steps=20")
    assert other.returncode == 1 and "other settings (trainer.steps)" in other.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--plan", "p.yaml", "--only-table", "--seeds", "9"], "--seeds: the plan says it"),
        (["--plan", "p.yaml", "--baseline", "grpo"], "--baseline: the plan says it"),
        (["--plan", "p.yaml", "--", "trainer.steps=1"], "trainer.steps=1: settings stand in the plan"),
        (["--plan", "p.yaml", "--collect", "runs"], "--collect: --plan makes its own table"),
        (["--collect", "runs", "--", "trainer.steps=1"], "trainer.steps=1: --collect starts no run"),
        (["--collect", "runs", "--methods", "pact"], "--methods: --collect takes the runs that there are"),
        (["--only-table"], "--only-table: it is read with --plan"),
        (["--baseline", "gpro"], "--baseline=gpro is none of --methods pact grpo"),
        (["--", "run.seed=3"], "run.seed=3: a comparison gives each run its own run.seed"),
    ],
)
def test_what_nothing_would_read_is_refused(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "run_one", lambda *_: pytest.fail("a run was started"))
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    assert compare.main() == 1 and says in capsys.readouterr().err


def test_a_seed_that_is_named_twice_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        (method, seed): make_run(tmp_path, method=method, seed=seed) for method in ("pact", "grpo") for seed in (1, 2)
    }
    monkeypatch.setattr(compare, "run_one", lambda config, seed, root, words: made[config.name.split("_")[0], seed])
    options = compare._parser().parse_args(["--methods", "pact", "grpo", "pact", "--seeds", "1", "2", "1"])
    assert {name: len(runs) for name, runs in compare.run_methods(options, []).items()} == {"pact": 2, "grpo": 2}


def test_other_limits_and_models_are_told(tmp_path: Path) -> None:
    make_run(tmp_path, seed=1)
    run = make_run(tmp_path, method="grpo", seed=1)
    settings = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(settings, "rollout.sampling.max_turn_tokens", 33)
    OmegaConf.update(settings, "model.path", "/another")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(settings))
    said = next(line for line in table(collect(tmp_path), "grpo", "x").splitlines() if "evaluated differently" in line)
    assert "model.path" in said and "rollout.sampling.max_turn_tokens" in said


def test_unknown_methods_and_empty_folders_are_refused_by_name(tmp_path: Path) -> None:
    unknown = run("--methods", "ppo", "--root", str(tmp_path))
    assert unknown.returncode == 1
    assert (
        "methods with one: chord, chord_phi, ftrl, grpo, luffy, matchtir, pact, sft, sft_matchtir, toolrl"
        in unknown.stderr
    )
    empty = run("--collect", str(tmp_path))
    assert empty.returncode == 1 and "no finished run" in empty.stderr


def test_a_page_holds_the_tables_of_several_plans(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    assert "<!-- table -->\nfirst\n<!-- /table -->" in replaced(page, "first\n", "one")
    page.write_text("a\n<!-- table -->\nx\n<!-- /table -->\nb\n<!-- table two -->\ny\n<!-- /table -->\nc\n")
    second = replaced(page, "new\n", "two")
    assert second == "a\n<!-- table -->\nx\n<!-- /table -->\nb\n<!-- table two -->\nnew\n<!-- /table -->\nc\n"
    first = replaced(page, "new\n", "one")
    assert first == "a\n<!-- table -->\nnew\n<!-- /table -->\nb\n<!-- table two -->\ny\n<!-- /table -->\nc\n"
    page.write_text("a\n<!-- table two -->\n")
    with pytest.raises(ConfigError, match="has no <!-- table -->"):
        replaced(page, "new\n", "two")


def test_a_row_says_what_its_difference_is_over_where_the_arms_have_more() -> None:
    kept = read_result(ROOT / "docs/evidence/starting_point/sft8-sft-seed1.json")

    def made(arm: str, seed: int, tasks: str) -> Result:
        return replace(kept, arm=arm, seed=seed, scores={"after": dict.fromkeys(tasks, 1.0)})

    runs = [made("sft", 1, "abcd"), made("sft", 2, "abcd"), made("pact", 2, "abcd"), made("grpo", 1, "cdef")]
    runs += [made("chord", seed, "abcd") for seed in (1, 2)]
    rows = {line.split(" | ")[2]: line for line in results.table(runs, "sft").splitlines()[2:6]}
    assert "| +0.000 (seed 2) |" in rows["pact"] and "| +0.000 (seed 1; 2 common tasks) |" in rows["grpo"]
    assert "| +0.000 |" in rows["chord"] and "| – |" in rows["sft"]


def test_a_run_says_the_commit_of_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *name, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    assert "commit" not in versions()
    git("init", "-q")
    assert "commit" not in versions()  # nothing committed yet
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD").strip()
    (tmp_path / "untracked").write_text("2")
    assert versions()["commit"] == head[:12]
    (tmp_path / "a.py").write_text("2")
    assert versions()["commit"] == head[:12] + "+changes"
    monkeypatch.setattr(checkout, "ROOT", tmp_path / "inside")
    (tmp_path / "inside").mkdir()
    assert "commit" not in versions()
