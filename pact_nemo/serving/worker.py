"""Runs inside vLLM's workers: loads an export and makes sure that every layer computes with it. Never imported by the
trainer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pact_nemo.checkpoints.adapter_exports import adapted_matrices, base_digest, check_base
from pact_nemo.checkpoints.manifest import Manifest, verify_manifest
from pact_nemo.checkpoints.verified import verify_once
from pact_nemo.errors import CheckpointError
from pact_nemo.runtime.tensor_files import read_tensors
from pact_nemo.serving.adapters import RUNTIME_ENV

#: Least allowed difference between a head's output and its weights' product, relative to the latter's largest entry:
#: another kernel sums in another order. In 16-bit types their own precision is allowed.
_HEAD_TOLERANCE = 1e-4


class RefitExtension:
    """Mixed into vLLM's worker class by ``--worker-extension-cls``; its methods are called through
    ``collective_rpc``.
    """

    model_runner: Any
    model_config: Any
    vllm_config: Any

    pact_version: int | None = None  # loaded last
    pact_replaced = False  # a refit's weights are in the base's place
    pact_base: str | None = None  # folder of the base; None: the one that the server was started from
    pact_adapters: frozenset[int] = frozenset()  # that were there before the one that is loaded now

    def pact_heartbeat(self) -> dict[str, int | None]:
        """A sign of life of engine and worker, with the weight version that was loaded last; None: the weights it was
        started with.
        """
        return {"version": self.pact_version}

    def pact_load_weights(self, folder: str, version: int | None, verify: bool) -> None:
        """Load an HF folder in place (see :meth:`pact_nemo.serving.admin.ServerAdmin.load_weights`).

        vLLM's reload alone is not enough: on the CPU an output head holds its own packed copy of the weights, which is
        renewed when weights are loaded *into the
        head*. A head that is tied to the embeddings loads nothing, so it would go on with the copy of the model that
        the server was started with.

        A folder whose manifest says another version, or whose files are not of the manifest's sizes (with ``verify``:
        digests, which one process of the machine checks), is refused before anything is loaded: this process may see
        another state of the disk than the trainer.

        Raises:
            CheckpointError: the folder is not what it should be.
            RuntimeError: an output head still does not compute with its weights.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if version is not None:
            _verified(folder, version, verify)
        self.pact_version = -1  # neither the old ones nor the new ones, should this fail half way
        self.pact_replaced = True
        threads = torch.get_num_threads()
        try:
            # many small copies: on the CPU, threads that wait for each other after each of them cost more than they
            # bring
            torch.set_num_threads(1)
            self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]
        finally:
            torch.set_num_threads(threads)
        for name, layer in self.model_runner.get_model().named_modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
                _check_head(name, layer)
        self.pact_version = version
        if version is None:
            self.pact_replaced, self.pact_base = False, folder

    def pact_adapter_facts(self) -> dict[str, Any]:
        """The fields of :class:`pact_nemo.serving.admin.AdapterFacts`."""
        lora = self.vllm_config.lora_config
        return {
            "rank": lora.max_lora_rank if lora is not None else 0,
            "targets": lora.target_modules if lora is not None else None,
            "runtime": os.environ.get(RUNTIME_ENV, "0").strip().lower() in ("1", "true"),
            "base": None if self.pact_replaced else base_digest(self.pact_base_folder()),
        }

    def pact_base_folder(self) -> Path:
        """Of the model as it came."""
        return Path(self.pact_base if self.pact_base is not None else self.model_config.model)

    def pact_expect_adapter(self, folder: str, version: int, verify: bool) -> None:
        """An adapter is about to be loaded: look at it as :meth:`pact_load_weights` looks at a folder, and at the base.

        Raises:
            CheckpointError: the folder is not what it should be, or belongs to another base than is held here.
        """
        manifest = _verified(folder, version, verify)
        if self.vllm_config.lora_config is None:
            raise CheckpointError(f"{folder} is an adapter, and this server was started without --enable-lora")
        if self.pact_replaced:
            raise CheckpointError(
                f"{folder} is an adapter, and a refit has replaced its base here; restart this server"
            )
        check_base(manifest, Path(folder), self.pact_base_folder())
        self.pact_version = -1
        self.pact_adapters = frozenset(self.model_runner.lora_manager.list_adapters())

    def pact_adapter_loaded(self, folder: str, version: int) -> None:
        """It was loaded: make sure that each of its matrices is where the next batch computes with it. vLLM passes over
        those that it finds no place for.

        Raises:
            RuntimeError: it isn't there, or not all of it.
        """
        manager = self.model_runner.lora_manager
        new = frozenset(manager.list_adapters()) - self.pact_adapters
        if len(new) != 1:
            raise RuntimeError(f"{folder}: {len(new)} adapters were loaded instead of it alone")
        slot = manager._adapter_manager.lora_index_to_id.index(next(iter(new)))
        layers = self.model_runner.get_model().modules()
        factors = [part[slot] for layer in layers for part in getattr(layer, "lora_a_stacked", ())]
        here, wanted = sum(bool(factor.any()) for factor in factors), len(adapted_matrices(read_tensors(folder)))
        if here != wanted:
            raise RuntimeError(
                f"{folder}: {here} of its {wanted} matrices are computed with; check --lora-target-modules"
            )
        self.pact_version = version


def _verified(folder: str, version: int, digests: bool) -> Manifest:
    """The manifest of a folder that is whole. Raises CheckpointError."""
    if digests:
        return verify_once(folder, expect_version=version)
    return verify_manifest(folder, expect_version=version, digests=False)


@torch.no_grad()
def _check_head(name: str, layer: Any) -> None:
    weight = layer.weight
    if weight.dim() != 2 or not weight.is_floating_point():  # a quantised head has no plain product to compare with
        return
    probe = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    expected = F.linear(probe, weight).float()
    difference = (layer.quant_method.apply(layer, probe).float() - expected).abs().max()
    if not difference <= max(_HEAD_TOLERANCE, torch.finfo(weight.dtype).eps) * expected.abs().max():
        raise RuntimeError(
            f"output head {name} does not compute with the weights that were loaded (difference"
            f" {difference.item():.3g})"
        )
