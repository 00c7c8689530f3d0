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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pact_nemo.batches.prompt_groups import PromptGroup
from pact_nemo.batches.prompt_trees import PROMPT_ONLY, contexts_needed, grow_tree
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError, NumericsError
from pact_nemo.methods.registry import make_method
from pact_nemo.policy.packing import pack
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.training.run import TrainingRun
from pact_nemo.training.stopwatch import Stopwatch
from pact_nemo.training.update import update
from tools.benches.kit import (
    interleaved,
    median_ratio,
    recorded_groups,
    report,
    scratch,
    stand_in,
    still_policy,
    timed_step,
)
from tools.benches.trl_trainer import INSTALL, Sample, Trainer

GOAL, PACT_GOAL = 0.9, 1.0
TOLERANCE = 1e-3  #: in float32, of log-probabilities in nats and of the gradient norm, relative
FOLDER = Path(".cache/bench/trl")
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


@dataclass(frozen=True)
class Rollouts:
    """The same dumped steps for all contestants.

    Attributes:
        steps: their numbers.
        ours: of each method of ours its config, and per step its groups.
        sequences: per step, what TRL trains on.
    """

    steps: list[int]
    ours: dict[str, tuple[Config, list[list[PromptGroup]]]]
    sequences: list[list[Sample]]


def run(options: argparse.Namespace) -> int:
    rollouts = read_rollouts(options)
    config, groups = rollouts.ours["grpo"]
    with scratch(Path(".cache/bench"), "trl") as folder:
        peer = Trainer(options.trl, options.run / "hf", config, folder)
        policy = still_policy(config, options.run / "hf")
        agreement = check(policy, peer, config, groups, rollouts.sequences)
        sizes = {
            str(size): lambda size=size: peer.step(rollouts.sequences[0], size)["total"]
            for size in options.trl_micro_batches
        }  # type: ignore[misc]
        speeds = {size: times[0] for size, times in interleaved(1, sizes).items()}
        best = int(min(speeds, key=lambda size: speeds[size]))
        print(
            f"TRL's micro-batches: {', '.join(f'{size}: {value:.2f} s' for size, value in speeds.items())}",
            file=sys.stderr,
        )
        calls = contestants(rollouts, policy, peer, best, as_shipped=options.as_shipped)
        times = interleaved(options.rounds, calls)
        padded = {f"our {method}": padded_tokens(policy, *found) for method, found in rollouts.ours.items()}
    result: dict[str, Any] = {
        "steps": len(rollouts.steps),
        "sequences": sum(map(len, rollouts.sequences)),
        "trl_version": peer.version,
        "trl_micro_batch": best,
        "trl_micro_batches_s": speeds,
        **agreement,
        **ratios(times),
    }
    if options.as_shipped:
        totals = {name: [row["total"] for row in times[name]] for name in ("our grpo", SHIPPED)}
        result = {"shipped_ratio": median_ratio(totals["our grpo"], totals[SHIPPED])[0], **result}
    title = (
        f"{len(rollouts.steps)} steps of {options.run.resolve().name}, seconds, medians of {options.rounds} rounds;"
        " tokens of the update"
    )
    report(options, title, table(times, padded), result)
    return 0


def read_rollouts(options: argparse.Namespace) -> Rollouts:
    """The dumped steps that ``options`` name, formed by both of our methods, one update a step."""
    steps = options.steps or sorted(
        int(path.stem.split("_")[-1]) for path in (options.run / "rollouts").glob("*_*.jsonl*")
    )
    words = [*options.set, "rollout.importance=off"]
    ours = {}
    for method in ("grpo", "pact"):
        config, found = recorded_groups(options.run, steps, method=method, words=words)
        config = replace(config, trainer=replace(config.trainer, mini_batch_size=config.trainer.batch_size))
        ours[method] = (config, [groups[: options.prompts] for groups in found])
    config, groups = ours["grpo"]
    return Rollouts(steps, ours, [sequences_of(batch, config) for batch in groups])


def contestants(
    rollouts: Rollouts, policy: MegatronPolicy, peer: Trainer, size: int, *, as_shipped: bool
) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> a call that trains on all steps and returns sums over them of what a step measures. TRL has micro-batches
    of ``size`` sequences.
    """

    def ours(method: str) -> dict[str, float]:
        settings, batches = rollouts.ours[method]
        stand = stand_in(settings, policy)
        return _sum([timed_step(_at(stand, step), batch) for step, batch in zip(rollouts.steps, batches, strict=True)])

    def theirs(compact: bool) -> dict[str, float]:
        peer.compact(compact)
        return _sum([peer.step(batch, size) for batch in rollouts.sequences])

    calls: dict[str, Callable[[], dict[str, float]]] = {
        "trl grpo": lambda: theirs(True),
        "our grpo": lambda: ours("grpo"),
        "our pact": lambda: ours("pact"),
    }
    if as_shipped:
        calls[SHIPPED] = lambda: theirs(False)
    return calls


def table(times: dict[str, list[dict[str, float]]], padded: dict[str, int]) -> list[dict[str, Any]]:
    """A row for each contestant: median seconds over the rounds, and tokens without and with padding."""
    return [
        {
            "step": name,
            **{part: statistics.median(row[part] for row in found) for part in ("score", "update", "total")},
            "tokens": int(found[0]["tokens"]),
            "with padding": int(padded.get(name, found[0].get("padded", 0))),
        }
        for name, found in times.items()
    ]


def ratios(times: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Median seconds of each contestant, and our times over TRL's with their spread over the rounds and their goals."""
    totals = {name: [row["total"] for row in found] for name, found in times.items()}
    ratio, spread = median_ratio(totals["our grpo"], totals["trl grpo"])
    pact_ratio, pact_spread = median_ratio(totals["our pact"], totals["trl grpo"])
    return {
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
    policy: MegatronPolicy,
    peer: Trainer,
    config: Config,
    groups: list[list[PromptGroup]],
    sequences: list[list[Sample]],
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
