"""What a person sees while a run goes on: the phase, how far it is, how long is left. Rank 0 only."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pact_nemo.runtime.hangs import beat
from pact_nemo.runtime.terminal import RunLog

PLAIN_INTERVAL_S = 5.0  #: without a terminal a phase says something at most this often
RECENT_STEPS = 5  #: the remaining time is learnt from this many last steps
EVALUATION = "evaluation"  #: phases whose name starts so tell how long the evaluation after training will take

_COLUMNS = (  # key, label, format of one step's line
    ("reward/mean", "reward", "{:.3f}"),
    ("reward/success", "success", "{:.2f}"),
    ("loss/total", "loss", "{:+.4f}"),
    ("policy/grad_norm", "grad", "{:.2f}"),
    ("latent/gap_success", "gap+", "{:+.3f}"),
    ("latent/gap_failure", "gap-", "{:+.3f}"),
    ("rollout/tokens_per_second", "tok/s", "{:.0f}"),
    ("time/total", "s", "{:.1f}"),
)


def duration(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Phase:
    """One running phase. ``advance`` and ``update`` may be called from any thread."""

    def __init__(self, owner: RunProgress, name: str, total: int | None, task: TaskID | None):
        self._owner, self.name, self.total, self._task = owner, name, total, task
        self.done = 0
        self._started = self._said = owner.now()
        self._lock = threading.Lock()

    def advance(self, n: int = 1, note: str = "") -> None:
        """``n`` more units are done; ``note`` is shown beside the bar."""
        with self._lock:
            self._update(self.done + n, note)

    def update(self, done: int, note: str = "") -> None:
        """``done`` units are done in all."""
        with self._lock:
            self._update(done, note)

    def _update(self, done: int, note: str) -> None:
        beat()
        self.done = done
        now = self._owner.now()
        seconds = (now - self._started) / done * (self.total - done) if self.total and 0 < done < self.total else 0.0
        left = f"about {duration(seconds)} left in this phase" if seconds else ""
        text = " · ".join(part for part in (note, left, self._owner.remaining(seconds)) if part)
        self._owner.show(self._task, done, self.total, text)
        if self._owner.plain and now - self._said >= PLAIN_INTERVAL_S:
            self._said = now
            self._owner.message(
                f"{self.name}: {done}" + (f"/{self.total}" if self.total else "") + (f" · {text}" if text else "")
            )


class RunProgress:
    """Terminal progress of one run: bars on a terminal, plain lines elsewhere.

    The remaining time of the run is learnt from finished steps: mean seconds of the last five, times the steps that are
    left, plus the seconds that the latest evaluation took for the one after training. It runs down within a step, as
    far as the step's mean.

    Args:
        total_steps: RL steps of the whole run, resumed ones included.
        enabled: False on ranks other than 0: every method is then silent.
        console: where to print; None = standard output.
        now: monotonic clock in seconds.
        log: gets every line, too.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        enabled: bool = True,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
        log: RunLog | None = None,
    ):
        self.total_steps = total_steps
        self.enabled = enabled
        self.now = now
        self.log = log
        self._lost = False
        self._console = console if console is not None else Console(highlight=False, soft_wrap=True)
        self.plain = not self._console.is_terminal
        self._bars: Progress | None = None
        self._step_seconds: list[float] = []
        self._steps_done = 0
        self._step_ended = 0.0
        self._tail_seconds = 0.0
        self._started = self._spoke = now()

    def __enter__(self) -> RunProgress:
        if self.enabled and not self.plain:
            columns = (
                TextColumn("{task.description:<20}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
            )
            self._bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=self._console, transient=True)
            with self._unharmed():
                self._bars.start()
            if self._lost:
                self._bars = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            with suppress(Exception) if self._lost else self._unharmed():  # half drawn, rich may stumble over itself
                self._bars.stop()
            self._bars = None

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, brief: bool = False) -> Iterator[Phase]:
        """A named stretch of work with ``total`` units, or an unknown number of them. Phases may be nested.

        A ``brief`` one (a part of a step) is announced without a terminal only when nothing was said for
        ``PLAIN_INTERVAL_S``.
        """
        beat(name)
        task = None
        if self._bars is not None:
            with self._unharmed():
                task = self._bars.add_task(
                    name, total=total, count=f"0/{total}" if total else "", note=self.remaining()
                )
        elif total != 0 and not (brief and self.now() - self._spoke < PLAIN_INTERVAL_S):
            left = self.remaining()
            self.message(name + (f" ({total})" if total else "") + (f" · {left}" if left else ""))
        phase = Phase(self, name, total, task)
        started = self.now()
        try:
            yield phase
        finally:
            beat()
            if name.startswith(EVALUATION):
                self._tail_seconds = self.now() - started
            if self._bars is not None and task is not None:
                with self._unharmed():
                    self._bars.remove_task(task)

    def show(self, task: TaskID | None, done: int, total: int | None, note: str) -> None:
        """Move one bar."""
        if self._bars is not None and task is not None:
            with self._unharmed():
                self._bars.update(task, completed=done, note=note, count=f"{done}/{total}" if total else str(done))

    def message(self, text: str) -> None:
        """A line that stays, with the time since the start; into the log, too. A terminal that is gone or a full disk
        behind it ends no run.
        """
        if self.enabled:
            self._spoke = self.now()
            if self.log is not None:
                self.log.write(text)
            with self._unharmed():
                self._console.print(
                    f"[{duration(self.now() - self._started)}] {text}", markup=False, highlight=False, soft_wrap=True
                )
                sys.stdout.flush()

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """What the terminal does to us is said once, in the log. (rich turns a broken pipe into SystemExit, and is
        quiet from then on.)
        """
        try:
            yield
        except (OSError, ValueError, SystemExit) as error:
            if not self._lost and self.log is not None:
                self.log.write(f"the terminal can't be written to ({error!r}); the run goes on without it")
            self._lost = True

    def remaining(self, in_phase: float = 0.0) -> str:
        """``about m:ss left in the run``, once a step has finished and while something is left; never less than the
        seconds that are left in the phase.
        """
        if not self._step_seconds:
            return ""
        recent = self._step_seconds[-RECENT_STEPS:]
        step, steps_left = sum(recent) / len(recent), max(self.total_steps - self._steps_done, 0)
        passed = min(self.now() - self._step_ended, step if steps_left else self._tail_seconds)
        left = max(step * steps_left + self._tail_seconds - passed, in_phase)
        return f"about {duration(left)} left in the run" if left >= 1 else ""

    def step_line(self, record: dict[str, Any]) -> None:
        """The line of one finished step; values that are absent or None are left out."""
        parts = [
            f"{record['stage']} step {record['step']}" + (f"/{self.total_steps}" if record["stage"] == "rl" else "")
        ]
        for key, label, form in _COLUMNS:
            value = record.get(key)
            if value is not None and math.isfinite(value):
                parts.append(f"{label} {form.format(value)}")
        for key, label in (("server/restarts", "server restarts"), ("rollout/reissued", "requests sent again")):
            if record.get(key):
                parts.append(f"{label} {record[key]:.0f}")
        if record["stage"] == "rl":
            self._step_seconds.append(float(record["time/total"]))
            self._steps_done, self._step_ended = int(record["step"]), self.now()
            parts.append(self.remaining())
        self.message("  ".join(part for part in parts if part))
