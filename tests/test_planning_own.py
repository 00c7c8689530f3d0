"""The plan of an agent of the user's own: lengths are those of its tasks and traces, counted with its tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.config.load import load_config
from pact_nemo.config.recipes import recipe
from pact_nemo.data.tasks import build_environment, prompt_length
from pact_nemo.planning.from_config import expected_lengths, run_plan, step_work
from pact_nemo.planning.workload import Lengths, measured
from pact_nemo.preflight.lengths import read_lengths
from tools import plan as plan_tool

ROOT = Path(__file__).resolve().parents[1]
SHOP = [f"agent.tools={ROOT}/examples/shop/shop.py:Shop", f"tasks.path={ROOT}/examples/shop/tasks.jsonl"]
TRACES = f"traces.path={ROOT}/examples/shop/traces.jsonl"
PRESET = ROOT / "conf" / "pact_own-smollm2_135m-cpu.yaml"


def test_means_are_those_of_what_was_counted() -> None:
    found = measured([10, 30], [(8, 4), (16, 4)], limit=100)
    assert (found.prompt, found.response, found.trace, found.longest) == (20, 12, 12, 100)
    assert found.policy_share == pytest.approx(8 / 24) and found.traced == 1.0
    half = measured([10, 30], [(8, 4)], limit=6)  # a trace may be longer than a response can be
    assert (half.response, half.trace, half.traced) == (6, 8, 0.5)
    none = measured([10], [], limit=100)
    assert (none.response, none.trace, none.traced) == (50, 0, 0.0)


def test_a_prompt_without_a_trace_is_planned_as_anchored() -> None:
    config = load_config(PRESET, [*SHOP, TRACES, "objective.anchor_prob=0.25"])
    whole = step_work(config, Lengths(10, 10, 10))
    part = step_work(config, Lengths(10, 10, 10, traced=0.5))
    assert (whole.conditioned, part.conditioned) == (0.75, 0.375)
    assert part.mean_tree.tokens < whole.mean_tree.tokens


def test_lengths_are_measured_on_the_users_own_files(chat: ChatFormat) -> None:
    config = load_config(PRESET, [*SHOP, TRACES])
    said: list[str] = []
    found = read_lengths(config, said.append)
    rows = [json.loads(line) for line in (ROOT / "examples/shop/tasks.jsonl").read_text().splitlines()]
    assert found.source == f"measured on {len(rows) - 8} tasks and {len(rows) - 8} traces" and said
    environment = build_environment(config)
    try:
        lengths = [prompt_length(chat, task) for task in environment.tasks()]
    finally:
        environment.close()
    assert min(lengths) <= found.prompt <= max(lengths) and abs(found.prompt - fmean(lengths)) < 3
    assert 0 < found.policy_share < 1 and found.response == found.trace < config.traces.max_tokens
    assumed = expected_lengths(config)
    assert (assumed.prompt, assumed.trace) != (found.prompt, found.trace)
    assert run_plan(config, lengths=found).step != run_plan(config).step


@pytest.mark.parametrize(
    ("words", "says"),
    [([], ""), (["traces.path=x.jsonl"], "model.path=FOLDER")],
    ids=["no file", "no tokenizer"],
)
def test_where_nothing_can_be_counted_the_limits_are_taken_and_it_is_said(words: list[str], says: str) -> None:
    config = load_config(
        [ROOT / "conf" / "pact_own.yaml", recipe("qwen3_4b_4xh100_bf16")], ["agent.tools=x.py", *words]
    )
    said: list[str] = []
    assert read_lengths(config, said.append) == expected_lengths(config)
    assert says in "".join(said) and bool(said) == bool(says)


def test_the_tool_takes_the_words_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        code = plan_tool.main()
        return (code, *capsys.readouterr())

    code, out, err = run("--gpu", "H100", "--response-tokens", "200", *SHOP, TRACES)
    assert code == 0 and "response 200" in out and "response as said, the others measured on 32 tasks" in out
    code, out, _ = run("--recipe", "qwen3_4b_4xh100_bf16", *SHOP, TRACES)  # without environment=own
    assert code == 0 and "4 x H100" in out and "assumed from the limits" in out
    code, _, err = run("agent.tools=nowhere.py:Shop", *SHOP[1:], TRACES)
    assert code == 2 and "nowhere.py" in err
    code, _, err = run(SHOP[0], "tasks.path=nowhere.jsonl", TRACES)
    assert code == 2 and "nowhere.jsonl" in err
