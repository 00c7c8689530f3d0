"""``tools/evaluate.py``: its settings, its tasks, the earlier episodes that it takes, what it says of failed ones."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.data.tasks import build_environment, limited, load_tasks
from pact_nemo.environments.base import Outcome, Task
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.preflight.chat import chat_of
from pact_nemo.rollouts.episode import SeedPath
from pact_nemo.rollouts.types import Rollout
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.tracking.episodes import dump_evaluation
from tools.evaluate import counted, drawing, settings_of, tasks_in
from tools.evaluations.chosen import chosen_tasks
from tools.evaluations.kept import identity, kept_rollouts, open_folder

CONF = ROOT / "conf"


def options(environment: str | None = None, config: str | None = None, *words: str) -> argparse.Namespace:
    return argparse.Namespace(
        environment=environment, config=[CONF / config] if config else None, overrides=list(words)
    )


def test_the_environment_is_the_option_s_or_else_that_of_the_settings_file() -> None:
    own = "pact_own-smollm2_135m-cpu.yaml"
    assert settings_of(options(None, own, "agent.tools=shop.py:Shop", "tasks.path=t.jsonl")).environment == "own"
    assert settings_of(options("own", None, "agent.tools=shop.py:Shop", "tasks.path=t.jsonl")).environment == "own"
    assert settings_of(options()).environment == "bfcl"
    assert settings_of(options("toolhop", None, "tasks.path=t.json")).environment == "toolhop"


def test_each_metric_has_its_own_count_and_the_first_failure_is_named() -> None:
    tasks = [Task(name, name, "c", (), (), ()) for name in "abc"]

    def rollout(task: str, outcome: Outcome | None) -> Rollout:
        made = Rollout(task, 0, [1], [], [], [], [], outcome, 0)
        if outcome is None:
            made.status, made.error = "failed", "SandboxFailure: lost"
        return made

    played = [rollout("a", Outcome(True, 1.0, metrics={"calls": 2.0})), rollout("b", None)]
    played.append(rollout("c", Outcome(False, 0.0, metrics={"calls": 4.0, "errors": 1.0})))
    found = counted(played, tasks)
    assert found == {"metric_counts": {"calls": 2, "errors": 1}, "first_failure": "b: SandboxFailure: lost"}
    assert counted(played[:1], tasks)["first_failure"] is None


def shop(folder: Path, *words: str) -> Config:
    """The example shop; its tasks copied to ``folder``, a quarter of them into a file of their own, one prompt long."""
    rows = [json.loads(line) for line in (ROOT / "examples/shop/tasks.jsonl").read_text().splitlines()]
    rows[3]["question"] += " please" * 400
    for name, kept in (("train.jsonl", rows[10:]), ("test.jsonl", rows[:10]), ("all.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    copied = shutil.copy(ROOT / "examples/shop/shop.py", folder / "shop.py")
    return load_config(CONF / "pact_own-smollm2_135m-cpu.yaml", [f"agent.tools={copied}:Shop", *words])


@pytest.mark.parametrize(
    "words",
    [
        ["tasks.path=train.jsonl", "tasks.eval_path=test.jsonl", "tasks.max_eval=null"],
        ["tasks.path=all.jsonl", "tasks.held_out=16", "tasks.max_eval=8"],
    ],
)
def test_held_out_is_what_the_run_holds_out(tmp_path: Path, words: list[str]) -> None:
    config = shop(tmp_path, *(word.replace("path=", f"path={tmp_path}/") for word in words))
    environment = build_environment(config)
    try:
        train, wanted, dropped = load_tasks(config, environment, chat_of(config), Quarantine("strict"))
        every, chosen = chosen_tasks(config, environment, None, held_out=True, limit=None)
    finally:
        environment.close()
    assert dropped["prompt_too_long"] == 1 and len(wanted) in (8, 9)
    assert [task.id for task in chosen] == [task.id for task in wanted]
    names = {task.id for task in chosen}
    assert not names & {task.id for task in train} and names <= {task.id for task in every}


def loaded(config: Config) -> tuple[list[Task], list[Task], dict[str, int]]:
    """What :func:`load_tasks` gives for a config."""
    environment = build_environment(config)
    try:
        return load_tasks(config, environment, chat_of(config), Quarantine("strict"))
    finally:
        environment.close()


def test_validation_tasks_are_neither_trained_on_nor_held_out(tmp_path: Path) -> None:
    """Tuning never sees a held-out task, and every held-out task is the same with and without it."""
    sides = {}
    for name, words in (("final", []), ("tuning", ["tasks.validation=10"])):
        config = shop(tmp_path, f"tasks.path={tmp_path}/all.jsonl", "tasks.held_out=16", "tasks.max_eval=null", *words)
        environment = build_environment(config)
        try:
            train, scored, _ = load_tasks(config, environment, chat_of(config), Quarantine("strict"))
            _, chosen = chosen_tasks(config, environment, None, held_out=True, limit=None)
        finally:
            environment.close()
        sides[name] = ({task.id for task in train}, {task.id for task in scored})
        assert config.tasks.scored == {"final": "held-out", "tuning": "validation"}[name]
        assert sides[name][1] == {task.id for task in chosen}
    (rest, held_out), (train, validation) = sides["final"], sides["tuning"]
    assert len(validation) >= 10 and not validation & (train | held_out) and not train & held_out
    assert train | validation <= rest


def test_one_id_in_both_files_is_refused(tmp_path: Path) -> None:
    """A row without an id has one made of its number. A measured held-out task took the place of the training task of
    its name, and that task lost its trace.
    """
    config = shop(tmp_path, f"tasks.path={tmp_path}/train.jsonl", f"tasks.eval_path={tmp_path}/test.jsonl")
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({key: value for key, value in row.items() if key != "id"}) + "\n" for row in rows)
        )
    with pytest.raises(DataError, match=r"test\.jsonl: 10 ids of tasks\.path too, the first one is task_1: give"):
        loaded(config)


def test_a_validation_set_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    config = shop(tmp_path, f"tasks.path={tmp_path}/all.jsonl", "tasks.held_out=16", "tasks.validation=500")
    with pytest.raises(ConfigError, match=r"tasks\.validation=500 .* side empty: lower it, or tasks\.held"):
        loaded(config)


def test_training_tasks_that_are_left_out_change_no_held_out_task(tmp_path: Path) -> None:
    config = shop(tmp_path, "tasks.max_eval=8")
    tasks = [Task(f"t{i}", f"t{i}", "c", (), (), ()) for i in range(40)]
    train, held_out = tasks[:24], tasks[24:]
    chosen = [task.id for task in limited(config, train, held_out)[1]]
    assert len(chosen) == 8
    assert [task.id for task in limited(config, train[3:], held_out)[1]] == chosen
    gone = next(task for task in held_out if task.id not in chosen)
    assert [task.id for task in limited(config, train, [t for t in held_out if t is not gone])[1]] == chosen


def episode(task: str, sample: int, status: str = "ok") -> Rollout:
    outcome = None if status == "failed" else Outcome(True, 1.0)
    return Rollout(task, sample, [1], [2], [1], [0.0], [], outcome, 0, status=status)


def test_a_task_of_which_a_sample_failed_is_played_again_whole(tmp_path: Path) -> None:
    tasks = [Task(name, name, "c", (), (), ()) for name in "ab"]
    played = [episode("a", 0), episode("a", 1, "failed"), episode("b", 0), episode("b", 1)]
    file = tmp_path / "episodes.jsonl"
    dump_evaluation(file, tasks, played, [[1.0]] * 4)
    assert [(r.task_id, r.sample) for r in kept_rollouts(file, tasks, 2)] == [("b", 0), ("b", 1)]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("model.template_kwargs={enable_thinking: false}", "model_settings"),
        ("model.earlier_thoughts=keep", "model_settings"),
        ("rollout.server.dtype=bfloat16", "server"),
        ("run.seed=2", "seed"),
        ("sandbox.seconds=1", "sandbox"),
        ("evaluation.max_turns_per_user_turn=2", "evaluation, limits"),
    ],
)
def test_episodes_of_other_settings_are_not_taken_over(tmp_path: Path, word: str, named: str) -> None:
    warm = "evaluation.temperature=1.0"

    def opened(*words: str) -> Path:
        config = shop(tmp_path, f"tasks.path={tmp_path}/all.jsonl", warm, *words)
        return open_folder(tmp_path / "out", identity(config, str(tmp_path), "x", []))

    opened().write_text("")
    opened("trainer.steps=3")
    with pytest.raises(ConfigError, match=rf"holds episodes with another {named}; name another folder"):
        opened(word)


def test_episodes_of_another_template_or_shape_are_not_taken_over(tmp_path: Path) -> None:
    """The weights alone don't say what a model reads and computes."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"rope_theta": 10000}')
    (model / "chat_template.jinja").write_text("a")
    config = shop(tmp_path, f"tasks.path={tmp_path}/all.jsonl")

    def opened() -> Path:
        return open_folder(tmp_path / "out", identity(config, str(model), "x", []))

    opened().write_text("")
    for name in ("config.json", "chat_template.jinja"):
        before = (model / name).read_text()
        (model / name).write_text("another")
        with pytest.raises(ConfigError, match="holds episodes with another model_files; name another folder"):
            opened()
        (model / name).write_text(before)
    opened()


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_a_number_of_tasks_is_at_least_one(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="give a whole number, at least 1"):
        tasks_in(text)


def test_episodes_of_changed_tasks_and_tools_are_not_taken_over(tmp_path: Path) -> None:
    config = shop(tmp_path, f"tasks.path={tmp_path}/all.jsonl")
    first, other = (Task("a", "a", "c", ((), ()), (), (), data={"price": price}) for price in (1, 2))
    new = Task("b", "b", "c", (), (), ())

    def opened(tasks: list[Task]) -> Path:
        return open_folder(tmp_path / "out", identity(config, str(tmp_path), "x", tasks))

    opened([first]).write_text("")
    opened([first, new])
    opened([new])  # as with --held-out
    with pytest.raises(ConfigError, match="another content of task a; name"):
        opened([other, new])
    with (tmp_path / "shop.py").open("a") as tools:
        tools.write("\n# another price\n")
    with pytest.raises(ConfigError, match="another code; name"):
        opened([first])


def test_requests_of_a_sample_have_seeds_of_their_own() -> None:
    seen: list[int | None] = []

    def complete(messages: Any, tools: Any, seed: int | None = None) -> dict[str, Any]:
        seen.append(seed)
        return {}

    task = Task("a", "a", "c", (), (), ())
    for sample in (0, 1):
        ask = drawing(complete, SeedPath(1, "evaluate"), task, sample)
        ask([], []), ask([], [])
    assert len(set(seen)) == 4 and None not in seen
    drawing(complete, None, task, 0)([], [])
    assert seen[4] is None
