"""The ranks of a job on one machine: started, watched and ended together.

The processes are those of torch's elastic launcher (``torch.distributed.elastic.multiprocessing``), which ``torchrun``
starts its own with. Its agent above them is left out: at a signal it gives the ranks 30 seconds and kills them, and an
update under way takes longer; and its meeting point listens on every interface of the machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pact_nemo.errors import ConfigError
from pact_nemo.runtime.hangs import EXIT_CODE as HUNG
from pact_nemo.runtime.interrupt import EXIT_CODE as INTERRUPTED
from pact_nemo.runtime.interrupt import SIGNALS

#: Set for the ranks: the launcher's process id, and the folder of their logs, which rank 0 takes into its run folder.
LAUNCHER_ENV, LOGS_ENV = "PACT_LAUNCHER", "PACT_RANK_LOGS"
#: seconds that the others have to follow a rank that left in order, and one that did not
FOLLOW_S, FOLLOW_FAILURE_S = 120.0, 20.0
_PERIOD_S = 0.1
_LAST_LINES = 25


def started_by() -> str | None:
    """What started this process as one rank of several; None where nothing did.

    Raises:
        ConfigError: a Slurm step of several tasks that says no ranks: each task would be a run of its own.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return "this launcher" if LAUNCHER_ENV in os.environ else "torchrun or srun"
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_STEP_ID" in os.environ and tasks != "1":
        raise ConfigError(
            f"srun started {tasks} tasks of this command without RANK and WORLD_SIZE, and each would be a run of its"
            " own; take the job scripts (sbatch slurm/pact_bfcl.sh ...), or srun --ntasks=1"
        )
    return None


@dataclass
class Ending:
    """How the ranks ended.

    Attributes:
        codes: rank -> exit code, of those that ended by themselves; below 0: minus the signal that killed it.
        first: the rank that failed first; None: all ended with 0.
        logs: where their logs are now.
    """

    codes: dict[int, int] = field(default_factory=dict)
    first: int | None = None
    logs: Path = Path()

    @property
    def code(self) -> int:
        """Exit code of the job: the first failing rank's, 128 + signal of one that was killed; 76 of any that hung."""
        if self.first is None:
            return 0
        if HUNG in self.codes.values():
            return HUNG
        code = self.codes[self.first]
        return code if code > 0 else 128 - code

    def message(self) -> str:
        """The failing rank and its last lines."""
        if self.first is None or self.code == INTERRUPTED:
            return ""
        code, log = self.codes[self.first], self.logs / f"rank-{self.first}.err"
        how = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
        text = f"rank {self.first} {how}, and the job with it; logs in {self.logs}"
        if self.first == 0 or not log.is_file():  # the first rank's lines are on the terminal
            return text
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join([*(f"[rank {self.first}] {line}" for line in lines), text])


class RankProcesses:
    """``world`` processes of one command, a rank each.

    Standard error goes to ``rank-N.err`` of the log folder, the first rank's to the terminal as well. Standard output:
    the first rank's is this process's own, the others' goes to ``rank-N.out``.

    Args:
        command: program and arguments.
        world: ranks, all of them here.
        logs: an empty folder.
    """

    def __init__(self, command: list[str], world: int, logs: Path):
        self._command, self._world, self._logs = command, world, logs
        self._asked: list[int] = []

    def run(self) -> Ending:
        """Start them and return when all have ended. SIGINT, SIGTERM, SIGUSR1 and SIGHUP are handed on to every rank,
        once each: the ranks leave by themselves (:mod:`pact_nemo.runtime.interrupt`).
        """
        from torch.distributed.elastic.multiprocessing import start_processes

        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGURG"  # one that nobody sends: it would take ours over
        ranks = range(self._world)
        folder = os.open(self._logs, os.O_RDONLY)
        with _meeting_point() as port, _handed_on(self._asked):
            context = start_processes(
                name="rank",
                entrypoint=self._command[0],
                args={rank: tuple(self._command[1:]) for rank in ranks},
                envs={rank: self._environment(rank, port) for rank in ranks},
                logs_specs=_rank_logs(self._logs),
                log_line_prefixes={0: ""},
            )
            try:
                ending = self._watch(context)
            finally:
                context.close()
        ending.logs = Path(os.readlink(f"/proc/self/fd/{folder}"))  # the first rank has moved it into its run folder
        os.close(folder)
        return ending

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process keeps the meeting point: it outlives the ranks
            "WORLD_SIZE": str(self._world),
            "LOCAL_WORLD_SIZE": str(self._world),
            LAUNCHER_ENV: str(os.getpid()),
            LOGS_ENV: str(self._logs),
        }
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if "OMP_NUM_THREADS" not in os.environ:
            shared["OMP_NUM_THREADS"] = str(max(1, cores // self._world))
        return shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}

    def _watch(self, context: Any) -> Ending:
        """Until all have ended, or those that are left haven't followed a rank that failed."""
        ending, failed_at = Ending(), 0.0
        pids: Mapping[int, int] = context.pids()
        while len(ending.codes) < self._world:
            for number in self._asked:
                _send(number, [pid for rank, pid in pids.items() if rank not in ending.codes])
            self._asked.clear()
            for rank, pid in pids.items():
                if rank not in ending.codes and (code := _exit_code(pid)) is not None:
                    ending.codes[rank] = code
                    if code != 0 and ending.first is None:
                        ending.first, failed_at = rank, time.monotonic()
            if ending.first is not None:
                patience = FOLLOW_S if ending.codes[ending.first] == INTERRUPTED else FOLLOW_FAILURE_S
                if time.monotonic() - failed_at > patience:
                    break
            time.sleep(_PERIOD_S)
        return ending


def _exit_code(pid: int) -> int | None:
    """Of a child that has ended, which stays to be waited for; None while it runs."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _send(number: int, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.contextmanager
def _handed_on(asked: list[int]) -> Iterator[None]:
    """Inside the block, signals that ask for an end are written into ``asked``."""

    def take(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    taken = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # `nohup` ignores it
    before = {number: signal.signal(number, take) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _meeting_point() -> Iterator[int]:
    """Port of a store that the ranks meet at; on the loopback interface alone."""
    from torch.distributed import TCPStore

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(4096)
        port = listening.getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
        yield port
        del store


def _rank_logs(folder: Path) -> Any:
    """Where each rank's lines go, for torch's launcher."""
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

    class RankLogs(LogsSpecs):
        @property
        def root_log_dir(self) -> str:
            return str(folder)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            errors = {rank: str(folder / f"rank-{rank}.err") for rank in envs}
            return LogsDest(
                stdouts={rank: str(folder / f"rank-{rank}.out") if rank else "" for rank in envs},
                stderrs=errors,
                tee_stderrs={0: errors[0]},
                error_files=dict.fromkeys(envs, os.devnull),
            )

    return RankLogs()
