"""One run of a comparison in a subprocess of its own: not run again when it is finished, resumed when it was cut."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pact_nemo.checkpoints.manifest import read_manifest
from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config, to_dict
from pact_nemo.errors import ConfigError, PactError
from pact_nemo.report.comparison import flat
from pact_nemo.report.data import load_run

REPOSITORY = Path(__file__).resolve().parents[2]


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


def finished(root: Path) -> Path | None:
    """The run folder under ``root`` that has a summary, or None."""
    return next((path.parent for path in sorted(root.glob("*/summary.json")) if not path.parent.is_symlink()), None)


def settings_of(config: Path, seed: int, overrides: Sequence[str]) -> dict[str, str]:
    """What a run has resolved, by dotted key, as text; without ``run`` and the place of its weights, which differ by
    machine.
    """
    found = flat(to_dict(load_config([config], [f"run.seed={seed}", *overrides])))
    return {key: value for key, value in found.items() if not key.startswith("run.") and key != "model.path"}


def unlike(had: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Keys of the settings that a run doesn't have as they are wanted. One of before a setting existed had what is now
    its default.
    """
    defaults = flat(asdict(Config()))
    return [key for key, value in wanted.items() if had.get(key, defaults.get(key, value)) != value]


def digest(settings: dict[str, str]) -> str:
    """Of the settings that are not the defaults: a setting that is added later changes no digest."""
    defaults = flat(asdict(Config()))
    own = sorted(f"{key}={value}" for key, value in settings.items() if defaults.get(key) != value)
    return hashlib.blake2b("\n".join(own).encode(), digest_size=16).hexdigest()


def weights_of(hf: Path) -> str:
    """Digest of an export's weights, by its manifest; empty where there is none."""
    if not (hf / "manifest.json").is_file():
        return ""
    files = read_manifest(hf).files
    own = {name: entry for name, entry in sorted(files.items()) if name.endswith(".safetensors")}
    return hashlib.blake2b(json.dumps(own, sort_keys=True, default=vars).encode(), digest_size=16).hexdigest()


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
    wanted = settings_of(config, seed, overrides)
    for folder in [done] if done is not None else cut[-1:]:
        had = flat(load_run(folder, episodes=False).config)
        if different := unlike(had, wanted):
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
        code = subprocess.call([sys.executable, recipe, *words], stdout=out, stderr=subprocess.STDOUT)
    done = finished(root)
    if code != 0 or done is None:
        end = "\n".join(log.read_text(encoding="utf-8").split("\n")[-8:])
        raise PactError(f"{config.name}, seed {seed}: exit code {code}; end of {log}:\n{end}")
    return done
