"""BFCL's vector memory: refused by name where its encoder isn't on this disk; with it, BFCL's own backend.

The last test needs sentence-transformers, faiss and the folder of the encoder, which the variable PACT_BFCL_ENCODER
names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pact_nemo.environments.bfcl.agentic_data import load_agentic
from pact_nemo.environments.bfcl.memory import memory_text
from pact_nemo.errors import ConfigError, MissingDependency
from tests.workers.bfcl_tasks import bfcl_environment

ENCODER = os.environ.get("PACT_BFCL_ENCODER")
REAL = """
import json, sys
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.bfcl.environment import BFCLEnvironment
from pact_nemo.environments.bfcl.settings import BFCLConfig
from pact_nemo.errors import ConfigError
from tests.workers.bfcl_tasks import bfcl_environment, make_traces

encoder, other = sys.argv[1:]
env = bfcl_environment(["memory_vector"], encoder=encoder)
first, second = [task for task in env.tasks() if task.prepares and task.group == "notetaker"][:2]
one = env.start(first)
texts = ["The daycare is open at eight.", "Jacob calls on Wednesday."]
one.execute([ToolCall("archival_memory_add", {"text": text}) for text in texts])
one.execute([ToolCall("core_memory_add", {"text": "A note."})])
one.outcome()
one.close()
two = env.start(second)
assert "A note." in two.opening()[0]["content"]
[found] = two.execute([ToolCall("archival_memory_retrieve", {"query": "When is kindergarten open?", "top_k": 1})])
two.close()
env.close()
reader = bfcl_environment(["memory_vector"], memory="read", encoder=encoder)
traces, rejected = make_traces(reader, reader.tasks()[:3])
try:
    bfcl_environment(["memory_vector"], encoder=other)
    refused = ""
except ConfigError as error:
    refused = str(error)
print(json.dumps([found, len(reader.tasks()), len(traces), refused]))
"""


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"never downloaded.*environment_config\.encoder.*leave memory_vector out"):
        bfcl_environment(["memory_vector"])
    with pytest.raises(ConfigError, match=r"no modules\.json is in it"):
        bfcl_environment(["memory_vector"], encoder=str(tmp_path))
    (tmp_path / "modules.json").write_text("[]")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependency, match="faiss.*pip install --no-deps sentence-transformers faiss-cpu"):
        bfcl_environment(["memory_vector"], encoder=str(tmp_path))


def test_its_tools_and_its_snapshots_are_read() -> None:
    entry = load_agentic("memory_vector")[0]
    assert "archival_memory_retrieve" in {tool["name"] for tool in entry.tools}
    saved = {"next_id": 2, "store": {"0": "one", "1": "two"}}
    text = json.dumps({"core_memory": saved, "archival_memory": {"next_id": 0, "store": {}}})
    assert memory_text(text, "MemoryAPI_vector") == "one\ntwo"


@pytest.mark.slow
@pytest.mark.skipif(ENCODER is None, reason="PACT_BFCL_ENCODER names no folder")
def test_with_the_encoder_on_this_disk(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(ENCODER), str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found, tasks, traces, refused = json.loads(done.stdout.splitlines()[-1])
    assert "The daycare is open at eight." in found and "Jacob" not in found
    assert (tasks, traces) == (130, 3) and "start another one" in refused
