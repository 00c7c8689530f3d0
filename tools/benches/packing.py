"""Packing: how much of the packed rows is real tokens, how even the ranks' work is, and what ragged lengths cost.

The first part only packs: the token trees of every dumped step of a run (or, without one, of the ragged synthetic step
below), for several data-parallel sizes and row multiples as TP, CP and FP8 ask for. ``real`` is the share of all rows'
tokens that belong to trees (empty rows of ranks with less count as padding), ``imbalance`` the tokens of the fullest
rank over the mean of the ranks, both over all steps. ``packing_us_per_token`` is what one rank spends on the plan and
on its own rows, a token of all ranks' trees.

The second part trains: updates of a policy on synthetic prompts whose responses vary in length by ``--spread``, and on
the same prompts with responses of their mean length, all else equal. ``ratio`` is the tokens per second of the first
over those of the second, of all tokens that go through the model; ``distinct_ratio`` leaves out prefixes that are
computed again because a tree was too large for a row.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pact_nemo.batches.prompt_groups import PromptGroup
from pact_nemo.batches.prompt_trees import contexts_needed, grow_tree
from pact_nemo.checkpoints.embedded import materialise_embedded_model
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.methods.registry import make_method
from pact_nemo.planning.workload import Lengths
from pact_nemo.policy.packing import plan_rows
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.policy.trees import TokenTree
from tools.benches.kit import (
    BOUNDARY,
    LlamaShape,
    interleaved,
    median_ratio,
    random_llama,
    recorded_groups,
    report,
    scratch,
    stand_in,
    synthetic_groups,
    timed_step,
)

GOAL, SHARE_GOAL = 0.9, 0.95
CONFIG = Path("conf/pact_bfcl-smollm2_135m-cpu.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=Path, help="finished run with rollouts/, whose steps are packed (default: a synthetic step)"
    )
    parser.add_argument("--steps", type=int, nargs="+", help="which dumped steps (default: all)")
    parser.add_argument("--data-parallel", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--multiples", type=int, nargs="+", default=[1, 8, 32], help="of row lengths: TP x 2 CP x what FP8 aligns to"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of the second part; 0 leaves it out")
    parser.add_argument("--prompts", type=int, default=6, help="of a synthetic step")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs=3,
        default=[290, 100, 110],
        metavar=("PROMPT", "RESPONSE", "TRACE"),
        help="synthetic, mean",
    )
    parser.add_argument(
        "--spread", type=float, default=0.9, help="responses vary evenly by this share of the mean to either side"
    )
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: the embedded SmolLM2-135M)")
    parser.add_argument(
        "--random", type=int, nargs=2, metavar=("LAYERS", "HIDDEN"), help="an untrained Llama of this shape instead"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the config")


def run(options: argparse.Namespace) -> int:
    # nothing to score beside the update
    config = load_config(
        options.run / "config.yaml" if options.run else CONFIG,
        [*options.set, "objective.kl_coef=0", "rollout.importance=off"],
    )
    config = replace(
        config, trainer=replace(config.trainer, batch_size=options.prompts, mini_batch_size=options.prompts)
    )
    with scratch(Path(config.run.cache_dir), "packing") as folder:
        model = _model(options, config, folder)
        batches = synthetic_batches(options, config, model)
        trees = (
            [trees_of(groups, config) for groups in _recorded(options)]
            if options.run
            else [trees_of(batches["ragged"], config)]
        )
        layouts = [
            layout(trees, config, ranks, multiple) for ranks in options.data_parallel for multiple in options.multiples
        ]
        speeds: dict[str, Any] = {}
        if options.rounds:
            shape = {name: layout([trees_of(groups, config)], config, 1, 1) for name, groups in batches.items()}
            speeds = speed_numbers(measure(config, model, batches, options.rounds), shape)
    packed = f"{len(trees)} steps of {options.run.resolve().name}" if options.run else "one synthetic step"
    title = f"{packed}, packed for data-parallel ranks and row multiples; rounds: {options.rounds}"
    result = {"packed": packed, **packing_numbers(layouts, options.data_parallel), **speeds}
    report(options, title, layouts, result)
    return 0


def synthetic_batches(options: argparse.Namespace, config: Config, model: Path) -> dict[str, list[PromptGroup]]:
    """``ragged``: responses of varying lengths; ``equal``: all of their mean length."""
    vocabulary = int(json.loads((model / "config.json").read_text())["vocab_size"])
    prompt, response, trace = options.lengths

    def batch(mean: int, spread: float) -> list[PromptGroup]:
        return synthetic_groups(
            config, Lengths(prompt, mean, trace), options.prompts, vocabulary=vocabulary, spread=spread
        )

    ragged = batch(response, options.spread)
    mean = round(statistics.mean(len(r.token_ids) for group in ragged for r in group.rollouts))
    return {"ragged": ragged, "equal": batch(mean, 0.0)}


def measure(config: Config, model: Path, batches: dict[str, list[PromptGroup]], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of an update of each batch, in each round."""
    policy = MegatronPolicy(config.policy, replace(config.optimizer, lr=0.0), model, seed=0, total_steps=1)
    stand = stand_in(config, policy)

    def speed(name: str) -> float:
        times = timed_step(stand, batches[name])
        return times["tokens"] / times["update"]

    return interleaved(rounds, {name: lambda name=name: speed(name) for name in batches})  # type: ignore[misc]


def packing_numbers(layouts: list[dict[str, Any]], data_parallel: list[int]) -> dict[str, Any]:
    """Of all layouts, the worst; fill and repeated prefixes are of the first."""
    return {
        "real_token_share": min(row["real"] for row in layouts),
        "real_token_share_goal": f">= {SHARE_GOAL}",
        "row_fill": layouts[0]["fill"],
        "packing_us_per_token": max(row["microseconds"] for row in layouts),
        "repeated_share": layouts[0]["repeated"],
        "imbalance": {
            str(ranks): max(row["imbalance"] for row in layouts if row["ranks"] == ranks) for ranks in data_parallel
        },
    }


def speed_numbers(speeds: dict[str, list[float]], shape: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Speeds of ragged and equal lengths, their ratio and its goal; ``shape`` has each batch's layout on one rank."""
    ratio, spread = median_ratio(speeds["ragged"], speeds["equal"])
    distinct = {name: 1 - row["repeated"] for name, row in shape.items()}
    return {
        **{f"{name}_tokens_per_s": statistics.median(found) for name, found in speeds.items()},
        **{f"{name}_rows": row["rows"] for name, row in shape.items()},
        "distinct_ratio": ratio * distinct["ragged"] / distinct["equal"],
        "spread": spread,
        "ratio": ratio,
        "goal": f">= {GOAL}",
    }


def _recorded(options: argparse.Namespace) -> list[list[PromptGroup]]:
    steps = options.steps or sorted(
        int(path.stem.split("_")[-1]) for path in (options.run / "rollouts").glob("*_*.jsonl*")
    )
    return recorded_groups(options.run, steps, words=options.set)[1]


def _model(options: argparse.Namespace, config: Config, folder: Path) -> Path:
    if options.random is not None:
        layers, hidden = options.random
        heads = max(1, hidden // 64)
        size = LlamaShape(hidden, 3 * hidden, layers, heads=heads, kv_heads=heads, vocabulary=4096, tied=True)
        return random_llama(folder / "model", size)
    return options.model if options.model is not None else materialise_embedded_model(config.run.cache_dir)


def trees_of(groups: list[PromptGroup], config: Config) -> list[TokenTree]:
    """The trees of one update, without streams."""
    method = make_method(config)
    return [
        grow_tree(group, [5] * BOUNDARY, method, contexts=contexts_needed(group, method, diagnostics=True)).tree
        for group in groups
    ]


def layout(steps: list[list[TokenTree]], config: Config, ranks: int, multiple: int) -> dict[str, Any]:
    """Counts over all steps of one layout's rows.

    Returns:
        ``rows`` and ``empty`` rows of all ranks; ``bound``: rows that no packing of the ranks' tokens can do without;
        ``real`` tokens over all tokens of rows; ``fill``: real tokens over the budget of rows that aren't empty;
        ``repeated``: tokens of prefixes that cut trees compute again, over real tokens; ``imbalance`` and ``worst``
        step's imbalance: the fullest rank's tokens over the ranks' mean; ``microseconds`` of one rank's packing a token
        of all ranks.
    """
    budget = config.policy.micro_batch_tokens
    rows = empty = bound = used = total = distinct = 0
    fullest, means, worst, seconds = 0.0, 0.0, 1.0, 0.0
    for trees in steps:
        started = time.perf_counter()
        plan = plan_rows(trees, budget, share_prefix=config.policy.share_prefix, data_parallel=ranks, multiple=multiple)
        own = plan.build(0)
        seconds += time.perf_counter() - started
        packed = [own, *(plan.build(rank) for rank in range(1, ranks))]
        loads = [sum(row.tokens.shape[0] for row in rank) for rank in packed]
        rows += sum(map(len, packed))
        empty += sum(row.used == 0 for rank in packed for row in rank)
        bound += sum(max(1, math.ceil(sum(row.used for row in rank) / budget)) for rank in packed)
        used += sum(row.used for rank in packed for row in rank)
        total += sum(loads)
        distinct += sum(tree.num_tokens for tree in trees if tree.num_scored)
        fullest, means, worst = (
            fullest + max(loads),
            means + sum(loads) / ranks,
            max(worst, max(loads) * ranks / sum(loads)),
        )
    return {
        "ranks": ranks,
        "multiple": multiple,
        "rows": rows,
        "empty": empty,
        "bound": bound,
        "real": used / total,
        "fill": used / (budget * max(rows - empty, 1)),
        "repeated": 1 - distinct / used,
        "imbalance": fullest / means,
        "worst": worst,
        "microseconds": 1e6 * seconds / used,
    }
