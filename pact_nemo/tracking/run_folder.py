"""The run folder: one place that knows what lies where in it."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import IO

from blake3 import blake3

from pact_nemo.checkpoints.embedded import FOLDER_NAME
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config, to_yaml
from pact_nemo.errors import CheckpointError, ConfigError
from pact_nemo.runtime import machine, strict_json
from pact_nemo.runtime.files import lock_folder, temporary_beside, write_text_atomic
from pact_nemo.runtime.plugins import short_name
from pact_nemo.runtime.ranks import LOGS_ENV


class Workspace:
    """Paths of one run. A folder is opened by one process at a time (``flock`` on ``.lock``, released by the kernel
    however we die).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "config.yaml"
        self.summary = folder / "summary.json"
        self.rollouts = folder / "rollouts"
        self.evaluations = folder / "eval"
        self.traces = folder / "traces.jsonl"
        self.names = folder / "tool_names.json"  #: own name -> the name that the model sees, where any differs
        self.checkpoints = folder / "checkpoints"
        self.exports = folder / "exports"
        self.hf = folder / "hf"
        self.adapter = folder / "adapter"
        self.bridge = folder / "megatron_bridge"
        self.results = (self.hf, self.adapter, self.bridge)  #: what a finished run may leave of its weights
        self.numerics = folder / "numerics"
        self.server_log = folder / "server.log"
        self.run_log = folder / "run.log"
        self.mark = (
            folder / ".mark"
        )  # random: two machines with a shared disk for exports may have run folders of the same path
        self._lock: IO[str] | None = None

    def set_summary_aside(self, config: Config) -> None:
        """Where the folder has the summary of a run of another length than ``config`` has: keep it under a name that
        says its step, and take the last evaluation away. The run is not finished, and nothing may read it as if it
        were.
        """
        try:
            steps = strict_json.loads(self.summary.read_text(encoding="utf-8"))["steps"]
        except (OSError, ValueError, KeyError, TypeError):  # none, or none that a run wrote
            return
        if steps != config.trainer.steps:
            os.replace(self.summary, self.folder / f"summary-step_{int(steps):06d}.json")
            self.evaluation("after").unlink(missing_ok=True)

    def place_exports(self, root: str | None) -> None:
        """Keep refit exports below ``root`` instead of in the run folder, in a folder that no other run has."""
        if root is not None:
            place = self.folder.resolve()
            try:
                mark = self.mark.read_text().strip()
            except OSError:  # a run of before there were marks
                mark = blake3(str(place).encode()).hexdigest()[:8]
            self.exports = Path(root) / f"{place.name}-{mark}"

    def check_exports(self) -> None:
        """Raises ConfigError when exports can't be written where they are to go."""
        try:
            self.exports.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.exports):
                pass
        except OSError as error:
            raise ConfigError(
                f"rollout.exports_dir: {self.exports} can't be written ({error}); give a folder on a disk of this node"
            ) from error

    def lock(self) -> None:
        """Raises CheckpointError when another process has the folder open."""
        self._lock = lock_folder(self.folder)
        if self._lock is None:
            raise CheckpointError(f"{self.folder} is in use by another process; wait for it or start a new run")

    def take_logs(self) -> None:
        """Move the logs of this job's ranks, where a launcher keeps them (:mod:`pact_nemo.runtime.ranks`), into
        ``logs/N`` of the folder. Their files stay open.
        """
        if (logs := os.environ.pop(LOGS_ENV, None)) is None:
            return
        place = self.folder / "logs"
        place.mkdir(exist_ok=True)
        number = max((int(path.name) for path in place.iterdir() if path.name.isdigit()), default=0) + 1
        os.rename(logs, place / str(number))

    def step_rollouts(self, step: int) -> Path:
        return self.rollouts / f"step_{step:06d}.jsonl"

    def evaluation(self, name: str) -> Path:
        return self.evaluations / f"{name}.jsonl"


def check_replay(config: Config) -> None:
    """Raises ConfigError where ``trainer.replay`` names a run that sampled from another distribution than this config
    says it trains.
    """
    if config.trainer.replay is None or not (dumped := Path(config.trainer.replay) / "config.yaml").is_file():
        return
    theirs, ours = load_config(dumped).rollout.sampling.temperature, config.rollout.sampling.temperature
    if theirs != ours:
        raise ConfigError(
            f"trainer.replay={config.trainer.replay}: its rollouts were sampled at temperature {theirs}, this config"
            f" trains the policy at {ours}; set rollout.sampling.temperature={theirs}"
        )


def check_places(config: Config) -> None:
    """Raises ConfigError where a folder that the run writes to can't be written, naming the setting. Makes nothing."""
    places = {"run.root": config.run.root}
    if config.rollout.exports_dir is not None:
        places["rollout.exports_dir"] = config.rollout.exports_dir
    if (
        config.model.path is None and not (Path(config.run.cache_dir) / FOLDER_NAME).exists()
    ):  # the embedded model is converted into it
        places["run.cache_dir"] = config.run.cache_dir
    for key, folder in places.items():
        machine.check_writable(folder, key)


def _point_latest(root: Path, target: Path) -> None:
    link, temporary = root / "latest", temporary_beside(root / "latest")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


def create(config: Config) -> Workspace:
    """Make the next free ``<root>/<name>-seed<seed>-<n>``, write the resolved config into it and point
    ``<root>/latest`` at it.
    """
    if config.trainer.replay is not None:  # ``runs/latest`` is about to mean this very run
        config.trainer.replay = str(Path(config.trainer.replay).resolve())
    root = Path(config.run.root)
    root.mkdir(parents=True, exist_ok=True)
    stem = f"{config.run.name}-{config.run.label or short_name(config.method)}-seed{config.run.seed}-"
    taken = [int(m.group(1)) for p in root.iterdir() if (m := re.fullmatch(re.escape(stem) + r"(\d+)", p.name))]
    number = max(taken, default=0) + 1
    while True:
        folder = root / f"{stem}{number}"
        try:
            folder.mkdir()
            break
        except FileExistsError:  # another run took the number between the look and the mkdir
            number += 1
    workspace = Workspace(folder)
    workspace.lock()
    write_text_atomic(workspace.mark, secrets.token_hex(4) + "\n")
    write_text_atomic(workspace.config, to_yaml(config))
    _point_latest(root, folder)
    return workspace


def reopen(folder: str | Path) -> Workspace:
    """Open an existing run to continue it.

    Raises:
        ConfigError: there is no run in that folder.
    """
    path = Path(folder).resolve()
    workspace = Workspace(path)
    if not workspace.config.is_file():
        raise ConfigError(
            f"{folder}: no config.yaml there, so it is no run folder; --resume takes one, e.g. --resume runs/latest"
        )
    workspace.lock()
    _point_latest(path.parent, path)
    return workspace
