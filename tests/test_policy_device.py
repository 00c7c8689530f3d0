"""megatron-core without CUDA: one test per redirected call, so that a new version shows what moved."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import recipe
from pact_nemo.errors import ConfigError
from pact_nemo.policy import device, distributed, megatron_import, without_cuda
from pact_nemo.preflight import checks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the redirection is for machines without CUDA")
megatron_import.prepare_megatron()

CPU = torch.device("cpu")
REPO = Path(__file__).resolve().parents[1]


def test_installing_twice_changes_nothing() -> None:
    before = torch.zeros
    assert without_cuda.install_cpu_redirection() is True
    assert torch.zeros is before


def test_with_cuda_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(without_cuda, "use_cuda", lambda: True)
    monkeypatch.setattr(without_cuda, "_redirect_cuda_module", lambda: pytest.fail("redirected although CUDA is there"))
    monkeypatch.setattr(without_cuda, "_installed", False)
    assert without_cuda.install_cpu_redirection() is False


FACTORIES: dict[str, Callable[..., torch.Tensor]] = {
    "zeros": lambda **k: torch.zeros(2, **k),
    "ones": lambda **k: torch.ones(2, **k),
    "empty": lambda **k: torch.empty(2, **k),
    "full": lambda **k: torch.full((2,), 1.0, **k),
    "tensor": lambda **k: torch.tensor([1.0], **k),
    "arange": lambda **k: torch.arange(3, **k),
    "rand": lambda **k: torch.rand(2, **k),
    "randn": lambda **k: torch.randn(2, **k),
    "randint": lambda **k: torch.randint(0, 3, (2,), **k),
    "linspace": lambda **k: torch.linspace(0, 1, 3, **k),
    "eye": lambda **k: torch.eye(2, **k),
    "as_tensor": lambda **k: torch.as_tensor([1.0], **k),
    "zeros_like": lambda **k: torch.zeros_like(torch.ones(2), **k),
    "ones_like": lambda **k: torch.ones_like(torch.ones(2), **k),
    "empty_like": lambda **k: torch.empty_like(torch.ones(2), **k),
    "full_like": lambda **k: torch.full_like(torch.ones(2), 1.0, **k),
}


def test_every_factory_has_its_test() -> None:
    assert set(FACTORIES) == set(without_cuda._FACTORIES)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("spelling", ["cuda", "cuda:0", torch.device("cuda", 0)])
def test_factories_with_a_cuda_device(name: str, spelling: Any) -> None:
    before = without_cuda.REDIRECTED[f"torch.{name}"]
    assert FACTORIES[name](device=spelling).device == CPU
    assert without_cuda.REDIRECTED[f"torch.{name}"] == before + 1
    assert FACTORIES[name](device="meta").device.type == "meta", "other devices pass through"


def test_pinned_memory_is_ordinary_memory() -> None:
    assert torch.zeros(2, pin_memory=True).tolist() == [0.0, 0.0]


def test_device_context_still_reaches_the_factories() -> None:
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("current_device", (), CPU),
        ("device_count", (), 0),
        ("get_device_capability", (), (0, 0)),
        ("synchronize", (), None),
        ("empty_cache", (), None),
        ("set_device", (0,), None),
        ("memory_allocated", (), 0),
        ("max_memory_allocated", (), 0),
    ],
)
def test_cuda_module_answers(name: str, arguments: tuple[Any, ...], expected: Any) -> None:
    assert getattr(torch.cuda, name)(*arguments) == expected
    assert without_cuda.REDIRECTED[f"torch.cuda.{name}"] > 0


@pytest.mark.parametrize("name", ["current_stream", "default_stream"])
def test_streams_have_nothing_to_wait_for(name: str) -> None:
    stream = getattr(torch.cuda, name)()
    stream.wait_stream(torch.cuda.Stream(device=torch.cuda.current_device()))
    stream.wait_event(torch.cuda.Event(enable_timing=True))
    assert stream.query() and stream.record_event().elapsed_time(None) == 0.0
    with torch.cuda.stream(stream), stream:
        stream.synchronize()


def test_profiler_ranges_are_ignored() -> None:
    torch.cuda.nvtx.range_push("x")
    torch.cuda.nvtx.range_pop()
    torch.cuda.nvtx.mark("x")
    with torch.cuda.nvtx.range("x"):
        pass


def test_tensor_methods() -> None:
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor and tensor.cuda(non_blocking=True) is tensor
    assert tensor.to("cuda") is tensor and tensor.to(device="cuda:0") is tensor
    assert tensor.to(torch.float64).dtype == torch.float64
    module = torch.nn.Linear(1, 1)
    assert module.cuda() is module


def test_type_strings_name_cuda_to_megatron_only() -> None:
    assert torch.ones(1).type() == "torch.FloatTensor"
    asked = compile("answer = tensor.type()", "/somewhere/megatron/core/asks.py", "exec")
    scope: dict[str, Any] = {"tensor": torch.ones(1, dtype=torch.bfloat16)}
    exec(asked, scope)
    assert scope["answer"] == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_cuda_random_state_is_the_cpu_generators() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    megatron_random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.cuda.set_rng_state(megatron_random._get_cuda_rng_state())


def test_torch_compile_is_left_alone_outside_megatron() -> None:
    from megatron.core import jit

    def function(x: int) -> int:
        return x

    assert jit.jit_fuser(function) is function, "megatron's fused kernels stay plain functions"
    assert torch.compile(function) is not function, "others may still compile"


def test_stand_ins_are_gone_after_the_import() -> None:
    assert "transformer_engine" not in sys.modules
    for name, module in sys.modules.items():  # a CUDA build of torch brings triton, and then the real module is there
        assert not name.endswith("attention_context.triton.tensor_ops") or getattr(module, "__file__", None), name
    from megatron.core.extensions import transformer_engine as extension

    assert not extension.HAVE_TE


def test_scatter_makes_its_chunks_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(
        dist,
        "scatter",
        lambda tensor, chunks=None, *a, **k: seen.extend(chunk.is_contiguous() for chunk in chunks or []),
    )
    megatron_import._patch_gloo_scatter()
    dist.scatter(torch.empty(2, 2), list(torch.ones(2, 4).chunk(2, dim=1)))
    dist.scatter(torch.empty(2, 2))
    assert seen == [True, True]


def test_a_plain_process_is_a_job_of_one_rank() -> None:
    code = (
        "import torch.distributed as dist\n"
        "from pact_nemo.policy.device import local_device\n"
        "from pact_nemo.policy.distributed import init_distributed\n"
        "init_distributed(30); init_distributed(30)\n"
        "print(dist.get_world_size(), dist.get_backend(), local_device())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", "gloo", "cpu"], done.stderr


def test_importing_megatron_says_nothing() -> None:
    program = (
        "import logging; logging.basicConfig(); from pact_nemo.policy.megatron_import import prepare_megatron;"
        " prepare_megatron()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_megatrons_loggers_obey_the_process() -> None:
    loggers = [
        found
        for name, found in logging.root.manager.loggerDict.items()
        if name.startswith("megatron.") and isinstance(found, logging.Logger)
    ]
    assert loggers and not [logger.name for logger in loggers if logger.handlers]
    assert logging.root.manager.disable == 0


def test_megatron_imported_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_import, "_prepared", False)
    with pytest.raises(RuntimeError, match="imported before .*prepare_megatron"):
        megatron_import.prepare_megatron()


def test_megatron_is_prepared_in_every_module_that_imports_it() -> None:
    importing = []
    for path in sorted((REPO / "pact_nemo").rglob("*.py")):
        body = ast.parse(path.read_text()).body
        names = [ast.unparse(line) for line in body]
        first = next((i for i, name in enumerate(names) if name.startswith(("import megatron", "from megatron"))), None)
        if first is not None:
            importing.append(path.stem)
            assert "prepare_megatron()" in names[:first], path
    assert {"model", "optimizer", "microbatches", "bridge", "attention"} <= {*importing}


def test_a_module_imported_alone_prepares_megatron_itself_and_leaves_logging_alone() -> None:
    program = (
        "import logging; before = (list(logging.root.handlers), logging.root.level)\n"
        "import pact_nemo.policy.attention; from megatron.core import jit\n"
        "assert (logging.root.handlers, logging.root.level) == before\n"
        "def function(x): return x\n"
        "assert jit.jit_fuser(function) is function"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", ["", "raise OSError('libtransformer_engine.so is missing')\n"])
def test_half_a_transformer_engine_is_refused_by_name(source: str, tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(source)
    program = "from pact_nemo.policy.megatron_import import prepare_megatron; prepare_megatron()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert "ConfigError: transformer_engine is installed and can't be imported" in done.stderr
    assert "pip uninstall transformer_engine" in done.stderr


def test_experts_token_counts_are_left_to_megatron_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe import token_dispatcher

    own = object()
    monkeypatch.setattr(megatron_import, "_patch_torch_adam_state", lambda cls: None)
    monkeypatch.setattr(token_dispatcher, "maybe_move_tensor_to_cpu", own)
    megatron_import._patch_megatron(on_cpu=False)
    assert token_dispatcher.maybe_move_tensor_to_cpu is own, "ours calls .numpy() on tensors that may be on a GPU"
    megatron_import._patch_megatron(on_cpu=True)
    assert token_dispatcher.maybe_move_tensor_to_cpu is not own


def test_on_gpus_objects_travel_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(distributed, "use_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: asked.update(backend=backend))
    monkeypatch.delenv("RANK", raising=False)
    distributed.init_distributed(30)
    assert asked["backend"] == "cpu:gloo,cuda:nccl"


def test_a_rank_stays_on_the_cpus_beside_its_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "0000:1b:00.0"
    place.mkdir()
    (place / "local_cpulist").write_text("0-1,4,6-7\n")
    assert device.near_cpus("0000:1b:00.0", tmp_path) == {0, 1, 4, 6, 7}
    assert device.near_cpus("0000:1c:00.0", tmp_path) == set()
    kept: list[set[int]] = []
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: properties)
    monkeypatch.setattr(device, "near_cpus", lambda address: {0, 1, 4, 6, 7} if address == place.name else set())
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 7})
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cpus: kept.append(cpus))
    for rank in ("0", "3"):  # the first rank of a node starts what others need
        monkeypatch.setenv("LOCAL_RANK", rank)
        device.stay_near_gpu()
    assert kept == [{1, 7}]


def test_attention_in_float32_that_no_gpu_holds_is_refused_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's lengths under fp32 on an 80 GB card; bf16, short rows, and machines without a GPU pass."""

    def check(*words: str, gpu: int | None = 80 * 10**9) -> None:
        monkeypatch.setattr(device, "gpu_memory", lambda: gpu)
        checks.check_layout(
            load_config([REPO / "conf" / "pact_bfcl.yaml", recipe("qwen3_1p7b_4xh100_bf16")], list(words)), None
        )

    fp32 = ("policy.precision=fp32",)
    with pytest.raises(
        ConfigError, match="policy.precision=fp32: on a GPU the attention scores of 23,000 by .* GiB, of 75"
    ):
        check(*fp32)
    check()
    check(*fp32, gpu=None)
    check(*fp32, "tasks.max_prompt_tokens=2000", "rollout.sampling.max_response_tokens=2000", "traces.max_tokens=2000")
