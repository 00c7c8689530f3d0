"""The device guard and hooks that autograd asks of CUDA tensors, for a process that sees no GPU: ``guard.cpp``.

Python can't give them: autograd's engine asks for them in C++, before any operation is dispatched, and torch keeps the
hooks that it finds while it is imported. So one process compiles them, and others load them before they import torch.
Nothing here imports torch by itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

from pact_nemo.errors import MissingDependency

SOURCE = Path(__file__).with_name("guard.cpp")
INSTALL = "pact_install_guard"


def build_guard() -> Path:
    """The compiled library, kept where torch keeps its extensions. The first time for a version of torch takes half a
    minute.

    Raises:
        MissingDependency: there is no C++ compiler that can compile it.
    """
    import torch
    from torch.utils import cpp_extension

    made_of = f"{SOURCE.read_text()}{torch.__version__}{torch.__file__}"
    folder = Path(cpp_extension.get_default_build_root()) / "pact_rehearsal_guard"
    library = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, "-O1", "-std=c++20", "-fPIC", "-shared", str(SOURCE), "-o", str(made)]
        command += [f"-I{path}" for path in cpp_extension.include_paths()]
        command += [word for path in cpp_extension.library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
        command += ["-lc10", "-ltorch_cpu"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise MissingDependency(
                f"a rehearsal needs a C++ compiler, and there is no {compiler}: install g++"
            ) from error
        if done.returncode:
            raise MissingDependency(
                f"a rehearsal needs a C++ compiler, and {compiler} can't compile {SOURCE}: {done.stderr[-600:]}"
            )
        made.replace(library)
    return library


def preload(library: Path) -> ctypes.CDLL:
    """Load torch's own libraries and then the guard, in a process that has not imported torch. Hand the result to
    :func:`install` once it has.
    """
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def install(guard: ctypes.CDLL) -> None:
    """Put the guard in the place of whatever torch's import has put there."""
    getattr(guard, INSTALL)()
