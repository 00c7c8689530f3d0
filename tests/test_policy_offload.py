"""A trainer's memory, released and restored: real storages of real policies, on one process and on two."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pact_nemo.policy import offload, reference
from pact_nemo.policy.config import LoraConfig
from pact_nemo.policy.device import keep_freed_memory
from pact_nemo.policy.offload import HostMemory, Offload, trainer_memory
from pact_nemo.policy.policy import MegatronPolicy
from tests.workers.policy_kit import launch, loss_fn, make_trees
from tests.workers.small_policy import build

Models = Callable[[str], Path]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are tiny, and all of their storages below what is worth moving."""
    monkeypatch.setattr(offload, "SMALLEST", 100)


def state(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    """Copies of every weight, main weight and moment, found without the code that moves them."""
    found = {f"weight {name}": p.data for chunk in policy.chunks for name, p in chunk.named_parameters()}
    for number, part in enumerate(policy.optimizer.chained_optimizers):
        for index, parameter in enumerate(p for group in part.optimizer.param_groups for p in group["params"]):
            found[f"main {number} {index}"] = parameter.data
            for key, value in part.optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor):
                    found[f"{key} {number} {index}"] = value
    return {name: value.clone() for name, value in found.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 8])
def test_all_bits_come_back_and_the_update_after_is_the_one_without(
    models: Models, rank: int, precision: str, distributed: bool, weights: bool
) -> None:
    """With adapters the base is in no buffer of megatron's, and has to move all the same."""
    settings = {"precision": precision, "distributed_optimizer": distributed, "lora": LoraConfig(rank=rank)}
    trees = make_trees(5)
    plain, moved = (build(models("llama"), **settings) for _ in range(2))
    for policy in (plain, moved):
        policy.update(trees, loss_fn)
    memory = trainer_memory(moved.wrapped, moved.optimizer, weights=weights)
    before = state(moved)
    assert any(name.startswith("exp_avg_sq") and value.any() for name, value in before.items())
    gone = memory.release()
    assert memory.released and (gone.copied, gone.dropped) == (memory.copied_bytes, memory.dropped_bytes)
    large = sum(value.numel() * value.element_size() for name, value in before.items() if name.startswith("exp_avg"))
    assert gone.copied >= large > 0  # both moments
    buffers = [buffer for chunk in moved.wrapped for buffer in chunk.buffers]
    assert all(buffer.grad_data.untyped_storage().nbytes() == 0 for buffer in buffers)
    held = [p.data.untyped_storage().nbytes() > 0 for chunk in moved.chunks for p in chunk.parameters() if p.dim() > 1]
    assert not any(held) if weights else all(held)
    if not weights:  # what needs no optimizer goes on
        now, then = moved.logprobs(trees), plain.logprobs(trees)
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))
    back = memory.restore()
    for buffer in buffers:  # what was dropped may hold anything
        buffer.grad_data.fill_(torch.nan)
    assert back.copied == gone.copied and not memory.released
    assert same(state(moved), before)
    results = [policy.update(trees, loss_fn) for policy in (plain, moved)]
    assert (results[0].loss, results[0].grad_norm) == (results[1].loss, results[1].grad_norm)
    assert same(state(plain), state(moved))


def test_moments_that_came_after_the_first_release_are_moved_by_the_next(models: Models) -> None:
    policy, host = build(models("llama"), precision="bf16"), HostMemory()
    first = trainer_memory(policy.wrapped, policy.optimizer, weights=True, host=host)
    first.release()
    first.restore()
    policy.update(make_trees(3), loss_fn)
    second = trainer_memory(policy.wrapped, policy.optimizer, weights=True, host=host)
    assert second.copied_bytes > 2 * first.copied_bytes
    before = state(policy)
    second.release()
    second.restore()
    assert same(state(policy), before)
    blocks = host.blocks(second.copied_bytes, locked=False)
    assert sum(block.numel() for block in blocks) == second.copied_bytes  # what the first one had was used again


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Five odd storages, each larger than a block of the host's memory and none a multiple of it."""
    monkeypatch.setattr(offload, "BLOCK", 10_007)
    draw = torch.Generator().manual_seed(1)
    yield [
        torch.randint(0, 255, (size,), dtype=torch.uint8, generator=draw) for size in (5, 9_999, 31_337, 10_007, 77_777)
    ]


def test_storages_lie_across_blocks(tensors: list[torch.Tensor]) -> None:
    before = [tensor.clone() for tensor in tensors]
    view = tensors[2][100:200].view(2, 50)
    memory = Offload([*tensors, view], [])
    assert memory.copied_bytes == sum(tensor.numel() for tensor in tensors[1:])  # a view is moved with its storage
    memory.release()
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [5, 0, 0, 0, 0]
    memory.restore()
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    assert torch.equal(view, before[2][100:200].view(2, 50))


def test_what_stays_is_not_moved_and_what_is_dropped_is_not_copied(tensors: list[torch.Tensor]) -> None:
    kept, dropped, stays = tensors[1], tensors[2], tensors[3]
    before = [kept.clone(), stays.clone()]
    memory = Offload([kept, stays[:7]], [dropped, kept, stays], [stays])
    assert (memory.copied_bytes, memory.dropped_bytes) == (kept.numel(), dropped.numel())
    memory.release()
    assert torch.equal(stays, before[1])
    assert dropped.untyped_storage().nbytes() == 0
    memory.restore()
    assert dropped.untyped_storage().nbytes() == dropped.numel()
    assert torch.equal(kept, before[0])


def test_a_move_that_was_made_already_is_refused(tensors: list[torch.Tensor]) -> None:
    memory = Offload(tensors, [])
    with pytest.raises(RuntimeError, match="not released"):
        memory.restore()
    memory.release()
    with pytest.raises(RuntimeError, match="released already"):
        memory.release()
    memory.restore()


def test_the_machine_has_what_is_released() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keep_freed_memory()  # as a policy on a CPU has it by default
    size = 24 << 20
    kept = [torch.ones(size, dtype=torch.uint8) for _ in range(3)]
    kept[2].numpy()  # as the export's writer does; torch never resizes that storage again
    memory = Offload(kept, [torch.ones(size, dtype=torch.uint8)])
    memory.release()  # makes the copy's memory
    memory.restore()
    before = resident()
    memory.release()
    assert before - resident() > 0.9 * (memory.copied_bytes)
    memory.restore()
    assert before - resident() < 1.1 * memory.dropped_bytes
    assert all(bool(tensor.all()) for tensor in kept)


def test_two_ranks_that_shared_their_optimizer_go_on_bit_for_bit(models: Models, tmp_path: Path) -> None:
    """Data-parallel: each has half of the optimizer's state, and its weights are views of one gathered buffer."""
    moves: dict[str, list[list[Any]]] = {
        "plain": [],
        "optimizer": [["away", {"weights": False}]],
        "all": [["away", {"weights": True}]],
    }
    jobs = [
        {
            "name": name,
            "hf_path": str(models("llama")),
            "config": {"precision": "bf16"},
            "actions": [["update", None], *move, ["update", None], ["logprobs", None]],
        }
        for name, move in moves.items()
    ]
    found = launch(2, jobs, tmp_path)
    for name in ("optimizer", "all"):
        first, went, *after = found[name]
        assert went == [True, True, True]
        assert [first, *after] == found["plain"]


class OnGpu(torch.Tensor):
    """A tensor that says to be on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_reference_weights_come_back_from_page_locked_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From pageable memory it takes several times as long. Where the system allows none, that is said."""
    weights, asked, made = torch.arange(3.0).as_subclass(OnGpu), [], torch.empty(3)

    def locked(like: torch.Tensor, **settings: Any) -> torch.Tensor:
        asked.append(settings)
        return made

    def refused(like: torch.Tensor, **settings: Any) -> torch.Tensor:
        raise RuntimeError("no more locked memory")

    monkeypatch.setattr(reference.torch, "empty_like", locked)
    assert reference._on_host(weights).tolist() == made.tolist() == [0.0, 1.0, 2.0]
    assert asked == [{"device": "cpu", "pin_memory": True}]
    monkeypatch.setattr(reference.torch, "empty_like", refused)
    assert reference._on_host(weights).tolist() == [0.0, 1.0, 2.0] and "no more locked memory" in caplog.text
