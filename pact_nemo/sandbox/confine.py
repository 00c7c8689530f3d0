"""Linux confinement by system calls alone: namespaces, a read-only root of its own, dropped privileges. Standard
library only.

This file runs inside the worker process, so it must not import the package. Two stages:

``enter``      once per worker: new mount, PID, network, IPC and UTS namespaces (through a user namespace unless root),
a root folder that
               holds read-only views of the interpreter and the system libraries and nothing else of the host, no
               network device that is up.
``drop``       once per call, in the forked child: its own mount and IPC namespace with an empty memory-backed /tmp,
resource limits, no
               capabilities, ``no_new_privs``, a user id of its own when the worker is root.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Sequence

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

_libc = ctypes.CDLL(None, use_errno=True)


class Unconfined(OSError):
    """This system can't confine the worker; says which step failed."""


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise Unconfined(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int, what: str) -> None:
    _check(_libc.unshare(flags), f"unshare ({what})")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [part.encode() if part is not None else None for part in (source, target, kind)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), data.encode() if data is not None else None), f"mount {target}")


def _syscall(table: dict[str, int], *arguments: object) -> int:
    number = table.get(os.uname().machine)
    if number is None:
        raise Unconfined(0, f"no system call numbers for {os.uname().machine}")
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    return result


def end_with_parent() -> None:
    """End this process when its parent ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl")


def enter(read_only: list[str], wait: Callable[[int], int] | None = None) -> None:
    """Confine this process and everything it starts. It must have one thread.

    Returns in a child that is process 1 of a new PID namespace; the caller's process only waits for it and never
    returns.

    Args:
        read_only: host folders that the worker sees, at the same paths, read-only; system libraries come on top. A
            file stands for itself.
        wait: what the caller's process does: gives the wait status of the process that it is given; None: it waits.

    Raises:
        Unconfined: the kernel refuses a step.
    """
    root = os.geteuid() == 0
    uid, gid = os.geteuid(), os.getegid()
    namespaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    unshare(namespaces if root else namespaces | CLONE_NEWUSER, "namespaces")
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as handle:
                handle.write(text)
    child = os.fork()
    if child:
        status = wait(child) if wait is not None else os.waitpid(child, 0)[1]
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    end_with_parent()
    _new_root(read_only)
    _check(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")  # /proc/1 of the worker stays closed to the tools it runs


def _new_root(read_only: list[str]) -> None:
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    base = "/tmp"
    below = _held([path for path in read_only if _within(path, base)])  # before something else is mounted over them
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    seen: list[str] = []
    for folder in sorted({os.path.abspath(path) for path in [*SYSTEM_FOLDERS, *read_only]}):
        if any(folder == other or folder.startswith(other + "/") for other in seen):
            continue
        if os.path.islink(folder) and folder in SYSTEM_FOLDERS:
            os.symlink(os.readlink(folder), base + folder)
        elif folder in below:
            _show(below[folder], base + folder)
            seen.append(folder)
        elif os.path.isdir(folder):
            os.makedirs(base + folder, exist_ok=True)
            _bind(folder, base + folder)
            seen.append(folder)
        elif os.path.isfile(folder):
            os.makedirs(os.path.dirname(base + folder), exist_ok=True)
            open(base + folder, "w").close()
            _bind(folder, base + folder)
    for path in (*SYSTEM_FILES, *DEVICES):
        if os.path.exists(path):
            os.makedirs(os.path.dirname(base + path), exist_ok=True)
            open(base + path, "w").close()
            _bind(path, base + path, device=path in DEVICES)
    for folder in ("/proc", "/tmp", "/old"):
        os.makedirs(base + folder, exist_ok=True)
    mount("proc", base + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(base)
    _check(_syscall(SYS_PIVOT_ROOT, b".", b"old"), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/old", MNT_DETACH), "umount /old")
    os.rmdir("/old")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _bind(source: str, target: str, device: bool = False) -> None:
    mount(source, target, None, MS_BIND | (0 if device else MS_REC))
    # flags that the source has may not be taken away in a user namespace; asking for all of them is always allowed
    flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | (0 if device else MS_NODEV)
    try:
        mount(None, target, None, flags)
    except Unconfined:
        mount(None, target, None, flags | MS_NOEXEC if not device else flags)


def _within(path: str, folder: str) -> bool:
    return os.path.abspath(path).startswith(folder + "/")


def _held(paths: Sequence[str]) -> dict[str, int]:
    """A descriptor of each path: it reaches what is below a mount that comes later."""
    return {os.path.abspath(path): os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths if os.path.exists(path)}


def _show(descriptor: int, target: str) -> None:
    """Show what a descriptor of :func:`_held` is of, read-only."""
    source = f"/proc/self/fd/{descriptor}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
    _bind(source, target)
    os.close(descriptor)


def drop(limits: dict[str, float], confined: bool, keep: Sequence[str] = (), proc: bool = False) -> None:
    """Give this process a scratch folder and resource limits, and take its privileges away for good.

    Args:
        limits: ``memory_mb``, ``cpu_seconds``, ``scratch_mb``, ``processes``, ``uid``.
        confined: False: resource limits only.
        keep: what stays visible below ``/tmp``.
        proc: show the processes of this process's own PID namespace, which it is the first of.

    Raises:
        Unconfined: the kernel refuses a step.
    """
    if confined:
        unshare(CLONE_NEWNS | CLONE_NEWIPC, "scratch")
        held = _held(keep)
        mount(
            "tmpfs",
            "/tmp",
            "tmpfs",
            MS_NOSUID | MS_NODEV | MS_NOEXEC,
            f"size={int(limits['scratch_mb'])}m,mode=1777,nr_inodes=4096",
        )
        for path, descriptor in held.items():
            _show(descriptor, path)
        if proc:
            mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        os.chdir("/tmp")
    memory = int(limits["memory_mb"]) << 20
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, int(limits["cpu_seconds"])),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, int(limits["scratch_mb"]) << 20),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NPROC, int(limits["processes"])),
    ):
        resource.setrlimit(kind, (value, value))
    if not confined:
        return
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    if os.geteuid() == 0:
        os.setgroups([])
        own = int(limits["uid"])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(_syscall(SYS_CAPSET, header, (ctypes.c_uint32 * 6)()), "capset")
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    _filter_system_calls()


DENIED = (
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "kcmp",
    "pidfd_getfd",
    "mount",
    "umount2",
    "pivot_root",
    "chroot",
    "unshare",
    "setns",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "keyctl",
    "add_key",
    "request_key",
    "init_module",
    "finit_module",
    "delete_module",
    "kexec_load",
    "reboot",
    "swapon",
    "swapoff",
    "acct",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "open_by_handle_at",
    "name_to_handle_at",
    "fsopen",
    "fsmount",
    "move_mount",
    "open_tree",
    "mount_setattr",
    "quotactl",
    "syslog",
    "personality",
)


def has_seccomp() -> bool:
    """Whether libseccomp and its Python binding are here."""
    try:
        import pyseccomp  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _filter_system_calls() -> None:
    """A second fence where libseccomp is present: calls that only serve to widen the confinement fail with EPERM."""
    if not has_seccomp():
        return
    import errno

    import pyseccomp

    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in DENIED:
        try:
            rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
        except (OSError, ValueError):  # unknown to this kernel or architecture
            continue
    rules.load()


def interpreter_folders() -> list[str]:
    """What the worker needs to see of the host: this interpreter and its packages."""
    return sorted(
        {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
        | {sys.prefix, sys.base_prefix}
    )
