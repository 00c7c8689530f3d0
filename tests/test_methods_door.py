"""The door for methods: the page's example works as it stands, every method keeps the contract of the loss, and one
that can't be used is refused by name before anything starts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pact_nemo.config.load import load_config
from pact_nemo.config.schema import ObjectiveConfig, to_yaml
from pact_nemo.errors import ConfigError
from pact_nemo.methods.base import Method
from pact_nemo.methods.registry import METHODS, make_method, method_class
from pact_nemo.objective.components import CALL, REASONING
from pact_nemo.objective.loss import STREAMS
from pact_nemo.planning.from_config import describe_plan
from pact_nemo.planning.workload import Lengths
from pact_nemo.policy.config import OptimizerConfig
from pact_nemo.policy.policy import MegatronPolicy
from pact_nemo.training.stopwatch import Stopwatch
from pact_nemo.training.update import update
from tests.workers.policy_kit import VOCAB, make_chat_model
from tests.workers.scripted import write_replay
from tools.benches.kit import stand_in, synthetic_groups

REPO = Path(__file__).resolve().parents[1]


def programs(page: str) -> list[str]:
    """The programs of a page of docs/extend, as they stand."""
    text = (REPO / "docs" / "extend" / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


(EXAMPLE,) = programs("method.md")


@pytest.fixture(scope="module")
def cispo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's file."""
    path = tmp_path_factory.mktemp("outside") / "cispo.py"
    path.write_text(EXAMPLE, encoding="utf-8")
    return path


def test_the_pages_example_is_short() -> None:
    assert len(EXAMPLE.splitlines()) <= 60


@pytest.mark.parametrize("rank", [0, pytest.param(8, marks=pytest.mark.slow)])
def test_method_environment_and_logger_of_the_pages_share_a_replayed_run(
    cispo: Path, tmp_path: Path, rank: int
) -> None:
    """Nothing of the three is in the repository: each is a file beside the command."""
    (cispo.parent / "shop.py").write_text(programs("environment.md")[0], encoding="utf-8")
    (cispo.parent / "my_tracker.py").write_text(programs("logger.md")[0], encoding="utf-8")
    model = make_chat_model(tmp_path / "model")
    words = [
        f"model.path={model}",
        "warmup.steps=0",
        f"policy.lora.rank={rank}",
        "trainer.steps=2",
        "trainer.batch_size=2",
        "trainer.mini_batch_size=1",
        "tasks.max_train=6",
        "tasks.held_out=4",
        f"run.root={tmp_path / 'runs'}",
    ]
    preset = REPO / "conf" / "pact-smollm2_135m-cpu.yaml"
    there = load_config(preset, [f"environment={cispo.parent / 'shop.py'}:Shop", *words])
    write_replay(there, model, tmp_path / "replay", 2)
    mine = [
        "environment=shop.py:Shop",
        "method=cispo.py:Cispo",
        "method_config.ceiling=1.5",
        "tracking.trackers={'my_tracker.py:CsvTracker': {only: loss/}}",
        f"trainer.replay={tmp_path / 'replay'}",
    ]
    done = subprocess.run(
        [sys.executable, str(REPO / "recipes" / "pact.py"), *words, *mine],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=cispo.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    (summary,) = (tmp_path / "runs").glob("*-Cispo-seed1234-1/summary.json")
    run = summary.parent
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("rl", 1), ("rl", 2)]
    assert any(row["policy/grad_norm"] > 0 for row in rows) and all(row["gate/anchored"] == 1.0 for row in rows)
    assert "method: cispo.py:Cispo\nmethod_config:\n  ceiling: 1.5\n" in (run / "config.yaml").read_text()
    assert json.loads(summary.read_text())["method"] == "Cispo"
    assert "environment: shop.py:Shop\n" in (run / "config.yaml").read_text()
    curves = [line.split(",") for line in (run / "curves.csv").read_text().splitlines()]
    drawn = {(key, int(step)): float(value) for key, step, value in curves[1:] if key == "loss/total"}
    assert drawn == {("loss/total", row["step"]): row["loss/total"] for row in rows}


def test_the_pages_surrogate_is_cispos(cispo: Path) -> None:
    method = make_method(load_config(None, [f"method={cispo}:Cispo", "method_config.ceiling=2.0"]))
    logprobs = torch.tensor([-1.0, -0.2, -3.0, -0.5], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.2, -2.0, -3.0, -0.1], dtype=torch.float64)
    advantages = torch.tensor([1.0, 0.5, -2.0, 1.5], dtype=torch.float64)
    loss, stopped = method.surrogate(logprobs, old, advantages)
    ratio = np.exp([0.2, 1.8, 0.0, -0.4])
    weight = np.minimum(ratio, 2.0)
    np.testing.assert_allclose(loss.detach(), -weight * advantages.numpy() * logprobs.detach().numpy(), rtol=1e-12)
    loss.sum().backward()
    np.testing.assert_allclose(logprobs.grad, -weight * advantages.numpy(), rtol=1e-12)  # also of what is cut off
    assert stopped.tolist() == [False, True, False, False]


def test_a_saved_run_with_a_method_from_outside_is_read_again(cispo: Path, tmp_path: Path) -> None:
    config = load_config(None, [f"method={cispo}:Cispo", "method_config.ceiling=2"])
    assert (config.objective.kl_coef, config.objective.aggregation) == (0.0, "token-mean")
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml") == config
    again = load_config(tmp_path / "saved.yaml", ["method=pact"])
    assert again.objective.kl_coef == ObjectiveConfig().kl_coef  # the other method's defaults and settings are gone
    assert f"method {cispo}:Cispo" in describe_plan(config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=ppo"], "method='ppo'.*pact, matchtir"),
        (["method=no_such_module_here:Thing"], "no_such_module_here can't be imported"),
        (
            ["method=no_such_file.py:Thing"],
            "no_such_file.py can't be imported.*relative path starts at the working folder",
        ),
        (["method={file}:Missing"], "has no Missing"),
        (["method={file}:CispoConfig"], "no subclass"),
        (["method={file}:Cispo", "method_config.floor=1"], r"method_config.*floor.*ceiling"),
        (["method={file}:Cispo", "method_config.ceiling=0.5"], "method_config.*ceiling=0.5"),
        (["method={file}:Cispo", "method_config.ceiling=high"], "method_config.ceiling"),
        (["method=grpo", "method_config.mu_start=0.5"], "method_config.*mu_start.*settings of method=grpo: none"),
        (["objective.method=grpo"], "objective.method is now method"),
        (["method=chord", "objective.mu_start=0.5"], "objective.mu_start is now method_config.mu_start"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(cispo: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, [word.replace("{file}", str(cispo)) for word in words])


def test_code_that_breaks_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('not today')\n")
    with pytest.raises(ConfigError, match="broken.py can't be imported: RuntimeError: not today"):
        load_config(None, [f"method={tmp_path / 'broken.py'}:X"])
    (tmp_path / "odd.py").write_text(
        "from pact_nemo.methods.base import Method\n\n\nclass Odd(Method):\n    defaults = {'no_such_setting': 1}\n"
    )
    with pytest.raises(ConfigError, match="no_such_setting"):
        load_config(None, [f"method={tmp_path / 'odd.py'}:Odd"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "def surrogate(self, logprobs): ...",
            r"Odd.surrogate\(self, logprobs\) can't be called like Method.surrogate",
        ),
        ("def trace_streams(self, component, weights): ...", "Odd.trace_streams.*can't be called like"),
        ("def surogate(self, a, b, c): ...", "Odd.surogate overrides nothing; is surrogate meant"),
        ("default = {}", "Odd.default overrides nothing; is defaults meant"),
    ],
)
def test_what_overrides_nothing_or_cannot_be_called_is_named(tmp_path: Path, body: str, said: str) -> None:
    file = tmp_path / "odd.py"
    file.write_text(f"from pact_nemo.methods.base import Method\n\n\nclass Odd(Method):\n    {body}\n")
    with pytest.raises(ConfigError, match=said):
        load_config(None, [f"method={file}:Odd"])


def built(name: str, **objective: object) -> Method:
    words = ["trainer.steps=0", "warmup.steps=1"] if name == "sft" else []
    return make_method(
        load_config(None, [f"method={name}", *words, *(f"objective.{k}={v}" for k, v in objective.items())])
    )


@pytest.mark.parametrize("name", [*METHODS, "outside"])
def test_a_method_keeps_the_contract_of_the_loss(name: str, cispo: Path) -> None:
    """Sums over tokens: any split adds up; tokens without a weight have value and gradient 0, whatever they hold."""
    method = built(f"{cispo}:Cispo" if name == "outside" else name)
    generator = torch.Generator().manual_seed(3)
    size = 24
    names = (*STREAMS, *(term.stream for term in method.terms))
    streams = {key: torch.rand(size, generator=generator, dtype=torch.float64) for key in names}
    streams["old_logprobs"] = -3.0 * torch.rand(size, generator=generator, dtype=torch.float64)
    logprobs = -3.0 * torch.rand(size, generator=generator, dtype=torch.float64)
    unused = torch.arange(size) % 4 == 0
    for key in names:
        if key.startswith("w_"):
            streams[key] = streams[key].masked_fill(unused, 0.0)

    def loss_of(part: slice, values: torch.Tensor) -> torch.Tensor:
        return method.loss(values[part], {key: stream[part] for key, stream in streams.items()})[0]

    leaf = logprobs.clone().requires_grad_()
    whole = loss_of(slice(None), leaf)
    whole.backward()
    assert float(whole.detach()) == pytest.approx(
        float(loss_of(slice(0, 10), logprobs) + loss_of(slice(10, size), logprobs)), rel=1e-12
    )
    assert leaf.grad is not None and not leaf.grad[unused].any() and leaf.grad[~unused].any()
    wild = logprobs.masked_fill(unused, float("nan"))
    assert float(loss_of(slice(None), wild)) == pytest.approx(float(whole.detach()), rel=1e-12)
    empty, metrics = method.loss(logprobs[:0].requires_grad_(), {key: value[:0] for key, value in streams.items()})
    assert float(empty.detach()) == 0.0 and empty.requires_grad and all(float(v) == 0.0 for v in metrics.values())


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_keeps_the_contract_of_its_pieces(name: str) -> None:
    found, method = method_class(name), built(name)
    assert found.source and isinstance(method.config, found.Config)
    coefficients = method.coefficients(3)
    assert coefficients.rl >= 0.0 and coefficients.sft >= 0.0
    rewards = [np.array([0.5, 1.0]), np.array([0.0]), np.array([0.25, 0.0, 0.0])]
    for traced in (False, True):
        advantages, of_trace = method.advantages(rewards, [True, True, False], traced=traced)
        assert [a.shape for a in advantages] == [r.shape for r in rewards] and not advantages[2].any()
        assert (of_trace != 0.0) == (traced and method.trace_is_sample)
    component, weights = np.array([REASONING, CALL, REASONING]), np.array([0.1, 0.2, 0.3])
    own = method.trace_streams(component, weights, sample_weight=0.5, advantage=0.7)
    assert set(own) <= {*STREAMS, *(term.stream for term in method.terms)}
    for key, values in own.items():
        if key.startswith("w_sft"):
            assert np.all(np.asarray(values) <= weights)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sft"])
def test_the_first_step_of_adapters_is_a_methods_step_of_all_weights(name: str, models: Callable[[str], Path]) -> None:
    """B is 0, so every term has the base's value. The update moves each B and nothing of the base."""
    terms: list[dict[str, float]] = []
    for rank in (0, 8):
        words = [f"method={name}", f"policy.lora.rank={rank}", "policy.precision=fp32", "objective.group_size=3"]
        config = load_config(None, [*words, "trainer.batch_size=4", "trainer.mini_batch_size=4"])
        policy = MegatronPolicy(config.policy, OptimizerConfig(lr=1e-3), models("llama"), seed=1, total_steps=4)
        if config.objective.kl_coef:
            policy.load_reference(models("llama"))
        run = stand_in(config, policy)
        before = {key: value.detach().clone() for key, value in policy.chunks[0].named_parameters()}
        groups = synthetic_groups(config, Lengths(12, 18, 9), 4, vocabulary=VOCAB, seed=3, spread=0.8)
        for group in groups:  # the tokens are random, and some methods' rewards of them all alike
            for advantages, value in zip(group.advantages, (-1.0, 0.25, 0.75), strict=True):
                advantages[:] = value
        record = update(run, groups, Stopwatch(run.progress))
        assert record["policy/grad_norm"] > 0
        assert any(key.startswith("anneal/") for key in record) == (name == "pact"), "only it has the schedule"
        terms.append({key: value for key, value in record.items() if key.startswith(("loss/", "latent/"))})
        moved = {key for key, value in policy.chunks[0].named_parameters() if not torch.equal(value, before[key])}
        assert moved == {key for key in before if not rank or ".adapter.linear_out." in key}
    assert terms[0] == terms[1] and any(terms[0].values())
