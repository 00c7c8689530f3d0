"""Our plain GRPO step and our whole PACT step against a plain GRPO step of TRL's ``GRPOTrainer``, from the same
finished rollouts of a run to new weights, with the same Hugging Face weights in the same precision.

TRL's side is its own code: its padding helper, its reference pass (``_get_per_token_logps_and_entropies``),
``training_step`` (loss, backward), gradient clipping and its default AdamW; its trainer is built without generation and
is handed the rollouts as its own generation step would hand them over. In its favour: the fastest of several
micro-batch sizes; rows padded per micro-batch, where TRL pads to the longest of the whole batch; no gradient
checkpointing, which is its default; the rollouts of a prompt side by side; no training loop around the step (callbacks,
logging); and output logits of completion tokens only, which TRL does on CUDA but not on the CPU (``--as-shipped`` adds
a contestant without that). On every side the learning rate is 0 (all rounds compute the same numbers), there is one
update per step and no correction for the sampler.

Before timing, both sides score all policy-written tokens and take the gradient of the first step: log-probabilities and
gradient norms have to agree.
TRL is no dependency of the project. It is put into a folder of its own with ``pip install --no-deps --target``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from pact_nemo.batches.prompt_groups import PromptGroup
from pact_nemo.batches.prompt_trees import PROMPT_ONLY, contexts_needed, grow_tree
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError, NumericsError
from pact_nemo.methods.registry import make_method
from pact_nemo.policy.device import use_cuda
from pact_nemo.policy.packing import pack
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.runtime.collective import world_size
from pact_nemo.training.run import TrainingRun
from pact_nemo.training.stopwatch import Stopwatch
from pact_nemo.training.update import update
from tools.benches.kit import interleaved, median_ratio, recorded_groups, report, scratch, stand_in, timed_step

GOAL, PACT_GOAL = 0.9, 1.0
TOLERANCE = 1e-3  #: in float32, of log-probabilities in nats and of the gradient norm, relative
FOLDER = Path(".cache/bench/trl")
INSTALL = "pip install --no-deps --target .cache/bench/trl trl==1.16.0 accelerate==1.15.0"
LOSS_TYPES = {
    "rollout-mean": "grpo",
    "token-mean": "dapo",
    "constant-length": "dr_grpo",
}  # our aggregation -> TRL's name of it
SHIPPED = "trl grpo, as shipped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, default=Path("runs/latest"), help="finished run with rollouts/ and hf/")
    parser.add_argument("--steps", type=int, nargs="+", help="which dumped steps (default: all)")
    parser.add_argument("--prompts", type=int, help="only the first so many prompts of each step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--trl", type=Path, default=FOLDER, metavar="FOLDER", help=f"where TRL is installed ({INSTALL})"
    )
    parser.add_argument(
        "--trl-micro-batches",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="sequences; the fastest on the first step stays",
    )
    parser.add_argument(
        "--as-shipped",
        action="store_true",
        help="also time TRL with output logits of every position, its way on the CPU",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the run's config, for all contestants"
    )


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


def run(options: argparse.Namespace) -> int:
    steps = options.steps or sorted(
        int(path.stem.split("_")[-1]) for path in (options.run / "rollouts").glob("*_*.jsonl*")
    )
    words = [*options.set, "rollout.importance=off"]
    with scratch(Path(".cache/bench"), "trl") as folder:
        contestants = {}
        for method in ("grpo", "pact"):
            config, found = recorded_groups(options.run, steps, method=method, words=words)
            config = replace(config, trainer=replace(config.trainer, mini_batch_size=config.trainer.batch_size))
            contestants[method] = (config, [groups[: options.prompts] for groups in found])
        config, groups = contestants["grpo"]
        sequences = [sequences_of(batch, config) for batch in groups]
        peer = Peer(options.trl, options.run / "hf", config, folder)
        keep = config.objective.kl_coef > 0
        policy = MegatronPolicy(
            config.policy,
            replace(config.optimizer, lr=0.0),
            options.run / "hf",
            seed=0,
            total_steps=1,
            keep_reference=keep,
        )
        agreement = check(policy, peer, config, groups, sequences)
        sizes = {
            str(size): lambda size=size: peer.step(sequences[0], size)["total"] for size in options.trl_micro_batches
        }  # type: ignore[misc]
        speeds = {size: times[0] for size, times in interleaved(1, sizes).items()}
        best = int(min(speeds, key=lambda size: speeds[size]))
        print(
            f"TRL's micro-batches: {', '.join(f'{size}: {value:.2f} s' for size, value in speeds.items())}",
            file=sys.stderr,
        )

        def ours(method: str) -> dict[str, float]:
            settings, batches = contestants[method]
            stand = stand_in(settings, policy)
            return _sum([timed_step(_at(stand, step), batch) for step, batch in zip(steps, batches, strict=True)])

        def theirs(compact: bool) -> dict[str, float]:
            peer.compact(compact)
            return _sum([peer.step(batch, best) for batch in sequences])

        calls: dict[str, Callable[[], dict[str, float]]] = {
            "trl grpo": lambda: theirs(True),
            "our grpo": lambda: ours("grpo"),
            "our pact": lambda: ours("pact"),
        }
        if options.as_shipped:
            calls[SHIPPED] = lambda: theirs(False)
        times = interleaved(options.rounds, calls)
        padded = {f"our {method}": padded_tokens(policy, *contestants[method]) for method in contestants}
    totals = {name: [row["total"] for row in found] for name, found in times.items()}
    rows = [
        {
            "step": name,
            **{part: statistics.median(row[part] for row in found) for part in ("score", "update", "total")},
            "tokens": int(found[0]["tokens"]),
            "with padding": int(padded.get(name, found[0].get("padded", 0))),
        }
        for name, found in times.items()
    ]
    ratio, spread = median_ratio(totals["our grpo"], totals["trl grpo"])
    pact_ratio, pact_spread = median_ratio(totals["our pact"], totals["trl grpo"])
    result: dict[str, Any] = {
        "steps": len(steps),
        "sequences": sum(map(len, sequences)),
        "trl_version": peer.version,
        "trl_micro_batch": best,
        "trl_micro_batches_s": speeds,
        **agreement,
        **{
            f"median_{name.replace(' ', '_')}_s": statistics.median(totals[name])
            for name in ("trl grpo", "our grpo", "our pact")
        },
        "spread": spread,
        "pact_spread": pact_spread,
        "pact_ratio": pact_ratio,
        "pact_goal": f"< {PACT_GOAL}",
        "ratio": ratio,
        "goal": f"<= {GOAL}",
    }
    if options.as_shipped:
        result = {"shipped_ratio": median_ratio(totals["our grpo"], totals[SHIPPED])[0], **result}
    title = (
        f"{len(steps)} steps of {options.run.resolve().name}, seconds, medians of {options.rounds} rounds; tokens of"
        " the update"
    )
    report(options, title, rows, result)
    return 0


def _at(run: TrainingRun, step: int) -> TrainingRun:
    run.state.step = step
    return run


def _sum(parts: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(part.get(key, 0.0) for part in parts) for key in parts[0]}


def sequences_of(groups: list[PromptGroup], config: Config) -> list[Sample]:
    """The rollouts that our step trains on, in the order in which it scores them.

    Raises:
        ConfigError: a rollout has several contexts.
    """
    found = []
    for group in groups:
        for _, k in grow_tree(group, [], make_method(config), contexts=(PROMPT_ONLY,)).spans:
            rollout = group.rollouts[k]
            if rollout.rewinds:
                raise ConfigError(
                    f"{rollout.task_id}, rollout {rollout.sample}, has several contexts, because earlier thoughts were"
                    " dropped: TRL trains on one sequence a rollout; compare on a run with model.earlier_thoughts=keep"
                )
            advantages = [0.0] * len(rollout.token_ids)
            for turn, value in zip(rollout.turns, group.advantages[k], strict=True):
                advantages[turn.start : turn.end] = [float(value)] * (turn.end - turn.start)
            found.append(
                Sample(
                    list(rollout.prompt_ids), list(rollout.token_ids), [int(m) for m in rollout.loss_mask], advantages
                )
            )
    return found


def padded_tokens(policy: MegatronPolicy, config: Config, batches: list[list[PromptGroup]]) -> int:
    """Tokens of our update's rows, padding included."""
    total, method = 0, make_method(config)
    for groups in batches:
        trees = [
            grow_tree(g, [5] * 8, method, contexts=contexts_needed(g, method, diagnostics=True)).tree for g in groups
        ]
        packed = pack(
            trees, policy.config.micro_batch_tokens, share_prefix=policy.config.share_prefix, multiple=policy.alignment
        )
        total += sum(row.tokens.shape[0] for rows in packed for row in rows)
    return total


def check(
    policy: MegatronPolicy, peer: Peer, config: Config, groups: list[list[PromptGroup]], sequences: list[list[Sample]]
) -> dict[str, float]:
    """Log-probabilities of every scored token on both sides, and the gradient norm of the first step's loss.

    TRL is asked for micro-batches of one, so that its mean over micro-batches is a mean over rollouts. Where a rollout
    can't be used, its group's others weigh more on our side only, and the norms are not held against each other.

    Raises:
        NumericsError: log-probabilities or gradient norms in float32 differ by more than ``TOLERANCE``.
    """
    difference, count = 0.0, 0
    for batch, rows in zip(groups, sequences, strict=True):
        trees = [grow_tree(group, [], make_method(config), contexts=(PROMPT_ONLY,)).tree for group in batch]
        ours = torch.cat(policy.logprobs([tree for tree in trees if tree.num_scored]))
        theirs = torch.cat(peer.logprobs(rows))
        difference, count = max(difference, float((ours - theirs).abs().max())), count + ours.shape[0]
    stand = stand_in(config, policy)
    ours_norm = float(update(stand, groups[0], Stopwatch(stand.progress))["policy/grad_norm"])
    their_norm = peer.step(sequences[0], 1)["grad_norm"]
    complete = len(sequences[0]) == sum(len(group.rollouts) for group in groups[0])
    if not policy.bf16 and not difference <= TOLERANCE:
        raise NumericsError(
            f"TRL's log-probabilities differ from ours by up to {difference:.2e} nats: the two sides don't compute the"
            " same thing"
        )
    if not policy.bf16 and complete and not abs(ours_norm - their_norm) <= TOLERANCE * max(ours_norm, their_norm):
        raise NumericsError(
            f"TRL's gradient norm is {their_norm:.6g}, ours {ours_norm:.6g}: the two sides don't compute the same thing"
        )
    return {
        "scored_tokens": count,
        "logprob_difference": difference,
        "grad_norm_ours": ours_norm,
        "grad_norm_trl": their_norm,
    }


class Peer:
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
        objective, optimizer = config.objective, config.optimizer
        bf16 = config.policy.resolved_precision(cuda=use_cuda()) == "bf16"
        self.trainer: Any = OnGivenRollouts(
            model=str(model),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(
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
            ),
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
