"""The one door to megatron: megatron-core and Megatron-Bridge imported so that they work on this machine.

What they assume of packages that are absent, and what newer versions say of calls that older ones need, is mended here.
:mod:`pact_nemo.policy.without_cuda` has what is done where CUDA itself is absent.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.machinery
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version as PkgVersion

from pact_nemo.errors import ConfigError, MissingDependency
from pact_nemo.policy.config import transformer_engine_installed
from pact_nemo.policy.device import use_cuda
from pact_nemo.policy.without_cuda import install_cpu_redirection, redirect_rng_state, uncompiled
from pact_nemo.runtime import machine

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
_prepared = False


def prepare_megatron() -> None:
    """Import megatron-core and Megatron-Bridge in a way that works on this machine. Idempotent; call before any other
    import of them.

    Raises:
        MissingDependency: megatron-core or megatron-bridge is not installed.
        ConfigError: no folder can be written for locks and caches; Transformer Engine is there and can't be imported.
        RuntimeError: without CUDA, megatron-core was imported before: its CUDA calls and compiled kernels can't be
            redirected any more.
    """
    global _prepared
    if _prepared:
        return
    if not use_cuda() and "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before pact_nemo.policy.megatron_import.prepare_megatron(); call it first"
        )
    machine.prepare()
    for package, module in (("megatron-core", "megatron.core"), ("megatron-bridge", "megatron.bridge")):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise MissingDependency(f"the policy needs {package}; install the packages of requirements.txt")
    check_transformer_engine()
    on_cpu = install_cpu_redirection()
    compiled = uncompiled() if on_cpu else contextlib.nullcontext()
    with warnings.catch_warnings(), _without_remarks(), _hidden("wandb"), _without_collector(), compiled:
        # these warnings say that Apex, Transformer Engine and CUDA are absent
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer

        if on_cpu:
            redirect_rng_state()
            _patch_gloo_scatter()
        _patch_megatron(on_cpu=on_cpu)
        with _stand_ins():
            import megatron.bridge  # noqa: F401
    _leave_out_known_remarks()
    _prepared = True


def check_transformer_engine() -> None:
    """Refuse a Transformer Engine that is only half there: megatron-core takes its folder for all of it.

    Raises:
        ConfigError: with what is missing.
    """
    if not transformer_engine_installed():
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        raise ConfigError(
            f"transformer_engine is installed and can't be imported ({type(error).__name__}: {error}); finish its"
            " installation (bash tools/install.sh gpu), or remove it: pip uninstall transformer_engine"
            " transformer_engine_cu13 transformer_engine_torch, and what they leave of the folder"
        ) from error


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Imports make a million objects that stay; looking for garbage among them again and again takes a quarter of the
    time. Afterwards the collector leaves them out for good.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """As if ``package`` were not installed: megatron's timers import W&B where it is, for reports that nothing here
    asks for. That is a second of each process.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


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


def _patch_megatron(*, on_cpu: bool) -> None:
    """Places in megatron-core that assume Transformer Engine, Apex or a CUDA tensor."""
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # bound only if Transformer Engine imports, yet used without asking

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    if on_cpu:
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
        # asked for while modules are imported (0.19): older than any version that a feature needs
        utils._te_version = PkgVersion("0")
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
