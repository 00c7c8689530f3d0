"""The page: what it says, that it is whole without anything else, and that nothing a model wrote becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fixtures.run_folders import make_run

from pact_nemo.config.load import load_config
from pact_nemo.config.schema import to_yaml
from pact_nemo.errors import DataError
from pact_nemo.report import write_report
from pact_nemo.report.comparison import compare
from pact_nemo.report.curves import rl_curves
from pact_nemo.report.data import Run, load_run
from pact_nemo.report.episodes import choose_tasks, training_cards
from pact_nemo.report.page import facts

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<script>window.hit=1</script><img src=x onerror='window.hit=1'>\"'><b>&amp;{{ 7*7 }}"


class Page(HTMLParser):
    """Start tags with their attributes, the text, and the text of script elements."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._stack: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._stack and self._stack.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._stack[-1] if self._stack else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def edit(path: Path, change: Any) -> None:
    """Apply ``change`` to each row of a JSONL file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


def test_headline_table_and_facts(page: Page) -> None:
    text = " ".join(page.text.split())
    assert "12.5 %→37.5 % +25.0 points on 24 held-out episodes" in text
    assert "The model as published scored 0.0 %" in text
    assert "7 gained, 1 lost, 2 passed both times, 14 neither" in text
    assert "multi_turn_miss_func" in text and "as published" in text and "after warm-up" in text
    for fact in ("pact", "embedded small model", "14:39", "31\u202f200", "2.13.0+cpu", "trainer 5.0 GiB"):
        assert fact in page.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["agent.tools=shop.py:Shop"], "own: shop.py:Shop"),
        (["agent.mcp.command=[mcp-server-git,--repository,{workdir}]"], "own: mcp-server-git --repository {workdir}"),
    ],
)
def test_an_own_agents_tools_are_named(tmp_path: Path, words: list[str], said: str) -> None:
    folder = make_run(tmp_path, steps=2)
    assert dict(facts(load_run(folder)))["Environment"] == "bfcl"
    own = load_config(ROOT / "conf" / "pact_own-smollm2_135m-cpu.yaml", ["traces.path=talks.jsonl", *words])
    (folder / "config.yaml").write_text(to_yaml(own), encoding="utf-8")
    assert dict(facts(load_run(folder)))["Environment"] == said
    words_of_a_benchmark = re.search(r"benchmark|official", Page(write_report(folder).read_text(encoding="utf-8")).text)
    assert words_of_a_benchmark is None, words_of_a_benchmark


def test_every_required_curve_is_there_with_a_title_and_a_description(page: Page) -> None:
    titles = {
        "Reward",
        "Training success",
        "Total loss",
        "Surrogate terms",
        "Trace SFT terms",
        "KL term",
        "Privilege gap",
        "Clip fractions",
        "Call weight λₐ",
        "Anchored prompts",
        "Reasoning prefix level",
        "KL of the update",
        "KL to the reference",
        "Sampler mismatch",
        "Without a signal",
        "Generation speed",
        "Time per phase",
    }
    charts = [attributes for tag, attributes in page.tags if tag == "figure" and attributes.get("class") == "chart"]
    drawings = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("tabindex") == "0"]
    ids = {attributes["id"] for _, attributes in page.tags if attributes.get("id")}
    assert all(title in page.text for title in titles)
    assert len(charts) == len(drawings) >= len(titles)
    assert all(
        drawing["role"] == "img" and set((drawing["aria-labelledby"] or "").split()) <= ids for drawing in drawings
    )
    for chart in charts:
        data = json.loads(chart["data-chart"] or "")
        assert len(data["x"]) == len(data["step"]) == len(data["text"][0]) == len(data["y"][0])


def test_curves_of_a_run_whose_numbers_hardly_move() -> None:
    """An exact sampler, no clipped token and no refit: readable axes, and no layer for a phase of microseconds."""
    times = {"time/rollout": 20.0, "time/update": 30.0, "time/refit": 1.3e-5, "time/total": 50.1}
    still = {"policy/clip_fraction_x": 0.0, "policy/clip_fraction_h": 0.0}
    records = [{"step": step, "mismatch/weight_mean": 0.999992 + 1e-6 * step, **still, **times} for step in (1, 2, 3)]
    charts = {chart.title: chart for chart in rl_curves(Run(Path("run"), {}, {}, "", [], records))}
    assert set(charts) == {"Clip fractions", "Importance weight", "Time per phase"}
    assert max(len(tick.text) for chart in charts.values() for tick in chart.y_ticks) <= 6
    assert charts["Clip fractions"].y_ticks[-1].text == "1 %"
    assert [s.label for s in charts["Time per phase"].series] == ["rollout", "update"]


def test_nothing_is_loaded_and_only_this_script_may_run(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "action", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:,")), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    style = (ROOT / "pact_nemo/report/style.css").read_text()
    assert "url(" not in style and "@import" not in style


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=2, warmup=2, tasks=4, passed=(0, 1, 2))
    clean = Page(write_report(folder).read_text(encoding="utf-8"))

    def poison(row: dict[str, Any]) -> dict[str, Any]:
        for turn in row["turns"]:
            turn["text"] += EVIL
            turn["observations"] = [text + EVIL for text in turn["observations"]]
            turn["call_errors"] = [text + EVIL for text in turn["call_errors"]]
        row["task"]["category"] += EVIL
        row["task"]["user_turns"][0][0]["content"] += EVIL
        row["outcome"]["reason"] += EVIL
        row["error"] = EVIL
        return row

    for file in [*(folder / "eval").glob("*.jsonl"), *(folder / "rollouts").glob("*.jsonl")]:
        edit(file, poison)
    edit(
        folder / "traces.jsonl",
        lambda row: (
            row
            | {
                "turns": [
                    t | {"observations": [EVIL], "segments": [{"type": "other", "text": EVIL}]} for t in row["turns"]
                ]
            }
        ),
    )
    summary = json.loads((folder / "summary.json").read_text())
    summary["versions"][EVIL] = EVIL
    summary["hf_export"] = EVIL
    (folder / "summary.json").write_text(json.dumps(summary))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(f"{config}# {EVIL}\n")
    poisoned = Page(write_report(folder).read_text(encoding="utf-8"))
    assert EVIL in poisoned.text

    def scripts_and_images(of: Page) -> list[str]:
        return [tag for tag, _ in of.tags if tag in ("script", "img", "b")]

    assert scripts_and_images(poisoned).count("img") == 0
    assert poisoned.scripts == clean.scripts
    assert scripts_and_images(poisoned) == scripts_and_images(clean)


def test_a_run_that_has_not_finished_or_hardly_begun_still_has_a_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=1, warmup=0, tasks=2, passed=(0, 0, 1), finished=False)
    text = " ".join(Page(write_report(folder).read_text(encoding="utf-8")).text.split())
    assert "hasn't finished" in text and "0.0 %→50.0 %" in text  # counted from the episodes
    for name in ("metrics.jsonl", "traces.jsonl"):
        (folder / name).unlink()
    for name in ("eval", "rollouts"):
        for file in (folder / name).iterdir():
            file.unlink()
    text = write_report(folder).read_text(encoding="utf-8")
    assert "No step has finished yet" in text and "No episode was kept" in text and "There is no held-out score" in text


def test_an_unfinished_run_has_scores_where_no_episode_passes(tmp_path: Path) -> None:
    """FTRL's score is a share: nothing passed, and the score is 0.5."""
    folder = make_run(tmp_path, warmup=0, tasks=4, passed=(0, 0, 4), finished=False)
    file = folder / "eval" / "before.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["outcome"]["score"] = 0.5
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_run(folder).scores["before"]["score"] == 0.5


def test_episodes_that_failed_are_told_and_left_out_of_the_sign_test(tmp_path: Path) -> None:
    folder = make_run(tmp_path, warmup=0, tasks=6, passed=(0, 4, 4), finished=False)
    file = folder / "eval" / "after.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[:3]:
        row |= {"status": "failed", "outcome": None, "error": "ServerError: lost"}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = " ".join(Page(write_report(folder).read_text(encoding="utf-8")).text.split())
    assert "3 of 6 episodes after failed through no fault of the policy, and count 0." in text
    assert "0 lost" in text and "3 without a verdict in one of both" in text


def test_evaluations_of_one_side_only(tmp_path: Path) -> None:
    folder = make_run(tmp_path, warmup=0, tasks=4, passed=(0, 1, 2))
    summary = json.loads((folder / "summary.json").read_text())
    del summary["eval"]["before"]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "eval" / "before.jsonl").unlink()
    text = " ".join(Page(write_report(folder).read_text(encoding="utf-8")).text.split())
    assert "50.0 % after RL, on 4 held-out episodes" in text


def test_stage_names_follow_what_was_evaluated(run: Path, tmp_path: Path) -> None:
    assert [(s.name, s.label) for s in load_run(run).stages()] == [
        ("base", "as published"),
        ("before", "after warm-up"),
        ("after", "after RL"),
    ]
    plain = load_run(make_run(tmp_path, warmup=0))
    assert [(s.name, s.label) for s in plain.stages()] == [("before", "before"), ("after", "after")]


@pytest.mark.parametrize(
    ("file", "remedy"),
    [("eval/after.jsonl", "after.jsonl:25"), ("summary.json", "summary.json"), ("config.yaml", "config.yaml")],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, remedy: str) -> None:
    folder = make_run(tmp_path)
    with open(folder / file, "a") as handle:
        handle.write("{broken: [\n")
    with pytest.raises(DataError, match=remedy):
        write_report(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="runs/latest"):
        write_report(tmp_path)


def test_chosen_episodes_cover_gains_losses_and_the_rest(run: Path) -> None:
    loaded = load_run(run)
    passed_before, passed_after = (
        {row["task_id"] for row in loaded.episodes[name] if row["outcome"]["success"]} for name in ("base", "after")
    )
    chosen = choose_tasks(loaded, 8)
    assert len(chosen) == len(set(chosen)) == 8
    assert chosen[0] in passed_after - passed_before
    assert len([task for task in chosen if task in passed_after - passed_before]) >= 4
    assert any(task not in passed_after for task in chosen)
    assert len(choose_tasks(loaded, 1000)) == 24


def test_training_rollouts_come_from_the_prompt_with_the_largest_advantages(run: Path) -> None:
    cards = training_cards(load_run(run))
    assert [card.heading for card in cards] == [f"training step {step}, trace-conditioned" for step in (1, 13, 24)]
    # three steps were dumped: none is shown twice
    assert {card.task_id for card in cards} == {"multi_turn_base_100#1"}
    assert all([e.success for e in card.episodes] == [True, False] for card in cards)


def test_comparison_has_mean_and_spread_per_method(tmp_path: Path) -> None:
    ends = {1: 9, 2: 12, 3: 6}
    folders = [make_run(tmp_path, seed=seed, passed=(0, 3, count)) for seed, count in ends.items()]
    folders += [make_run(tmp_path, method="grpo", seed=1, passed=(0, 3, 5), steps=20)]
    made = compare([load_run(folder) for folder in folders])
    shares = [count / 24 for count in ends.values()]
    pact, grpo = made.methods
    assert (pact.method, pact.runs, pact.base, pact.start) == ("pact", 3, 0.0, 3 / 24)
    plain = compare([load_run(make_run(tmp_path, seed=9, warmup=0, passed=(0, 3, 4)))])
    assert made.has_base and not plain.has_base and plain.methods[0].base is None
    assert (pact.end, pact.deviation) == pytest.approx((statistics.mean(shares), statistics.stdev(shares)))
    assert (pact.low, pact.high) == (min(shares), max(shares))
    assert (grpo.runs, grpo.deviation) == (1, None)
    assert [key for key, _ in made.differences] == ["trainer.steps"]
    page = Page(write_report(folders[0], folders).read_text(encoding="utf-8"))  # itself among the others counts once
    assert len([1 for tag, a in page.tags if tag == "circle" and a.get("r") == "4.5"]) == 4
    assert "pact_bfcl-grpo-seed1-1" in page.text


def test_comparison_warns_of_unlike_evaluations_and_unfinished_runs(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path, seed=1),
        make_run(tmp_path, seed=2, tasks=12),
        make_run(tmp_path, seed=3, finished=False),
    ]
    warnings = " ".join(compare([load_run(folder) for folder in folders]).warnings)
    assert "different numbers of episodes" in warnings and "pact_bfcl-pact-seed3-1" in warnings


def test_command_line(tmp_path: Path) -> None:
    folder, other = make_run(tmp_path, steps=2), make_run(tmp_path, seed=2, steps=2)
    tool = [sys.executable, str(ROOT / "tools/report.py")]
    done = subprocess.run([*tool, str(folder), str(other)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not (other / "report.html").exists()
    assert other.name in (folder / "report.html").read_text()
    assert re.search(r"report: .*report\.html", done.stdout)
    without_browser = subprocess.run(
        [*tool, str(folder), "--png", str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": ""},
    )
    assert without_browser.returncode == 1
    assert "MissingDependency" in without_browser.stderr and "apt-get install chromium" in without_browser.stderr
    assert not (tmp_path / "a.png").exists()
