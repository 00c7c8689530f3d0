"""The policy as the training loop sees it: log-probabilities of token trees, one optimizer step on an additive loss,
and export.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pact_nemo.errors import ConfigError, NumericsError
from pact_nemo.policy import bridge, fp8, lora, microbatches, optimizer
from pact_nemo.policy import device as devices
from pact_nemo.policy.architectures import check_architecture
from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.policy.distributed import init_distributed
from pact_nemo.policy.export.hf_folder import write_folder
from pact_nemo.policy.export.layout import LayoutSettings, check_dtype
from pact_nemo.policy.export.peft_folder import write_adapter
from pact_nemo.policy.fp8 import ALIGNMENT
from pact_nemo.policy.microbatches import LocalMicroBatch
from pact_nemo.policy.model import build_chunks
from pact_nemo.policy.process_groups import initialize_model_parallel
from pact_nemo.policy.provider import build_provider, configure_provider
from pact_nemo.policy.reference import Reference, reference_for
from pact_nemo.policy.sharded_state import load_sharded_state, sharded_state
from pact_nemo.policy.trees import TokenTree, check_token_ids
from pact_nemo.policy.update_result import UpdateResult
from pact_nemo.runtime.digests import FileEntry


class MegatronPolicy:
    """A causal language model under any TP x PP x CP x DP layout; every method is collective and gives every rank the
    same result.
    """

    def __init__(
        self,
        config: PolicyConfig,
        optimizer_config: OptimizerConfig,
        hf_path: str | Path,
        *,
        seed: int,
        total_steps: int,
        trainable: bool = True,
        weights: bridge.Weights | None = None,
    ):
        """Build the model and load its weights.

        Args:
            config: layout and precision.
            optimizer_config: AdamW and its schedule.
            hf_path: local Hugging Face folder with the initial weights, tokenizer and configuration.
            seed: for megatron's generators (dropout is off, so results don't depend on it).
            total_steps: optimizer steps of the learning-rate schedule; those with a rate of their own don't count.
            trainable: False = no gradients and no optimizer.
            weights: read in place of those of ``hf_path``, which needs none then, if the policy isn't trainable.

        Raises:
            ConfigError: contradictory settings, or a model that isn't computed or can't be laid out this way.
            CheckpointError: the folder's tensors are not those of its model, or not finite.
        """
        init_distributed(config.init_timeout_s)
        cuda = devices.use_cuda()
        if config.keep_freed_memory and not cuda:
            devices.keep_freed_memory()
        if config.deterministic and cuda:
            devices.compute_deterministically()
        config.validate(cuda=cuda, world_size=dist.get_world_size())
        optimizer_config.validate()
        self.config, self.optimizer_config = config, optimizer_config
        self.hf_path, self.total_steps = Path(hf_path), total_steps
        self.step = self.unscheduled = 0  # updates so far; those of them with a rate of their own
        self.device = devices.local_device()
        self.bf16 = config.resolved_precision(cuda=cuda) == "bf16"
        self.fp8 = fp8.recipe_here(config, bf16=self.bf16)
        self.alignment = ALIGNMENT[self.fp8] if self.fp8 is not None else 1
        initialize_model_parallel(config, seed=seed)
        self.bridge = bridge.load_bridge(hf_path, with_weights=weights is None or trainable)
        self.architecture = check_architecture(hf_path, attention=config.attention)
        with bridge.quiet():
            self.provider = build_provider(self.architecture)
        configure_provider(self.provider, config, cuda=cuda, fp8=self.fp8)
        self.chunks = build_chunks(self.provider, self.architecture, config, cuda=cuda)
        (partial(bridge.load_weights, self.bridge) if weights is None else weights.fill)(self.chunks)
        self.adapters = lora.attach(config.lora, self.architecture, self.bridge, self.chunks, seed=seed)
        self._reference: Reference | None = None
        self.wrapped: list[Any] = []
        self.optimizer: Any = None
        if trainable:
            self._build_optimizer()
        else:
            for chunk in self.chunks:
                chunk.requires_grad_(False)

    def _build_optimizer(self) -> None:
        distributed = self.config.distributed_optimizer
        self.wrapped = optimizer.wrap_data_parallel(
            self.chunks, distributed_optimizer=distributed, overlap=self.config.overlap_grad_reduce
        )
        self.optimizer = optimizer.build_optimizer(
            self.optimizer_config, self.wrapped, bf16=self.bf16, distributed_optimizer=distributed
        )

    # ---------------------------------------------------------------- scoring

    @torch.no_grad()
    def logprobs(self, trees: list[TokenTree]) -> list[torch.Tensor]:
        """Log-probabilities of the scored tokens under the current weights, each at its tree's temperature.

        Args:
            trees: the same list on every rank.

        Returns:
            per tree [S] float32, in nats, in segment order then token order.

        Raises:
            DataError: malformed trees, or token ids that the model has no row for.
        """
        return self._score(trees, entropy=False)[0]

    @torch.no_grad()
    def logprobs_and_entropies(self, trees: list[TokenTree]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Like :meth:`logprobs`, with the entropy (nats) of each distribution that a scored token was drawn from."""
        return self._score(trees, entropy=True)

    @torch.no_grad()
    def reference_logprobs(self, trees: list[TokenTree]) -> list[torch.Tensor]:
        """Like :meth:`logprobs`, under the reference weights instead of the current ones.

        Raises:
            ConfigError: there is no reference yet: :meth:`load_reference`.
        """
        if self._reference is None:
            raise ConfigError("reference log-probs need load_reference()")
        with self._reference(), fp8.switched_off(self.chunks):
            return self.logprobs(trees)

    @property
    def weight_dtype(self) -> str:
        """Name of the dtype that holds the weights without loss."""
        return "bfloat16" if self.bf16 else "float32"

    def load_reference(self, hf_path: str | Path) -> None:
        """Take the weights of an HF folder as the frozen reference, see :func:`reference_for`. Collective."""
        self._reference = reference_for(
            hf_path, self.hf_path, self.architecture, self.chunks, self.device, self.adapters
        )

    def _local_batches(self, trees: list[TokenTree], *, entropy: bool) -> tuple[list[LocalMicroBatch], int]:
        """This rank's micro-batches of ``trees`` as this model computes them, and the number of tree tokens on all
        ranks together.
        """
        return microbatches.local_batches(
            trees,
            self.config,
            device=self.device,
            bf16=self.bf16,
            entropy=entropy,
            alignment=self.alignment,
            window=self.architecture.window,
        )

    def _score(self, trees: list[TokenTree], *, entropy: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        check_token_ids(trees, self.provider.vocab_size)
        bare = [TokenTree(tree.segments, temperatures=tree.temperatures) for tree in trees]
        batches, _ = self._local_batches(bare, entropy=entropy)
        for chunk in self.chunks:
            chunk.eval()
        collected = microbatches.run_schedule(self.chunks, batches, None, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        logprobs = self._per_tree(trees, collected.logprobs)
        return logprobs, self._per_tree(trees, collected.entropies) if entropy else []

    # --------------------------------------------------------------- training

    def update(
        self, trees: list[TokenTree], loss_fn: microbatches.LossFn, *, entropy: bool = False, lr: float | None = None
    ) -> UpdateResult:
        """One optimizer step on a loss that is a plain sum over scored tokens.

        Args:
            trees: the same list on every rank, all with the same stream names.
            loss_fn: (log-probs [S] float32 with gradient, streams name -> [S]) of any subset of the scored tokens ->
                (scalar loss, metrics). It must be additive over tokens: all denominators are already in the streams'
                weights. Loss and gradients of the step are the sums over all calls, micro-batches and ranks; nothing is
                averaged. Never called without tokens.
            entropy: compute the entropies of the distributions, too. The loss function finds them, with gradient, as
                stream ``entropy``.
            lr: learning rate of this step; None = the schedule's.

        Returns:
            the step's numbers, the same on every rank.

        Raises:
            NumericsError: NaN or Inf in the loss, a metric or the gradient norm; raised on all ranks together, weights
                untouched.
            DataError: malformed trees, or token ids that the model has no row for.
            ConfigError: the policy is not trainable.
        """
        if self.optimizer is None:
            raise ConfigError("this policy was built with trainable=False")
        collected, tokens = self._backward(trees, loss_fn, entropy=entropy)
        fp8.end_pass(self.chunks)
        loss, metrics = microbatches.gather_metrics(collected)
        grad_norm = optimizer.gradient_norm(self.optimizer)
        numbers = {"loss": loss, "grad_norm": grad_norm, **metrics}
        if broken := microbatches.not_finite(numbers):
            message = f"update {self.step + 1}: not finite: {', '.join(broken)}; the weights were not changed"
            raise NumericsError(message, names=broken, logprobs=self._per_tree(trees, collected.logprobs))
        scheduled = self.step - self.unscheduled + 1
        rate = optimizer.learning_rate(self.optimizer_config, scheduled, self.total_steps) if lr is None else lr
        moved = optimizer.apply_step(
            self.optimizer,
            lr=rate,
            weight_decay=self.optimizer_config.weight_decay,
            clip_grad=self.optimizer_config.clip_grad,
            grad_norm=grad_norm,
            bf16=self.bf16,
        )
        self.step, self.unscheduled = self.step + 1, self.unscheduled + (lr is not None)
        logprobs = self._per_tree(trees, collected.logprobs)
        entropies = self._per_tree(trees, collected.entropies) if entropy else []
        return UpdateResult(loss, grad_norm, metrics, rate, tokens, logprobs, moved, entropies)

    def gradient_cosine(
        self, first: list[TokenTree], second: list[TokenTree], loss_fn: microbatches.LossFn
    ) -> tuple[float, float, float]:
        """How far the gradients of a loss on two sets of trees point the same way. Changes nothing that a later pass or
        update reads.

        Holds one more copy of the gradient in float32. FP8 is off: its scaling factors would remember the passes.

        Args:
            first, second: the same lists on every rank, with the streams that ``loss_fn`` reads.
            loss_fn: as in :meth:`update`.

        Returns:
            the cosine, NaN where a gradient is 0; the norm of the first gradient and of the second.

        Raises:
            ConfigError: the policy is not trainable.
        """
        if self.optimizer is None:
            raise ConfigError("this policy was built with trainable=False")
        with fp8.switched_off(self.chunks):
            self._backward(first, loss_fn)
            norm = optimizer.gradient_norm(self.optimizer)
            kept = optimizer.KeptGradient(self.optimizer)
            self._backward(second, loss_fn)
            other = optimizer.gradient_norm(self.optimizer)
        dot = kept.dot(self.device)
        return dot / (norm * other) if norm * other > 0 else math.nan, norm, other

    def _backward(
        self, trees: list[TokenTree], loss_fn: microbatches.LossFn, *, entropy: bool = False
    ) -> tuple[microbatches.Collected, int]:
        """Leave the gradient of the loss in the buffers, in place of what was there. Returns what was collected, and
        the tree tokens of all ranks.
        """
        check_token_ids(trees, self.provider.vocab_size)
        batches, tokens = self._local_batches(trees, entropy=entropy)
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return microbatches.run_schedule(self.wrapped, batches, loss_fn, forward_only=False), tokens

    # ----------------------------------------------------------------- export

    @torch.no_grad()
    def export_hf(
        self, folder: str | Path, *, dtype: str = "bfloat16", previous: tuple[Path, dict[str, FileEntry]] | None = None
    ) -> dict[str, FileEntry]:
        """Write the current weights as a Hugging Face folder: safetensors, and everything else copied from ``hf_path``.

        Collective; all ranks that see the folder write, ``policy.export_writers`` of them at most. No rank holds more
        than the weight being gathered and those that wait for its writing threads. ``checkpoints.hf.export_version``
        makes atomic, versioned folders of it.

        Args:
            folder: existing or new folder.
            dtype: of the weights: ``float32``, ``bfloat16``, ``float16`` or ``fp8_block``.
            previous: (folder, manifest entries) of an earlier export, whose equal files are linked instead of written
                again.

        Returns:
            digests of the weight files.

        Raises:
            CheckpointError: on all ranks: the set of weights differs from that of ``hf_path``, or a rank can't write.
            ConfigError: unknown dtype.
        """
        check_dtype(dtype)
        return write_folder(
            bridge.export_weights(self.bridge, self.chunks, self.adapters),
            self.hf_path,
            folder,
            dtype,
            shapes=bridge.folder_of(self.bridge).shapes,
            settings=LayoutSettings(writers=self.config.export_writers),
            previous=previous,
        )

    @torch.no_grad()
    def export_adapter(self, folder: str | Path) -> dict[str, Any]:
        """Write the adapters alone in PEFT format into an existing folder, :mod:`pact_nemo.policy.export.peft_folder`.
        Collective. Returns what they have to be loaded onto (:attr:`pact_nemo.policy.lora.Adapters.facts`).

        Raises:
            ConfigError: the policy has none.
        """
        if self.adapters is None:
            raise ConfigError("there is no adapter to export: policy.lora.rank is 0")
        write_adapter(self.adapters, self.hf_path, folder)
        return self.adapters.facts

    # ------------------------------------------------------------- checkpoint

    def state_dict(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Sharded state dict of what is trained and its optimizer (moments, main weights, Adam's step counters);
        collective.

        Independent of the layout: ``checkpoints.resume`` loads it under another one.

        Raises:
            ConfigError: the policy is not trainable.
        """
        if self.optimizer is None:
            raise ConfigError("a policy built with trainable=False has no state to resume from; export it instead")
        return sharded_state(self.chunks, self.optimizer, is_loading=is_loading, adapters=self.adapters)

    def load_state_dict(self, state: dict[str, Any], *, step: int) -> None:
        """Take over a loaded state. Reference weights stay what they are.

        Args:
            state: as :meth:`state_dict`, with the tensors loaded.
            step: optimizer steps behind it.
        """
        load_sharded_state(self.chunks, self.optimizer, state, adapters=self.adapters)
        self.step = step

    def _per_tree(self, trees: list[TokenTree], parts: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        sizes = [tree.num_scored for tree in trees]
        return list(microbatches.gather_flat(parts, sum(sizes), self.device).split(sizes))
