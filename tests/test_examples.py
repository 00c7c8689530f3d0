"""The examples of ``examples/``: they raise no alarm, and each trains a model to a Hugging Face folder and a report."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checking.check import check
from pact_nemo.checking.findings import listed
from pact_nemo.checkout import ROOT
from pact_nemo.config.load import load_config
from tests.workers.policy_kit import make_chat_model

PRESET = "conf/pact_own-smollm2_135m-cpu.yaml"
#: name -> (settings files, words)
EXAMPLES = {
    "shop": (
        [PRESET],
        [
            "agent.tools=examples/shop/shop.py:Shop",
            "tasks.path=examples/shop/tasks.jsonl",
            "traces.path=examples/shop/traces.jsonl",
        ],
    ),
    "clock": ([PRESET, "examples/clock/clock.yaml"], []),
    "units": ([PRESET], ["agent.tools=examples/units/units.py", "traces.path=examples/units/talks.jsonl"]),
}
BRIEF = """trainer.steps=1 trainer.batch_size=2 trainer.mini_batch_size=2 trainer.checkpoint_every=1
objective.group_size=2 warmup.steps=1 warmup.batch_size=2
tasks.held_out=2 tasks.max_eval=2 rollout.sampling.max_turn_tokens=16""".split()


def needs(name: str) -> None:
    if name == "clock" and importlib.util.find_spec("mcp_server_time") is None:
        pytest.skip("mcp-server-time isn't installed")


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_data_are_those_of_its_script(name: str, tmp_path: Path) -> None:
    for path in (ROOT / "examples" / name).glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, str(tmp_path / "make_data.py")], check=True, timeout=60)
    written = sorted(tmp_path.glob("*.jsonl"))
    assert written
    for path in written:
        assert path.read_bytes() == (ROOT / "examples" / name / path.name).read_bytes()


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_raises_no_alarm(name: str, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(name)
    monkeypatch.chdir(ROOT)
    files, words = EXAMPLES[name]
    found = check(load_config([ROOT / file for file in files], words), chat, limit=12)
    # the preset teaches one closing message, and says so of tasks that want an answer
    alarms = [one for one in found.findings if one.level != "note" and one.kind != "closing"]
    assert not alarms, "\n".join(listed(found.findings))
    assert found.traces == found.tasks == 40


#: refits bring adapters. Their reference is the base, which a warm-up leaves
ADAPTERS = ["policy.lora.rank=8", "rollout.lora_refit=adapter", "objective.kl_coef=0"]


@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("shop", []),
        pytest.param("clock", [], marks=pytest.mark.slow),
        pytest.param("units", [], marks=pytest.mark.slow),
        pytest.param("shop", ADAPTERS, marks=pytest.mark.slow),
    ],
)
def test_it_trains(name: str, further: list[str], tmp_path: Path) -> None:
    needs(name)
    pytest.importorskip("vllm")
    files, words = EXAMPLES[name]
    command = [sys.executable, "recipes/pact_own.py", *(word for file in files for word in ("--config", file)), *words]
    model = make_chat_model(tmp_path / "model")
    command += [*BRIEF, f"model.path={model}", f"run.root={tmp_path / 'runs'}", *further]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir() and not path.is_symlink())
    assert (run / "hf" / "model.safetensors").is_file() and (run / "report.html").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file() == bool(further)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["stage"] == "rl"]
    assert len(trained) == 1 and trained[0]["rollout/failed"] == 0 and trained[0]["rollout/count"] == 4
