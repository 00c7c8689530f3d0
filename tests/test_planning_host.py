"""Host memory of a node: counted over all of its ranks and engines, and refused by name where there is less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from pact_nemo import launcher
from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import RECIPES, recipe
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from pact_nemo.planning import host, host_room
from pact_nemo.planning.from_config import describe_plan, model_shape, run_plan
from pact_nemo.planning.memory import GIB, state_bytes
from pact_nemo.planning.shape import Layout, rank_matrices, rank_parameters
from pact_nemo.preflight import nodes
from pact_nemo.runtime.gpus import Gpu
from pact_nemo.runtime.machine import HostMemory, host_memory

FULL = Path(__file__).resolve().parents[1] / "conf" / "pact_bfcl.yaml"
H100 = Gpu("NVIDIA H100 80GB HBM3", 85_000_000_000, 84_000_000_000)


def of(name: str, *words: str) -> Config:
    return load_config([FULL, recipe(name)], list(words))


@pytest.mark.parametrize("name", RECIPES)
def test_a_node_has_the_copies_of_all_of_its_ranks_and_the_weights_of_its_engines(name: str) -> None:
    config, found = of(name), recipe(name)
    shape, layout = model_shape(config), Layout.of(config.policy, found.world_size)
    plan = run_plan(config)
    assert plan.host is not None and plan.host.ranks == found.gpus_per_node
    assert plan.host.engines == found.gpus_per_node // found.server.tensor_parallel_size
    states = []
    for stage in range(layout.pipeline):
        parameters = rank_parameters(shape, layout, stage, config.policy.lora)
        states.append(state_bytes(parameters, layout, dataclasses.replace(config.policy, precision="bf16")))
        matrices = sum(rank_matrices(shape, layout, stage))
        assert 0 <= parameters.total - matrices < 0.001 * parameters.total  # norms and biases
    # whole stages are on a node, or a node is of one stage: the fullest has its ranks' mean or more
    each = sum(state.weights + state.optimizer for state in states) / len(states)
    copies = plan.host.parts[host.COPY]
    assert found.gpus_per_node * each <= copies < found.gpus_per_node * (max(map(host.moved_bytes, states)) + GIB)
    weights = 2 * shape.parameters * plan.host.engines
    assert weights <= plan.host.parts[host.ASLEEP] < 2 * weights
    assert (host.REFERENCE in plan.host.parts) == (config.policy.lora.rank == 0)
    assert f"a node has to have {plan.host.needed / GIB:,.0f} GiB" in describe_plan(config)
    without = run_plan(of(name, "rollout.server.time_sharing=false", "rollout.server.engines=1")).host
    assert without is not None and not {host.COPY, host.ASLEEP} & set(without.parts)


def test_page_locked_memory_is_counted_as_torchs_allocator_takes_it() -> None:
    assert [host.page_locked(size) for size in (0, 1, 4096, 4097, 3 << 20)] == [0, 1, 4096, 8192, 4 << 20]
    assert host.copy_bytes((3 << 30) + 5000) == (3 << 30) + 8192


def test_a_run_that_its_nodes_memory_can_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, name = of("qwen3_8b_8xh100_bf16"), "qwen3_8b_8xh100_bf16"
    plan = run_plan(config)
    assert plan.host is not None
    limit = Path("/sys/fs/cgroup/job/memory.max")
    monkeypatch.setattr(host_room, "host_memory", lambda: HostMemory(int(plan.host.needed) + 1))
    host_room.check_host_room(config, world=8, ranks_here=8)
    assert launcher.ranks_here(config, [H100] * 8, []) == 8 and name in launcher.fitting([H100] * 8)
    monkeypatch.setattr(host_room, "host_memory", lambda: HostMemory(64 << 30, limit))
    with pytest.raises(ConfigError) as caught:
        host_room.check_host_room(config, world=8, ranks_here=8)
    text = str(caught.value)
    assert f"{limit} allows 64 (under Slurm sbatch --mem=0" in text
    for word in ("8 rank(s) and 4 engine(s)", "rollout.server.time_sharing=false", "objective.kl_coef=0", host.COPY):
        assert word in text
    assert "distributed_optimizer" not in text  # it is on
    with pytest.raises(ConfigError, match="GiB of host memory by the plan"):  # before a rank is started
        launcher.ranks_here(config, [H100] * 8, [])
    assert name not in launcher.fitting([H100] * 8)


def test_the_ranks_of_a_job_refuse_together_before_a_folder_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Exception | None] = []
    monkeypatch.setattr(nodes, "use_cuda", lambda: True)
    monkeypatch.setattr(nodes, "raise_together", raised.append)
    monkeypatch.setattr(nodes.dist, "get_world_size", lambda: 64)
    monkeypatch.setattr(host_room, "host_memory", lambda: HostMemory(500 << 30))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config = of("llama3p1_70b_64xh100_bf16")
    for local in ("0", "1"):  # a node's first rank speaks for it
        monkeypatch.setenv("LOCAL_RANK", local)
        nodes.look_at_host(config)
    assert isinstance(raised[0], ConfigError) and raised[1] is None
    assert "8 rank(s) and 1 engine(s) of a node need" in str(raised[0]) and "this node has 500" in str(raised[0])


@pytest.fixture
def system(tmp_path: Path) -> Callable[[str, dict[str, int | str]], Path]:
    def make(groups: str, limits: dict[str, int | str]) -> Path:
        for path, text in {"proc/meminfo": "MemTotal: 1000 kB\n", "proc/self/cgroup": groups, **limits}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(str(text))
        return tmp_path

    return make


def test_a_cgroups_limit_above_this_process_counts(system: Callable[[str, dict[str, int | str]], Path]) -> None:
    job = "sys/fs/cgroup/slurm/job_7"
    root = system("0::/slurm/job_7/step_0\n", {f"{job}/step_0/memory.max": "max", f"{job}/memory.max": 500_000})
    assert host_memory(root) == HostMemory(500_000, root / job / "memory.max")
    (root / job / "memory.max").write_text("9000000")  # more than there is
    assert host_memory(root) == HostMemory(1_024_000)


def test_an_older_cgroups_limit_counts(system: Callable[[str, dict[str, int | str]], Path]) -> None:
    file = "sys/fs/cgroup/memory/job/memory.limit_in_bytes"
    root = system("5:cpu:/job\n3:memory:/job\n", {file: 400_000, "sys/fs/cgroup/cpu/job/memory.max": 1})
    assert host_memory(root) == HostMemory(400_000, root / file)
    (root / "proc/meminfo").unlink()
    assert host_memory(root) is None
