"""One schema, one home of each default, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pact_nemo.errors import ConfigError
from pact_nemo.training import workspace
from pact_nemo.training.config import Config, load_config, to_yaml

CONF = Path(__file__).resolve().parents[1] / "conf"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_resolves_and_round_trips(path: Path, tmp_path: Path) -> None:
    own_rows = "_bfcl" not in path.name  # the user brings the rows of the other benchmarks
    config = load_config(path, ["tasks.path=rows.jsonl"] if own_rows else [])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved) == config


@pytest.mark.parametrize("path", sorted((CONF / "ablations").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_ablation_changes_the_run_it_is_laid_over_by_what_it_says(path: Path) -> None:
    base_file = CONF / "pact_bfcl-smollm2_135m-cpu.yaml"
    base, ablated = to_yaml(load_config(base_file)).split("\n"), to_yaml(load_config([base_file, path])).split("\n")
    said = [line.split("#")[0].strip() for line in path.read_text().split("\n") if line.strip() and not line.startswith("#")]
    changed = [line.strip() for line in ablated if line not in base]
    assert len(changed) <= len(said)
    if path.stem not in ("table4-reasoning_segment", "table6-call_scale", "figure4-q_0.4"):  # the paper's own choice is the default
        assert ablated != base


def test_a_benchmark_without_its_rows_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="tasks.path=FILE"):
        load_config(CONF / "pact_ftrl.yaml")


def test_shipped_configs_open_with_their_launch_command() -> None:
    for path in CONF.glob("*.yaml"):
        assert "recipes/" in path.read_text().split("\nrun:")[0], path


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
        (["objective.method=ppo"], "objective.method"),
        (["objective.anchor_prob=1.5"], "objective.anchor_prob"),
        (["objective.group_size=1"], "objective.group_size"),
        (["trainer.mini_batch_size=7"], "trainer.mini_batch_size"),
        (["traces.components=[answers]"], "traces.components"),
        (["tasks.max_calls=2"], "tasks.max_calls"),
        (["rollout.sampling.top_p=0.9"], "top_p"),
        (["objective.schedule.call=segment"], "objective.schedule.call"),
        (["trainer.steps"], "trainer.steps"),
    ],
)
def test_a_bad_setting_is_refused_by_name(words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(None, words)


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


TEXTS = (
    "2024_01", "007", "1e3", "0x10", "0b11", "0o7", "12:30", "1:2:3.5", "2024-01-01", "no", "Yes", "on", "OFF", "true", "n", ".inf", ".NaN", "1_000",
    "+1", "-5", "a=b", "a #b", "[x", "{y", "- x", "? x", "a: b", "&a", "*a", "!t", "!!int 3", "%d", "@q", "`w", "|", ">", '"half', "it's", "٣",
)  # fmt: skip
NOT_PLAIN = ("a #b", "[x", "{y", "- x", "? x", "a: b", "&a", "*a", "!t", "!!int 3", "%d", "@q", "`w", "|", ">", '"half')
WORDS_OF_YAML = [text for text in TEXTS if text not in NOT_PLAIN]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_setting_is_what_is_typed(text: str) -> None:
    config = load_config(None, [f"run.name={text}", f"run.label={text}", f"traces.path=/data/{text}.jsonl", f"warmup.closing={text}"])
    assert (config.run.name, config.run.label, config.traces.path, config.warmup.closing) == (text, text, f"/data/{text}.jsonl", text)


@pytest.mark.parametrize("text", WORDS_OF_YAML)
def test_a_text_in_a_file_is_what_is_written(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"run:\n  name: {text}\n  label: {text} # a remark\ntasks: {{categories: [{text}, x]}}\n")
    config = load_config(tmp_path / "a.yaml")
    assert (config.run.name, config.run.label, config.tasks.categories) == (text, text, [text, "x"])
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml") == config
    assert load_config(None, [f"tasks.categories=[{text}, x]"]).tasks.categories == [text, "x"]
    assert load_config(None, [f"run={{name: {text}, seed: 5}}"]).run.name == text


def test_quotes_around_a_text_are_yamls() -> None:
    assert load_config(None, ['run.name="007"']).run.name == "007"
    assert load_config(None, ["run.name='a b'"]).run.name == "a b"


@pytest.mark.parametrize("nothing", ["null", "~", "Null", ""])
def test_null_still_clears_a_setting_that_may_be_absent(nothing: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run: {label: something}\ntrainer: {replay: else}\n")
    config = load_config(tmp_path / "a.yaml", [f"run.label={nothing}", f"trainer.replay={nothing}"])
    assert config.run.label is None and config.trainer.replay is None


def test_one_anchor_can_be_a_number_and_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run: {name: &it 0x10, seed: *it}\n")
    config = load_config(tmp_path / "a.yaml")
    assert (config.run.name, config.run.seed) == ("0x10", 16)


@pytest.mark.parametrize("word", ["trainer.steps=12:30", "optimizer.lr=1:30.5", "run.seed=1:2:3"])
def test_a_number_is_no_time_of_day(word: str) -> None:
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        load_config(None, [word])


def test_leading_zeros_are_no_octal_number() -> None:
    assert load_config(None, ["trainer.steps=010"]).trainer.steps == 10


@pytest.mark.parametrize("value", ["[a]", "{a: b}"])
def test_a_text_that_yaml_takes_for_something_else_is_refused_by_name(value: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"run:\n  seed: 3\n  name: {value}\n")
    with pytest.raises(ConfigError, match=r"a.yaml: run.name \(line 3\) is a text; put its value into quotes"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("traces:\n  path: /data/a: b.jsonl\n")
    with pytest.raises(ConfigError, match="quotes"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize("word", ["run.name=a/b", "run.name=..", "run.label=x/y", "run.name=' '", "run.name="])
def test_a_run_has_a_name_that_a_folder_can_have(word: str) -> None:
    with pytest.raises(ConfigError, match="run.name|run.label"):
        load_config(None, [word])
