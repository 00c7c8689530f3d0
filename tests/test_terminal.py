"""Standard output and error that are lost, full or closed end nothing and hide no failure. Each case is a real process
with a real descriptor.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from pact_nemo.runtime.interrupt import stop_request
from pact_nemo.runtime.terminal import GuardedStream, RunLog
from pact_nemo.tracking.terminal import RunProgress

REPO = Path(__file__).resolve().parents[1]
RUN = """
import logging, os, sys, time
from pathlib import Path
from pact_nemo.runtime.terminal import RunLog, command, expendable_output, on_loss
from pact_nemo.tracking.terminal import RunProgress

def main():
    log = RunLog(Path(os.environ["LOG"]))
    logging.basicConfig()
    with expendable_output(), on_loss(log.write), RunProgress(total_steps=3, log=log) as progress:
        for step in range(300):
            progress.message(f"step {step} " + "x" * 100)
            if step == 20:
                time.sleep(0.3)  # the reader leaves
        logging.getLogger("x").warning("a warning")
        print("written by print")
    Path(os.environ["DONE"]).write_text("done")
    return int(os.environ["CODE"])

command(main)
"""


def shell(line: str, folder: Path, program: str = RUN, code: int = 0) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the program with a shell's redirections; the log that it leaves."""
    (folder / "program.py").write_text(program)
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "LOG": str(folder / "run.log"),
        "DONE": str(folder / "done"),
        "CODE": str(code),
        "P": sys.executable,
    }
    line = "set -o pipefail; " + line.replace("RUN", f'"$P" {folder / "program.py"}')
    done = subprocess.run(
        ["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120, cwd=folder
    )
    return done, (folder / "run.log").read_text() if (folder / "run.log").exists() else ""


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("RUN | head -3", 0),
        ("RUN | true", 75),
        ("RUN > /dev/full", 0),
        ("RUN >&-", 0),
        ("RUN >&- 2>&-", 75),
        ("RUN > /dev/full 2>&1", 0),
        ("RUN 2>&1 | head -1", 0),
    ],
)
def test_a_run_goes_on_and_keeps_its_exit_code(line: str, code: int, tmp_path: Path) -> None:
    done, log = shell(line, tmp_path, code=code)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "done").read_text() == "done" and "step 299" in log
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if ">&-" not in line:  # closed from the start: nothing is lost on the way
        assert "standard output can't be written" in log
    if line == "RUN > /dev/full":
        assert "standard output can't be written (No space left on device)" in done.stderr


def test_a_closed_descriptor_is_not_given_to_the_next_file(tmp_path: Path) -> None:
    program = RUN.replace("def main():", "def main():\n    data = open('data', 'w'); os.write(1, b'stray')")
    shell("RUN >&-", tmp_path, program)
    assert (tmp_path / "data").read_text() == ""


PRINTS = (
    "import sys\nfrom pact_nemo.runtime.terminal import command\ndef main():\n    print('a line\\n' * 50000)\n"
    "    return"
    " {code}\ncommand(main)\n"
)


def test_a_commands_product_that_a_full_disk_refused_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    done, _ = shell("RUN > /dev/full", tmp_path, PRINTS.format(code=0))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


@pytest.mark.parametrize("code", [0, 2])
def test_a_reader_that_has_seen_enough_is_none(code: int, tmp_path: Path) -> None:
    done, _ = shell("RUN | head -1", tmp_path, PRINTS.format(code=code))
    assert (done.returncode, done.stdout, done.stderr) == (code, "a line\n", "")


def test_an_error_is_still_told_on_standard_error(tmp_path: Path) -> None:
    done, _ = shell("RUN > /dev/full", tmp_path, PRINTS.replace("return {code}", "raise SystemExit('the reason')"))
    assert done.returncode == 1 and "the reason" in done.stderr
    done, _ = shell("RUN | true", tmp_path, PRINTS.replace("return {code}", "raise ValueError('the reason')"))
    assert done.returncode == 1 and "ValueError: the reason" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("recipes/pact_bfcl.py --dry-run", marks=pytest.mark.slow),
        "tools/plan.py --recipe llama3p1_70b_64xh100_bf16",
    ],
)
def test_commands_that_print_much_are_quiet_about_head(line: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = f'set -o pipefail; "{sys.executable}" {REPO}/{line} | head -1'
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout and not done.stderr


class Broken(io.StringIO):
    """A terminal whose other end is gone."""

    def __init__(self, error: Exception, terminal: bool):
        super().__init__()
        self.error, self.terminal = error, terminal

    def write(self, text: str) -> int:
        raise self.error

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), OSError(5, "I/O error"), ValueError("closed")],
)
def test_progress_survives_its_console(
    error: Exception, terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Broken(error, terminal)
    monkeypatch.setattr(os, "dup2", lambda *args: None)  # rich would lead the tests' own output to /dev/null
    log = RunLog(tmp_path / "run.log")
    with (
        RunProgress(total_steps=1, console=Console(file=stream, force_terminal=terminal), log=log) as progress,
        progress.phase("work", 2) as phase,
    ):
        phase.advance()
        progress.message("a line")
        phase.advance()
    text = (tmp_path / "run.log").read_text()
    assert text.count("can't be written") == 1 and "a line" in text


def test_a_log_that_can_not_be_written_ends_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "absent" / "run.log")
    log.write("a line")
    log.close()
    full = RunLog(Path("/dev/full"))
    full.write("a line")
    full.close()


def test_room_that_was_made_is_used_again() -> None:
    class Disk(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    disk = Disk()
    stream = GuardedStream(disk, "a file")
    stream.write("lost")
    disk.full = False
    stream.write("kept")
    assert disk.getvalue() == "kept" and stream.lost is not None


def test_a_lost_terminal_asks_a_run_to_stop_and_nohup_does_not() -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with stop_request() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            deadline = time.monotonic() + 30
            while not stop and time.monotonic() < deadline:
                time.sleep(0.01)
            assert stop.name == "SIGHUP"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_request() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
