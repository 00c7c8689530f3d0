"""One schema, one home of each default, and errors that name the key."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config, open_episodes, settled, steps_of, to_yaml
from pact_nemo.data.tasks import check_batches, prompts_of_step
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.methods.registry import METHODS, method_class
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.tracking import run_folder as workspace

CONF = Path(__file__).resolve().parents[1] / "conf"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_resolves_and_round_trips(path: Path, tmp_path: Path) -> None:
    own_rows = "_ftrl" in path.name or "_toolhop" in path.name  # the user brings the rows of these benchmarks
    config = load_config(path, ["tasks.path=rows.jsonl"] if own_rows else [])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved) == config


@pytest.mark.parametrize("path", sorted((CONF / "ablations").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_ablation_changes_the_run_it_is_laid_over_by_what_it_says(path: Path) -> None:
    base_file = CONF / "pact_bfcl-smollm2_135m-cpu.yaml"
    base, ablated = to_yaml(load_config(base_file)).split("\n"), to_yaml(load_config([base_file, path])).split("\n")
    said = [
        line.split("#")[0].strip() for line in path.read_text().split("\n") if line.strip() and not line.startswith("#")
    ]
    changed = [line.strip() for line in ablated if line not in base]
    assert len(changed) <= len(said)
    if path.stem not in (
        "table4-reasoning_segment",
        "table6-call_scale",
        "figure4-q_0.4",
    ):  # the paper's own choice is the default
        assert ablated != base


def test_a_benchmark_without_its_rows_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="tasks.path=FILE"):
        load_config(CONF / "pact_ftrl.yaml")


def test_shipped_configs_open_with_their_launch_command() -> None:
    for path in CONF.glob("*.yaml"):
        assert ("tools/evaluate.py" if path.name.startswith("eval_") else "recipes/") in path.read_text().split(
            "\nrun:"
        )[0], path


def test_defaults_are_the_papers_settings() -> None:
    config = Config()
    o, t = config.objective, config.trainer
    assert (o.group_size, o.sft_coef, o.anchor_prob, o.kl_coef) == (8, 0.1, 0.4, 0.001)
    assert (o.schedule.call_start, o.schedule.call_end, o.schedule.reasoning_scale) == (0.8, 0.2, 1.0)
    assert (t.batch_size, t.mini_batch_size, t.steps) == (256, 32, 24)
    assert (config.rollout.sampling.temperature, config.rollout.sampling.max_turns_per_user_turn) == (1.0, 10)


def test_overrides_win_over_yaml_and_parents_lose_to_children(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text("trainer: {steps: 3, batch_size: 64}\n")
    (tmp_path / "child.yaml").write_text("defaults: [parent.yaml]\ntrainer: {steps: 4}\n")
    config = load_config(tmp_path / "child.yaml", ["trainer.mini_batch_size=16"])
    assert (config.trainer.steps, config.trainer.batch_size, config.trainer.mini_batch_size) == (4, 64, 16)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trainer.stepz=5"], "stepz"),
        (["trainer.steps=many"], "trainer.steps"),
        (["method=ppo"], "method"),
        (["objective.anchor_prob=1.5"], "objective.anchor_prob"),
        (["objective.group_size=1"], "objective.group_size"),
        (["trainer.mini_batch_size=7"], "trainer.mini_batch_size"),
        (["diagnostics.gradient_every=2", "trainer.mini_batch_size=1"], "gradient_every=2 compares two halves"),
        (["traces.components=[answers]"], "traces.components"),
        (["environment_config.max_calls=2"], "environment_config.max_calls only"),
        (["environment_config.window=half"], "environment_config.window"),
        (["tasks.path=rows.json"], "tasks.path=rows.json: environment=bfcl reads no file"),
        (["tasks.max_observation_chars=0"], "tasks.max_observation_chars"),
        (["rollout.sampling.top_p=0.9"], "top_p"),
        (["rollout.sampling.top_p=0.9", "rollout.importance=off"], "top_p"),
        (["rollout.sampling.temperature=0"], "rollout.sampling.temperature"),
        (["rollout.sampling.temperature=-0.5"], "rollout.sampling.temperature"),
        (["objective.dual_clip=1.1"], "objective.dual_clip"),
        (["objective.advantage_std_floor=-1"], "objective.advantage_std_floor"),
        (["objective.advantage_std=false", "objective.advantage_std_floor=0.1"], "objective.advantage_std"),
        (["objective.entropy_coef=-0.1"], "objective.entropy_coef"),
        (["method=chord", "method_config.mu_schedule=step"], "method_config"),
        (["objective.sft_aggregation=sum"], "objective.sft_aggregation"),
        (["objective.constant_length=0"], "objective.constant_length"),
        (["objective.schedule.call=segment"], "objective.schedule.call"),
        (["trainer.steps"], "trainer.steps"),
        (["trainer.steps=5", "trainer.epochs=3"], "trainer.steps=5 and trainer.epochs=3"),
        (["trainer.steps=null"], "trainer.steps=null and trainer.epochs=null"),
        (["trainer.epochs=0"], "trainer.epochs=0"),
        (["trainer.steps=null", "trainer.epochs=1", "method=sft", "warmup.steps=1"], "trainer.steps=None"),
        (["objective.outcome=answer_f1"], "objective.outcome=answer_f1: environment=bfcl has no reference answers"),
        (
            ["environment=ftrl", "environment_config.answer_rule=maybe"],
            "environment_config.answer_rule",
        ),
        (["environment=toolhop", "environment_config.scenario=other"], "environment_config.scenario"),
    ],
)
def test_a_bad_setting_is_refused_by_name(words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(None, words)


def test_epochs_or_steps_say_how_long_a_run_is(tmp_path: Path) -> None:
    assert (load_config(None).trainer.steps, load_config(None).trainer.epochs) == (24, None)
    for words in (["trainer.epochs=3"], ["trainer.steps=null", "trainer.epochs=3"]):
        config = load_config(None, words)
        assert (config.trainer.steps, config.trainer.epochs) == (None, 3)
        saved = tmp_path / "config.yaml"
        saved.write_text(to_yaml(config))
        assert load_config(saved) == config
    (tmp_path / "steps.yaml").write_text("trainer: {steps: 10}\n")
    (tmp_path / "epochs.yaml").write_text("defaults: [steps.yaml]\ntrainer: {epochs: 2}\n")
    for files, words in (([tmp_path / "steps.yaml"], ["trainer.epochs=2"]), ([tmp_path / "epochs.yaml"], [])):
        with pytest.raises(ConfigError, match="trainer.steps=10 and trainer.epochs=2: .* set the other one to null"):
            load_config(files, words)
    assert load_config(tmp_path / "epochs.yaml", ["trainer.steps=null"]).trainer.epochs == 2


def test_an_epoch_is_the_batches_it_fills() -> None:
    paper = load_config(None, ["trainer.epochs=3"])
    assert (
        steps_of(paper, 2215) == 24 == steps_of(load_config(None), 7)
    )  # the paper: about 2.2k prompts, 24 steps, 3 epochs
    for tasks, batch, epochs in ((12, 4, 1), (13, 4, 2), (15, 4, 3), (4, 4, 5)):
        config = load_config(
            None, [f"trainer.epochs={epochs}", f"trainer.batch_size={batch}", f"trainer.mini_batch_size={batch}"]
        )
        names: list[Any] = list(range(tasks))
        steps = steps_of(config, tasks)
        seen = Counter(task for step in range(steps) for task in prompts_of_step(names, step, batch, 1))
        assert max(seen.values()) <= epochs and sum(seen.values()) == epochs * batch * (tasks // batch)
        once_more = Counter(seen) + Counter(
            task for step in range(steps, steps + tasks // batch) for task in prompts_of_step(names, step, batch, 1)
        )
        assert max(once_more.values()) == epochs + 1
        resolved = settled(config, tasks)
        assert (resolved.trainer.steps, resolved.trainer.epochs) == (steps, None) and settled(resolved, 1) is resolved
        assert config.trainer.steps is None
    with pytest.raises(
        ConfigError, match="trainer.epochs=3: 255 training tasks fill no batch of trainer.batch_size=256"
    ):
        steps_of(paper, 255)


def test_naming_a_method_brings_its_own_defaults_and_what_is_said_beside_it_wins(tmp_path: Path) -> None:
    plain = load_config()
    luffy = load_config(None, ["method=luffy"]).objective
    assert {name: getattr(luffy, name) for name in method_class("luffy").defaults} == method_class("luffy").defaults
    assert (plain.objective.clip, plain.objective.kl_coef, plain.objective.aggregation) == (True, 0.001, "rollout-mean")
    for words in (
        ["objective.kl_coef=0.5", "method=luffy"],
        ["method=luffy", "objective.kl_coef=0.5"],
    ):
        assert load_config(None, words).objective.kl_coef == 0.5  # the order of words says nothing
    parent = tmp_path / "parent.yaml"
    parent.write_text("objective: {kl_coef: 0.25}\n")
    child = tmp_path / "child.yaml"
    child.write_text("defaults: [parent.yaml]\nmethod: luffy\n")
    assert load_config(child).objective.kl_coef == 0.25 and load_config(child).objective.clip is False
    # a finished run's file, whose every setting is spelled out, trained with another method: that method's defaults,
    # not the old one's
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(load_config(child)))
    assert load_config(saved) == load_config(child) == load_config(saved, ["method=luffy"])
    assert load_config(saved, ["method=pact"]).objective == dataclasses.replace(plain.objective, kl_coef=0.001)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_default_of_a_method_is_a_setting_that_passes_validation(method: str) -> None:
    words = [f"method={method}", *(["trainer.steps=0", "warmup.steps=1"] if method == "sft" else [])]
    objective = load_config(None, words).objective
    assert {name: getattr(objective, name) for name in method_class(method).defaults} == method_class(method).defaults


def test_missing_file_list_file_and_circle(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "a.yaml").write_text("defaults: [a.yaml]\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "a.yaml")


def test_replay_from_latest_means_the_run_that_was_the_latest(tmp_path: Path) -> None:
    first = workspace.create(load_config(None, [f"run.root={tmp_path}"]))
    again = load_config(None, [f"run.root={tmp_path}", f"trainer.replay={tmp_path / 'latest'}"])
    second = workspace.create(again)
    assert (tmp_path / "latest").resolve() == second.folder.resolve()
    assert again.trainer.replay == str(first.folder.resolve()) != str(second.folder.resolve())
    assert load_config(second.config).trainer.replay == again.trainer.replay


def test_rollouts_that_were_sampled_at_another_temperature_are_not_replayed(tmp_path: Path) -> None:
    first = workspace.create(load_config(None, [f"run.root={tmp_path}", "rollout.sampling.temperature=0.7"]))
    workspace.check_replay(load_config(None, [f"trainer.replay={first.folder}", "rollout.sampling.temperature=0.7"]))
    with pytest.raises(ConfigError, match="rollout.sampling.temperature=0.7"):
        workspace.check_replay(load_config(None, [f"trainer.replay={first.folder}"]))
    workspace.check_replay(
        load_config(None, [f"trainer.replay={tmp_path / 'made_elsewhere'}"])
    )  # dumps without a config say nothing of it


@pytest.mark.parametrize(
    "word",
    ["--generation-config=auto", "--override_generation_config", "--logprobs-mode=raw_logprobs", "--hf-overrides"],
)
def test_words_that_change_what_the_server_samples_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="rollout.server.extra_args"):
        load_config(None, [f"rollout.server.extra_args=['{word}']"])
    assert load_config(None, ["rollout.server.extra_args=['--max-num-seqs=2']"]).rollout.server.extra_args == [
        "--max-num-seqs=2"
    ]


@pytest.mark.parametrize(
    ("words", "episodes"),
    [
        ([], 80),
        (["rollout.server.max_num_seqs=30"], 38),
        (["rollout.server.url=http://a:1,http://b:1,http://c:1"], 240),
        (["rollout.server.url=http://a:1,http://b:1", "rollout.sampling.concurrency=7"], 7),
    ],
)
def test_episodes_in_flight_follow_the_servers(words: list[str], episodes: int) -> None:
    config = load_config(None, ["rollout.server.max_num_seqs=64", *words])
    assert open_episodes(config) == episodes
    assert open_episodes(config, 8) == (config.rollout.sampling.concurrency or 10 * config.rollout.server.max_num_seqs)


def test_no_episode_in_flight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sampling\.concurrency=0"):
        load_config(None, ["rollout.sampling.concurrency=0"])


def test_batches_that_the_tasks_cannot_fill_are_refused_by_their_setting() -> None:
    def config(*words: str) -> Config:
        return load_config(
            None, ["trainer.batch_size=4", "trainer.mini_batch_size=4", "warmup.steps=1", "warmup.batch_size=3", *words]
        )

    tasks: list[Any] = ["a", "b", "c", "d"]
    check_batches(config(), tasks, tasks[1:])
    check_batches(config("warmup.steps=0"), tasks, [])
    check_batches(config(), tasks, None)
    check_batches(config("method=sft", "trainer.steps=0"), tasks[1:], tasks[1:])
    for given, warmup, said in (
        (tasks[1:], tasks[1:], "there are 3: lower trainer.batch_size"),
        (tasks, tasks[:2], "lower warmup.batch_size"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_batches(config(), given, warmup)
    with pytest.raises(ConfigError, match="warmup.steps > 0 needs training tasks with traces"):
        check_batches(config(), tasks, [])


def test_batches_that_lack_quarantined_rows_are_refused_by_those_rows() -> None:
    quarantine, tasks = Quarantine("quarantine"), ["a", "b"]
    quarantine.add(DataError("no user message", file="x/tasks.jsonl", line=3), {})
    said = r"^in quarantine: 1 row \(1 of tasks.jsonl\); mend them, the first one: x/tasks.jsonl:3: no user message"
    for words in (["warmup.steps=1", "warmup.batch_size=3"], ["trainer.batch_size=4", "trainer.mini_batch_size=4"]):
        with pytest.raises(ConfigError, match=f"{said}.* there are 2: lower"):
            config = load_config(None, ["trainer.batch_size=2", "trainer.mini_batch_size=2", *words])
            check_batches(config, tasks, tasks, quarantine)  # type: ignore[arg-type]
