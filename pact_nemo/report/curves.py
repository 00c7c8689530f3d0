"""Which curves the report shows, and what each is divided by (``docs/reference/metrics.md`` has the full list)."""

from __future__ import annotations

from typing import Any

from pact_nemo.report.charts import Chart, Series, make_chart
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


def warmup_curves(run: Run) -> list[Chart]:
    """The stage before RL."""
    records = run.warmup
    if not records:
        return []
    steps = [record["step"] for record in records]
    charts = [
        make_chart(
            "Trace SFT loss",
            "nats; mean over traces of the weighted token mean",
            steps,
            _plain(records, ("loss/total", "total"), ("loss/sft_reasoning", "reasoning"), ("loss/sft_call", "calls")),
            bounds=(0.0, None),
        ),
        make_chart(
            "Held-out trace log-likelihood",
            "log π(h*|x) of traces that are never trained on, nats per token",
            *_measured(records, ("held_out/trace_reasoning", "reasoning"), ("held_out/trace_call", "calls")),
        ),
        make_chart(
            "Gradient norm", "before clipping", steps, _plain(records, ("policy/grad_norm", "norm")), bounds=(0.0, None)
        ),
    ]
    return [chart for chart in charts if chart is not None]


def rl_curves(run: Run) -> list[Chart]:
    """Algorithm 1, step by step."""
    records = run.rl
    if not records:
        return []
    steps = [record["step"] for record in records]

    def chart(title: str, note: str, series: list[Series], **options: Any) -> Chart | None:
        return make_chart(title, note, steps, series, **options)

    charts = [
        chart(
            "Reward",
            "sum over a rollout's turns; mean over rollouts",
            _noisy(records, ("reward/mean", "reward")),
            bounds=(0.0, None),
        ),
        chart(
            "Training success",
            "official checker's pass; share of rollouts",
            _noisy(records, ("reward/success", "success")),
            bounds=(0.0, None),
            percent=True,
        ),
        chart("Total loss", "mean over the step's updates", _plain(records, ("loss/total", "total"))),
        chart(
            "Surrogate terms",
            "as they enter the loss, gate inside",
            _plain(records, ("loss/rl_x", "prompt-only"), ("loss/rl_h", "trace-conditioned")),
        ),
        chart(
            "Trace SFT terms",
            "as they enter the loss, β and masks inside",
            _plain(records, ("loss/sft_reasoning", "reasoning"), ("loss/sft_call", "calls")),
            bounds=(0.0, None),
        ),
        chart(
            "KL term",
            "as it enters the loss, coefficient inside",
            _plain(records, ("loss/kl", "KL term")),
            bounds=(0.0, None),
        ),
        chart(
            "Privilege gap",
            "log π(τ|x,h*) − log π(τ|x), nats per policy token",
            _plain(records, ("latent/gap_success", "successes"), ("latent/gap_failure", "failures")),
            bounds=(0.0, 0.0),
        ),
        chart(
            "Trace log-likelihood",
            "log π(h*|x), nats per token",
            _plain(records, ("latent/trace_reasoning", "reasoning"), ("latent/trace_call", "calls")),
        ),
        make_chart(
            "Held-out trace log-likelihood",
            "log π(h*|x) of traces that are never trained on, nats per token",
            *_measured(records, ("held_out/trace_reasoning", "reasoning"), ("held_out/trace_call", "calls")),
        ),
        make_chart(
            "Signal in the gradient",
            "share of a mini-batch's squared gradient norm that its two halves agree on, by term",
            *_measured(records, ("signal/rl_share", "RL"), ("signal/sft_share", "trace SFT")),
            bounds=(0.0, 1.0),
            percent=True,
        ),
        chart(
            "Call weight λₐ and anchoring",
            "λₐ(s) of eq. 11; anchored share of the step's prompts",
            _plain(records, ("anneal/call_weight", "λₐ"), ("gate/anchored", "anchored")),
            bounds=(0.0, 1.0),
        ),
        chart(
            "Reasoning prefix level",
            "active level of the segment schedule",
            _plain(records, ("anneal/prefix_level", "level"), steps=True),
            levels=("L0", "L1", "L2", "L3", "L4"),
        ),
        chart(
            "Clip fractions",
            "clipped tokens / tokens of that surrogate",
            _plain(records, ("policy/clip_fraction_x", "prompt-only"), ("policy/clip_fraction_h", "trace-conditioned")),
            bounds=(0.0, 0.01),
            percent=True,
        ),
        chart(
            "KL of the update",
            "from the sampling policy, nats per token of that surrogate",
            _plain(records, ("policy/approx_kl_x", "prompt-only"), ("policy/approx_kl_h", "trace-conditioned")),
            bounds=(0.0, None),
        ),
        chart(
            "KL to the reference",
            "estimate under x, nats per policy token",
            _plain(records, ("policy/kl_ref", "KL")),
            bounds=(0.0, None),
        ),
        chart(
            "Entropy",
            "of the policy's distributions under x, nats per policy token",
            _plain(records, ("policy/entropy", "entropy")),
            bounds=(0.0, None),
        ),
        chart(
            "Sampler mismatch",
            "|trainer − sampler log-prob|, mean, nats per token",
            _plain(records, ("mismatch/mean_abs", "difference")),
            bounds=(0.0, None),
        ),
        chart(
            "Importance weight",
            "mean over policy tokens, before truncation",
            _plain(records, ("mismatch/weight_mean", "weight")),
            bounds=(0.99, 1.01),
        ),
        chart(
            "Gradient norm",
            "before clipping; mean over updates",
            _plain(records, ("policy/grad_norm", "norm")),
            bounds=(0.0, None),
        ),
        chart(
            "Generation speed",
            "policy tokens / seconds of the rollout phase",
            _plain(records, ("rollout/tokens_per_second", "tokens/s")),
            bounds=(0.0, None),
        ),
        chart(
            "Without a signal",
            "counts per step: prompts whose rollouts are all alike or without a verified trace; rollouts that skip the "
            "pass under the trace",
            _plain(
                records,
                ("groups/zero_advantage", "no advantage"),
                ("gate/no_trace", "no trace"),
                ("rollout/not_conditioned", "rollouts skipped"),
            ),
            bounds=(0.0, None),
        ),
        chart(
            "Rollout health",
            "counts per step",
            _plain(
                records,
                ("rollout/truncated_turn_tokens", "cut in a turn"),
                ("rollout/truncated_turns", "turn never closed"),
                ("rollout/truncated_response_tokens", "no room left"),
                ("rollout/failed", "failed"),
                ("rollout/malformed_calls", "malformed calls"),
                ("server/restarts", "server restarts"),
                ("rollout/reissued", "requests sent again"),
            ),
            bounds=(0.0, None),
        ),
        chart(
            "Turns", "assistant turns per rollout", _plain(records, ("rollout/mean_turns", "turns")), bounds=(0.0, None)
        ),
        chart("Time per phase", "seconds per step", _times(records), kind="stack"),
    ]
    return [made for made in charts if made is not None]
