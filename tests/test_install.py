"""The interpreter that the environment is made with: found, or refused by name before anything is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


def interpreter(folder: Path, version: str, name: str = "python") -> Path:
    """A program that runs the real interpreter and says to be of another version."""
    program = folder / name
    program.parent.mkdir(parents=True, exist_ok=True)
    site = folder / "site"
    site.mkdir(exist_ok=True)
    numbers = ", ".join(version.split("."))
    (site / "sitecustomize.py").write_text(f"import sys\nsys.version_info = ({numbers}, 0, 'final', 0)\n")
    program.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


def check(python: Path, venv: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python), "VENV": str(venv)}
    return subprocess.run(
        ["bash", "tools/install.sh", "check"], cwd=REPO, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("3.10", "too old"),
        ("3.11", None),
        ("3.12", None),
        ("3.13", "Megatron-Bridge ends at Python 3.12"),
        ("3.20", "too new"),
    ],
)
def test_the_interpreter_is_one_that_every_package_has(tmp_path: Path, version: str, words: str | None) -> None:
    done = check(interpreter(tmp_path, version), tmp_path / "venv")
    if words is None:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert (
            done.returncode == 1
            and words in done.stderr
            and f"Python {version}" in done.stderr
            and "PYTHON=python3.12" in done.stderr
        )


def test_an_environment_of_another_version_is_not_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    interpreter(tmp_path / "venv", "3.11", "bin/python")
    done = check(interpreter(tmp_path, "3.12"), tmp_path / "venv")
    assert done.returncode == 1 and "holds Python 3.11" in done.stderr and "VENV=.venv312" in done.stderr


def find(version: str, path: list[Path], pyenv: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.pathsep.join([*map(str, path), "/usr/bin", "/bin"]), "PYENV_ROOT": str(pyenv)}
    return subprocess.run(
        ["bash", ".ci/find_python", version], cwd=REPO, env=environment, capture_output=True, text=True, timeout=60
    )


def test_a_shim_that_only_complains_is_no_interpreter(tmp_path: Path) -> None:
    shim = tmp_path / "shims" / "python3.19"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.19: command not found' >&2; exit 127\n")
    shim.chmod(0o755)
    real = interpreter(tmp_path / "pyenv" / "versions" / "3.19.4", "3.19", "bin/python")
    done = find("3.19", [shim.parent], tmp_path / "pyenv")
    assert (done.returncode, done.stdout.strip()) == (0, str(real)), done.stderr


def test_without_the_interpreter_the_checks_of_a_change_fail_aloud(tmp_path: Path) -> None:
    done = find("3.19", [], tmp_path / "pyenv")
    assert done.returncode == 1 and not done.stdout and "no Python 3.19 found" in done.stderr
    lines = (REPO / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert any(
        line.startswith('other="$(.ci/find_python 3.12)"') for line in lines
    )  # an assignment alone, so that its failure ends the script


def test_the_package_metadata_agree() -> None:
    assert 'requires-python = ">=3.11,<3.13"' in (REPO / "pyproject.toml").read_text()
