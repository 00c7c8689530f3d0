"""What FP8 does to a real PACT step: every recipe, emulated, on the rollouts that a run dumped, against the same policy
without FP8.

    python tools/fp8_numerics.py --run runs/latest                     # step 0 of a finished run
    python tools/fp8_numerics.py --run runs/latest --step 3 --recipes tensorwise blockwise

Columns: mean and 99th percentile of |log-prob - log-prob without FP8| in nats over all scored tokens; the largest ratio
and the share of tokens outside the clip range [1 - 0.2, 1 + 0.2] if the old policy were scored without FP8 and updated
with it (what is avoided: scored alike, the ratios are exactly 1); the gradient's norm and its direction (cosine)
against those without FP8.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pact_nemo import checkout

checkout.enter(__file__)

from pact_nemo.batches.streams import Scores
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from pact_nemo.methods.registry import make_method
from pact_nemo.policy.config import FP8_RECIPES, PolicyConfig
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.policy.trees import TokenTree
from pact_nemo.runtime.terminal import command
from pact_nemo.training.collect import groups_of_step
from pact_nemo.training.open_run import open_run
from pact_nemo.training.update import cut, filled


def step_trees(config: Config, step: int) -> list[TokenTree]:
    """The trees of a dumped step's on-policy update, as the run cuts and weighs it, with all of the objective's terms
    but those that need a reference. Empty where that step scores no token.
    """
    with open_run(config, None) as run:
        run.state.step = step
        groups, _ = groups_of_step(run)
        parts = cut(run, groups)
        return [prompt.tree for prompt in filled(run, parts[0], Scores())] if parts else []


def measure(
    config: Config, policy_config: PolicyConfig, model: Path, trees: list[TokenTree]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Log-probs [S], gradient of the step and its norm under one precision."""
    policy = MegatronPolicy(policy_config, config.optimizer, model, seed=0, total_steps=1)
    loss = make_method(config).loss
    if policy_config.fp8 == "delayed":  # its scales come from an earlier pass
        policy.update(trees, loss, lr=0.0)
    logprobs = torch.cat(policy.logprobs(trees))
    result = policy.update(trees, loss, lr=0.0)
    gradient = torch.cat([parameter.main_grad.flatten() for parameter in policy.chunks[0].parameters()])
    del policy
    gc.collect()  # megatron's modules and buffers refer to each other
    return logprobs, gradient, result.grad_norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/latest", help="finished run folder with rollouts/ and hf/")
    parser.add_argument("--step", type=int, default=0, help="which dumped step")
    parser.add_argument("--model", help="HF folder to measure; default: the run's final weights")
    parser.add_argument("--prompts", type=int, help="only the first so many prompts of the step")
    parser.add_argument("--recipes", nargs="+", default=list(FP8_RECIPES), choices=FP8_RECIPES)
    parser.add_argument(
        "--bf16-layers", type=int, default=1, help="layers at each end that stay out of FP8 (delayed: 0)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    arguments = parser.parse_args()
    run = Path(arguments.run).resolve()
    model = Path(arguments.model) if arguments.model else run / "hf"
    with tempfile.TemporaryDirectory() as folder:
        words = [f"trainer.replay={run}", f"run.root={folder}", "objective.kl_coef=0", "trainer.dump_rollouts=false"]
        config = load_config(run / "config.yaml", words)
        trees = step_trees(config, arguments.step)[: arguments.prompts]
    if not trees:
        raise ConfigError(f"step {arguments.step} of {run} scores no token: take another --step")
    plain = measure(config, config.policy, model, trees)
    rows = []
    for recipe in arguments.recipes:
        settings = replace(
            config.policy,
            fp8=recipe,
            fp8_emulate=True,
            fp8_bf16_layers=0 if recipe == "delayed" else arguments.bf16_layers,
        )
        logprobs, gradient, norm = measure(config, settings, model, trees)
        error = (logprobs - plain[0]).abs()
        ratio = (logprobs - plain[0]).exp()
        outside = (ratio < 1 - config.objective.clip_low) | (ratio > 1 + config.objective.clip_high)
        rows.append(
            {
                "recipe": recipe,
                "mean_abs": error.mean().item(),
                "p99_abs": error.quantile(0.99).item(),
                "max_ratio": ratio.max().item(),
                "outside_clip": outside.float().mean().item(),
                "grad_norm_ratio": norm / plain[2],
                "grad_cosine": torch.nn.functional.cosine_similarity(gradient, plain[1], dim=0).item(),
            }
        )
    scored = f"{len(trees)} trees, {plain[0].numel():,} scored tokens, {config.policy.precision} without FP8"
    table = Table(title=f"{run.name}, step {arguments.step}: {scored}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4f}" for value in row.values()))
    Console(width=140).print(table)
    if arguments.json:
        print(json.dumps({"step": arguments.step, "scored_tokens": plain[0].numel(), "rows": rows}))


if __name__ == "__main__":
    command(main)
