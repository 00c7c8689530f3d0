"""Whether the packages of a GPU environment fit each other: what each declares of another one, held against what is
installed. Imports none of them.

pip says such a thing once, in a line among many, when it installs; a run says it as a missing symbol.
"""

from __future__ import annotations

import importlib.metadata
import sys

from pact_nemo.planning.findings import GPU, NONE, Finding, version_of

#: package -> what it has to fit
NEEDS = {
    "vllm": ("torch", "transformers"),
    "megatron-bridge": ("megatron-core",),
    "flashinfer-python": ("torch",),
    "nvidia-resiliency-ext": ("torch",),
}
ENGINE, ENGINE_TORCH = "transformer-engine", "transformer-engine-torch"
_KERNELS = ("transformer-engine-cu13", "transformer-engine-cu12")
#: declared by Megatron-Bridge and left aside on purpose, with the tests' blessing (requirements.txt)
_LEFT_ASIDE = {("megatron-bridge", "transformers")}
_INSTALL = "bash tools/install.sh gpu"


def contradictions() -> list[tuple[str, str]]:
    """(what contradicts what, what to do about it) of the installed packages; empty where they fit."""
    return [*_declared(), *_transformer_engine()]


def _declared() -> list[tuple[str, str]]:
    try:
        from packaging.requirements import Requirement
        from packaging.version import Version
    except ImportError:  # a broken environment: other findings say so
        return []
    found = []
    for package, others in NEEDS.items():
        if (version := version_of(package)) is None:
            continue
        for text in importlib.metadata.requires(package) or []:
            need = Requirement(text)
            there = version_of(need.name)
            if need.name not in others or there is None or (package, need.name) in _LEFT_ASIDE:
                continue
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            # an image's torch is a build of its own: 2.13.0a0+nv of 2.13.0
            if not need.specifier.contains(Version(there).base_version, prereleases=True):
                what = f"{package} {version} wants {need.name}{need.specifier}, and {need.name} {there} is installed"
                found.append((what, f"take the pins of requirements.txt and requirements-gpu.txt: {_INSTALL}"))
    return found


def _transformer_engine() -> list[tuple[str, str]]:
    engine, fused = version_of(ENGINE), version_of(ENGINE_TORCH)
    kernels = {name: version for name in _KERNELS if (version := version_of(name)) is not None}
    if engine is None and fused is None and not kernels:
        return []
    if engine is None or fused is None:
        there = ", ".join(f"{name} {version_of(name)}" for name in (ENGINE, ENGINE_TORCH, *kernels) if version_of(name))
        missing = ENGINE_TORCH if fused is None else ENGINE
        what = f"Transformer Engine is half there: {there} without {missing}"
        if fused is None:
            what += ", which is source alone and has to be built against the torch that is there"
        return [(what, f"{_INSTALL} builds it; or pip uninstall the rest: without it runs take the local layers")]
    versions = {ENGINE: engine, ENGINE_TORCH: fused, **kernels}
    if len({version.partition("+")[0] for version in versions.values()}) > 1:
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        return [
            (f"Transformer Engine's parts are of different versions: {shown}", f"pip uninstall them, then {_INSTALL}")
        ]
    return []


def agreement() -> Finding:
    """As a row of the doctor's table."""
    purpose, found = "packages that fit each other", contradictions()
    if not found:
        return Finding("agreement", True, "no contradiction", purpose, NONE)
    return Finding(
        "agreement",
        False,
        "; ".join(what for what, _ in found),
        purpose,
        GPU,
        "; ".join(dict.fromkeys(r for _, r in found)),
    )


def main() -> int:
    """Print contradictions; 1 where there is one."""
    for what, remedy in (found := contradictions()):
        print(f"{what}; {remedy}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
