"""Runs inside vLLM's workers: loads an export and makes sure that every layer computes with it. Never imported by the
trainer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pact_nemo.checkpoints.manifest import verify_manifest
from pact_nemo.checkpoints.verified import verify_once

#: Least allowed difference between a head's output and its weights' product, relative to the latter's largest entry:
#: another kernel sums in another order. In 16-bit types their own precision is allowed.
_HEAD_TOLERANCE = 1e-4


class RefitExtension:
    """Mixed into vLLM's worker class by ``--worker-extension-cls``; its methods are called through
    ``collective_rpc``.
    """

    model_runner: Any

    pact_version: int | None = None  # loaded last

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

        if version is not None and verify:
            verify_once(folder, expect_version=version)
        elif version is not None:
            verify_manifest(folder, expect_version=version, digests=False)
        self.pact_version = -1  # neither the old ones nor the new ones, should this fail half way
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
