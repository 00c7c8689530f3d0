"""A text setting is the text that was typed, whatever YAML would make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.config.schema import to_yaml
from pact_nemo.errors import ConfigError

TEXTS = (
    "2024_01",
    "007",
    "1e3",
    "0x10",
    "0b11",
    "0o7",
    "12:30",
    "1:2:3.5",
    "2024-01-01",
    "no",
    "Yes",
    "on",
    "OFF",
    "true",
    "n",
    ".inf",
    ".NaN",
    "1_000",
    "+1",
    "-5",
    "a=b",
    "a #b",
    "[x",
    "{y",
    "- x",
    "? x",
    "a: b",
    "&a",
    "*a",
    "!t",
    "!!int 3",
    "%d",
    "@q",
    "`w",
    "|",
    ">",
    '"half',
    "it's",
    "٣",
)
NOT_PLAIN = ("a #b", "[x", "{y", "- x", "? x", "a: b", "&a", "*a", "!t", "!!int 3", "%d", "@q", "`w", "|", ">", '"half')
WORDS_OF_YAML = [text for text in TEXTS if text not in NOT_PLAIN]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_setting_is_what_is_typed(text: str) -> None:
    config = load_config(
        None, [f"run.name={text}", f"run.label={text}", f"traces.path=/data/{text}.jsonl", f"warmup.closing={text}"]
    )
    assert (config.run.name, config.run.label, config.traces.path, config.warmup.closing) == (
        text,
        text,
        f"/data/{text}.jsonl",
        text,
    )


@pytest.mark.parametrize("text", WORDS_OF_YAML)
def test_a_text_in_a_file_is_what_is_written(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"run:\n  name: {text}\n  label: {text} # a remark\nwarmup: {{closing: {text}}}\n")
    config = load_config(tmp_path / "a.yaml")
    assert (config.run.name, config.run.label, config.warmup.closing) == (text, text, text)
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml") == config
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


def test_a_placeholder_in_braces_is_a_text(tmp_path: Path) -> None:
    command = ["mcp-server-git", "--repository", "{workdir}"]
    base = f"environment: own\ntraces: {{path: {tmp_path}/a.jsonl}}\n"
    (tmp_path / "a.yaml").write_text(
        f"{base}agent:\n  mcp:\n    command: [mcp-server-git, --repository, {{workdir}}]\n"
    )
    (tmp_path / "b.yaml").write_text(base)
    word = "agent.mcp.command=[mcp-server-git,--repository,{workdir}]"
    for found in (load_config(tmp_path / "a.yaml"), load_config(tmp_path / "b.yaml", [word])):
        assert found.environment_config.mcp.command == command  # type: ignore[attr-defined]
    word = 'agent.mcp.command=[mcp-server-git,--repository,"{task[info][repository]}"]'  # as the manual has it
    of_a_task = load_config(tmp_path / "b.yaml", [word]).environment_config.mcp.command  # type: ignore[attr-defined]
    assert of_a_task == [*command[:2], "{task[info][repository]}"]


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
