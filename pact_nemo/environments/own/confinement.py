"""``agent.isolation=sandbox``: the user's class in a confined process, for code that nobody vouches for.

The process that starts rollouts holds no code of the user's: it is privileged within its namespaces. Each rollout is a
fork of it that gives its privileges up (:mod:`pact_nemo.sandbox.confine`) before it imports the user's file. So the
import is confined as well, and is made anew for each rollout.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pact_nemo
from pact_nemo.environments.own.settings import OwnConfig
from pact_nemo.environments.own.signatures import as_text, signature
from pact_nemo.errors import ConfigError
from pact_nemo.sandbox import confine
from pact_nemo.sandbox.pool import FIRST_UID

MEMORY_MB = 1024  #: of address space beyond what a rollout starts with, where ``agent.memory_mb`` says none
_LIMITS = {"cpu_seconds": 3600, "processes": 64, "scratch_mb": 64}
_LOOK_S = 0.5  #: between looks at whether the trainer is still there
_TEMPORARY = "/tmp"
#: all that a rollout's environment has; a set has the same order in every run
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": _TEMPORARY,
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_REMEDY = (
    "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1; a container needs --security-opt"
    " seccomp=unconfined or CAP_SYS_ADMIN), or set agent.isolation=process for code that you trust"
)


def plan(reference: str, config: OwnConfig) -> dict[str, Any]:
    """What the confined processes need to know, as JSON.

    Args:
        reference: ``path/to/file.py:Class``, ``module:Class``, ``path/to/file.py`` or ``module``.

    Raises:
        ConfigError: the file's folder must not be shown, or can't be read by a rollout.
    """
    place, colon, attribute = reference.rpartition(":")
    place = place if colon else reference
    if place.endswith(".py"):
        file = Path(place).expanduser().resolve()
        folder = file.parent
        _check_folder(file)
        place = str(file)
    else:
        folder = _folder_of_module(place)
    ours = Path(pact_nemo.__file__).resolve().parent
    return {
        "reference": f"{place}:{attribute}" if colon else place,
        "read_only": [*confine.interpreter_folders(), str(ours), str(folder)],
        "limits": {**_LIMITS, "memory_mb": config.memory_mb if config.memory_mb is not None else MEMORY_MB},
        "uid": FIRST_UID + (os.getpid() % 100_000) * 10_000,
    }


def _check_folder(file: Path) -> None:
    """A rollout sees the folder of its file and runs under a user id of its own where the trainer is root."""
    home, folder = Path.home().resolve(), file.parent
    if folder in (home, *home.parents):
        raise ConfigError(
            f"agent.tools={file}: agent.isolation=sandbox shows its folder to the tools, and {folder} holds your home"
            " folder; put the file into a folder of its own"
        )
    if not file.is_file() or os.geteuid() != 0:
        return
    for path, needed in ((folder, 0o005), (file, 0o004)):
        if path.stat().st_mode & needed != needed:
            raise ConfigError(
                f"agent.tools={file}: agent.isolation=sandbox runs it under a user id of its own, which may not read"
                f" {path}; chmod -R o+rX {folder}"
            )


def _folder_of_module(name: str) -> Path:
    try:
        found = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConfigError(f"agent.tools: there is no module {name!r}; give path/to/file.py:Class or module:Class")
    folders = list(found.submodule_search_locations or ())
    if not folders and found.origin in (None, "built-in", "frozen"):
        raise ConfigError(f"agent.tools: the module {name!r} is part of the interpreter")
    return Path(folders[0] if folders else str(found.origin)).resolve()


def enter(plan: dict[str, Any], trainer: int) -> None:
    """Confine this process, which starts rollouts and has one thread. Returns in its child; this process stays until
    the child or the trainer has ended.

    Raises:
        ConfigError: the system refuses to confine.
    """
    confine.has_seccomp()  # imported once, not in every rollout; and so is what describes a first tool
    as_text(signature(_example, "example", "example").bind({"text": "", "count": 1}))
    try:
        confine.enter(plan["read_only"], lambda pid: _stay(pid, lambda: os.getppid() == trainer))
    except OSError as error:
        raise ConfigError(
            f"agent.isolation=sandbox: this system can't confine the tools ({error}); {_REMEDY}"
        ) from error


def _example(text: str, count: int = 1) -> None:
    """A tool that is only described."""


def _stay(pid: int, needed: Callable[[], bool]) -> int:
    """The wait status of a child, which is killed when it isn't needed any more."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if not needed():
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        time.sleep(_LOOK_S)


def become_rollout(plan: dict[str, Any], number: int) -> None:
    """Give up all privileges, in a process that is the first of a PID namespace of its own, with an empty ``/tmp``.
    Returns in that process; this one waits for it and ends as it did.

    Raises:
        OSError: the system refuses a step.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used_mb = pages * resource.getpagesize() >> 20
    confine.unshare(confine.CLONE_NEWPID, "rollout")
    child = os.fork()
    if child:
        _end_as(os.waitpid(child, 0)[1])
    limits = {
        **plan["limits"],
        "memory_mb": used_mb + plan["limits"]["memory_mb"],
        "uid": plan["uid"] + number % 10_000,
    }
    below = [folder for folder in plan["read_only"] if Path(folder).is_relative_to(_TEMPORARY)]
    confine.drop(limits, True, keep=below, proc=True)
    confine.end_with_parent()  # giving up a user id takes that back


def _end_as(status: int) -> None:
    """End with the exit code, or by the signal, of a wait status."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)
