"""The benches: turns in their rounds, their ratios, what they hand to a peer, and one that runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pact_nemo.batches.prompt_trees import PROMPT_ONLY, grow_tree
from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import recipe
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from pact_nemo.methods.registry import make_method
from pact_nemo.planning.from_config import run_plan
from pact_nemo.planning.workload import Lengths
from pact_nemo.policy.packing import plan_rows
from pact_nemo.policy.trees import Segment, TokenTree
from tools.benches import kit, packing, peak, trl_peer, trl_trainer

REPO = Path(__file__).resolve().parents[1]


def test_no_contestant_is_always_first_and_warm_up_rounds_are_dropped() -> None:
    calls: list[str] = []

    def contestant(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = kit.interleaved(3, {name: lambda name=name: contestant(name) for name in "abc"}, warm_up=1)  # type: ignore[misc]
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert found == {"a": [6, 8, 10], "b": [4, 9, 11], "c": [5, 7, 12]}


def test_rounds_without_warm_up() -> None:
    assert kit.interleaved(2, {"a": lambda: 1, "b": lambda: 2}, warm_up=0) == {"a": [1, 1], "b": [2, 2]}


def test_the_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    # a slow second round slows both, and leaves the ratio alone
    assert kit.median_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 2.0]) == (0.5, [0.5, 1.5])
    with pytest.raises(ValueError):
        kit.median_ratio([1.0], [1.0, 2.0])


def tree(*lengths: int) -> TokenTree:
    """A root of the first length with one scored leaf of each other length."""
    root, *leaves = lengths
    return TokenTree(
        [Segment([1] * root, -1, [False] * root), *(Segment([2] * size, 0, [True] * size) for size in leaves)]
    )


def test_a_layout_counts_padding_empty_rows_and_repeated_prefixes() -> None:
    config = load_config(None, ["policy.micro_batch_tokens=32"])
    # one step: 20 tokens on one rank, 10 + 10 on the other: two rows of 20 padded to 24
    even = packing.layout([[tree(4, 16), tree(2, 8), tree(3, 7)]], config, 2, 8)
    assert (even["rows"], even["empty"], even["bound"], even["imbalance"]) == (2, 0, 2, 1.0)
    assert even["real"] == 40 / 48 and even["fill"] == 40 / 64 and even["repeated"] == 0.0
    # 24 + 2 x 4 tokens are the budget; with 24 + 2 x 8 the prefix is computed twice, and the third rank has an empty
    # row of 8
    cut = packing.layout([[tree(24, 8, 8)]], config, 3, 8)
    assert (cut["rows"], cut["empty"]) == (3, 1)
    assert cut["repeated"] == 24 / 64 and cut["real"] == 64 / 72 and cut["worst"] == pytest.approx(32 * 3 / 72)


def test_a_peer_gets_the_tokens_that_our_step_scores_with_their_turns_advantages() -> None:
    config = load_config(REPO / packing.CONFIG, ["method=grpo"])
    groups = kit.synthetic_groups(config, Lengths(12, 20, 0), 2, vocabulary=100, spread=0.5)
    groups[0].rollouts[1].status = "failed"
    samples = trl_peer.sequences_of(groups, config)
    assert len(samples) == 2 * config.objective.group_size - 1
    trees = [grow_tree(group, [], make_method(config), contexts=(PROMPT_ONLY,)).tree for group in groups]
    scored = [
        token for t in trees for s in t.segments for token, flag in zip(s.token_ids, s.scored, strict=True) if flag
    ]
    assert [token for s in samples for token, flag in zip(s.completion, s.mask, strict=True) if flag] == scored
    last = samples[-1]
    assert [value for value, flag in zip(last.advantages, last.mask, strict=True) if not flag] == [
        0.0
    ] * last.mask.count(0)
    assert last.advantages[0] == groups[1].advantages[-1][0] and last.advantages[-1] == groups[1].advantages[-1][1]


def test_without_trl_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install --no-deps --target .* trl==") as caught:
        trl_trainer.Trainer(tmp_path, tmp_path, Config(), tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_the_operations_of_a_linear_layer_and_the_head_are_counted() -> None:
    left, right, own = torch.randn(4, 5), torch.randn(5, 6), torch.zeros(4, 6)
    with peak.counter() as found:
        torch.nn.functional.linear(left, right.t())
        own.addmm_(left, right)
    assert found.get_total_flops() == 2 * (2 * 4 * 5 * 6)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 64])
def test_packing_costs_a_fiftieth_of_the_70b_recipes_update(ranks: int) -> None:
    """One rank's CPU seconds for the mini-batch of an update, the growing of its trees included. (In plain Python, with
    the rows of all ranks: 3.9 and 12 s, of an update of 42.)
    """
    chosen = load_config([REPO / "conf" / "pact_bfcl.yaml", recipe("llama3p1_70b_64xh100_bf16")])
    planned = run_plan(chosen)
    groups = kit.synthetic_groups(chosen, Lengths(4200, 2875, 2875), chosen.trainer.mini_batch_size, vocabulary=4096)
    started = time.process_time()
    trees = packing.trees_of(groups, chosen)
    plan_rows(trees, chosen.policy.micro_batch_tokens, data_parallel=ranks, multiple=8).build(0)
    assert time.process_time() - started < 0.02 * planned.phases["update"] / planned.work.updates
    assert sum(tree.num_tokens for tree in trees) > 1_000_000


def test_packing_runs_on_synthetic_prompts_and_ends_with_one_object(tmp_path: Path) -> None:
    words = [
        "--rounds",
        "1",
        "--prompts",
        "2",
        "--random",
        "2",
        "64",
        "--lengths",
        "24",
        "16",
        "16",
        "--data-parallel",
        "1",
        "4",
    ]
    settings = ["policy.micro_batch_tokens=256", f"run.cache_dir={tmp_path}"]
    command = [
        sys.executable,
        "tools/bench.py",
        "packing",
        "--json",
        "--multiples",
        "1",
        "8",
        *words,
        "--set",
        *settings,
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ratio"] == pytest.approx(result["ragged_tokens_per_s"] / result["equal_tokens_per_s"])
    assert [(row["ranks"], row["multiple"]) for row in result["rows"]] == [(1, 1), (1, 8), (4, 1), (4, 8)]
    assert result["rows"][0]["real"] == 1.0 and result["real_token_share"] == min(row["real"] for row in result["rows"])
    assert not list(tmp_path.iterdir())  # its model is gone
