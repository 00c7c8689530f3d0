"""The interpreter that the environment is made with: found, or refused by name before anything is downloaded."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pact_nemo import checkout

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


PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def pins(lock: str) -> dict[str, list[str]]:
    """Versions of each package of a lock; several, where they depend on the Python version."""
    found: dict[str, list[str]] = {}
    for line in (REPO / lock).read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?(==|~=|>=)([\w.+]+)", line):
            found.setdefault(canonicalize_name(match[1]), []).append(match[3])
    return found


def needs(*extras: str) -> list[Requirement]:
    words = [*PROJECT["dependencies"], *(word for name in extras for word in PROJECT["optional-dependencies"][name])]
    return [Requirement(word) for word in words]


def test_the_package_metadata_agree() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.13"
    assert set(PROJECT["optional-dependencies"]) == {"cpu", "gpu", "wandb", "mlflow", "tau2", "dev", "docs"}


def test_the_ranges_hold_what_the_locks_pin() -> None:
    """Loggers are optional: their pins are looked at where the lock has them."""
    for lock, required, optional in (
        ("requirements.txt", needs("cpu", "dev", "docs"), needs("wandb", "mlflow", "tau2")),
        ("requirements-gpu.txt", needs("gpu")[len(PROJECT["dependencies"]) :], []),
    ):
        versions = pins(lock) | {"torch": ["2.13.0"]}  # tools/install.sh puts it there first
        for need in required:
            assert versions.get(canonicalize_name(need.name)), f"{lock} pins no {need.name}"
        for need in [*required, *optional]:
            for version in versions.get(canonicalize_name(need.name), []):
                assert need.specifier.contains(version), f"{need} leaves out {version} of {lock}"
    assert "\nTORCH=2.13.0\n" in (REPO / "tools" / "install.sh").read_text()


def test_what_the_package_imports_is_among_its_dependencies() -> None:
    """What stands at the top of a module is imported in every environment."""
    known = {"megatron": "megatron-core", "yaml": "PyYAML", "jinja2": "Jinja2", "bfcl_eval": "bfcl-eval"}
    elsewhere = {
        "vllm",
        "pact_nemo",
        "__future__",
        "confine",
        "limits",
    }  # an extra; itself; files of the sandbox's worker
    names = {canonicalize_name(need.name) for need in needs()}
    for path in sorted((REPO / "pact_nemo").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for module in {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - elsewhere:
                assert canonicalize_name(known.get(module, module)) in names, f"{path} imports {module}"


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_every_console_script_starts_a_file_of_the_checkout() -> None:
    assert set(PROJECT["scripts"]) == set(checkout.SCRIPTS)
    assert set(PROJECT["scripts"].values()) == {"pact_nemo.checkout:console"}
    for script in checkout.SCRIPTS.values():
        assert (REPO / script).is_file()


def test_a_console_script_is_the_file_with_the_same_words() -> None:
    program = "import sys; sys.argv[0] = '/x/bin/pact-report'; from pact_nemo.checkout import console; console()"
    (named, direct) = run(["-c", program, "--help"]), run([str(REPO / "tools" / "report.py"), "--help"])
    assert (named.returncode, named.stdout) == (0, direct.stdout), named.stderr
    assert "usage: report.py" in direct.stdout


def test_a_console_script_without_a_checkout_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pact-train"])
    with pytest.raises(SystemExit) as caught:
        checkout.console()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "recipes/pact_bfcl.py" in said and str(tmp_path) in said and "clone" in said


@pytest.mark.parametrize("script", ["recipes/pact_bfcl.py", "recipes/pact_ftrl.py", "tools/report.py", "tools/plan.py"])
def test_another_checkouts_script_is_refused_or_runs_its_own_code(tmp_path: Path, script: str) -> None:
    """A checkout's script and another one's environment: never the other one's code without a word."""
    for folder in ("pact_nemo", "recipes", "tools"):
        shutil.copytree(REPO / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    mark = tmp_path / "pact_nemo" / "checkout.py"
    mark.write_text(mark.read_text() + "\nprint('code of the copy', file=sys.stderr)\n")
    foreign = run([str(tmp_path / script), "--help"], PYTHONPATH=str(REPO))
    assert foreign.returncode == 2 and str(REPO) in foreign.stderr and f"PYTHONPATH={tmp_path}" in foreign.stderr
    assert "code of the copy" not in foreign.stderr and not foreign.stdout
    own = run([str(tmp_path / script), "--help"], PYTHONPATH=str(tmp_path))
    assert own.returncode == 0 and "usage:" in own.stdout and "code of the copy" in own.stderr


def test_path_set_up_has_one_home() -> None:
    """Every script enters its checkout; nothing else touches the import path."""
    own = {"tools/doctor.py", "tools/install.sh"}  # the doctor runs where nothing is installed
    for path in [*(REPO / "recipes").glob("*.py"), *(REPO / "tools").glob("*.py")]:
        text, name = path.read_text(), path.relative_to(REPO).as_posix()
        assert name in own or "sys.path" not in text, name
        assert name in own or "pact_nemo" not in text or "checkout.enter(__file__)" in text, name
