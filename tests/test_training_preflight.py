"""What is wrong with a model folder is refused before anything is started, and by ``--dry-run``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pact_nemo import cli
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.preflight.checks import check_room, preflight
from pact_nemo.preflight.token_ids import check_served_folder, check_token_ids
from pact_nemo.runtime import machine
from pact_nemo.training import open_run as setup
from tests.fixtures.chat_models import tokenizer
from tests.workers.policy_kit import VOCAB, make_model

PRESET = Path(__file__).resolve().parents[1] / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml"

Dry = Callable[..., tuple[int, str, str]]
ROWS = 49_152  # of the fixture's tokenizer, which has as many tokens


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a real tokenizer and a chat template."""
    folder = make_model(tmp_path_factory.mktemp("chat"), "llama", layers=1, vocabulary=ROWS, heads=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    tokenizer("smollm").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(chat_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat_model, tmp_path / "model"))


def config_of(folder: Path) -> Config:
    return load_config(None, [f"model.path={folder}"])


def edit(path: Path, change: Callable[[Any], None]) -> None:
    row = json.loads(path.read_text())
    change(row)
    path.write_text(json.dumps(row))


def add_token(folder: Path, token: str, *, special: bool = True) -> int:
    """One token more than the model has rows; its id."""

    def change(row: dict[str, Any]) -> None:
        entry = {
            "id": ROWS,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }
        row["added_tokens"].append(entry)

    edit(folder / "tokenizer.json", change)
    return ROWS


def test_a_whole_folder_passes_and_none_has_nothing_to_check(folder: Path) -> None:
    preflight(config_of(folder))
    preflight(load_config(None, []))


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_larger_than_the_model_is_refused_with_token_id_and_rows(special: bool, folder: Path) -> None:
    add_token(folder, "<|end_of_turn|>", special=special)
    with pytest.raises(
        ConfigError, match=rf"'<\|end_of_turn\|>' as id {ROWS}, the model has {ROWS} rows .*resize_token_embeddings"
    ):
        preflight(config_of(folder))


def test_padding_rows_are_fine(folder: Path) -> None:
    class Small:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": VOCAB - 10}

    (folder / "generation_config.json").unlink(missing_ok=True)
    edit(folder / "config.json", lambda row: row.update(eos_token_id=3, pad_token_id=-1, bos_token_id=None))
    check_token_ids(folder, Small(), VOCAB)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "eos_token_id", ROWS),
        ("config.json", "pad_token_id", ROWS + 5),
        ("config.json", "bos_token_id", 10**9),
        ("generation_config.json", "eos_token_id", [2, ROWS]),
        ("generation_config.json", "pad_token_id", ROWS),
    ],
)
def test_ids_in_the_settings_beyond_the_rows_are_refused_by_file_and_key(
    file: str, key: str, value: Any, folder: Path
) -> None:
    if not (folder / file).is_file():
        (folder / file).write_text("{}")
    edit(folder / file, lambda row: row.update({key: value}))
    with pytest.raises(ConfigError, match=rf"{file}: {key}=.*{ROWS}"):
        preflight(config_of(folder))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (
        lambda folder: edit(folder / "config.json", lambda row: row.update(architectures=["GemmaForCausalLM"])),
        "GemmaForCausalLM",
    ),
    "setting": (lambda folder: edit(folder / "config.json", lambda row: row.update(hidden_act="gelu")), "hidden_act"),
    "tensor": (lambda folder: without(folder, "model.layers.0.mlp.up_proj.weight"), "up_proj"),
    "value": (lambda folder: spoil(folder, "model.norm.weight"), r"model\.norm\.weight holds NaN or Inf"),
    "tokenizer": (lambda folder: add_token(folder, "<|more|>"), r"<\|more\|>"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "tokenizer"),
    "template": (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"), "template"),
}


def without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


def spoil(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][-1] = float("nan")
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_before_anything_is_started(
    fault: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, match = FAULTS[fault]
    change(folder)

    def started(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was started")

    for name in ("build_environment", "build_dataset", "Generator", "MegatronPolicy"):
        monkeypatch.setattr(setup, name, started)
    config = load_config(None, [f"model.path={folder}", f"run.root={tmp_path / 'runs'}"])
    with pytest.raises((ConfigError, CheckpointError), match=match), setup.open_run(config, None):
        pass


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dry:
    """``--dry-run`` of the BFCL recipe with further words: exit code, output, errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pact_bfcl.py", "--dry-run", *words])
        code = 0
        try:
            cli.main(lambda *_: None, "conf/pact_bfcl-smollm2_135m-cpu.yaml", "conf/pact_bfcl.yaml", None)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_a_dry_run_refuses_the_folder_and_explains_without_one(folder: Path, dry: Dry) -> None:
    code, out, _ = dry(f"model.path={folder}")
    assert code == 0 and str(folder) in out and "training tasks, " in out
    code, out, _ = dry("--recipe", "qwen3_4b_4xh100_bf16")
    assert code == 0 and "need a tokenizer" in out
    add_token(folder, "<|more|>")
    code, out, err = dry(f"model.path={folder}")
    assert code == 2 and "<|more|>" in err and out == "" and len(err.splitlines()) == 1


def test_a_dry_run_refuses_settings_of_the_policy_that_no_run_can_have(dry: Dry) -> None:
    for word in (
        "policy.tensor_parallel=0",
        "policy.precision=fp17",
        "optimizer.lr=-1",
        "rollout.server.max_num_seqs=0",
    ):
        code, out, err = dry(word)
        assert code == 2 and word.partition("=")[0] in err and not out and len(err.splitlines()) == 1, err
    code, _, err = dry("policy.pipeline_parallel=4")  # the embedded model has 30 layers
    assert code == 2 and "the embedded model" in err and "policy.pipeline_parallel" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["policy.tensor_parallel=4"],
            "2 attention heads can't be split over TP = 4 (policy.tensor_parallel has to divide num_attention_heads)",
        ),
        (["policy.tensor_parallel=4"], "2 key/value heads"),
        (["policy.pipeline_parallel=2"], "policy.pipeline_parallel has to divide num_hidden_layers"),
        (["policy.expert_parallel=2"], "policy.expert_parallel has to be 1 for a dense model"),
        (
            ["rollout.server.tensor_parallel_size=3"],
            "rollout.server.tensor_parallel_size=3 (it has to divide num_attention_heads)",
        ),
        (["rollout.server.max_model_len=9000"], "rollout.server.max_model_len=8192 or less"),
        (["policy.fp8=tensorwise", "policy.fp8_emulate=true", "policy.fp8_bf16_layers=1"], "policy.fp8_bf16_layers=1"),
    ],
)
def test_a_layout_that_the_model_cannot_be_cut_into_is_refused_by_its_settings(
    words: list[str], said: str, chat_model: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight(load_config(None, [f"model.path={chat_model}", *words]))
    assert said in str(caught.value) and (
        "max_model_len" in said or str(chat_model / "config.json") in str(caught.value)
    )


def test_a_layout_that_fits_passes_whatever_the_number_of_processes(chat_model: Path) -> None:
    preflight(
        load_config(
            None, [f"model.path={chat_model}", "policy.tensor_parallel=2", "rollout.server.tensor_parallel_size=2"]
        )
    )


def test_ranks_that_a_layout_does_not_divide_are_refused_in_a_job(chat_model: Path) -> None:
    config = load_config(None, [f"model.path={chat_model}", "policy.tensor_parallel=2"])
    preflight(config, 4)
    with pytest.raises(ConfigError, match="3 ranks can't be split into TP x PP x CP = 2"):
        preflight(config, 3)


@pytest.mark.parametrize(
    ("file", "text"), [("tokenizer_config.json", "[]"), ("tokenizer.json", "{"), ("tokenizer.json", "")]
)
def test_tokenizer_files_that_cannot_be_read_are_refused_in_one_line(file: str, text: str, folder: Path) -> None:
    (folder / file).write_text(text)
    with pytest.raises(
        ConfigError, match=rf"^{folder}: no tokenizer could be loaded \(.*; copy tokenizer\.json"
    ) as caught:
        preflight(config_of(folder))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    edit(folder / "tokenizer_config.json", lambda row: row.update(own))
    with pytest.raises(ConfigError, match="trust_remote_code"):
        preflight(config_of(folder))
    assert "[y/N]" not in capsys.readouterr().out


def test_a_dry_run_reads_tasks_and_traces(dry: Dry, tmp_path: Path) -> None:
    code, out, _ = dry(
        "tasks.max_train=9",
        "trainer.steps=null",
        "trainer.epochs=4",
        "trainer.batch_size=2",
        "trainer.mini_batch_size=2",
    )
    assert code == 0 and "9 training tasks, 8 with a verified trace" in out and "16 steps x" in out
    (tmp_path / "traces.jsonl").write_text('{"task_id": "multi_turn_base_0", "turns": 3}\n')
    for words, said in (
        ([f"traces.path={tmp_path / 'traces.jsonl'}"], "traces.jsonl"),
        (["environment=ftrl", f"tasks.path={tmp_path / 'rows.json'}"], "rows.json"),
    ):
        code, out, err = dry(*words)
        assert code in (1, 2) and said in err and not out and len(err.splitlines()) == 1, (words, err)


@pytest.mark.parametrize("key", ["run.root", "run.cache_dir", "rollout.exports_dir"])
def test_a_folder_that_cannot_be_written_is_refused_by_its_setting(key: str, dry: Dry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = dry(f"{key}={tmp_path / 'file' / 'below'}")
    assert code == 2 and f"{key}={tmp_path}" in err and not out


def test_a_disk_without_room_for_the_run_is_refused_with_what_it_takes(
    dry: Dry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of the preset's model; float32: exports and 16 bytes a parameter in a checkpoint, two more copies of the weights
    parameters = 134_515_008
    needed = parameters * (3 * 4 + 2 * 16 + 2 * 4)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: needed - 1)
    code, out, err = dry(f"run.root={tmp_path}")
    assert code == 2 and not out and f"run.root={tmp_path}" in err and f"take {needed / 2**30:.1f} GiB there" in err
    assert check_room(load_config(PRESET, ["trainer.keep_checkpoints=1", "rollout.export_dtype=bfloat16"])) is None
    monkeypatch.setattr(machine, "free_bytes", lambda folder: needed)
    check_room(load_config(PRESET))
    # exports on a disk of their own: each disk for itself
    monkeypatch.setattr(machine, "disk_of", lambda folder: len(str(folder)))
    monkeypatch.setattr(
        machine, "free_bytes", lambda folder: needed if str(folder) == "runs" else 3 * 4 * parameters - 1
    )
    with pytest.raises(ConfigError, match=r"rollout.exports_dir=/fast: .* 1.5 GiB there"):
        check_room(load_config(PRESET, ["rollout.exports_dir=/fast"]))
    # refits of adapters take megabytes, unless they bring the merged model
    monkeypatch.setattr(
        machine, "free_bytes", lambda folder: 12 * parameters if str(folder) == "runs" else 3 * 4 * 2_442_240
    )
    adapters = ["rollout.exports_dir=/fast", "policy.lora.rank=8", "objective.kl_coef=0", "rollout.lora_refit=adapter"]
    check_room(load_config(PRESET, adapters))
    with pytest.raises(ConfigError, match=r"rollout.exports_dir=/fast: .* 1.5 GiB there"):
        check_room(load_config(PRESET, [*adapters, "rollout.lora_refit=merged"]))
    # by default as the server's device has it: beside a GPU trainer, one on the CPU is given the merged model
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    by_default = [*adapters[:3], "policy.precision=fp32"]
    check_room(load_config(PRESET, [*by_default, "rollout.server.device=cuda"]))
    with pytest.raises(ConfigError, match=r"rollout.exports_dir=/fast: .* 1.5 GiB there"):
        check_room(load_config(PRESET, [*by_default, "rollout.server.device=cpu"]))
    with pytest.raises(ConfigError, match=r"run.root=runs"):
        monkeypatch.setattr(machine, "free_bytes", lambda folder: parameters)
        check_room(load_config(PRESET, ["rollout.exports_dir=/fast"]))


def test_a_folder_that_is_only_served_is_checked_too(folder: Path) -> None:
    check_served_folder(folder, tokenizer("smollm"))
    edit(folder / "config.json", lambda row: row.update(architectures=["GemmaForCausalLM"], model_type="gemma"))
    check_served_folder(folder, tokenizer("smollm"))
    edit(folder / "config.json", lambda row: row.update(vocab_size=ROWS - 1))
    with pytest.raises(ConfigError, match=f"{ROWS - 1} rows"):
        check_served_folder(folder, tokenizer("smollm"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        check_served_folder(folder, tokenizer("smollm"))
