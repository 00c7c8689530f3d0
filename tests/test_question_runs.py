"""The FTRL and ToolHop recipes on published rows: recorded traces, training on scripted rollouts, and the whole run
with a server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.config.load import load_config
from pact_nemo.environments.answers import in_order
from pact_nemo.environments.base import Task
from pact_nemo.environments.ftrl import FTRLEnvironment
from pact_nemo.environments.toolhop import ToolHopEnvironment
from pact_nemo.sandbox import Limits, Sandbox
from pact_nemo.traces.filters import reject_reason
from pact_nemo.traces.recorded import candidate_arguments, example_calls, recorded_trace
from tests.workers.policy_kit import make_model
from tests.workers.scripted import write_replay

REPO = Path(__file__).resolve().parents[1]
DATA = REPO.parent / "shared" / "data"
FILES = {"ftrl": DATA / "ftrl_test.parquet", "toolhop": DATA / "toolhop_100.jsonl"}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published sample files are not beside the project")


def test_sub_questions_are_ordered_by_what_they_name() -> None:
    questions = {
        "What is the second digit of 1861?": "8",
        "Join 8 and 6.": "86",
        "When was Vassar College founded?": "1861",
        "Who publishes it?": "Vassar College",
    }
    order = in_order(questions)
    assert (
        order.index("Who publishes it?")
        < order.index("When was Vassar College founded?")
        < order.index("What is the second digit of 1861?")
    )
    assert order[-1] == "Join 8 and 6."
    assert sorted(in_order({"a names b": "b", "b names a": "a"})) == [
        "a names b",
        "b names a",
    ]  # a circle ends all the same


def test_candidate_arguments_come_from_the_source_and_the_question() -> None:
    source = (
        "def find(name, kind='a', n=1):\n    if name == 'Ada Lovelace': return 1815\nprint(find('Alan Turing',"
        " n=-2))\nfind(name=open('x'))\n"
    )
    assert list(example_calls(source, "find")) == [{"name": "Alan Turing", "n": -2}]
    assert list(example_calls("def (", "find")) == []
    tool = {"name": "find", "parameters": {"properties": {"name": {"type": ["string", "null"]}}, "required": ["name"]}}
    candidates = list(candidate_arguments(tool, source, "When was Grace Hopper born?", ["Grace Hopper", "7"]))
    assert candidates[:2] == [{"name": "Alan Turing", "n": -2}, {"name": "Grace Hopper"}]
    assert {"name": "Ada Lovelace"} in candidates


@needs_data
@pytest.mark.parametrize("benchmark", FILES)
def test_recorded_traces_bring_every_recorded_answer_in(benchmark: str) -> None:
    with Sandbox(2, Limits(seconds=3.0)) as sandbox:
        environment: Any = (
            FTRLEnvironment(FILES["ftrl"], sandbox)
            if benchmark == "ftrl"
            else ToolHopEnvironment(FILES["toolhop"], sandbox)
        )
        tasks: list[Task] = environment.tasks()[:20]
        made = {task.id: recorded_trace(environment, task, "compact") for task in tasks}
        traces = [trace for trace in made.values() if trace is not None]
        assert len(traces) >= 3
        for task in tasks:
            trace = made[task.id]
            if trace is None:
                continue
            assert trace.source == "recorded" and trace.verified and reject_reason(trace, task.tools) is None
            session = environment.start(task)  # replayed, it solves the task again
            for turn in trace.turns:
                assert tuple(session.execute(list(turn.calls))) == turn.observations
            session.next_user_turn(task.reference_answer or "")
            assert session.outcome().success
            session.close()


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("benchmark", "count"), [("ftrl", 11), ("toolhop", 53)])
def test_how_many_of_a_hundred_tasks_get_a_recorded_trace(benchmark: str, count: int) -> None:
    """The figures of docs/design/traces.md."""
    with Sandbox(2, Limits(seconds=3.0)) as sandbox, ThreadPoolExecutor(2) as threads:
        environment: Any = (
            FTRLEnvironment(FILES["ftrl"], sandbox)
            if benchmark == "ftrl"
            else ToolHopEnvironment(FILES["toolhop"], sandbox)
        )
        made = list(threads.map(lambda task: recorded_trace(environment, task, "compact"), environment.tasks()[:100]))
    assert sum(trace is not None for trace in made) == count


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("questions")
    embedded = materialise_embedded_model(REPO / ".cache" / "pact_nemo")
    model = make_model(folder / "model", "llama", layers=2, vocabulary=49152, heads=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_bytes((embedded / name).read_bytes())
    return {"folder": folder, "model": model}


def words(stage: dict[str, Any], benchmark: str) -> list[str]:
    return [
        f"model.path={stage['model']}",
        f"run.root={stage['folder'] / 'runs'}",
        f"tasks.path={FILES[benchmark]}",
        "tasks.max_prompt_tokens=1200",
        "tasks.max_train=12",
        "tasks.max_eval=2",
        "trainer.steps=2",
        "trainer.batch_size=2",
        "trainer.mini_batch_size=2",
        "warmup.steps=1",
        "warmup.batch_size=2",
        "optimizer.lr=1e-3",
    ]


def recipe(benchmark: str, name: str, arguments: list[str]) -> tuple[Path, list[dict[str, Any]]]:
    command = [sys.executable, str(REPO / "recipes" / f"pact_{benchmark}.py"), *arguments, f"run.name={name}"]
    preset = str(REPO / "conf" / f"pact_{benchmark}-smollm2_135m-cpu.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--config", preset], capture_output=True, text=True, timeout=400, cwd=REPO, env=environment
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    run = (
        Path(next(word for word in arguments if word.startswith("run.root=")).removeprefix("run.root="))
        / f"{name}-pact-seed1234-1"
    )
    return run, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("benchmark", FILES)
def test_a_recipe_trains_on_rollouts_that_called_real_tools(stage: dict[str, Any], benchmark: str) -> None:
    preset = REPO / "conf" / f"pact_{benchmark}-smollm2_135m-cpu.yaml"
    replay = stage["folder"] / f"replay-{benchmark}"
    settings = [*words(stage, benchmark), f"trainer.replay={replay}"]
    write_replay(load_config(preset, settings), stage["model"], replay, 2)
    rollouts = [
        json.loads(line)
        for path in sorted((replay / "rollouts").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len(rollouts) == 16
    called = [r for r in rollouts if any(turn["calls"] for turn in r["turns"])]
    assert called and all(r["outcome"]["metrics"]["calls"] > 0 for r in called)
    assert any(r["outcome"]["score"] > 0 for r in called), "a script that repeats the trace's calls scores"
    run, rows = recipe(benchmark, f"replay-{benchmark}", settings)
    assert [(r["stage"], r["step"]) for r in rows] == [("warmup", 1), ("rl", 1), ("rl", 2)]
    assert rows[0]["policy/grad_norm"] > 0 and any(r["policy/grad_norm"] > 0 for r in rows[1:])
    traces = [json.loads(line) for line in (run / "traces.jsonl").read_text().splitlines()]
    assert traces and {trace["source"] for trace in traces} == {"recorded"}
    assert (run / "report.html").is_file()


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("benchmark", FILES)
def test_a_recipe_runs_with_sandbox_and_server(stage: dict[str, Any], benchmark: str) -> None:
    arguments = [*words(stage, benchmark), "trainer.steps=1", "rollout.sampling.max_turn_tokens=24"]
    run, rows = recipe(benchmark, f"served-{benchmark}", arguments)
    summary = json.loads((run / "summary.json").read_text())
    assert [summary["eval"][name]["weight_version"] for name in ("base", "before", "after")] == [0, 1, 2]
    key = {"ftrl": "solve_f1", "toolhop": "answer_correctness"}[benchmark]
    for score in summary["eval"].values():
        assert score["n"] == 2 and score["failed"] == 0
        assert score["metrics"][key] == pytest.approx(score["score"])
    assert rows[-1]["mismatch/mean_abs"] < 2e-3
    ChatFormat.from_pretrained(run / "hf", "pythonic")
    if benchmark == "toolhop":  # per hop count and per answer type, in the summary and in the report
        groups = summary["eval"]["after"]["categories"]
        page = (run / "report.html").read_text()
        for kind in (" hops", "answer type: "):
            named = [name for name in groups if kind in name]
            assert sum(groups[name]["n"] for name in named) == 2 and all(name in page for name in named)
        assert "invocation errors" in page
