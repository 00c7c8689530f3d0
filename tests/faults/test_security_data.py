"""Data stays data: hostile calls, names that lead out of a folder, keys in what a run writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pact_nemo.chat.tool_formats import TOOL_FORMATS
from pact_nemo.checkpoints import manifest, resume_folders, resume_manifest
from pact_nemo.config.load import load_config
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.bfcl import data as bfcl_data
from pact_nemo.errors import CheckpointError, ConfigError, DataError
from pact_nemo.policy.distributed import init_distributed  # noqa: F401 - what the child process below imports
from pact_nemo.runtime import tensor_files
from pact_nemo.runtime.files import stays_inside
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.launch import engine_arguments, engine_environment
from pact_nemo.serving.server import RolloutServer
from pact_nemo.tracking import run_folder as workspace
from tests.faults import tally
from tests.workers.bfcl_tasks import bfcl_environment

ROOT = Path(__file__).resolve().parents[2]

# -- BFCL evaluates call text
# ------------------------------------------------------------------------------------------------------------------


def hostile(mark: Path) -> list[str]:
    """Assistant messages that would touch ``mark`` if any part of them were run."""
    command = f"touch {mark}"
    python = f"__import__('os').system('{command}')"
    return [
        f"[{python}]",
        f"[ls(a={python})]",
        f"[ls(**{{'a': {python}}})]",
        f"[{python.replace('__import__', 'ls').replace('os', 'x')}]",
        f"[cat(file_name=open('{mark}', 'w').name)]",
        f"[open(file='{mark}', mode='w')]",
        f'[exec(source="{python}")]',
        f'[eval("{python}")]',
        f"[cat(file_name=f'{{{python}}}')]",
        f"[cat(file_name='a') if {python} else ls()]",
        f"[(lambda: {python})()]",
        f"[ls(), *[{python}]]",
        f"[cat(file_name='x'); {python}]",
        f"[cat(file_name='a\\'); {python}; (\\'')]",
        f"[cat(file_name=\"'); {python}; ('\")]",
        f"[cat(file_name='ls(a={command})')]",
        f"[ls.__globals__['os'].system('{command}')]",
        f"[cat({python}=1)]",
        '<tool_call>\n{"name": "cat", "arguments": {"file_name\'), ' + python + '#": "a"}}\n</tool_call>',
        '<tool_call>\n{"name": "' + python + '", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "cat", "arguments": {"file_name": "\'); ' + python + "; ('\"}}\n</tool_call>",
        '{"name": "cat", "parameters": {"file_name": "$(' + command + ')"}}',
        '{"name": "echo", "parameters": {"content": "`' + command + '`", "file_name": "../../../' + mark.name + '"}}',
        f"[echo(content='x', file_name='{mark}')]",
        f"[touch(file_name='{mark}')]",
        f"[cp(source='x', destination='{mark}')]",
        f"[mkdir(dir_name='{mark}')]",
        f"[cd(folder='{mark.parent}')]",
    ]


def test_no_call_text_runs_and_the_virtual_file_system_stays_virtual(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    environment = bfcl_environment(("multi_turn_base",), window="full")
    task = next(task for task in environment.tasks() if "GorillaFileSystem" in task.data["entry"].classes)
    names = {tool["name"] for tool in task.tools}
    assert {"ls", "cat", "echo", "touch", "cp", "mkdir", "cd"} <= names
    tried = executed = 0
    for text in hostile(mark):
        for form in TOOL_FORMATS.values():
            parsed = form.parse(text, task.tools)
            session = environment.start(task)
            try:
                observations = session.execute(parsed.calls)
                assert len(observations) == len(parsed.calls)
                session.next_user_turn("")
                session.outcome()
            finally:
                session.close()
            tried += 1
            executed += len(parsed.calls)
            assert not mark.exists(), f"{form.name} let through: {text}"
    for call in (
        ToolCall("open", {"file": str(mark), "mode": "w"}),
        ToolCall("__import__", {"name": "os"}),
        ToolCall("exec", {"source": "1"}),
    ):
        session = environment.start(task)
        assert session.execute([call])[0].startswith("Error: unknown function")
        session.close()
    assert executed > 10 and not mark.exists() and list(tmp_path.iterdir()) == []
    tally.record("hostile calls", injected=tried, survived=tried, lost=0)


@pytest.mark.parametrize(
    "call",
    [
        "open(file='{mark}', mode='w')",
        "__import__('os').system('touch {mark}')",
        "exec(object='1')",
        "print(end='x')",
        "cat(file_name=open('{mark}','w'))",
    ],
)
def test_ground_truth_that_is_no_call_of_its_classes_is_a_bad_row(call: str, tmp_path: Path) -> None:
    category = "multi_turn_base"
    name, source = f"BFCL_v4_{category}.json", bfcl_data.data_dir()
    (tmp_path / "possible_answer").mkdir()
    with (
        open(source / name, encoding="utf-8") as rows,
        open(source / "possible_answer" / name, encoding="utf-8") as answers,
    ):
        record, answer = rows.readline(), json.loads(answers.readline())
    mark = tmp_path / "mark"
    answer["ground_truth"][0][0] = call.format(mark=mark)
    (tmp_path / name).write_text(record)
    (tmp_path / "possible_answer" / name).write_text(json.dumps(answer) + "\n")
    entries, bad = bfcl_data._load.__wrapped__(tmp_path, category)
    assert (
        entries == () and len(bad) == 1 and isinstance(bad[0].error, DataError) and bad[0].error.field == "ground_truth"
    )
    assert not mark.exists()


# -- names that lead elsewhere
# -------------------------------------------------------------------------------------------------------------

OUTSIDE = ["../secret", "a/../../secret", "/etc/hostname", "..", ".", "", "link", "loop", "x\0y", "a" * 5000]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("s")
    base = tmp_path / "v000000"
    base.mkdir()
    (base / "link").symlink_to("../secret")
    (base / "loop").symlink_to("loop")
    return base


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_manifest_and_no_index_leads_out_of_its_folder(name: str, folder: Path) -> None:
    assert not stays_inside(folder, name)
    row = {"schema": 1, "version": 0, "extra": {}, "files": {name: {"size": 1, "sha256": "0" * 64}}}
    (folder / "manifest.json").write_text(json.dumps(row))
    with pytest.raises(CheckpointError, match="not in that folder"):
        manifest.verify_manifest(folder)
    with pytest.raises(CheckpointError, match="not in that folder"):
        resume_manifest.verify(folder)
    (folder / tensor_files.INDEX_NAME).write_text(
        json.dumps({"weight_map": {"w": f"{name}.safetensors" if name else name}})
    )
    with pytest.raises(CheckpointError):
        tensor_files.read_tensors(folder)
    (folder / tensor_files.INDEX_NAME).write_text(json.dumps({"weight_map": {"w": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="no safetensors file of this folder"):
        tensor_files.read_tensors(folder)


def test_a_pointer_does_not_lead_out_of_its_root(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    (tmp_path / "step_000001").mkdir()
    (root / "latest").write_text("../step_000001\n")
    with pytest.raises(CheckpointError, match="not there"):
        resume_folders.latest(root)


# -- configuration and keys
# ------------------------------------------------------------------------------------------------------------------

_NAMES = ("HF_TOKEN", "WANDB_API_KEY", "PACT_ROLLOUT_API_KEY", "TEACHER_API_KEY", "AWS_SECRET_ACCESS_KEY")
KEYS = {name: f"canary-{number}" for number, name in enumerate(_NAMES)}


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.system ['touch {mark}']",
        "run: !!python/name:os.system",
        "run: {{label: '${{oc.env:HF_TOKEN}}'}}",
        "run: {{label: '${{oc.decode:1}}'}}",
        "defaults: ['${{oc.env:HOME}}/x.yaml']",
    ],
)
def test_yaml_runs_nothing_and_reads_no_environment(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", KEYS["HF_TOKEN"])
    file = tmp_path / "c.yaml"
    file.write_text(text.format(mark=tmp_path / "mark"))
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert "canary" not in str(refused.value) and not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "word",
    [
        "rollout.server.url=http://user:canary-9@host:80",
        "rollout.server.url=http://host:80/?key=canary-9",
        "rollout.server.extra_args=[--api-key=canary-9]",
        "rollout.server.extra_args=[--api_key,canary-9]",
        "rollout.server.extra_args=[--hf-token,canary-9]",
    ],
)
def test_a_key_in_a_setting_is_refused_without_repeating_it(word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [word])
    assert "canary" not in str(refused.value)


def test_no_key_of_the_environment_reaches_command_line_config_or_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pact_nemo.report import write_report
    from pact_nemo.runtime.versions import versions
    from tests.fixtures.run_folders import make_run

    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    config = load_config(None, [f"run.root={tmp_path / 'runs'}", "tasks.held_out=2"])
    space = workspace.create(config)
    endpoint = ServerEndpoint("http://127.0.0.1:1", KEYS["PACT_ROLLOUT_API_KEY"])
    server = RolloutServerConfig(device="cpu")
    arguments = engine_arguments(server, tmp_path, endpoint, 1)
    environment = engine_environment(server, endpoint)
    assert environment.pop("VLLM_API_KEY") == KEYS["PACT_ROLLOUT_API_KEY"]
    run = make_run(tmp_path / "run", steps=2, warmup=1, tasks=2, passed=(0, 1, 2))
    written = [
        space.config.read_text(),
        write_report(run).read_text(),
        json.dumps(versions()),
        repr(endpoint),
        repr(config),
        *arguments,
    ]
    for text in [*written, *environment.values()]:
        assert "canary" not in text, text[:200]
    assert "--host=127.0.0.1" in arguments and "--load-format=safetensors" in arguments


def test_the_end_of_a_log_that_holds_the_key_is_shown_without_it(tmp_path: Path) -> None:
    server = RolloutServer(RolloutServerConfig(device="cpu"), tmp_path, log_file=tmp_path / "log")
    server._endpoint = ServerEndpoint("http://127.0.0.1:1", "canary-7")
    (tmp_path / "log").write_text("VLLM_API_KEY=canary-7 crashed\n")
    assert "canary" not in server.log_tail() and "crashed" in server.log_tail()


def test_a_process_of_one_rank_listens_on_the_loopback_only() -> None:
    code = (
        "import os, torch, torch.distributed as dist\n"
        "from tests.faults.sockets import foreign\n"
        "from pact_nemo.policy.distributed import init_distributed\n"
        "init_distributed(60)\n"
        "dist.all_reduce(torch.ones(1)); dist.new_group([0])\n"
        "print('foreign', foreign([os.getpid()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert "foreign {}" in done.stdout, done.stdout + done.stderr
