"""A plain ``python recipes/...`` starts the ranks of its machine: which ones, what it refuses, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pact_nemo import launcher
from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import RECIPES, recipe
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from pact_nemo.planning import host_room
from pact_nemo.runtime import gpus as gpu_module
from pact_nemo.runtime import ranks
from pact_nemo.runtime.gpus import Gpu, visible_gpus
from pact_nemo.runtime.machine import HostMemory
from pact_nemo.runtime.ranks import Ending, RankProcesses
from tests.workers.recipe_runs import REPO, records, weights
from tests.workers.recipe_runs import recipe as run_recipe

FULL = REPO / "conf" / "pact_bfcl.yaml"
H100 = Gpu("NVIDIA H100 80GB HBM3", 85_000_000_000, 84_000_000_000)
SMALL = Gpu("NVIDIA L4", 24_000_000_000, 23_500_000_000)


@pytest.fixture(autouse=True)
def _memory_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_room, "host_memory", lambda: HostMemory(2 << 40))


def of(name: str, *words: str) -> Config:
    return load_config([FULL, recipe(name)], list(words))


def refused(name: str, gpus: list[Gpu], *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        launcher.ranks_here(of(name, *words), gpus, ["recipes/pact_ftrl.py", "--recipe", name, "model.path=/m", *words])
    return str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_a_node_of_eight_h100_holds_every_recipe_of_one_node(name: str) -> None:
    chosen = recipe(name)
    assert (name in launcher.fitting([H100] * 8)) is (chosen.nodes == 1)
    if chosen.nodes == 1:
        assert launcher.ranks_here(of(name), [H100] * 8, []) == chosen.world_size
        (found, started) = launcher.report(of(name), [H100] * 8, chosen.world_size)
        assert "8 x NVIDIA H100 80GB HBM3 (79 GiB, 78 free); Transformer Engine not installed" in found
        assert f"recipe {name}: {chosen.world_size} rank(s) on GPU" in started
        split = chosen.server.tensor_parallel_size
        engines = chosen.world_size // split
        said = (
            f"{engines} rollout engines over {split} GPU(s) each"
            if engines > 1
            else f"a rollout engine over {split} GPU(s)"
        )
        assert said in started
        (_, single) = launcher.report(of(name, "rollout.server.engines=1"), [H100] * 8, chosen.world_size)
        assert f"a rollout engine over {split} GPU(s)" in single
        assert ("run.ranks=8 takes all of them" in started) is (chosen.world_size < 8)


def test_what_a_node_can_not_hold_is_refused_with_what_it_can() -> None:
    two = refused("qwen3_4b_4xh100_bf16", [H100] * 2)
    assert "4 rank(s), one a GPU" in two and "2 x NVIDIA H100" in two and "fit here: qwen3_0p6b_1xh100_bf16" in two
    small = refused("qwen3_4b_4xh100_bf16", [SMALL] * 4)
    assert "GiB of each GPU by the plan" in small and "fit here: qwen3_0p6b_1xh100_bf16" in small
    used = refused("qwen3_4b_4xh100_bf16", [H100, H100, Gpu(H100.name, H100.memory, 10 * 2**30), H100])
    assert "10.0 are free of GPU 2" in used and "CUDA_VISIBLE_DEVICES" in used
    none = refused("qwen3_4b_4xh100_bf16", [])
    assert "torch sees none here" in none and "run.ranks=4" in none
    assert launcher.ranks_here(of("qwen3_4b_4xh100_bf16", "run.ranks=4"), [], []) == 4
    assert "run.ranks=16: 16 rank(s)" in refused("qwen3_4b_4xh100_bf16", [H100] * 8, "run.ranks=16")


def test_a_recipe_of_several_nodes_is_refused_with_the_line_that_submits_it(tmp_path: Path) -> None:
    said = refused("qwen3_32b_16xh100_bf16", [H100] * 8, "trainer.steps=5")
    assert "is for 2 nodes of 8 GPUs, and this is one node with 8 x NVIDIA H100" in said and "qwen3_14b" in said
    line = said.partition("On a cluster: ")[2]
    assert line.startswith('RECIPE=recipes/pact_ftrl.py SETTINGS="--recipe qwen3_32b_16xh100_bf16" sbatch --nodes=2 ')
    assert line.endswith(" model.path=/m trainer.steps=5")
    # the line is the one that the job script understands
    dry = line.replace("sbatch --nodes=2 slurm/pact_70b.sh", "SLURM_JOB_NUM_NODES=2 bash slurm/pact_70b.sh --dry-run")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(["bash", "-c", dry], capture_output=True, text=True, timeout=60, cwd=REPO, env=environment)
    assert "--nodes=2 --ntasks=16" in done.stdout and "recipes/pact_ftrl.py --recipe qwen3_32b" in done.stdout, done


def test_without_a_recipe_the_small_preset_runs_and_the_recipes_that_fit_are_named() -> None:
    config = load_config(REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml")
    assert launcher.ranks_here(config, [H100] * 4, []) == 1
    (_, line) = launcher.report(config, [H100] * 4, 1)
    assert (
        "no --recipe: 1 rank(s) on GPU 0 of 4" in line
        and "qwen3_4b_4xh100_bf16, qwen3_4b_1xh100_lora (--recipe NAME" in line
    )
    assert "qwen3_8b" not in line and launcher.report(config, [], 1) == []
    layout = load_config(REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml", ["policy.pipeline_parallel=2"])
    assert launcher.ranks_here(layout, [], []) == 2 == launcher.ranks_here(layout, [H100] * 2, [])
    with pytest.raises(ConfigError, match="the layout .* needs 2 ranks"):
        launcher.ranks_here(layout, [H100], [])
    with pytest.raises(ConfigError, match="run.ranks=0"):
        load_config(FULL, ["run.ranks=0"])


def test_gpus_are_looked_at_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in = """
from types import SimpleNamespace as N
class cuda:
    device_count = staticmethod(lambda: 2)
    get_device_properties = staticmethod(lambda i: N(name=f"GPU {i}"))
    mem_get_info = staticmethod(lambda i: (5 + i, 10))
"""
    assert visible_gpus() == []  # no CUDA here
    (tmp_path / "torch.py").write_text(stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    assert visible_gpus() == [Gpu("GPU 0", 10, 5), Gpu("GPU 1", 10, 6)]
    assert gpu_module.named([H100, H100, SMALL]) == (
        "2 x NVIDIA H100 80GB HBM3 (79 GiB, 78 free), 1 x NVIDIA L4 (22 GiB, 22 free)"
    )
    (tmp_path / "torch.py").write_text("raise RuntimeError('CUDA error: out of memory')")
    with pytest.raises(ConfigError, match="can't open them .*CUDA error: out of memory"):
        visible_gpus()


def test_who_has_started_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", ranks.LAUNCHER_ENV):
        monkeypatch.delenv(name, raising=False)
    assert ranks.started_by() is None
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match="8 tasks of this command without RANK"):
        ranks.started_by()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert ranks.started_by() == "torchrun or srun"


RANK = """
import os, signal, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1]
print("out", rank, flush=True); print("here", rank, os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], file=sys.stderr, flush=True)
asked = []
if what == "asked":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, f: asked.append(n))
    open(f"{sys.argv[2]}/ready-{rank}", "w").close()
    while not asked: time.sleep(0.02)
    time.sleep(0.5)
    print("asked", [signal.Signals(n).name for n in asked], file=sys.stderr)
    sys.exit(75)
if what == "moves" and rank == 0:
    time.sleep(1)  # who shows the file looks for it ten times a second
    os.rename(os.environ["PACT_RANK_LOGS"], sys.argv[2])
if what == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "hung":
    sys.exit(76 if rank == 1 else 1)
if what == "fails" and rank == 1:
    print("configuration error: this one", file=sys.stderr); sys.exit(2)
if what in ("killed", "fails"):
    time.sleep(60)
"""  # noqa: E501


def processes(folder: Path, *words: str, world: int = 2) -> RankProcesses:
    (folder / "rank.py").write_text(RANK)
    (folder / "logs").mkdir()
    return RankProcesses([sys.executable, "-S", str(folder / "rank.py"), *words], world, folder / "logs")


@pytest.mark.parametrize(
    ("what", "code", "first", "words"),
    [
        ("ends", 0, None, []),
        ("killed", 137, 1, ["rank 1 was killed by SIGKILL, and the job with it", "[rank 1] here 1 1 2"]),
        ("fails", 2, 1, ["[rank 1] configuration error: this one", "rank 1 ended with exit code 2"]),
        ("hung", 76, None, []),
    ],
)
def test_the_first_ranks_end_is_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, code: int, first: int | None, words: list[str]
) -> None:
    monkeypatch.setattr(ranks, "FOLLOW_FAILURE_S", 60.0 if what == "hung" else 0.5)
    ending = processes(tmp_path, what).run()
    assert ending.code == code and (first is None or ending.first == first)
    assert all(word in ending.message() for word in words) and (code != 0 or ending.message() == "")


def test_the_logs_are_found_where_the_first_rank_has_taken_them(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    ending = processes(tmp_path, "moves", str(tmp_path / "taken"), world=3).run()
    assert ending == Ending({0: 0, 1: 0, 2: 0}, None, tmp_path / "taken")
    assert sorted(path.name for path in (tmp_path / "taken").iterdir()) == [
        "rank-0.err",
        "rank-1.err",
        "rank-1.out",
        "rank-2.err",
        "rank-2.out",
    ]
    assert (tmp_path / "taken" / "rank-2.err").read_text() == "here 2 2 3\n"
    shown = capfd.readouterr()
    assert shown.out == "out 0\n" and shown.err == "here 0 0 3\n"  # the first rank's lines alone


LAUNCH = """
import sys
from pathlib import Path
from pact_nemo.runtime.ranks import RankProcesses
ending = RankProcesses([sys.executable, "-S", *sys.argv[2:]], 2, Path(sys.argv[1])).run()
print(sorted(ending.codes.items()), ending.message()); sys.exit(ending.code)
"""


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C goes to all processes of a terminal; a second one would end the ranks without a checkpoint."""
    processes(tmp_path)
    command = [sys.executable, "-c", LAUNCH, str(tmp_path / "logs"), str(tmp_path / "rank.py"), "asked", str(tmp_path)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO, start_new_session=True)
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    os.killpg(job.pid, number)
    said, _ = job.communicate(timeout=60)
    assert (job.returncode, said) == (75, "out 0\n[(0, 75), (1, 75)] \n")
    for rank in range(2):
        assert f"asked ['{number.name}']" in (tmp_path / "logs" / f"rank-{rank}.err").read_text()


def child(pid: int, rank: int) -> int | None:
    """The process of a rank."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and f"\0RANK={rank}\0".encode() in b"\0" + (process / "environ").read_bytes():
                return int(process.name)
        except OSError:
            continue
    return None


def start(stage: dict[str, Any], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPO / "recipes" / "pact_bfcl.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO, env=environment
    )


def read_until(job: subprocess.Popen[str], text: str) -> None:
    assert job.stdout is not None
    for line in job.stdout:
        if text in line:
            return
    raise AssertionError(job.communicate(timeout=60)[1])


@pytest.mark.slow
def test_two_ranks_of_a_plain_command_that_are_killed_asked_and_resumed_end_as_if_nothing_had_been(
    stage: dict[str, Any],
) -> None:
    """One kill of a rank in mid-step, one Ctrl-C, one end; the launcher says which rank it was, and keeps its lines."""
    words = ["--config", stage["preset"], *stage["words"], "policy.pipeline_parallel=2"]
    run = stage["folder"] / "runs" / "cut-pact-seed1234-1"
    job = start(stage, *words, "run.name=cut")
    read_until(job, "warmup step 1 ")
    until(lambda: any((run / "checkpoints").glob("step_*")))
    os.kill(child(job.pid, 1) or 0, signal.SIGKILL)
    _, said = job.communicate(timeout=100)
    assert job.returncode == 137 and f"rank 1 was killed by SIGKILL, and the job with it; logs in {run}/logs/1" in said
    assert not list(run.parent.glob(".ranks-*"))
    job = start(stage, "--resume", str(run), "trainer.checkpoint_every=0")  # the layout is the run's own
    read_until(job, "resumed after step ")
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=100)
    assert job.returncode == 75 and "SIGINT: stopped after" in said and "--resume" in said, said
    run_recipe(stage, "cut", resume=run)
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["1", "2", "3"]
    uncut = run_recipe(stage, "uncut", "policy.pipeline_parallel=2", ranks=2)
    assert records(run) == records(uncut)
    assert all(torch.equal(value, weights(uncut)[name]) for name, value in weights(run).items())


@pytest.mark.slow
def test_four_ranks_of_a_plain_command_give_the_numbers_of_one(stage: dict[str, Any]) -> None:
    one, four = run_recipe(stage, "one"), run_recipe(stage, "four", "run.ranks=4", "policy.pipeline_parallel=2")
    for row, expected in zip(records(four), records(one), strict=True):
        for key in ("loss/total", "policy/grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (row["step"], key)
    assert json.loads((four / "summary.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_ranks_whose_launcher_is_gone_stop_with_a_checkpoint(stage: dict[str, Any]) -> None:
    words = ["--config", stage["preset"], *stage["words"], "run.ranks=2", "trainer.checkpoint_every=0"]
    job = start(stage, *words, "run.name=orphans")
    read_until(job, "warmup step 1 ")
    pids = [child(job.pid, rank) for rank in range(2)]
    job.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 120)
    assert list((stage["folder"] / "runs" / "orphans-pact-seed1234-1" / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_refused_start_says_why_once_and_leaves_no_logs_outside_the_run(tmp_path: Path) -> None:
    words = ["run.ranks=2", f"run.root={tmp_path / 'runs'}", f"model.path={tmp_path}", "policy.tensor_parallel=3"]
    command = [sys.executable, str(REPO / "recipes" / "pact_bfcl.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and "holds no config.json" in done.stderr, done.stderr
    assert done.stderr.count("holds no") == 1 == done.stderr.count("rank 0 ended with exit code 2")
    assert not list((tmp_path / "runs").glob(".ranks-*"))


def test_the_nodes_of_a_job_hold_the_layout_or_the_number_that_does_is_named() -> None:
    assert "4 x (TP x PP x CP = 16)" in launcher.check_nodes(of("llama3p1_70b_64xh100_bf16"), 8, 0, 8)
    config = of("llama3p1_70b_64xh100_bf16", "policy.tensor_parallel=8")
    assert launcher.check_nodes(config, 8, 0, 8).startswith("64 ranks on 8 node(s): 2 x (TP x PP x CP = 32)")
    assert launcher.check_nodes(config, 8, 0, 8).endswith("; a rollout engine over 8 GPU(s) on every node")
    apart = launcher.check_nodes(config, 10, 2, 8)
    assert "SERVER_NODES=2" in apart and "engine" not in apart
    with pytest.raises(ConfigError, match="engines=12 can't be shared evenly by 8 nodes"):
        launcher.check_nodes(of("llama3p1_70b_64xh100_bf16", "rollout.server.engines=12"), 8, 0, 8)
    for nodes, servers, remedy in (
        (8, 2, "leaves 48 trainer ranks.*--nodes=10 or --nodes=6,"),
        (2, 2, "leaves 0 trainer ranks.*--nodes=6,"),
        (3, 0, "leaves 24 trainer ranks.*--nodes=4,"),
    ):
        with pytest.raises(ConfigError, match=remedy):
            launcher.check_nodes(config, nodes, servers, 8)
    assert launcher.check_nodes(experts := of("qwen3_30b_a3b_16xh100_bf16"), 2, 0, 8)  # TP 4, PP 2, EP 8
    with pytest.raises(ConfigError, match="multiples of 16.*PP x EP = 16"):
        launcher.check_nodes(experts, 1, 0, 8)
