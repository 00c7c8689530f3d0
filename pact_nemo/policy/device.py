"""Which device and backend to run on, and megatron-core without CUDA.

megatron-core names CUDA in a few places: ``torch.cuda.current_device()``, ``device="cuda"`` literals,
``Tensor.cuda()``, streams and events, CUDA random-number state, and dtype tests by ``Tensor.type()`` string. On a
machine without CUDA :func:`install_cpu_redirection` sends these to the CPU. It must run before megatron is imported;
with CUDA it does nothing at all. :data:`REDIRECTED` counts what was sent elsewhere, so that a test shows which of them
a given megatron-core version uses. :func:`prepare_megatron` is the one door to megatron.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import datetime
import functools
import importlib.machinery
import importlib.util
import logging
import os
import platform
import socket
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version as PkgVersion

from pact_nemo.errors import MissingDependency
from pact_nemo.runtime import machine
from pact_nemo.runtime.hangs import HangWatch

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
REDIRECTED: collections.Counter[str] = collections.Counter()
_FACTORIES = (
    "zeros",
    "ones",
    "empty",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "linspace",
    "eye",
    "as_tensor",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
)
_STAND_INS = {
    "transformer_engine": "transformer_engine",
    "transformer_engine.pytorch": "transformer_engine",
    "transformer_engine.pytorch.ops": "transformer_engine",
    "megatron.core.inference.contexts.attention_context.triton.tensor_ops": "triton",
}  # module -> the absent package that it is or needs
#: What newer versions say of calls that older ones need: logger -> words that its line has.
_REMARKS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "async save is deprecated",
}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3)
_installed = False
_prepared = False


class NullStream:
    """Stands for a CUDA stream or event where there is nothing to wait for."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> NullStream:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> NullStream:
        return self

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def use_cuda() -> bool:
    """Whether the policy runs on CUDA devices."""
    return torch.cuda.is_available()


def local_device() -> torch.device:
    """This rank's device: ``cuda:LOCAL_RANK`` or ``cpu``."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda() else CPU


def compute_capability() -> tuple[int, int] | None:
    """Of this rank's GPU; None without one."""
    return torch.cuda.get_device_capability(local_device()) if use_cuda() else None


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: a GPU and the package."""
    return use_cuda() and importlib.util.find_spec("transformer_engine") is not None


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation, instead of giving large blocks back to the kernel each
    time.

    Tensors of a layer are allocated and freed thousands of times a step, and memory that a process touches for the
    first time costs a CPU several times what writing to it costs. The process's resident memory stays at its peak.
    Without glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def prepare_megatron() -> None:
    """Import megatron-core and Megatron-Bridge in a way that works on this machine. Idempotent; call before any other
    import of them.

    Raises:
        MissingDependency: megatron-core or megatron-bridge is not installed.
        ConfigError: no folder can be written for locks and caches.
        RuntimeError: without CUDA, megatron-core was imported before: its CUDA calls and compiled kernels can't be
            redirected any more.
    """
    global _prepared
    if _prepared:
        return
    if not use_cuda() and "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before pact_nemo.policy.device.prepare_megatron(); call it first"
        )
    machine.prepare()
    for package, module in (("megatron-core", "megatron.core"), ("megatron-bridge", "megatron.bridge")):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise MissingDependency(f"the policy needs {package}; install the packages of requirements.txt")
    on_cpu = install_cpu_redirection()
    with warnings.catch_warnings(), _without_remarks(), _uncompiled() if on_cpu else contextlib.nullcontext():
        # these warnings say that Apex, Transformer Engine and CUDA are absent
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer

        if on_cpu:
            _redirect_rng_state()
            _patch_gloo_scatter()
        _patch_megatron()
        with _stand_ins():
            import megatron.bridge  # noqa: F401
    _leave_out_known_remarks()
    _prepared = True


def install_cpu_redirection() -> bool:
    """Redirect CUDA calls to the CPU where CUDA is absent. (Random-number state follows when megatron is imported.)

    Returns:
        True if the redirection is in place (now or from before), False with CUDA (nothing was touched).
    """
    global _installed
    if use_cuda():
        return False
    if not _installed:
        _redirect_cuda_module()
        _redirect_factories()
        _redirect_tensor_methods()
        _installed = True
    return True


def _redirect_cuda_module() -> None:
    """``torch.cuda.*`` functions that ask where tensors live, wait for the device, or mark ranges for a profiler."""

    def answer(name: str, make: Callable[[], Any]) -> None:
        def redirected(*args: Any, **kwargs: Any) -> Any:
            REDIRECTED[f"torch.cuda.{name}"] += 1
            return make()

        setattr(torch.cuda, name, redirected)

    answer("current_device", lambda: CPU)
    answer("device_count", lambda: 0)
    answer("get_device_capability", lambda: (0, 0))
    for name in ("synchronize", "empty_cache", "set_device"):
        answer(name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        answer(name, lambda: 0)
    for name in ("current_stream", "default_stream"):
        answer(name, NullStream)
    answer("stream", contextlib.nullcontext)
    torch.cuda.Stream = NullStream  # type: ignore[misc,assignment]
    torch.cuda.Event = NullStream  # type: ignore[misc,assignment]
    nvtx = types.ModuleType("torch.cuda.nvtx")
    for name in ("range_push", "range_pop", "mark"):
        setattr(nvtx, name, lambda *args, **kwargs: None)
    nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()  # type: ignore[attr-defined]
    torch.cuda.nvtx = nvtx  # type: ignore[assignment]
    sys.modules["torch.cuda.nvtx"] = nvtx


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _redirect_factories() -> None:
    """``device="cuda"`` literals and pinned memory in tensor factories."""
    from torch.utils._device import _device_constructors

    _device_constructors()  # caches the original factories, so that `with torch.device(...)` keeps working

    def wrap(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def redirected(*args: Any, **kwargs: Any) -> Any:
            if _names_cuda(kwargs.get("device")):
                REDIRECTED[f"torch.{name}"] += 1
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return function(*args, **kwargs)

        return redirected

    for name in _FACTORIES:
        setattr(torch, name, wrap(getattr(torch, name), name))


def _redirect_tensor_methods() -> None:
    """``Tensor.cuda()``, ``Tensor.to("cuda")``, ``Module.cuda()`` and the ``Tensor.type()`` strings that megatron
    compares with.
    """
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        REDIRECTED["Tensor.cuda"] += 1
        return self

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            REDIRECTED["Tensor.to"] += 1
            args = (CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            REDIRECTED["Tensor.to"] += 1
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        asks = not args and not kwargs and result.startswith("torch.") and not result.startswith("torch.cuda")
        if asks and "megatron" in sys._getframe(1).f_code.co_filename:
            REDIRECTED["Tensor.type"] += 1
            return "torch.cuda." + result.removeprefix("torch.")
        return result

    torch.Tensor.cuda = cuda  # type: ignore[method-assign,assignment]
    torch.Tensor.to = to  # type: ignore[method-assign,assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Imports without log lines about packages that are absent on purpose, tracebacks of failed optional imports
    included; ``--verbose`` has them.

    Afterwards megatron's loggers obey the process's own settings, which are as before: Megatron-Bridge gives one of
    them a handler and a level of its own, and where nobody has configured logging yet, a package of megatron-core
    0.19's has the root logger write to standard output.
    """
    disabled, handlers, level = logging.root.manager.disable, list(logging.root.handlers), logging.root.level
    if not logging.getLogger().isEnabledFor(logging.INFO):
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        for name, found in list(logging.root.manager.loggerDict.items()):
            if name.startswith("megatron.") and isinstance(found, logging.Logger) and found.handlers:
                found.handlers.clear()
                found.setLevel(logging.NOTSET)


def _leave_out_known_remarks() -> None:
    """Log lines and warnings about megatron's own future, which nobody who runs this can do anything about."""

    def leave_out(name: str, words: str) -> None:
        logging.getLogger(name).addFilter(lambda record: words not in record.getMessage())

    for name, words in _REMARKS.items():
        leave_out(name, words)
    # from a module of megatron's that is imported later, as needed
    warnings.filterwarnings(
        "ignore", message=".*is experimental and still under active development", category=UserWarning
    )


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """``torch.compile`` as a no-op while megatron-core is imported: its fused elementwise kernels stay plain functions
    on the CPU.

    Narrower than switching off dynamo: other users of ``torch.compile`` in this process are left alone.
    """
    original = torch.compile
    torch.compile = lambda model=None, *args, **kwargs: model if model is not None else (lambda function: function)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


def _redirect_rng_state() -> None:
    """CUDA random-number state: the default CPU generator stands in for it."""
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        REDIRECTED["torch.cuda.get_rng_state"] += 1
        return torch.random.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        REDIRECTED["torch.cuda.set_rng_state"] += 1
        torch.random.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        REDIRECTED["torch.cuda.manual_seed"] += 1
        torch.random.default_generator.manual_seed(int(seed))

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_state  # type: ignore[assignment]
        module.set_rng_state = set_state  # type: ignore[assignment]
        module.manual_seed = manual_seed  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _patch_megatron() -> None:
    """Places in megatron-core that assume Transformer Engine, Apex or a CUDA tensor."""
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # bound only if Transformer Engine imports, yet used without asking

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host  # converts CUDA tensors only
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _patch_torch_adam_state(distrib_optimizer.DistributedOptimizer)


def _patch_torch_adam_state(cls: Any) -> None:
    """torch's Adam keeps its step counter per parameter; the distributed optimizer's checkpoint code expects Apex's
    per-group one.
    """
    original_state_dict, original_load = cls.state_dict, cls.load_state_dict

    def state_dict(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    zeros = torch.zeros_like(param)
                    self.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": zeros,
                        "exp_avg_sq": zeros.clone(),
                    }
        return original_state_dict(self)

    def set_main_param_and_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        for key, value in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if key != "step":
                value.copy_(tensors[key])

    def load_state_dict(self: Any, state: Any) -> None:
        original_load(self, state)
        for entry in self.optimizer.state.values():
            if "step" in entry:
                # one tensor is shared by all parameters after loading, and Adam counts it up in place
                entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32).detach().clone()

    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict
    cls._set_main_param_and_optimizer_states = set_main_param_and_states


def _patch_gloo_scatter() -> None:
    """gloo's ``scatter`` reads non-contiguous list members as if they were contiguous, silently; Megatron-Bridge passes
    such chunks.
    """
    original = dist.scatter

    @functools.wraps(original)
    def scatter(tensor: torch.Tensor, scatter_list: list[torch.Tensor] | None = None, *args: Any, **kwargs: Any) -> Any:
        chunks = [chunk.contiguous() for chunk in scatter_list] if scatter_list else scatter_list
        return original(tensor, chunks, *args, **kwargs)

    dist.scatter = scatter


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Empty modules in place of Transformer Engine and one of Triton kernels while Megatron-Bridge is imported.

    It imports both unconditionally, for LoRA layers and Mamba that are never used here. megatron-core has been imported
    by now and has recorded that Transformer Engine is absent; afterwards the stand-ins are removed, so nobody else
    takes them for the real ones.
    """
    absent = {package for package in set(_STAND_INS.values()) if importlib.util.find_spec(package) is None}
    added = [name for name, package in _STAND_INS.items() if package in absent and name not in sys.modules]
    from megatron.core import utils

    if "transformer_engine" in absent and hasattr(utils, "_te_version"):
        utils._te_version = PkgVersion(
            "0"
        )  # asked for while modules are imported (0.19): older than any version that a feature needs
    for name in added:
        module = _StandIn(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
        if "transformer_engine" in absent and hasattr(utils, "_te_version"):
            utils._te_version = None


class _StandIn(types.ModuleType):
    """A module whose every public attribute is its submodule of that name or an empty ``torch.nn.Module`` class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or type(name, (torch.nn.Module,), {})


def _stay_on_loopback() -> None:
    """Ranks of one machine talk over its loopback interface: gloo and nccl would take the one that the host's name
    leads to. A setting of the user's own stands.
    """
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def patience(timeout_s: float) -> datetime.timedelta:
    """How long collectives wait: ranks may wait for one that generates for hours, and when nobody gets on for
    ``timeout_s``, the hang watch ends the job before they do, and says why."""
    return datetime.timedelta(days=1, seconds=timeout_s)


def init_distributed(timeout_s: float) -> None:
    """Start torch.distributed: nccl with CUDA, gloo otherwise. Under ``torchrun`` its environment is used; a plain
    process becomes a job of one rank that no other process can reach. Does nothing if a process group exists already.

    The ranks of one machine use its loopback interface. Several machines have to reach each other, and anyone on their
    network reaches them: keep that network to the cluster. (``torchrun``'s own meeting point listens on every
    interface; torch has no setting for it.)

    Args:
        timeout_s: when no rank gets on for so many seconds, every rank says which one is missing and ends
            (:mod:`pact_nemo.runtime.hangs`); also how long ranks wait for the meeting point.
    """
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "nccl" if use_cuda() else "gloo"
    if use_cuda():
        torch.cuda.set_device(local_device())
    world = os.environ.get("WORLD_SIZE")
    if "RANK" in os.environ and world is not None:
        if os.environ.get("LOCAL_WORLD_SIZE") == world:  # torchrun on one machine
            _stay_on_loopback()
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        own = (
            store.clone() if hasattr(store, "clone") else store
        )  # a connection of its own: the main thread's may be waiting
        HangWatch(dist.PrefixStore("pact_nemo/hangs", own), rank, size, timeout_s).start()
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default_pg", store),
            rank=rank,
            world_size=size,
            timeout=patience(timeout_s),
        )
        return
    _stay_on_loopback()
    # a TCPStore would listen on every interface, whatever address it is given
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
