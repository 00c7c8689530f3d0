"""A Slurm cluster of several slurmd on this host, below one folder, for tests of the job scripts."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")


def missing() -> list[str]:
    """What a machine lacks to run a cluster: programs, root, the munge user."""
    lacks = [
        name for name in NEEDED if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None
    ]
    if os.geteuid() != 0:
        lacks.append("root")
    try:
        pwd.getpwnam("munge")
    except KeyError:
        lacks.append("user munge")
    return lacks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """munged, slurmctld and a slurmd per node, as daemons of this test; a context manager.

    Attributes:
        env: environment for sbatch, squeue and scontrol.
    """

    def __init__(self, folder: Path, nodes: int = 2):
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(nodes)]
        self.conf = folder / "slurm.conf"
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.env = {**os.environ, "PATH": path, "SLURM_CONF": str(self.conf)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        folder = self.folder
        for name in ("state", "spool", "log", "munge"):
            (folder / name).mkdir(parents=True)
        for parent in (folder, *folder.parents):  # munged runs as its own user and must reach its folder
            if parent.stat().st_mode & 0o005 != 0o005 and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o055)
        sockets = self._start_munged()
        self.conf.write_text("\n".join(self._settings(sockets)) + "\n")
        self._until(lambda: sockets.exists(), 20, "munged's socket")
        self._start("slurmctld", ["slurmctld", "-D"])
        for name in self.nodes:
            self.start_node(name)
        self._until(lambda: self.ask("sinfo", "-h", "-o", "%T").split() == ["idle"], 60, "idle nodes")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.conf.exists():
            subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True, timeout=30)
            time.sleep(1)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def start_node(self, name: str) -> None:
        """Start (again) the slurmd of a node."""
        self._start(name, ["slurmd", "-D", "-N", name])

    def kill_node(self, name: str) -> None:
        """As if it lost power: slurmd and everything it started are killed."""
        self._daemons[name].kill()
        self._daemons[name].wait(10)
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = (Path("/proc") / pid / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURMD_NODENAME={name}".encode() in environment and int(pid) != os.getpid():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def ask(self, *command: str) -> str:
        """Output of a Slurm command; empty while the controller doesn't answer."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else ""

    def state(self, job: str) -> str:
        """A job's state, e.g. ``RUNNING``."""
        return next(
            (
                word.partition("=")[2]
                for word in self.ask("scontrol", "show", "job", job).split()
                if word.startswith("JobState=")
            ),
            "",
        )

    def wait_state(self, job: str, wanted: tuple[str, ...], seconds: float) -> str:
        """Until the job is in one of the states. A requeued job, which Slurm holds back for two minutes, is let start
        at once.
        """

        def reached() -> bool:
            state = self.state(job)
            if state == "PENDING" and state not in wanted:
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
            return state in wanted

        self._until(reached, seconds, f"job {job} in {wanted}")
        return self.state(job)

    def _start_munged(self) -> Path:
        """Returns its socket."""
        folder = self.folder
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        user = pwd.getpwnam("munge")
        for item in (folder / "munge", key):
            os.chown(item, user.pw_uid, user.pw_gid)
        (folder / "munge").chmod(0o755)
        sockets = folder / "munge" / "socket"
        self._start(
            "munged",
            [
                "munged",
                "--foreground",
                f"--socket={sockets}",
                f"--key-file={key}",
                f"--pid-file={folder / 'munge' / 'pid'}",
                f"--log-file={folder / 'munge' / 'log'}",
                f"--seed-file={folder / 'munge' / 'seed'}",
                "--force",
            ],
            user=(user.pw_uid, user.pw_gid),
        )
        return sockets

    def _settings(self, sockets: Path) -> list[str]:
        """Lines of slurm.conf."""
        folder = self.folder
        ports = {name: free_port() for name in self.nodes}
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={socket.gethostname()}(127.0.0.1)",
            f"SlurmctldPort={free_port()}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={sockets}",
            "CryptoType=crypto/munge",
            "MpiDefault=none",
            "ProctrackType=proctrack/pgid",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "ReturnToService=2",
            "JobRequeue=1",
            "SlurmdTimeout=10",
            "SlurmctldTimeout=10",
            "KillWait=60",
            "MinJobAge=300",
            "SlurmdParameters=config_overrides",
            "SchedulerParameters=requeue_setup_env_fail,sched_interval=2,bf_interval=2",
            "AccountingStorageType=accounting_storage/none",
            "JobAcctGatherType=jobacct_gather/none",
            f"StateSaveLocation={folder / 'state'}",
            f"SlurmdSpoolDir={folder / 'spool'}/%n",
            f"SlurmctldPidFile={folder / 'ctld.pid'}",
            f"SlurmdPidFile={folder}/%n.pid",
            f"SlurmctldLogFile={folder / 'log' / 'ctld'}",
            f"SlurmdLogFile={folder / 'log'}/%n",
            "ReconfigFlags=KeepPartState",
        ]
        lines += [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={ports[name]} CPUs=2"
            for name in self.nodes
        ]
        lines += [
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES"
        ]
        return lines

    def _start(self, name: str, command: list[str], user: tuple[int, int] | None = None) -> None:
        output = open(self.folder / "log" / f"{name}.out", "ab")  # noqa: SIM115 - the daemon's
        extra = {"user": user[0], "group": user[1]} if user is not None else {}
        self._daemons[name] = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=self.env, start_new_session=True, **extra
        )  # type: ignore[call-overload]

    def _until(self, reached: object, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not reached():  # type: ignore[operator]
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"{p.name}: {p.read_text(errors='replace')[-1500:]}"
                    for p in sorted((self.folder / "log").iterdir())
                )
                raise TimeoutError(f"{what}: not within {seconds} s\n{logs}")
            time.sleep(0.5)
