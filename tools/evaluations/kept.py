"""Episodes of an earlier evaluation into the same folder: what they depend on, and which of them stand."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pact_nemo.config.limits import evaluation_limits
from pact_nemo.config.schema import Config, to_dict
from pact_nemo.environments.base import Task
from pact_nemo.environments.order import standing
from pact_nemo.errors import ConfigError
from pact_nemo.report.comparison import flat
from pact_nemo.rollouts.store import read_rollouts
from pact_nemo.rollouts.types import Rollout
from pact_nemo.runtime.files import write_json_atomic
from tools.evaluations.chosen import model_folder


def identity(config: Config, model: str, name: str, tasks: Sequence[Task]) -> dict[str, Any]:
    """What episodes depend on: the model, the settings that evaluation reads, the code that plays and the tasks.

    Args:
        model: folder or URL.
        name: the model's name behind the URL.
        tasks: all tasks that there are.
    """
    settings = to_dict(config)
    folder = model_folder(model)
    weights = sorted(folder.glob("*.safetensors")) if folder is not None else []
    server = settings["rollout"]["server"]
    return {
        "model": model if folder is None else str(folder.resolve()),
        "name": name if folder is None else None,
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
        "model_files": _files(folder) if folder is not None else {},
        "environment": config.environment,
        "environment_config": settings["environment_config"],
        "code": _code(config.environment, settings["environment_config"]),
        "model_settings": {key: value for key, value in settings["model"].items() if key not in ("path", "recipe")},
        "tasks": {key: value for key, value in settings["tasks"].items() if key not in ("max_train", "max_eval")},
        "task_contents": {task.id: _digest(json.dumps(asdict(task), sort_keys=True, default=_kind)) for task in tasks},
        "sampling": settings["rollout"]["sampling"],
        "sandbox": settings["sandbox"],
        "server": {} if folder is None else {key: server[key] for key in ("dtype", "extra_args")},
        "evaluation": settings["evaluation"],
        "seed": config.run.seed if config.evaluation.temperature > 0 else None,
        "limits": asdict(evaluation_limits(config)),
    }


def _files(folder: Path) -> dict[str, str]:
    """File -> digest, of what a model folder says besides its weights: shape, tokenizer and chat template."""
    own = [path for pattern in ("*.json", "*.jinja", "*.model", "*.txt") for path in folder.glob(pattern)]
    return {
        path.name: _digest(path.read_bytes())
        for path in sorted(own)
        if path.name != "manifest.json" and not path.name.endswith(".index.json")  # they tell of the weights
    }


def _kind(value: object) -> str:
    return type(value).__name__


def _digest(content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _code(environment: str, settings: dict[str, Any]) -> dict[str, str]:
    """File -> digest, of the Python files that the settings name as ``path/to/file.py:name``."""
    named = {text.rpartition(":")[0] for text in (environment, *flat(settings).values())}
    files = [Path(place) for place in sorted(named) if place.endswith(".py")]
    return {str(path): _digest(path.read_text(encoding="utf-8")) for path in files if path.is_file()}


def open_folder(folder: Path, mine: dict[str, Any]) -> Path:
    """The episodes file of ``folder``; episodes of another model, other settings or a task that has another content by
    now are never taken for this one's.

    Args:
        mine: of :func:`identity`.

    Raises:
        ConfigError: names what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    episodes, note = folder / "episodes.jsonl", folder / "identity.json"
    mine = json.loads(json.dumps(mine))
    if episodes.is_file():
        found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        before, now = found.pop("task_contents", {}), mine["task_contents"]
        different = [key for key in mine if key != "task_contents" and found.get(key) != mine[key]]
        changed = [name for name in before if name in now and before[name] != now[name]]
        if changed:
            different.append(f"content of task {changed[0]}" + (f" and {len(changed) - 1} more" if changed[1:] else ""))
        if different:
            raise ConfigError(
                f"{episodes} holds episodes with another {', '.join(different)}; name another folder with --out, or"
                " delete this one"
            )
        mine["task_contents"] = before | now
    write_json_atomic(note, mine)
    return episodes


def kept_rollouts(episodes: Path, tasks: Sequence[Task], samples: int) -> list[Rollout]:
    """What was played before and stands: the tasks of which no sample failed, nor one that they build on is played
    again.

    Args:
        tasks: all that there are.
        samples: episodes of each task.
    """
    rollouts = read_rollouts(episodes) if episodes.is_file() else []
    whole = Counter(rollout.task_id for rollout in rollouts if rollout.status != "failed")
    stands = standing({task_id for task_id, count in whole.items() if count == samples}, list(tasks))
    return [rollout for rollout in rollouts if rollout.task_id in stands]
