"""TRL's ``GRPOTrainer`` on rollouts that are given to it.

Its code is its own: its padding helper, its reference pass (``_get_per_token_logps_and_entropies``), ``training_step``
(loss, backward), gradient clipping and its default AdamW. It is built without generation and is handed the rollouts as
its own generation step would hand them over. It is no dependency of the project and lies in a folder of its own
(:data:`INSTALL`).
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from pact_nemo.policy.device import use_cuda
from pact_nemo.runtime.collective import world_size

INSTALL = "pip install --no-deps --target .cache/bench/trl trl==1.16.0 accelerate==1.15.0"
LOSS_TYPES = {
    "rollout-mean": "grpo",
    "token-mean": "dapo",
    "constant-length": "dr_grpo",
}  # our aggregation -> TRL's name of it


@dataclass
class Sample:
    """One rollout as TRL takes it.

    Attributes:
        prompt, completion: token ids.
        mask: [T] 1 = written by the policy, 0 = observation (TRL's ``tool_mask``).
        advantages: [T], the turn's value on its tokens.
    """

    prompt: list[int]
    completion: list[int]
    mask: list[int]
    advantages: list[float]


def _grpo_config(trl: Any, config: Config, output: Path) -> Any:
    """TRL's settings, of our objective, optimizer and precision."""
    objective, optimizer = config.objective, config.optimizer
    bf16 = config.policy.resolved_precision(cuda=use_cuda()) == "bf16"
    return trl.GRPOConfig(
        output_dir=str(output),
        model_init_kwargs={"dtype": "bfloat16" if bf16 else "float32", "attn_implementation": "sdpa"},
        per_device_train_batch_size=objective.group_size,
        num_generations=objective.group_size,
        max_completion_length=objective.constant_length,
        loss_type=LOSS_TYPES[objective.aggregation],
        beta=objective.kl_coef,
        epsilon=objective.clip_low,
        epsilon_high=objective.clip_high,
        learning_rate=0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.clip_grad,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=not use_cuda(),
        report_to="none",
    )


class Trainer:
    """TRL's ``GRPOTrainer`` on rollouts that are given to it."""

    def __init__(self, folder: Path, model: Path, config: Config, output: Path):
        """
        Args:
            folder: where TRL and accelerate are installed.
            model: Hugging Face folder.
            config: of our side; its objective, optimizer and precision are TRL's too.
            output: for whatever a trainer wants to write.

        Raises:
            ConfigError: TRL is not there, or there is more than one process.
        """
        if not (folder / "trl").is_dir():
            raise ConfigError(f"{folder} holds no TRL; install it there, as in: {INSTALL}")
        if world_size() > 1:
            raise ConfigError("the comparison with TRL is of one process; start it without torchrun")
        sys.path.insert(0, str(folder.resolve()))
        transformers_logging.set_verbosity_error()  # torch.distributed is initialised, for the other side
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the vLLM that it would generate with
            import trl
            from datasets import Dataset
            from transformers import AutoTokenizer
            from trl.trainer import utils
            from trl.trainer.grpo_trainer import GRPOTrainer

        class OnGivenRollouts(GRPOTrainer):
            def _prepare_inputs(self, generation_batch: Any) -> Any:
                return generation_batch

            def _send_telemetry(self) -> None:
                pass

        self.version = str(trl.__version__)
        self._utils, self._scores_compactly = utils, utils._use_triton
        self.trainer: Any = OnGivenRollouts(
            model=str(model),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=_grpo_config(trl, config, output),
            train_dataset=Dataset.from_list([{"prompt": "-"}]),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        self.compact(True)
        self.trainer.create_optimizer()
        self.model, self.trainer.optimizer = self.trainer.accelerator.prepare(
            self.trainer.model, self.trainer.optimizer
        )
        self.trainer.model_wrapped = self.model

    def compact(self, only_completions: bool) -> None:
        """Output logits of completion tokens only, or TRL's own choice by device."""
        self._utils._use_triton = (lambda device: True) if only_completions else self._scores_compactly

    def batches(self, sequences: list[Sample], size: int) -> list[dict[str, torch.Tensor]]:
        """Micro-batches of ``size`` sequences in the form that TRL's generation step returns, each padded to its own
        longest.
        """
        pad, device = self._utils.pad, self.trainer.accelerator.device
        fill = self.trainer._tokenizer.pad_token_id
        scored = sum(sum(sequence.mask) for sequence in sequences)
        found = []
        for start in range(0, len(sequences), size):
            rows = sequences[start : start + size]
            prompts = [torch.tensor(row.prompt) for row in rows]
            completions = [torch.tensor(row.completion) for row in rows]
            found.append(
                {
                    "prompt_ids": pad(prompts, padding_value=fill, padding_side="left").to(device),
                    "prompt_mask": pad(
                        [torch.ones_like(ids) for ids in prompts], padding_value=0, padding_side="left"
                    ).to(device),
                    "completion_ids": pad(completions, padding_value=fill, padding_side="right").to(device),
                    "completion_mask": pad(
                        [torch.ones_like(ids) for ids in completions], padding_value=0, padding_side="right"
                    ).to(device),
                    "tool_mask": pad(
                        [torch.tensor(row.mask) for row in rows], padding_value=1, padding_side="right"
                    ).to(device),
                    "advantages": pad(
                        [torch.tensor(row.advantages) for row in rows],
                        padding_value=0.0,  # type: ignore[arg-type]  # TRL's hint says int
                        padding_side="right",
                    ).to(device),
                }
            )
        for inputs in found:  # TRL divides by this times the number of micro-batches
            inputs["num_items_in_batch"] = torch.tensor(scored / len(found), device=device)
        return found

    @torch.no_grad()
    def _score(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logprobs: torch.Tensor = self.trainer._get_per_token_logps_and_entropies(
            model, ids, mask, inputs["completion_ids"].shape[1]
        )[0]
        return logprobs

    def logprobs(self, sequences: list[Sample]) -> list[torch.Tensor]:
        """Per sequence, of its policy-written tokens."""
        found = []
        for inputs in self.batches(sequences, 4):
            scored = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
            found += [
                row[keep].float().cpu() for row, keep in zip(self._score(self.model, inputs), scored, strict=True)
            ]
        return found

    def step(self, sequences: list[Sample], size: int) -> dict[str, float]:
        """One optimizer step: seconds of ``score``, ``update`` and ``total``, the gradient's norm, tokens with and
        without padding.
        """
        trainer = self.trainer
        start = time.perf_counter()
        batches = self.batches(sequences, size)
        if trainer.ref_model is not None:
            for inputs in batches:
                inputs["ref_per_token_logps"] = self._score(trainer.ref_model, inputs)
        scored = time.perf_counter()
        trainer.current_gradient_accumulation_steps = len(batches)
        for inputs in batches:
            trainer.training_step(self.model, inputs, None)
        norm = float(trainer._clip_grad_norm(self.model)) if trainer.args.max_grad_norm > 0 else 0.0
        trainer.optimizer.step()
        self.model.zero_grad()
        end = time.perf_counter()
        trainer._metrics["train"].clear()
        return {
            "score": scored - start,
            "update": end - scored,
            "total": end - start,
            "grad_norm": norm,
            "tokens": float(sum(len(s.prompt) + len(s.completion) for s in sequences)),
            "padded": float(sum(b["prompt_ids"].numel() + b["completion_ids"].numel() for b in batches)),
        }
