"""Settings, rows and packages that BFCL's memory categories refuse by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pact_nemo.checking.check import check
from pact_nemo.config.load import load_config
from pact_nemo.data.tasks import build_environment, refuse_evaluation_only
from pact_nemo.environments.bfcl.agentic_data import load_agentic
from pact_nemo.environments.bfcl.data import data_dir
from pact_nemo.errors import ConfigError, DataError
from tests.test_bfcl_memory import CHAINS
from tests.workers.bfcl_tasks import bfcl_environment


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["categories=[memory_kv]", "memory=recall"], "memory='recall'"),
        (["categories=[memory_kv]", "window=turn"], "window=turn only applies to multi-turn"),
        (["categories=[memory_kv]", "max_tools=4"], "evaluated with all of its tools"),
        (["categories=[memory_kv]", "memory_snapshots=x"], "memory_snapshots only applies"),
        (["categories=[memory_kv,memory_rec_sum]", "memory=read", "memory_snapshots=x"], "one memory category"),
        (["categories=[memory_vector]"], "never downloaded"),
        (["categories=[memory_disk]"], "unknown BFCL category 'memory_disk'"),
    ],
)
def test_settings_that_can_not_be_are_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_config([], ["environment=bfcl", *(f"environment_config.{word}" for word in words)])


def test_the_published_kind_is_never_trained_on() -> None:
    config = load_config([], ["environment=bfcl", "environment_config.categories=[memory_kv]"])
    environment = build_environment(config)
    with pytest.raises(ConfigError, match=r"environment_config\.memory=published"):
        refuse_evaluation_only(config, environment.tasks())
    environment.close()
    assert [finding.text for finding in check(config, None).findings if "memory=published" in finding.text]
    for kind in ("write", "read"):
        trained = load_config(
            [], ["environment=bfcl", "environment_config.categories=[memory_kv]", f"environment_config.memory={kind}"]
        )
        refuse_evaluation_only(trained, build_environment(trained).tasks())


def test_bad_rows_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pact_nemo.environments.bfcl import agentic_data

    folder = tmp_path / "data"
    for name in ("memory_prereq_conversation", "possible_answer"):
        (folder / name).mkdir(parents=True)
    for name in CHAINS:
        source = data_dir() / "memory_prereq_conversation" / f"memory_{name}.json"
        (folder / "memory_prereq_conversation" / source.name).write_bytes(source.read_bytes())
    for where in ("BFCL_v4_memory.json", "possible_answer/BFCL_v4_memory.json"):
        rows = (data_dir() / where).read_text(encoding="utf-8").splitlines()
        rows[4] = rows[4].replace('"scenario": "customer"', '"scenario": "zoo"')
        (folder / where).write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.setattr(agentic_data, "data_dir", lambda: folder)
    with pytest.raises(
        DataError, match=r"BFCL_v4_memory\.json:5: expected one of student, customer.*\[field scenario\]"
    ):
        load_agentic("memory_kv")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from pact_nemo.errors import MissingDependency

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install --no-deps rank-bm25 overrides"):
        bfcl_environment(["memory_kv"])
