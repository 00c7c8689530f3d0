"""One run of a comparison in a subprocess of its own: not run again when it is finished, resumed when it was cut."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pact_nemo.config.load import load_config
from pact_nemo.config.schema import to_dict
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
    if done is not None:
        wanted = flat(to_dict(load_config([config], [f"run.seed={seed}", *overrides])))
        different = [
            key
            for key, value in flat(load_run(done, episodes=False).config).items()
            if key in wanted and wanted[key] != value
        ]
        different = [key for key in different if not key.startswith("run.")]
        if different:
            raise ConfigError(
                f"{done} was run with other settings ({', '.join(different)}); give --root another folder, or delete it"
            )
        return done
    recipe = str(REPOSITORY / "recipes" / "pact.py")
    cut = [path.parent for path in sorted(root.glob("*/checkpoints/latest")) if not path.parent.parent.is_symlink()]
    words = (
        ["--resume", str(cut[-1].parent)]
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
