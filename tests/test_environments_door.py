"""The door for environments: the page's example works as it stands, every environment obeys the protocol, and a name or
setting that is none is refused as the settings are read.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pact_nemo
from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.config.limits import evaluation_limits
from pact_nemo.config.load import load_config
from pact_nemo.config.own import MOVED
from pact_nemo.config.schema import Config, to_dict, to_yaml
from pact_nemo.data.dataset import build_dataset
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import Outcome, ToolCall
from pact_nemo.environments.outside import task_fault
from pact_nemo.environments.registry import ENVIRONMENTS, environment_spec
from pact_nemo.environments.spec import EnvironmentSpec
from pact_nemo.errors import ConfigError
from pact_nemo.planning.from_config import describe_plan
from pact_nemo.traces.without_teacher import expert_trace
from tests.workers.policy_kit import make_model
from tests.workers.question_rows import ftrl_row, toolhop_row, write
from tests.workers.scripted import write_replay

REPO = Path(__file__).resolve().parents[1]
OWN = REPO / "examples" / "shop"
PAGE = REPO / "docs" / "extend" / "environment.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's file: both of its parts, one after the other."""
    path = tmp_path_factory.mktemp("outside") / "shop.py"
    path.write_text("\n\n".join(BLOCKS), encoding="utf-8")
    return path


def words_of(name: str, folder: Path, shop: Path) -> list[str]:
    """Settings of every environment that there is."""
    rows = {"ftrl": [ftrl_row()], "toolhop": [toolhop_row()]}
    if name in rows:
        return [f"environment={name}", f"tasks.path={write(folder / f'{name}.jsonl', *rows[name])}"]
    if name == "bfcl":
        return ["environment=bfcl", "environment_config.categories=[multi_turn_base]"]
    if name == "own":
        row = {**json.loads((OWN / "traces.jsonl").read_text().splitlines()[1])}
        row["info"] = json.loads((OWN / "tasks.jsonl").read_text().splitlines()[1])["info"]
        talks = write(folder / "talks.jsonl", row)
        return ["environment=own", f"agent.tools={OWN / 'shop.py'}:Shop", f"traces.path={talks}"]
    return [f"environment={shop}:{name}"]


# --- the page


def test_the_page_has_an_environment_of_at_most_sixty_lines() -> None:
    first, second = BLOCKS
    assert sum(bool(line.strip()) for line in first.splitlines()) <= 60
    assert max(map(len, PAGE.read_text(encoding="utf-8").splitlines())) <= 100
    assert {node.module for node in ast.walk(ast.parse(second)) if isinstance(node, ast.ImportFrom)} == {
        "dataclasses",
        "pact_nemo.environments.spec",
    }
    fields = {field.name for field in dataclasses.fields(EnvironmentSpec)} - {"build", "config", "answer_remedy"}
    assert fields <= set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.slow
def test_the_pages_file_trains_through_the_generic_recipe(shop: Path, tmp_path: Path) -> None:
    embedded = materialise_embedded_model(REPO / ".cache" / "pact_nemo")
    model = make_model(tmp_path / "model", "llama", layers=2, vocabulary=49152, heads=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_bytes((embedded / name).read_bytes())
    alone = tmp_path / "shop.py"
    alone.write_text(BLOCKS[0], encoding="utf-8")  # the first part is whole by itself
    words = [
        "environment=shop.py:Shop",
        f"model.path={model}",
        f"run.root={tmp_path / 'runs'}",
        "tasks.held_out=10",
        "tasks.max_train=12",
        "trainer.steps=2",
        "trainer.batch_size=2",
        "trainer.mini_batch_size=2",
        "warmup.steps=1",
        "warmup.batch_size=2",
        "optimizer.lr=1e-3",
        f"trainer.replay={tmp_path / 'replay'}",
    ]
    preset = REPO / "conf" / "pact-smollm2_135m-cpu.yaml"
    here = [f"environment={alone}:Shop", *words[1:]]
    write_replay(load_config(preset, here), model, tmp_path / "replay", 2)
    command = [sys.executable, str(REPO / "recipes" / "pact.py"), *words, "run.name=shop"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    run = tmp_path / "runs" / "shop-pact-seed1234-1"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("warmup", 1), ("rl", 1), ("rl", 2)]
    assert any(row["policy/grad_norm"] > 0 for row in rows[1:])
    traces = [json.loads(line) for line in (run / "traces.jsonl").read_text().splitlines()]
    assert len(traces) == 12 and {trace["source"] for trace in traces} == {"ground_truth"}
    assert "environment: shop.py:Shop\n" in (run / "config.yaml").read_text()


def test_the_pages_settings_are_a_section_that_is_checked(shop: Path, tmp_path: Path) -> None:
    config = load_config(None, [f"environment={shop}:SHOP", "environment_config.most=3", "tasks.held_out=4"])
    environment = build_environment(config)
    assert len(environment.tasks()) == 12
    assert f"{shop}:SHOP; at most 3; held out: 4 groups" in describe_plan(config)
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml") == config
    for word, named in (("mosst=3", "environment_config.mosst"), ("most=few", "environment_config.most")):
        with pytest.raises(ConfigError, match=named):
            load_config(None, [f"environment={shop}:SHOP", f"environment_config.{word}"])
    with pytest.raises(ConfigError, match=r"environment_config\.most.*settings of environment=.*Shop: none"):
        load_config(None, [f"environment={shop}:Shop", "environment_config.most=3"])  # no class: no key


def test_an_outside_environment_is_evaluated_as_in_training_unless_it_says_otherwise(shop: Path) -> None:
    config = load_config(None, [f"environment={shop}:Shop", "rollout.sampling.max_turns_per_user_turn=4"])
    assert evaluation_limits(config).max_turns_per_user_turn == 4
    assert "(as in training)" in describe_plan(config)


def test_an_outside_environments_tasks_and_traces_make_a_dataset(shop: Path) -> None:
    chat = ChatFormat.from_pretrained(materialise_embedded_model(REPO / ".cache" / "pact_nemo"), "pythonic")
    config = load_config(REPO / "conf/pact-smollm2_135m-cpu.yaml", [f"environment={shop}:Shop", "tasks.held_out=10"])
    dataset = build_dataset(config, build_environment(config), chat)
    assert len(dataset.train) == 30 and len(dataset.held_out) == 10 and len(dataset.trace_tokens) == 30


# --- the protocol, for every environment


@pytest.mark.parametrize("name", [*ENVIRONMENTS, "Shop", "SHOP"])
def test_every_environment_obeys_the_protocol(name: str, shop: Path, tmp_path: Path) -> None:
    config = load_config(None, words_of(name, tmp_path, shop))
    spec = environment_spec(config.environment)
    assert isinstance(config.environment_config, spec.config)
    environment = build_environment(config)
    try:
        tasks = environment.tasks()
        assert tasks and len({task.id for task in tasks}) == len(tasks)
        assert [task_fault(task) for task in tasks] == [None] * len(tasks)
        assert environment.tasks() == tasks, "asked again it has the same tasks"
        for task in tasks[:3]:
            one, two = environment.start(task), environment.start(task)
            calls = [ToolCall("no_such_tool", {}), *(call for turn in task.reference_calls[:1] for call in turn)]
            seen = one.execute(calls)
            assert len(seen) == len(calls) and all(isinstance(text, str) for text in seen)
            assert seen[0].startswith("Error"), "a failing tool is an observation"
            left = len(task.user_turns) - 1
            while (following := one.next_user_turn("")) is not None:
                messages, tools = following
                assert messages and isinstance(tools, list)
                left -= 1
            assert left == 0
            outcome = one.outcome()
            assert isinstance(outcome, Outcome) and 0.0 <= outcome.score <= 1.0
            for session in (one, two):
                session.close()
                session.close()
        kept = expert_trace(spec.expert_traces, environment, tasks[0], "compact", "one")
        assert kept is not None and kept.verified
    finally:
        environment.close()
        environment.close()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_of_the_table_has_its_full_settings(name: str, tmp_path: Path, shop: Path) -> None:
    config = load_config(REPO / "conf" / f"pact_{name}.yaml", words_of(name, tmp_path, shop)[1:])
    assert config.environment == name
    assert (config.tasks.path is not None) is (environment_spec(name).tasks_file == "required")


def test_no_code_outside_the_environments_compares_a_benchmarks_name() -> None:
    root = Path(pact_nemo.__file__).parent
    files = [path for path in root.rglob("*.py") if "environments" not in path.relative_to(root).parts]
    files += [*(REPO / "tools").rglob("*.py"), *(REPO / "recipes").rglob("*.py")]
    offenders = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                if any(isinstance(side, ast.Constant) and side.value in ENVIRONMENTS for side in sides):
                    offenders.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.Attribute) and node.attr == "data" and isinstance(node.value, ast.Name):
                if node.value.id == "task":
                    offenders.append(f"{path.name}:{node.lineno} reads task.data")
    assert offenders == []


# --- names that are none


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("shopp", "must be one of bfcl, ftrl, toolhop, own, or module:name or path/to/file.py:name of your own"),
        ("no_such_module:Shop", "no_such_module can't be imported"),
        ("{folder}/none.py:Shop", "FileNotFoundError"),
        ("{folder}/broken.py:Shop", "ZeroDivisionError"),
        ("{folder}/leaves.py:Shop", "SystemExit"),
        ("{folder}/empty.py:Shop", "has no Shop; it has Other"),
        ("{folder}/number.py:Shop", "is a int; it has to be a class or function"),
        ("{folder}/config.py:Shop", "has to be a dataclass that inherits from EnvironmentConfig"),
        ("{folder}/field.py:Shop", "Own can't be a section of settings"),
    ],
)
def test_an_environment_that_is_none_is_refused_as_the_settings_are_read(value: str, said: str, tmp_path: Path) -> None:
    spec = "from pact_nemo.environments.spec import *\n"
    files = {
        "broken": "1 / 0",
        "leaves": "raise SystemExit(3)",
        "empty": "class Other: pass",
        "number": "Shop = 5",
        "config": f"{spec}Shop = EnvironmentSpec(int, config=dict)",
        "field": (
            f"{spec}from dataclasses import dataclass, field\n@dataclass\nclass Own(EnvironmentConfig):\n"
            "    x: set = field(default_factory=set)\nShop = EnvironmentSpec(int, config=Own)"
        ),
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    value = value.format(folder=tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"environment={value}"])
    assert said in str(caught.value) and "environment=" in str(caught.value) and value in str(caught.value)


@pytest.mark.parametrize("old", [old for old in MOVED if old.startswith("tasks.")])
def test_a_setting_that_moved_is_refused_with_its_new_name(old: str, tmp_path: Path) -> None:
    new = MOVED[old]
    assert old.removeprefix("tasks.") not in to_dict(Config())["tasks"]
    known = {
        f"environment_config.{f.name}"
        for name in ENVIRONMENTS
        for f in dataclasses.fields(environment_spec(name).config)
    }
    assert new in known | {"environment"}
    section, _, key = old.partition(".")
    (tmp_path / "parent.yaml").write_text(f"{section}: {{{key}: null}}\n")
    (tmp_path / "child.yaml").write_text("defaults: [parent.yaml]\n")
    for file, words in ((None, [f"{old}=5"]), (None, [f"{section}={{{key}: 5}}"]), (tmp_path / "child.yaml", [])):
        with pytest.raises(ConfigError, match=f"{re.escape(old)} is now {re.escape(new)}"):
            load_config(file, words)


# --- whose section it is


def test_a_section_belongs_to_the_environment_that_is_named_with_it(tmp_path: Path) -> None:
    preset = REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml"
    config = load_config(preset, ["environment_config.scenario=free", "environment=toolhop", "tasks.path=x.jsonl"])
    assert dataclasses.asdict(config.environment_config) == {"scenario": "free"}  # whatever the order of the words
    (tmp_path / "mine.yaml").write_text("environment_config: {scenario: free}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: .*scenario.*settings of environment=bfcl"):
        load_config(tmp_path / "mine.yaml", ["environment=toolhop", "tasks.path=x.jsonl"])
    (tmp_path / "child.yaml").write_text("defaults: [mine.yaml]\nenvironment: toolhop\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: .*scenario.*settings of environment=bfcl"):
        load_config(tmp_path / "child.yaml", ["tasks.path=x.jsonl"])
    (tmp_path / "toolhop.yaml").write_text("environment: toolhop\ntasks: {path: x.jsonl}\n")
    (tmp_path / "both.yaml").write_text("defaults: [toolhop.yaml, mine.yaml]\n")
    for files in ([tmp_path / "both.yaml"], [tmp_path / "toolhop.yaml", tmp_path / "mine.yaml"]):
        assert load_config(files).environment_config.scenario == "free"
    back = load_config([preset, tmp_path / "toolhop.yaml"], ["environment=bfcl", "tasks.path=null"])
    assert back.environment_config == load_config(None).environment_config  # it starts anew, at its defaults


@pytest.mark.parametrize("text", ["2024_01", "no", "1e3", "12:30", "0x10"])
def test_texts_of_the_section_stay_what_is_written(text: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass, field\nfrom pact_nemo.environments.spec import *\n@dataclass\n"
        "class Own(EnvironmentConfig):\n    name: str = 'x'\n    names: list[str] = field(default_factory=list)\n"
        "E = EnvironmentSpec(int, config=Own)\n"
    )
    value = f"environment: {tmp_path}/own.py:E\nenvironment_config: {{name: {text}, names: [{text}, x]}}\n"
    (tmp_path / "a.yaml").write_text(value)
    words = [f"environment={tmp_path}/own.py:E"]
    for config in (
        load_config(tmp_path / "a.yaml"),
        load_config(None, [*words, f"environment_config.name={text}", f"environment_config.names=[{text}, x]"]),
    ):
        assert (config.environment_config.name, config.environment_config.names) == (text, [text, "x"])
