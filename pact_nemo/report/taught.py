"""What teaches a run's policy besides rewards: by which settings, and what the likelihood of held-out traces says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pact_nemo.config.schema import Config
from pact_nemo.config.trace_use import method_teaches
from pact_nemo.report.curves import column
from pact_nemo.report.data import Run

if TYPE_CHECKING:
    from pact_nemo.methods.base import Method

SATURATED = 0.01  #: nats a call token that held-out traces still gain over the second half of the measurements
FEWEST = 3  #: measurements of which a trend is told


def method_of(run: Run) -> type[Method] | None:
    """The class of a run's method; None for one from outside, whose code is not run to read about a run."""
    from pact_nemo.methods.registry import METHODS, method_class  # imports torch

    name = str(run.setting("method") or run.setting("objective.method") or Config().method)
    return method_class(name) if name in METHODS else None


def sft_settings(run: Run) -> tuple[str, ...]:
    """Settings that weigh the SFT term of the RL stage; none where it has no such term, or gives it no weight in
    any step. A method from outside has the term where the steps tell its loss.
    """
    method = method_of(run)
    if method is None:
        losses = (value for record in run.rl for key, value in record.items() if key.startswith("loss/sft"))
        return ("objective.sft_coef",) if any(losses) else ()
    return method.sft_settings if method_teaches(method, run.setting) else ()


def teaches_calls(run: Run) -> bool:
    """Whether the SFT term of RL, where there is one, has call tokens: closing messages count as such."""
    method = method_of(run)
    return method is None or not method.conditions_on_trace or method_teaches(method, run.setting, calls=True)


def learns_traces(run: Run) -> bool:
    """Whether the RL stage teaches traces, by an SFT term or by a term of the method's own."""
    method = method_of(run)
    return run.has_rl and (bool(sft_settings(run)) if method is None else method_teaches(method, run.setting))


def closing_settings(run: Run) -> list[str]:
    """Settings that would teach a message that closes a turn, of those that are null and have an effect here."""
    warmed = bool(run.warmup or run.setting("warmup.steps"))
    if run.setting("traces.closing") or (not run.has_rl and run.setting("warmup.closing")):
        return []
    in_rl = learns_traces(run) and teaches_calls(run)
    of_stages = {"traces.closing": in_rl, "warmup.closing": warmed and not run.setting("warmup.closing")}
    return [key for key, teaches in of_stages.items() if teaches]


def trend_of_traces(run: Run) -> tuple[str, str] | None:
    """(finding, change) on whether held-out traces still become likelier; None where there is nothing to say.

    Where RL has an SFT term, over both stages. Else RL can only forget them, and what they gained is the warm-up's.
    """
    warmed, trained = ([v for v in column(of, "held_out/trace_call") if v is not None] for of in (run.warmup, run.rl))
    keys = sft_settings(run) if teaches_calls(run) else ()
    if not run.has_rl or not keys:
        return _of_rl_alone(warmed, trained) or _of_sft(warmed, later=run.has_rl)
    values, weights = [*warmed, *trained], " and ".join(keys)
    if lost := _lost(values, values):
        return lost, f"The policy forgets or overfits the traces: lower {weights} or optimizer.lr, or add traces."
    if flat := _flat(values):
        return flat, f"Imitation is saturated: more SFT won't help. Let RL go on with {weights} lowered."
    return None


def _of_rl_alone(warmed: list[float], trained: list[float]) -> tuple[str, str] | None:
    lost = _lost([*warmed[-1:], *trained], [*warmed, *trained]) if trained else None
    return (lost, "RL forgets the traces: lower optimizer.lr, or raise objective.kl_coef.") if lost else None


def _of_sft(values: list[float], *, later: bool) -> tuple[str, str] | None:
    if lost := _lost(values, values):
        return lost, "The policy overfits the traces: lower warmup.lr or warmup.steps, or add traces."
    if flat := _flat(values):
        rest = "Fewer warmup.steps do." if later else "Go on by RL from its export (model.path, warmup.steps=0)."
        return flat, f"Imitation is saturated: more SFT won't help. {rest}"
    return None


def _lost(values: list[float], measured: list[float]) -> str | None:
    """That the last value is below the best; None where it isn't, or too little was measured."""
    if len(measured) < FEWEST or max(values) - values[-1] <= SATURATED:
        return None
    return f"Calls of held-out traces have become less likely: {values[-1]:.3f} nats a token, {max(values):.3f} before."


def _flat(values: list[float]) -> str | None:
    """That the second half gained nothing."""
    if len(values) < FEWEST or (gain := values[-1] - values[len(values) // 2]) >= SATURATED:
        return None
    return f"Calls of held-out traces gained {gain:+.3f} nats a token over the second half of the measurements."
