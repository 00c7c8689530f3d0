"""One run of a comparison in a subprocess of its own: not run again when it is finished, resumed when it was cut."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pact_nemo.checkpoints.manifest import read_manifest
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config, to_dict
from pact_nemo.errors import ConfigError, PactError
from pact_nemo.report.comparison import flat
from pact_nemo.report.data import load_run

REPOSITORY = Path(__file__).resolve().parents[2]
_LIVE: set[subprocess.Popen[bytes]] = set()  # runs that are going on
FREE = "model.template_kwargs."  #: the user's own keys, which have no default


def config_of(method: str, benchmark: str, preset: str) -> Path:
    """The settings file of a method.

    Raises:
        ConfigError: there is none; names those that there are.
    """
    path = REPOSITORY / "conf" / f"{method}_{benchmark}-{preset}.yaml"
    if not path.is_file():
        known = sorted(p.name.split("_" + benchmark)[0] for p in path.parent.glob(f"*_{benchmark}-{preset}.yaml"))
        raise ConfigError(f"no settings file {path.name}; methods with one: {', '.join(known)}")
    return path


def check_words(words: Sequence[str], taken: Sequence[str]) -> None:
    """Raises ConfigError where a word sets what the comparison itself says: each key, as ``run.seed``, to each run."""
    for word in words:
        if (key := word.partition("=")[0]) in taken:
            raise ConfigError(f"{word}: a comparison gives each run its own {key}; leave it out")


def finished(root: Path) -> Path | None:
    """The run folder under ``root`` that has a summary, or None."""
    return next((path.parent for path in sorted(root.glob("*/summary.json")) if not path.parent.is_symlink()), None)


@dataclass(frozen=True)
class Settings:
    """What a run has resolved, by dotted key, as text; of ``run`` the seed alone, for the rest differs by machine.

    Attributes:
        values: of every setting.
        defaults: of the code, those of this method and environment included: a run of before a setting existed had what
            is now its default.
    """

    values: dict[str, str]
    defaults: dict[str, str]

    @classmethod
    def of(cls, config: Path, seed: int, overrides: Sequence[str]) -> Settings:
        """Of a run with this settings file, seed and words."""
        found = load_config([config], [f"run.seed={seed}", *overrides])
        defaults = asdict(Config()) | {
            key: asdict(type(getattr(found, key))()) for key in ("method_config", "environment_config")
        }
        return cls(_kept(flat(to_dict(found))), flat(defaults))

    def unlike(self, config: dict[str, Any], training_tasks: int | None = None) -> list[str]:
        """Keys that a run with this ``config.yaml`` has otherwise.

        Args:
            training_tasks: of the finished run; None: not known, and a number of epochs isn't compared.
        """
        had = _kept(flat(config))
        free = [key for key in had if key.startswith(FREE) and key not in self.values]
        # steps of a run that was told epochs are written down once its tasks are counted
        epochs = self.values.get("trainer.epochs", "None")
        counted = ("trainer.steps", "trainer.epochs") if epochs != "None" else ()
        if counted and training_tasks is not None:
            steps = int(epochs) * (training_tasks // int(self.values["trainer.batch_size"]))
            free += [] if had.get("trainer.steps") == str(steps) else ["trainer.epochs"]
        return free + [
            key
            for key, value in self.values.items()
            if key not in counted and had.get(key, self.defaults.get(key, "None")) != value
        ]

    @property
    def digest(self) -> str:
        """Of the settings that are not the defaults: a setting that is added later changes no digest."""
        own = sorted(f"{key}={value}" for key, value in self.values.items() if self.defaults.get(key) != value)
        return hashlib.blake2b("\n".join(own).encode(), digest_size=16).hexdigest()


def _kept(settings: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key == "run.seed" or not key.startswith("run.")}


def weights_of(hf: Path) -> str:
    """Digest of an export's weights, by its manifest; empty where there is none."""
    if not (hf / "manifest.json").is_file():
        return ""
    files = read_manifest(hf).files
    own = {name: entry for name, entry in sorted(files.items()) if name.endswith(".safetensors")}
    return hashlib.blake2b(json.dumps(own, sort_keys=True, default=vars).encode(), digest_size=16).hexdigest()


def call(words: Sequence[str], out: IO[str]) -> int:
    """Run a command to its end; a signal that ends this process is passed on to it (:func:`passing_signals_on`)."""
    process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT)
    _LIVE.add(process)
    try:
        return process.wait()
    finally:
        _LIVE.discard(process)


@contextmanager
def passing_signals_on() -> Iterator[None]:
    """SIGTERM goes to the runs that are going on: each checkpoints its finished steps and ends, and with it the
    comparison. Runs left alone would go on beside the next ones.
    """

    def pass_on(number: int, frame: Any) -> None:
        for process in tuple(_LIVE):
            process.send_signal(number)
        if not _LIVE:
            raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_one(config: Path, seed: int, root: Path, overrides: Sequence[str]) -> Path:
    """Run to the end, or go on where it was cut.

    Args:
        root: folder of this run alone; its run folder is made in there, beside its ``log.txt``.
        overrides: ``key=value`` words.

    Raises:
        ConfigError: it was run before with other settings.
        PactError: it failed; says the end of its log.
    """
    done = finished(root)
    cut = [path.parent.parent for path in sorted(root.glob("*/checkpoints/latest"))]
    cut = [folder for folder in cut if not folder.is_symlink()]
    wanted = Settings.of(config, seed, overrides)
    for folder in [done] if done is not None else cut[-1:]:
        found = load_run(folder, episodes=False)
        if different := wanted.unlike(found.config, found.summary.get("tasks", {}).get("train")):
            raise ConfigError(
                f"{folder} was run with other settings ({', '.join(different)}); give --root another folder, or delete"
                " it"
            )
    if done is not None:
        return done
    recipe = str(REPOSITORY / "recipes" / "pact.py")
    words = (
        ["--resume", str(cut[-1])]
        if cut
        else ["--config", str(config), f"run.seed={seed}", f"run.root={root}", *overrides]
    )
    root.mkdir(parents=True, exist_ok=True)
    log = root / "log.txt"
    with open(log, "a", encoding="utf-8") as out:
        # in this folder: a path in the words means what it means here
        code = call([sys.executable, recipe, *words], out)
    done = finished(root)
    if code != 0 or done is None:
        end = "\n".join(log.read_text(encoding="utf-8").split("\n")[-8:])
        raise PactError(f"{config.name}, seed {seed}: exit code {code}; end of {log}:\n{end}")
    return done
