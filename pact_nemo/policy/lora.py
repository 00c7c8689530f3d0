"""Low-rank adapters on a frozen base, through Megatron-Bridge's PEFT package.

The bridge's layers compute ``W x + (alpha / rank) B A x``. Three things are done here instead of there. A's first
values are a function of the seed, the layer and the matrix, so that no layout changes them. An export multiplies B A
and adds it to the base in float32: the bridge does so in the base's dtype, where bf16 rounds a small update away. The
base's own names stay what they were: its conversion tasks are made before the adapters are.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from pact_nemo.errors import ConfigError
from pact_nemo.policy.architectures import Architecture
from pact_nemo.policy.bridge import conversion_tasks
from pact_nemo.policy.config import LORA_MATRICES, LoraConfig
from pact_nemo.policy.device import has_transformer_engine, local_device
from pact_nemo.policy.lora_sizes import lora_problems
from pact_nemo.policy.megatron_import import prepare_megatron
from pact_nemo.policy.model import mark_tensor_parallel
from pact_nemo.runtime.collective import gather, on_rank_zero

prepare_megatron()

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.peft import utils as peft_utils  # noqa: E402
from megatron.bridge.peft.lora import LoRA  # noqa: E402
from megatron.bridge.peft.lora_layers import LoRALinear  # noqa: E402
from megatron.bridge.peft.walk_utils import walk  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

if not has_transformer_engine():
    peft_utils.HAVE_TE = False  # it takes the stand-ins of megatron_import for classes

#: where a target stands in a layer
_PLACES = {"linear_qkv": "self_attention", "linear_proj": "self_attention", "linear_fc1": "mlp", "linear_fc2": "mlp"}
_SPLIT_BY_COLUMNS = ("linear_proj", "linear_fc2")  # over tensor-parallel ranks; the others by rows


class Adapters:
    """The adapters of a policy's chunks, and what they make of its base."""

    def __init__(self, config: LoraConfig, chunks: list[Any], tasks: list[Any], *, seed: int, base: str):
        """Freeze the chunks and put adapters on their targets. Collective over tensor-parallel ranks.

        Args:
            config: with places in the model.
            chunks: this rank's model chunks with the base's weights, before anything wraps them.
            tasks: conversion tasks of the bare chunks that nothing else uses; they remember shapes.
            seed: of the run.
            base: digest of the base's folder.
        """
        self.config, self.chunks, self.base = config, chunks, base
        for chunk in chunks:
            chunk.requires_grad_(False)
            chunk.base_is_frozen = True
            _wrap(chunk, config)
            mark_tensor_parallel(chunk)
        self._kept: torch.Tensor | None = None
        self.layers = dict(_adapted(chunks))
        for name, layer in self.layers.items():
            _initialise(layer, f"{seed}:{name}")
        self._by_weight = {id(layer.to_wrap.weight): layer for layer in self.layers.values()}
        pattern = re.compile(rf"layers\.\d+\.\w+\.({'|'.join(config.targets)})\.weight$")
        self._tasks = [task for task in tasks if task is not None and pattern.search(task.global_param_name)]

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint of the adapters alone has to be loaded onto: JSON values."""
        return {
            "rank": self.config.rank,
            "alpha": float(self.config.alpha),
            "targets": sorted(self.config.targets),
            "base": self.base,
        }

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """The chunks' next passes without the adapters: the base alone, with no copy of it."""
        for layer in self.layers.values():
            layer.disable_adapter_layers()
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapter_layers()

    @torch.no_grad()
    def merged(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Conversion tasks whose weights have their adapters' product in them, float32, one at a time. Collective.

        Nothing is rounded here: what an export rounds, it rounds once. The base is read only.
        """
        factors = {key: _whole_factors(layer) for key, layer in self._by_weight.items()}
        self._kept = None
        for task in tasks:
            layer = self._by_weight.get(id(task.param_weight)) if task is not None else None
            if layer is None:
                yield task
                continue
            inner, outer = factors[id(task.param_weight)]
            scale = self.config.alpha / self.config.rank
            merged = torch.add(task.param_weight.float(), outer.float() @ inner.float(), alpha=scale)
            self._count_kept(task.param_weight, merged)
            changed = copy.copy(task)  # frozen, in the bridge
            object.__setattr__(changed, "param_weight", merged)
            yield changed

    def _count_kept(self, base: torch.Tensor, merged: torch.Tensor) -> None:
        if base.dtype == merged.dtype:  # nothing is rounded, and a refit may merge at every step
            return
        change = merged - base.float()
        stored = merged.to(base.dtype).float() - base.float()
        part = torch.stack([(stored * change).sum(dtype=torch.float64), change.square().sum(dtype=torch.float64)])
        self._kept = part if self._kept is None else self._kept + part

    def kept(self) -> float:
        """Share of the adapters' change that the weights merged last still have once they are rounded to the policy's
        own precision: the rounded change, projected on the exact one. Of all layers; 1 where nothing changes.
        Collective.

        A base in bfloat16 is on its grid: what is smaller than half a step of it is rounded away, always.
        """
        parts = gather([0.0, 0.0] if self._kept is None else self._kept.tolist())  # every layer on as many ranks
        left, whole = (sum(column) for column in zip(*parts, strict=True))
        return left / whole if whole > 0 else 1.0

    @torch.no_grad()
    def peft_tensors(self) -> dict[str, torch.Tensor]:
        """The adapters as ``peft`` names and cuts them: A is [rank, columns] and B [rows, rank] of each of a Hugging
        Face model's own matrices. On the host, in the policy's dtype, on every rank. Collective.
        """
        found = {}
        for task in self._tasks:
            layer = self._by_weight.get(id(task.param_weight))
            inner = outer = module = None
            by_columns = task.global_param_name.split(".")[-2] in _SPLIT_BY_COLUMNS
            if layer is not None:
                module = layer.to_wrap
                whole = _whole_factors(layer)
                inner, outer = layer.adapter.linear_in.weight.data, layer.adapter.linear_out.weight.data
                inner, outer = (inner, whole[1]) if by_columns else (whole[0], outer)
            # the factor that is cut over ranks as the matrix is takes the matrix's way to Hugging Face
            cut, shared = (inner, outer) if by_columns else (outer, inner)
            parts = task.mapping.megatron_to_hf(cut, module)
            shared = task.mapping.broadcast_from_pp_rank(shared, cache_key="the adapter's other factor")
            for name, part in parts.items():
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                first, second = (part, shared) if by_columns else (shared, part)
                found[f"{stem}.lora_A.weight"] = _own_copy(first)
                found[f"{stem}.lora_B.weight"] = _own_copy(second)
        return found

    def peft_config(self, base_model: str) -> dict[str, Any]:
        """Content of ``adapter_config.json``."""
        alpha = float(self.config.alpha)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.config.rank,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(name for target in self.config.targets for name in LORA_MATRICES[target]),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
            "use_dora": False,
            "use_rslora": False,
        }


def attach(
    config: LoraConfig, model: Architecture, bridge: AutoBridge, chunks: list[Any], *, seed: int
) -> Adapters | None:
    """The adapters that the settings ask for, put on chunks that have the base's weights; None = none. Collective.

    Raises:
        ConfigError: the model has no place for them.
    """
    if not config.rank:
        return None
    if found := lora_problems(config, model):
        raise ConfigError("; ".join(found))
    conversion_tasks(bridge, chunks)  # exports go by the names that the base has without adapters
    base = on_rank_zero(bridge.hf_pretrained.state.digest)
    return Adapters(config, chunks, bridge.get_conversion_tasks(chunks), seed=seed, base=base)


def _wrap(chunk: Any, config: LoraConfig) -> None:
    """Put the bridge's adapter layers around the targets, on the chunk's device."""
    recipe = LoRA(
        target_modules=[f"*.{_PLACES[name]}.{name}" for name in config.targets],
        dim=config.rank,
        alpha=config.alpha,
        dropout=0.0,
    )
    before, root, guard = chunk.config.perform_initialization, logging.getLogger(), logging.NullHandler()
    disabled = logging.root.manager.disable
    root.addHandler(guard)  # the bridge's line for each layer would configure logging where nobody has yet
    logging.disable(logging.INFO)
    try:
        walk(chunk, recipe.transform)
    finally:
        logging.disable(disabled)
        root.removeHandler(guard)
        chunk.config.perform_initialization = before
    chunk.to(local_device())


def _adapted(chunks: list[Any]) -> Iterator[tuple[str, Any]]:
    """(layer number in the whole model and the matrix's name there, adapter layer) of this rank's chunks."""
    for chunk in chunks:
        for block in chunk.decoder.layers:
            for name, module in block.named_modules():
                if isinstance(module, LoRALinear):
                    yield f"{block.layer_number}.{name}", module


@torch.no_grad()
def _initialise(layer: Any, key: str) -> None:
    """B = 0; A uniform in +-1 / sqrt(columns), as ``peft`` draws it. Every rank draws the whole of A and takes its
    part.
    """
    adapter = layer.adapter
    mine, size, rank = adapter.linear_in.weight, _tensor_parallel().size(), _tensor_parallel().rank()
    columns = mine.shape[1] * (size if adapter.input_is_parallel else 1)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    whole = (torch.rand(adapter.dim, columns, generator=generator) * 2.0 - 1.0) / columns**0.5
    mine.copy_(whole.chunk(size, dim=1 if adapter.input_is_parallel else 0)[rank])
    adapter.linear_out.weight.zero_()


def _whole_factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) whose product is this rank's part of the matrix: of the two, the one that the matrix isn't cut along is
    gathered.
    """
    inner, outer = layer.adapter.linear_in.weight.data, layer.adapter.linear_out.weight.data
    if layer.adapter.input_is_parallel:
        return inner, _gathered_rows(outer)
    return _gathered_rows(inner), outer


def _gathered_rows(part: torch.Tensor) -> torch.Tensor:
    group = _tensor_parallel()
    if group.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """On the host, in memory of its own: a safetensors file has no shared memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _tensor_parallel() -> Any:
    return parallel_state.get_tensor_model_parallel_group()
