"""Which curves the report shows, and what each is divided by (``docs/reference/metrics.md`` has the full list)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pact_nemo.report.charts import PLAIN, Axis, Chart, Series, make_chart
from pact_nemo.report.data import Run
from pact_nemo.report.stats import running_mean

PHASES = ("rollout", "score", "update", "refit")
SMOOTH_FROM = 10  #: with at least this many steps, noisy curves get a running mean of ``WINDOW`` steps
WINDOW = 5
LEAST_SECONDS = 0.01

Records = list[dict[str, Any]]


def column(records: Records, key: str) -> list[float | None]:
    """Values of one key, None where a step hasn't got it."""
    return [None if record.get(key) is None else float(record[key]) for record in records]


def _plain(records: Records, *keys: tuple[str, str], steps: bool = False) -> list[Series]:
    return [Series(label, column(records, key), tone, steps=steps) for tone, (key, label) in enumerate(keys)]


def _noisy(records: Records, *keys: tuple[str, str]) -> list[Series]:
    """Raw values, and in front of them their running mean once there are enough steps for one."""
    series = []
    for tone, (key, label) in enumerate(keys):
        raw = column(records, key)
        if len(records) < SMOOTH_FROM:
            series.append(Series(label, raw, tone))
        else:
            series.append(Series(label, raw, tone, faint=True))
            series.append(Series(f"{label}, mean of {WINDOW}", running_mean(raw, WINDOW), tone))
    return series


def _measured(records: Records, *keys: tuple[str, str]) -> tuple[list[int], list[Series]]:
    """Steps in which one of the keys was measured, and the curves over these."""
    some = [record for record in records if any(record.get(key) is not None for key, _ in keys)]
    return [record["step"] for record in some], _plain(some, *keys)


def _times(records: Records) -> list[Series]:
    measured = {phase: column(records, f"time/{phase}") for phase in PHASES}
    # a phase that a run never enters still costs some microseconds
    known = {
        phase: values for phase, values in measured.items() if any((value or 0.0) >= LEAST_SECONDS for value in values)
    }
    total = column(records, "time/total")
    other: list[float | None] = []
    for index, seconds in enumerate(total):
        rest = None if seconds is None else seconds - sum(values[index] or 0.0 for values in known.values())
        other.append(rest if rest is not None and rest > 0.01 * (seconds or 0.0) else None)
    layers = [*((PHASES.index(phase), phase, values) for phase, values in known.items()), (len(PHASES), "other", other)]
    return [Series(phase, values, tone) for tone, phase, values in layers]


@dataclass(frozen=True)
class Curve:
    """A chart of one run.

    Attributes:
        title, note: what is written above it.
        keys: of the run's records, each with the label of its line.
        axis: how values are shown.
        how: ``plain``: one line a key; ``noisy``: with running means; ``staircase``: levels that change at once;
            ``measured``: over the steps alone in which one of the keys was measured; ``phases``: a stack of the phases'
            seconds.
    """

    title: str
    note: str
    keys: tuple[tuple[str, str], ...]
    axis: Axis = PLAIN
    how: Literal["plain", "noisy", "staircase", "measured", "phases"] = "plain"

    def drawn(self, records: Records) -> Chart | None:
        """The chart; None when no record has one of its values."""
        if self.how == "measured":
            return make_chart(self.title, self.note, *_measured(records, *self.keys), axis=self.axis)
        steps = [record["step"] for record in records]
        if self.how == "phases":
            return make_chart(self.title, self.note, steps, _times(records), kind="stack", axis=self.axis)
        if self.how == "noisy":
            series = _noisy(records, *self.keys)
        else:
            series = _plain(records, *self.keys, steps=self.how == "staircase")
        return make_chart(self.title, self.note, steps, series, axis=self.axis)


FROM_ZERO = Axis(bounds=(0.0, None))
SHARE_FROM_ZERO = Axis(bounds=(0.0, None), percent=True)

HELD_OUT = Curve(
    "Held-out score",
    "of evaluations between steps and at both ends of the stage (evaluation.every)",
    (("held_out/score", "score"),),
    SHARE_FROM_ZERO,
    how="measured",
)

#: the stage before RL
WARMUP = (
    Curve(
        "Trace SFT loss",
        "nats; mean over traces of the weighted token mean",
        (("loss/total", "total"), ("loss/sft_reasoning", "reasoning"), ("loss/sft_call", "calls")),
        FROM_ZERO,
    ),
    Curve(
        "Held-out trace log-likelihood",
        "log π(h*|x) of traces that are never trained on, nats per token",
        (("held_out/trace_reasoning", "reasoning"), ("held_out/trace_call", "calls")),
        how="measured",
    ),
    Curve(
        "Gradient norm",
        "before clipping",
        (("policy/grad_norm", "norm"),),
        FROM_ZERO,
    ),
    Curve(
        "Weights moved",
        "share of the bfloat16 weights that an update changes",
        (("policy/moved", "share"),),
        FROM_ZERO,
        how="measured",
    ),
)

#: Algorithm 1, step by step
RL = (
    Curve(
        "Reward",
        "sum over a rollout's turns; mean over rollouts",
        (("reward/mean", "reward"),),
        FROM_ZERO,
        how="noisy",
    ),
    Curve(
        "Training success",
        "the environment's verdict; share of rollouts that pass",
        (("reward/success", "success"),),
        SHARE_FROM_ZERO,
        how="noisy",
    ),
    Curve(
        "Total loss",
        "mean over the step's updates",
        (("loss/total", "total"),),
    ),
    Curve(
        "Surrogate terms",
        "as they enter the loss, gate inside",
        (("loss/rl_x", "prompt-only"), ("loss/rl_h", "trace-conditioned")),
    ),
    Curve(
        "Trace SFT terms",
        "as they enter the loss, β and masks inside",
        (("loss/sft_reasoning", "reasoning"), ("loss/sft_call", "calls")),
        FROM_ZERO,
    ),
    Curve(
        "KL term",
        "as it enters the loss, coefficient inside",
        (("loss/kl", "KL term"),),
        FROM_ZERO,
    ),
    Curve(
        "Privilege gap",
        "log π(τ|x,h*) − log π(τ|x), nats per policy token",
        (("latent/gap_success", "successes"), ("latent/gap_failure", "failures")),
        Axis(bounds=(0.0, 0.0)),
    ),
    Curve(
        "Trace log-likelihood",
        "log π(h*|x), nats per token",
        (("latent/trace_reasoning", "reasoning"), ("latent/trace_call", "calls")),
    ),
    Curve(
        "Held-out trace log-likelihood",
        "log π(h*|x) of traces that are never trained on, nats per token",
        (("held_out/trace_reasoning", "reasoning"), ("held_out/trace_call", "calls")),
        how="measured",
    ),
    Curve(
        "Signal in the gradient",
        "share of a mini-batch's squared gradient norm that its two halves agree on, by term",
        (("signal/rl_share", "RL"), ("signal/sft_share", "trace SFT")),
        Axis(bounds=(0.0, 1.0), percent=True),
        how="measured",
    ),
    Curve(
        "Call weight λₐ",
        "λₐ(s) of eq. 11",
        (("anneal/call_weight", "λₐ"),),
        Axis(bounds=(0.0, 1.0)),
    ),
    Curve(
        "Anchored prompts",
        "share of the step's prompts through plain RL",
        (("gate/anchored", "anchored"),),
        Axis(bounds=(0.0, 1.0), percent=True),
    ),
    Curve(
        "Reasoning prefix level",
        "active level of the segment schedule",
        (("anneal/prefix_level", "level"),),
        Axis(levels=("L0", "L1", "L2", "L3", "L4")),
        how="staircase",
    ),
    Curve(
        "Clip fractions",
        "clipped tokens / tokens of that surrogate",
        (("policy/clip_fraction_x", "prompt-only"), ("policy/clip_fraction_h", "trace-conditioned")),
        Axis(bounds=(0.0, 0.01), percent=True),
    ),
    Curve(
        "KL of the update",
        "from the sampling policy, nats per token of that surrogate",
        (("policy/approx_kl_x", "prompt-only"), ("policy/approx_kl_h", "trace-conditioned")),
        FROM_ZERO,
    ),
    Curve(
        "KL to the reference",
        "estimate under x, nats per policy token",
        (("policy/kl_ref", "KL"),),
        FROM_ZERO,
    ),
    Curve(
        "Entropy",
        "of the policy's distributions under x, nats per policy token",
        (("policy/entropy", "entropy"),),
        FROM_ZERO,
    ),
    Curve(
        "Sampler mismatch",
        "|trainer − sampler log-prob|, mean, nats per token",
        (("mismatch/mean_abs", "difference"),),
        FROM_ZERO,
    ),
    Curve(
        "Importance weight",
        "mean over policy tokens, before truncation",
        (("mismatch/weight_mean", "weight"),),
        Axis(bounds=(0.99, 1.01)),
    ),
    Curve(
        "Gradient norm",
        "before clipping; mean over updates",
        (("policy/grad_norm", "norm"),),
        FROM_ZERO,
    ),
    Curve(
        "Weights moved",
        "share of the bfloat16 weights that an update changes; mean over updates",
        (("policy/moved", "share"),),
        FROM_ZERO,
        how="measured",
    ),
    Curve(
        "Generation speed",
        "policy tokens / seconds of the rollout phase",
        (("rollout/tokens_per_second", "tokens/s"),),
        FROM_ZERO,
    ),
    Curve(
        "Without a signal",
        "counts per step: prompts whose rollouts are all alike or without a verified trace; rollouts that skip the "
        "pass under the trace",
        (
            ("groups/zero_advantage", "no advantage"),
            ("gate/no_trace", "no trace"),
            ("rollout/not_conditioned", "rollouts skipped"),
        ),
        FROM_ZERO,
    ),
    Curve(
        "Rollout health",
        "counts per step",
        (
            ("rollout/truncated_turn_tokens", "cut in a turn"),
            ("rollout/truncated_turns", "turn never closed"),
            ("rollout/truncated_response_tokens", "no room left"),
            ("rollout/failed", "failed"),
            ("rollout/malformed_calls", "malformed calls"),
            ("server/restarts", "server restarts"),
            ("rollout/reissued", "requests sent again"),
        ),
        FROM_ZERO,
    ),
    Curve(
        "Turns",
        "assistant turns per rollout",
        (("rollout/mean_turns", "turns"),),
        FROM_ZERO,
    ),
    Curve(
        "Time per phase",
        "seconds per step",
        (),
        how="phases",
    ),
)


def warmup_curves(run: Run) -> list[Chart]:
    """The stage before RL."""
    return _drawn(WARMUP, run.warmup, held_out_scores(run, "warmup"))


def rl_curves(run: Run) -> list[Chart]:
    """Algorithm 1, step by step."""
    return _drawn(RL, run.rl, held_out_scores(run, "rl"))


def held_out_scores(run: Run, stage: Literal["warmup", "rl"]) -> Records:
    """``step``, ``held_out/score`` and ``held_out/failed`` (episodes) of a stage, in order: between its steps, and at
    both its ends where the run has them.
    """
    records = run.warmup if stage == "warmup" else run.rl
    if not records:
        return []
    between = [record for record in records if record.get("held_out/score") is not None]
    first = "base" if stage == "warmup" else "before"
    last = "before" if stage == "warmup" and (run.rl or "before" in run.scores) else "after"
    ends = {0: run.scores.get(first), records[-1]["step"]: run.scores.get(last)}
    rows = [
        {"step": step, "held_out/score": score["score"], "held_out/failed": score.get("failed")}
        for step, score in ends.items()
        if score is not None
    ]
    return sorted([*between, *rows], key=lambda record: record["step"])


def _drawn(curves: tuple[Curve, ...], records: Records, scores: Records) -> list[Chart]:
    """Those that the run has values for."""
    charts = [curve.drawn(records) for curve in curves]
    if any(record.get("held_out/score") is not None for record in records):  # its two ends alone are no curve
        charts = [HELD_OUT.drawn(scores), *charts]
    return [chart for chart in charts if chart is not None]
