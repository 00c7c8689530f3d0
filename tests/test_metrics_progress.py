"""Terminal progress: how often it speaks, what it says, how it learns the time that is left."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
from rich.console import Console

from pact_nemo.tracking.terminal import RunProgress, duration


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def plain(total_steps: int = 10, enabled: bool = True) -> tuple[RunProgress, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    return (
        RunProgress(total_steps=total_steps, enabled=enabled, console=Console(file=out, width=60), now=clock),
        clock,
        out,
    )


def step(number: int, seconds: float = 30.0, **values: Any) -> dict[str, Any]:
    return {"step": number, "stage": "rl", "time/total": seconds, **values}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (7325, "2:02:05")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_a_phase_speaks_at_its_start_and_then_at_most_every_five_seconds() -> None:
    progress, clock, out = plain()
    with progress, progress.phase("evaluation before", total=100) as phase:
        for _ in range(100):
            clock.seconds += 0.25
            phase.advance(note="120 tokens/s")
    lines = out.getvalue().splitlines()
    assert lines[0] == "[0:00] evaluation before (100)"
    assert [line.split(" · ")[0] for line in lines[1:]] == [
        f"[0:{s:02d}] evaluation before: {4 * s}/100" for s in (5, 10, 15, 20, 25)
    ]
    assert lines[1].endswith("120 tokens/s · about 0:20 left in this phase")


def test_without_a_terminal_a_brief_phase_speaks_only_after_five_seconds_of_silence() -> None:
    progress, clock, out = plain()
    with progress:
        progress.message("before")
        with progress.phase("score", brief=True):
            clock.seconds += 6
        with progress.phase("update", brief=True):
            pass
    assert "score" not in out.getvalue()
    assert "update" in out.getvalue()


def test_remaining_time_is_the_mean_of_recent_steps_times_the_steps_left_plus_the_last_evaluation() -> None:
    progress, clock, _ = plain(total_steps=10)
    assert progress.remaining() == ""
    with progress.phase("evaluation before", total=4):
        clock.seconds += 40
    for number, seconds in enumerate((1000, 20, 20, 20, 20, 45), start=1):
        progress.step_line(step(number, seconds))
    assert progress.remaining() == f"about {duration(25 * 4 + 40)} left in the run"
    clock.seconds += 10
    assert progress.remaining() == f"about {duration(25 * 4 + 40 - 10)} left in the run", "it runs down"
    clock.seconds += 90
    assert progress.remaining() == f"about {duration(25 * 3 + 40)} left in the run", "the later steps are left"
    assert progress.remaining(300.0) == "about 5:00 left in the run", "the phase alone takes so long"


def test_a_resumed_run_counts_the_steps_before_it() -> None:
    progress, _, _ = plain(total_steps=10)
    progress.step_line(step(9, 30))
    assert progress.remaining() == "about 0:30 left in the run"


def test_step_line_is_one_line_and_leaves_out_what_is_absent() -> None:
    progress, _, out = plain()
    values = {
        "reward/mean": 0.5,
        "loss/total": 0.1234,
        "latent/gap_success": None,
        "latent/gap_failure": 0.25,
        "policy/grad_norm": float("nan"),
    }
    progress.step_line(step(3, 30.0, **values))
    lines = out.getvalue().splitlines()
    assert len(lines) == 1
    assert "rl step 3/10  reward 0.500  loss +0.1234  gap- +0.250  s 30.0  about 3:30 left" in lines[0]
    assert "gap+" not in lines[0] and "nan" not in lines[0]


def test_a_warm_up_line_does_not_disturb_the_learnt_time() -> None:
    progress, _, out = plain()
    progress.step_line({"step": 1, "stage": "warmup", "loss/total": 5.0})
    assert progress.remaining() == ""
    assert "warmup step 1  loss +5.0000" in out.getvalue()


def test_markup_in_a_message_is_shown_as_it_is() -> None:
    progress, _, out = plain()
    progress.message("task [bold]x[/bold] :smile:")
    assert "[bold]x[/bold]" in out.getvalue()


def test_other_ranks_are_silent() -> None:
    progress, clock, out = plain(enabled=False)
    with progress, progress.phase("step", total=2) as phase:
        clock.seconds += 60
        phase.advance()
        progress.step_line(step(1))
        progress.message("hello")
    assert out.getvalue() == ""


def test_advance_from_many_threads_loses_nothing() -> None:
    progress, _, _ = plain()
    with progress.phase("rollouts", total=4000) as phase:
        threads = [threading.Thread(target=lambda: [phase.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert phase.done == 4000


def test_on_a_terminal_bars_come_and_go_and_lines_stay() -> None:
    out = io.StringIO()
    with RunProgress(total_steps=2, console=Console(file=out, force_terminal=True, width=120)) as progress:
        with progress.phase("step 1 rollouts", total=2) as outer:
            with progress.phase("score"):
                outer.advance(note="90 tokens/s")
            outer.advance()
        progress.step_line(step(1))
    assert "1/2" in out.getvalue() and "rl step 1/2" in out.getvalue()


def test_a_phase_ends_when_its_work_raises() -> None:
    out = io.StringIO()
    progress = RunProgress(total_steps=2, console=Console(file=out, force_terminal=True, width=120))
    with pytest.raises(RuntimeError, match="broken"), progress, progress.phase("update"):
        raise RuntimeError("broken")
    assert progress._bars is None
