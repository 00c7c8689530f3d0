"""BFCL's memory backends in a folder of their own for each episode, and the snapshots that episodes leave behind.

``bfcl-eval`` keeps one file for each scenario that every conversation overwrites. Here an episode works on a private
copy of what its predecessor left, and only what a finished conversation saved is kept, under its own id. So what ran at
the same time, was cut off or is played again can't reach another episode's memory.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

from pact_nemo.environments.bfcl.agentic_data import AgenticEntry
from pact_nemo.environments.bfcl.backend import LOCK, Instances
from pact_nemo.errors import ConfigError, EnvironmentFailure, MissingDependency
from pact_nemo.runtime import strict_json
from pact_nemo.runtime.files import lock_folder, write_text_atomic

FOLDER = "memory"
ENCODER = "all-MiniLM-L6-v2"
_VECTOR_MODULE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code.memory_vector"
_encoder: Path | None = None  #: what BFCL's module was loaded with; it keeps one encoder for the life of the process


def check_packages() -> None:
    """Raises MissingDependency where BFCL's memory backends can't be imported; says what to install."""
    missing = [name for name in ("rank_bm25", "overrides") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"BFCL's memory categories need {', '.join(missing)}: pip install --no-deps rank-bm25 overrides"
        )


def load_encoder(folder: str) -> None:
    """Load BFCL's vector backend with the encoder in ``folder``. Nothing is ever downloaded.

    Raises:
        ConfigError: the folder holds no encoder, or this process has loaded another one.
        MissingDependency: a package of the backend is not installed.
    """
    global _encoder
    key = "environment_config.encoder"
    path = Path(folder).resolve()
    if not (path / "modules.json").is_file():
        raise ConfigError(
            f"{key}={folder}: no modules.json is in it, so it is no sentence-transformers model; name the folder that"
            f" holds {ENCODER}"
        )
    missing = [name for name in ("sentence_transformers", "faiss", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"memory_vector needs {', '.join(missing)}: pip install --no-deps sentence-transformers faiss-cpu"
            " scikit-learn joblib threadpoolctl, or leave memory_vector out of environment_config.categories"
        )
    with LOCK:
        if _encoder is not None and _encoder != path:
            raise ConfigError(f"{key}={folder}: this process has loaded {_encoder} already; start another one")
        if _encoder is None:
            _import_vector_backend(path)
            _encoder = path


def _import_vector_backend(path: Path) -> None:
    """BFCL's module asks for its encoder by a name that would be looked up on a hub; here the name means the folder."""
    try:
        package: Any = importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise MissingDependency(f"memory_vector can't be imported ({error}); install what is missing") from error
    original = package.SentenceTransformer

    def on_disk(name: str, **words: Any) -> Any:
        if name != ENCODER:
            raise ConfigError(f"bfcl-eval asks for the encoder {name}; this version of it is not supported")
        return original(str(path), local_files_only=True, **words)

    package.SentenceTransformer = on_disk
    try:
        importlib.import_module(_VECTOR_MODULE)
    except ImportError as error:
        raise MissingDependency(f"memory_vector can't be imported ({error}); install what is missing") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"environment_config.encoder={path}: it can't be loaded ({error}); copy it again") from error
    finally:
        package.SentenceTransformer = original


def memory_text(snapshot: str, backend: str) -> str:
    """Everything that a memory holds, one entry a line.

    Args:
        snapshot: as the backend saves it, a JSON text.
        backend: name of the backend class.
    """
    saved = json.loads(snapshot)
    if backend == "MemoryAPI_rec_sum":
        return str(saved["memory"])
    parts = (saved["core_memory"], saved["archival_memory"])
    if backend == "MemoryAPI_vector":
        return "\n".join(str(text) for part in parts for text in part["store"].values())
    return "\n".join(f"{key}: {value}" for part in parts for key, value in part.items())


def with_instruction(entry: AgenticEntry, shown: str) -> list[dict[str, str]]:
    """The first user turn of an entry under BFCL's instruction to use the memory.

    Args:
        entry: a conversation or question.
        shown: what :meth:`Memory.shown` says.
    """
    from bfcl_eval.constants import default_prompts

    unified = entry.backend == "MemoryAPI_rec_sum"
    template = (
        default_prompts.MEMORY_BACKEND_INSTRUCTION_UNIFIED
        if unified
        else default_prompts.MEMORY_BACKEND_INSTRUCTION_CORE_ARCHIVAL
    )
    setting = default_prompts.MEMORY_AGENT_SETTINGS[entry.chain]
    system = template.format(scenario_setting=setting, memory_content=shown)
    first = [dict(message) for message in entry.user_turns[0]]
    if first[0]["role"] == "system":
        first[0]["content"] = f"{system}\n\n{first[0]['content']}"
        return first
    return [{"role": "system", "content": system}, *first]


class Memory:
    """BFCL's backend of one episode.

    Args:
        entry: the conversation or question that is played.
        before: what the memory holds at the start, as a backend saves it; None: nothing.

    Raises:
        EnvironmentFailure: BFCL can't load it.
    """

    def __init__(self, entry: AgenticEntry, before: str | None):
        from bfcl_eval.utils import get_directory_structure_by_id

        self._folder = Path(tempfile.mkdtemp(prefix="pact_bfcl_memory_"))
        self.entry = entry
        # BFCL starts empty under the id of a chain's first conversation, and loads the chain's file under any other id
        name = entry.id if before is not None else f"memory_{entry.backend.removeprefix('MemoryAPI_')}_prereq_0-x-0"
        self._saved = (
            self._folder / get_directory_structure_by_id(name) / "memory_snapshot" / f"{entry.chain}_final.json"
        )
        if before is not None:
            self._saved.parent.mkdir(parents=True)
            self._saved.write_text(before, encoding="utf-8")
        initial = {"model_result_dir": self._folder, "scenario": entry.chain, "test_id": name}
        self.backend = Instances(
            {"id": entry.id, "involved_classes": [entry.backend], "initial_config": {entry.backend: initial}}
        )
        try:
            self.backend.instance(entry.backend)
        except EnvironmentFailure:
            self.close()
            raise

    def shown(self) -> str:
        """What a prompt shows of the memory now."""
        held = str(self.backend.instance(self.entry.backend)._dump_core_memory_to_context())
        return held.encode("utf-8", "replace").decode("utf-8")

    def opening(self) -> list[dict[str, str]]:
        """The first user turn under BFCL's instruction, which shows what the memory holds now."""
        return with_instruction(self.entry, self.shown())

    def save(self) -> str:
        """What the memory holds now, as BFCL's backend saves it."""
        instance = self.backend.instance(self.entry.backend)
        with LOCK:
            try:
                instance._flush_memory_to_local_file()
                return self._saved.read_text(encoding="utf-8")
            except OSError as error:
                raise EnvironmentFailure(f"{self.entry.id}: its memory can't be saved: {error}") from error

    def close(self) -> None:
        """Drop the instance and the folder; safe to call twice."""
        self.backend.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class Snapshots:
    """What each finished conversation of one evaluation left in memory: a file for each id.

    Args:
        folder: of the evaluation; None: a temporary one, which :meth:`close` removes.
    """

    def __init__(self, folder: Path | None):
        self._own = folder is None
        self.folder = folder / FOLDER if folder is not None else Path(tempfile.mkdtemp(prefix="pact_bfcl_snapshots_"))
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Take the folder for this process.

        Raises:
            ConfigError: another evaluation has it, or it can't be written.
        """
        if self._lock is not None:
            return
        try:
            self._lock = lock_folder(self.folder)
        except OSError as error:
            raise ConfigError(f"{self.folder}: memory can't be kept there ({error}); name another --out") from error
        if self._lock is None:
            raise ConfigError(
                f"{self.folder} is in use by another evaluation; wait for it, or name another folder with --out"
            )

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def read(self, name: str, reader: str) -> str:
        """The snapshot of the conversation ``name``.

        Raises:
            EnvironmentFailure: there is none, so ``reader`` can't be played.
        """
        try:
            return self.path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise EnvironmentFailure(
                f"{reader}: the conversation {name} before it left no memory in {self.folder}: it failed, or its file"
                " is gone"
            ) from error

    def drop(self, name: str) -> None:
        """Forget what an earlier attempt at ``name`` left, as it is played again."""
        with contextlib.suppress(FileNotFoundError):
            self.path(name).unlink()

    def write(self, name: str, snapshot: str) -> None:
        write_text_atomic(self.path(name), snapshot)

    def close(self) -> None:
        """Give the folder back; safe to call twice."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)


def fixed_snapshots(folder: str, category: str, ends: dict[str, str]) -> dict[str, str]:
    """Per scenario, what the last conversation of its chain left in the folder of an evaluation.

    Args:
        ends: scenario -> id of its last conversation.

    Raises:
        ConfigError: a file is missing or is not what the category's backend saves; names it.
    """
    found = {}
    for scenario, name in ends.items():
        path = Path(folder) / f"{name}.json"
        try:
            text = path.read_text(encoding="utf-8")
            strict_json.loads(text)
            memory_text(text, f"MemoryAPI_{category.removeprefix('memory_')}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"environment_config.memory_snapshots={folder}: {path.name} is not a memory that {category} saved"
                f" ({error!r:.120}); name the folder {FOLDER}{os.sep} of an evaluation of {category} that was finished"
            ) from error
        found[scenario] = text
    return found
