"""What a process needs of the machine around it: places for caches and locks, and for sockets, whose paths are short.

Libraries put both below ``$HOME`` and ``$TMPDIR`` without asking. Users without a home, homes that are read-only
(containers), and the long temporary folders of schedulers are common; :func:`prepare` makes them work, for this process
and for every process that it starts.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pact_nemo.errors import ConfigError

log = logging.getLogger(__name__)

#: Places that libraries write to: the variable that moves each, and where it is below the home without it.
PLACES = {
    "XDG_CACHE_HOME": ".cache",
    "XDG_CONFIG_HOME": ".config",
    "HF_HOME": ".cache/huggingface",
    "MEGATRON_CONFIG_LOCK_DIR": ".cache/huggingface",  # Megatron-Bridge locks here, whatever HF_HOME says
    "VLLM_CACHE_ROOT": ".cache/vllm",
    "VLLM_CONFIG_ROOT": ".config/vllm",
    "TORCH_HOME": ".cache/torch",
    "TORCH_EXTENSIONS_DIR": ".cache/torch_extensions",
    "TRITON_CACHE_DIR": ".triton/cache",
    "FLASHINFER_WORKSPACE_BASE": "",  # it adds .cache/flashinfer itself
    "MPLCONFIGDIR": ".config/matplotlib",
}
#: Variables of torch's allocator, and of CUDA's hardware queues.
ALLOCATOR_ENV, CONNECTIONS_ENV = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "CUDA_DEVICE_MAX_CONNECTIONS"
SOCKET_PATH_BYTES = 107  #: most that the kernel takes (sun_path)
_SOCKET_NAME_BYTES = 40  #: of a socket in a folder of :func:`short_folder`: vLLM's are "/" and a UUID
_FOLDER_NAME = "pact-"  #: and eight random characters


def writable(folder: str | os.PathLike[str]) -> bool:
    """Whether files can be made in a folder, or in one that can be made there."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return True
    except OSError:
        return False


def check_writable(folder: str | os.PathLike[str], key: str) -> None:
    """Raises ConfigError where no files can be made in the folder that the setting ``key`` names. Makes nothing."""
    if not writable(folder):
        raise ConfigError(
            f"{key}={folder}: no files can be made there; give a folder on a disk that this user may write to"
        )


def _existing(folder: str | os.PathLike[str]) -> Path:
    """The folder, or the nearest one above it that is there."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place


def disk_of(folder: str | os.PathLike[str]) -> int:
    """The device that a folder is on, or would be made on."""
    return os.stat(_existing(folder)).st_dev


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """What this user may still write to the disk of a folder."""
    return shutil.disk_usage(_existing(folder)).free


#: controllers of a line of /proc/self/cgroup, none in version 2 -> where its groups are, and the file of a limit
_CGROUPS = {"": ("sys/fs/cgroup", "memory.max"), "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes")}


@dataclass(frozen=True)
class HostMemory:
    """Memory that this process may use.

    Attributes:
        total: bytes.
        limit: the file that allows no more; None: that is all that the machine has.
    """

    total: int
    limit: Path | None = None


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """The machine's memory, or the least that a cgroup above this process allows: a container's, or a Slurm job's. None
    where the system doesn't say.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    try:
        words = (root / "proc/meminfo").read_text().split()
        found = HostMemory(int(words[words.index("MemTotal:") + 1]) * 1024)
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError, IndexError):
        return None
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers not in _CGROUPS:
            continue
        base, name = _CGROUPS[controllers]
        place = root / base / path.lstrip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(root / base):
                break
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                limit = int((folder / name).read_text())
                if limit < found.total:
                    found = HostMemory(limit, folder / name)
    return found


def prepare() -> None:
    """Give this process, and through its environment those that it starts, places to write to where the user's own
    can't be written. Idempotent.

    Only what can't be used is replaced: a private folder stands in for the home, and for each place of :data:`PLACES`.
    Call it before libraries are imported that look at these variables when they are.

    Raises:
        ConfigError: there is no temporary folder to write to, or none whose path is short enough for a socket.
    """
    temporary_base()
    moved = []
    home = _home()
    if home is None or not writable(home):
        moved.append(f"HOME={os.environ.get('HOME', '(not set)')}")
        os.environ["HOME"] = home = str(_stand_in())
    for variable, default in PLACES.items():
        said = os.environ.get(variable)
        if said:
            place = os.path.expanduser(said)
        elif (
            variable != "MEGATRON_CONFIG_LOCK_DIR"
            and default.startswith((".cache", ".config"))
            and variable[:4] != "XDG_"
        ):
            base, _, rest = default.partition("/")  # most of them ask XDG's variable first
            place = os.path.join(
                os.environ.get("XDG_CACHE_HOME" if base == ".cache" else "XDG_CONFIG_HOME") or os.path.join(home, base),
                rest,
            )
        else:
            place = os.path.join(home, default)
        if not writable(place):
            moved.append(f"{variable} ({place})")
            os.environ[variable] = str(_stand_in() / (default or ".cache"))
            Path(os.environ[variable]).mkdir(parents=True, exist_ok=True)
    try:
        getpass.getuser()
    except (
        KeyError,
        OSError,
        ImportError,
    ):  # a user id without a name, as containers have them: torch asks for the name
        os.environ["USER"] = os.environ["LOGNAME"] = f"user{os.getuid()}"
    if moved and os.environ.get("RANK", "0") == "0":
        log.warning("%s can't be written: caches and locks go below %s", ", ".join(moved), _stand_in())


def prepare_cuda(*, one_connection: bool) -> None:
    """Settings of CUDA for this process, where the user has none of their own. Before anything opens a GPU. The rollout
    server doesn't inherit them (``serving/launch.py``): vLLM's sleep mode has an allocator of its own.

    Args:
        one_connection: kernels start in the order of their launches, which megatron-core's overlap of tensor-parallel
            exchange and products counts on.
    """
    if not any(os.environ.get(name) for name in ALLOCATOR_ENV):
        # packed rows differ in length from step to step; segments that grow leave no gaps that nothing fits
        os.environ[ALLOCATOR_ENV[0]] = "expandable_segments:True"
    if one_connection:
        os.environ.setdefault(CONNECTIONS_ENV, "1")


def _home() -> str | None:
    found = os.path.expanduser("~")
    return found if os.path.isabs(found) else None


def _stand_in() -> Path:
    """A folder of this user's alone in the temporary folder, the same one for later runs."""
    folder = Path(tempfile.gettempdir()) / f"pact_nemo-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if (
            stat.S_ISDIR(found.st_mode)
            and found.st_uid == os.getuid()
            and not found.st_mode & 0o077
            and writable(folder)
        ):
            return folder
        problem = "it belongs to another user, is open to others or can't be written"
    except OSError as error:
        problem = str(error)
    raise ConfigError(
        f"neither HOME={os.environ.get('HOME', '(not set)')} nor {folder} can be used for caches ({problem}); "
        "set HOME or TMPDIR to a folder of your own"
    )


def temporary_base() -> Path:
    """The folder that folders with sockets are made in: the temporary one, or where its path is too long another that
    can be written.

    Raises:
        ConfigError: there is none.
    """
    try:
        own = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError(f"no temporary folder can be written ({error}); set TMPDIR to one of your own") from error
    room = SOCKET_PATH_BYTES - _SOCKET_NAME_BYTES - len(f"/{_FOLDER_NAME}") - 8
    others = [place for place in (os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp", "/dev/shm") if place]
    for place in (own, *others):
        if len(os.fsencode(place)) <= room and os.path.isdir(place) and writable(place):
            return Path(place)
    raise ConfigError(
        f"TMPDIR={own} is too long for sockets (at most {room} bytes), and none of {', '.join(others)} can be written;"
        " set TMPDIR to a shorter folder"
    )


def short_folder() -> Path:
    """A new folder of this user's alone for sockets. Who asks for it removes it.

    Raises:
        ConfigError: there is no place for it.
    """
    return Path(tempfile.mkdtemp(prefix=_FOLDER_NAME, dir=temporary_base()))  # mode 0700
