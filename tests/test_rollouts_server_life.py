"""The real server's life: one that can't start says why, and none outlives its trainer or is left half started."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pact_nemo.errors import ServerError
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.server import RolloutServer, group_members

pytest.importorskip("vllm")
ROOT = Path(__file__).parents[1]


def test_a_killed_trainer_takes_its_server_along(model_dir, tmp_path):
    script = (
        "import sys, time\nfrom pact_nemo.serving.config import RolloutServerConfig\nfrom pact_nemo.serving.server"
        f" import RolloutServer\nserver = RolloutServer(RolloutServerConfig(device='cpu'), {str(model_dir)!r},"
        f" log_file={str(tmp_path / 'log')!r})\nserver.launch(); print(server.pid, flush=True); time.sleep(100)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    group = int(trainer.stdout.readline())
    time.sleep(1)
    assert group_members(group) == [group]
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 60
    while group_members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert group_members(group) == []


def test_a_server_that_dies_while_starting_says_why(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = RolloutServerConfig(device="cpu", extra_args=["--no-such-option"])
    with (
        pytest.raises(ServerError, match="(?s)died while starting.*no-such-option"),
        RolloutServer(config, tmp_path, log_file=tmp_path / "log"),
    ):
        pass
    assert "no-such-option" in (tmp_path / "log").read_text()


def test_a_server_that_is_not_healthy_in_time_is_stopped(model_dir, tmp_path):
    server = RolloutServer(RolloutServerConfig(device="cpu", start_timeout_s=1.0), model_dir, log_file=tmp_path / "log")
    seen = []
    server.launch()
    group = server.pid
    with pytest.raises(ServerError, match="not healthy after 1 s"):
        server.wait_ready(lambda seconds, line: seen.append(seconds))
    assert seen and group_members(group) == []
