"""What a run's own numbers say about where it stands, and which setting to change: the rules of
``docs/when-to-use.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist, variance
from typing import Any, Literal

from pact_nemo.objective.gradient_noise import prompts_for_half, signal_share
from pact_nemo.report.curves import column, held_out_scores
from pact_nemo.report.data import Run
from pact_nemo.report.stats import mean
from pact_nemo.report.taught import closing_settings, sft_settings, trend_of_traces

LATE = 5  #: steps at the end of the run that are looked at
SAME_SCORES = 0.5  #: share of groups without an advantage above which most rollouts teach nothing
OUTWEIGHS = 5  #: how many times as long one term's gradient is as the other's, from where it is told
LITTLE_SIGNAL = 0.2  #: share of a gradient that is signal below which the batch is called too small
CUT = 0.25  #: share of rollouts that a limit cut
FAILED = 0.03  #: share of held-out episodes above which those that failed may be what lowered a score
ONE_SIDED = 1 - NormalDist().cdf(
    2
)  #: how often a policy that stays the same is called worse: as by two standard errors
FEW_MOVED = 0.25  #: share of the bfloat16 weights that a whole run can have changed
FEW_SUCCESSES, MANY_SUCCESSES = 0.05, 0.9

Record = dict[str, Any]


@dataclass(frozen=True)
class Advice:
    """One finding.

    Attributes:
        key: short name, the row of the decision table.
        finding: what was measured.
        change: what to do about it.
    """

    key: str
    finding: str
    change: str


#: what a rule needs and is not measured by default -> column, setting that measures it
_MEASURED = {
    "the held-out score between the steps": ("held_out/score", "evaluation.every"),
    "whether held-out traces get likelier": ("held_out/trace_call", "diagnostics.trace_every"),
    "how much of a gradient is signal": ("signal/rl_norm", "diagnostics.gradient_every"),
}
#: of these a warm-up tells too
_OF_SFT = ("evaluation.every", "diagnostics.trace_every")
LARGE_GAP = 0.1  #: nats a token; a gap on successes below it is no reliance on the trace


def unmeasured(run: Run) -> list[tuple[str, str]]:
    """(what, setting that measures it) of what the rules have not seen, and is off; of SFT alone, what it can tell."""
    steps, keys = (run.rl, [key for _, key in _MEASURED.values()]) if run.rl else (run.warmup, _OF_SFT)
    return [
        (what, key)
        for what, (series, key) in _MEASURED.items()
        if steps and key in keys and not run.setting(key) and not known(steps, series)
    ]


def known(records: list[Record], key: str) -> list[float]:
    """Values of the steps that have one."""
    return [value for value in column(records, key) if value is not None]


def advice(run: Run) -> list[Advice]:
    """The findings, the weightiest first; nothing where there is nothing to say. Of a run of SFT alone, those that need
    no rollouts.
    """
    rules: tuple[Callable[[Run, list[Record]], Advice | None], ...] = (
        same_scores,
        cut_rollouts,
        closing,
        past_best,
        rl_noise,
        sft_noise,
        balance,
        resolution,
        imitation,
        reliance,
    )
    late = run.rl[-LATE:]
    return [found for rule in rules if (found := rule(run, late)) is not None]


def last(steps: int) -> str:
    """``the last step``, ``the last 5 steps``."""
    return "the last step" if steps == 1 else f"the last {steps} steps"


def groups_of(run: Run, record: Record) -> float:
    """Prompts of a step."""
    return float(
        run.setting("trainer.batch_size") or record["rollout/count"] / (run.setting("objective.group_size") or 1)
    )


def same_scores(run: Run, late: list[Record]) -> Advice | None:
    """Groups whose rollouts are all alike have no advantage."""
    shares = [
        record["groups/zero_advantage"] / groups_of(run, record)
        for record in late
        if record.get("groups/zero_advantage") is not None
    ]
    successes = known(late, "reward/success")
    if not shares or not successes or mean(shares) <= SAME_SCORES:
        return None
    share, success = mean(shares), mean(successes)
    finding = f"{share:.0%} of the groups had no advantage in {last(len(shares))}, at a success rate of {success:.0%}."
    if success < FEW_SUCCESSES:
        change = (
            "The policy hardly ever succeeds: start from a better one (warmup.steps, more traces), or sample more"
            " (objective.group_size)."
        )
    elif success > MANY_SUCCESSES:
        change = "The tasks are solved: train on harder ones, or stop."
    else:
        change = (
            "Sample more rollouts a prompt (objective.group_size), or leave out tasks that are always or never solved."
        )
    return Advice("same_scores", finding, change)


def cut_rollouts(run: Run, late: list[Record]) -> Advice | None:
    """Rollouts that a limit cut, by the limit that cut most of them."""
    causes = {
        "truncated_turn_tokens": (
            "in the middle of a message",
            "rollout.sampling.max_turn_tokens, or teach the call format first (warmup.steps)",
        ),
        "truncated_turns": (
            "because no message closed the turn",
            "rollout.sampling.max_turns_per_user_turn"
            + (f", or teach how a turn is closed ({', '.join(teach)})" if (teach := closing_settings(run)) else ""),
        ),
        "truncated_response_tokens": ("because no room was left", "rollout.sampling.max_response_tokens"),
    }
    total = sum(known(late, "rollout/count"))
    counts = {name: sum(known(late, f"rollout/{name}")) for name in causes}
    if not total or sum(counts.values()) / total <= CUT:
        return None
    worst = max(counts, key=lambda name: counts[name])
    where, what = causes[worst]
    share, own = sum(counts.values()) / total, counts[worst] / total
    finding = f"{share:.0%} of the rollouts were cut in {last(len(late))}, {own:.0%} {where}."
    return Advice("cut_rollouts", finding, f"Raise {what}.")


def closing(run: Run, late: list[Record]) -> Advice | None:
    """Held-out episodes that no message closed: many more after the training than before it."""
    before, after = (run.episodes.get(stage or "", []) for stage in (run.start(), "after"))
    if not before or not after:
        return None
    first, now = (sum(bool(row.get("limit")) for row in rows) / len(rows) for rows in (before, after))
    if now - first <= CUT:
        return None
    finding = (
        f"{now:.0%} of the {run.scored_tasks} episodes were cut off by a limit after the training, {first:.0%} before"
        " it."
    )
    cut = [row for row in after if row.get("limit")]
    again = sum(repeats(row) for row in cut)
    less = "optimizer.lr or trainer.steps" if run.has_rl else "warmup.lr or warmup.steps"
    if again > len(cut) / 2:
        return Advice(
            "closing",
            f"{finding} {again} of them repeat their last message word for word.",
            f"The policy repeats what brought it nowhere: read such episodes below. Lower {less}"
            + (", or begin from a better policy (warmup.steps)." if run.has_rl else "."),
        )
    teach = closing_settings(run)
    taught = run.setting("traces.closing") or run.setting("warmup.closing")
    change = "The policy has unlearnt how to end" + ("." if taught else ": nothing teaches a final answer.")
    change += f" Teach a closing message ({', '.join(teach)}), lower {less}" if teach else f" Lower {less}"
    return Advice("closing", finding, change + (", or raise objective.kl_coef." if run.has_rl else "."))


def repeats(row: Record) -> bool:
    """Whether the last two messages of an episode are the same."""
    texts = [turn["text"] for turn in row.get("turns", [])[-2:]]
    return len(texts) == 2 and texts[0] == texts[1]


def past_best(run: Run, late: list[Record]) -> Advice | None:
    """A held-out score that was better before the end of the stage, by more than chance explains: two standard errors
    of the difference for one earlier score. The best of several is high by chance, so that they need more for the same
    share of false alarms. Nothing where failed episodes, which count 0, may have lowered the last score.
    """
    stage: Literal["rl", "warmup"] = "rl" if run.rl else "warmup"
    scores = held_out_scores(run, stage)
    if not scores or not (last_of := run.scores.get("after")):
        return None
    if (scores[-1].get("held_out/failed") or 0) > FAILED * last_of["n"]:
        return None
    best, end = max(scores, key=lambda row: row["held_out/score"]), scores[-1]["held_out/score"]
    top = best["held_out/score"]
    error = math.sqrt((top * (1 - top) + end * (1 - end)) / run.held_out_tasks(last_of["n"]))
    if top - end <= NormalDist().inv_cdf(1 - ONE_SIDED / max(len(scores) - 1, 1)) * error:
        return None
    steps, remedy = (
        ("trainer.steps", "a lower optimizer.lr, or more rollouts an update")
        if run.rl
        else ("warmup.steps", "a lower warmup.lr")
    )
    if best["step"]:
        when, change = f"after step {best['step']}", f"The training has gone too far: fewer {steps}, or {remedy}."
    else:
        when, change = "before the first step", f"The training has harmed: {remedy}."
    finding = f"The {run.scored_tasks} score was {top:.3f} {when} and is {end:.3f} at the end."
    return Advice("past_best", finding, change)


def rl_noise(run: Run, late: list[Record]) -> Advice | None:
    """Halves of the batch that disagree about the surrogate's gradient."""
    return _noise(
        run,
        "rl",
        "RL",
        "rollouts: raise trainer.mini_batch_size and trainer.batch_size, or objective.group_size; or lower"
        " optimizer.lr",
    )


def sft_noise(run: Run, late: list[Record]) -> Advice | None:
    """Halves of the batch that disagree about the SFT term's gradient."""
    lower = "".join(f", or lower {' and '.join(keys)}" for keys in [sft_settings(run)] if keys)
    return _noise(run, "sft", "trace SFT", f"traces: raise trainer.mini_batch_size and trainer.batch_size{lower}")


def _noise(run: Run, term: str, words: str, what: str) -> Advice | None:
    products, norms = known(run.rl, f"signal/{term}_product"), known(run.rl, f"signal/{term}_norm")
    size, share = run.setting("trainer.mini_batch_size"), signal_share(products, norms)
    if not size or share is None or share >= LITTLE_SIGNAL:
        return None
    needed = prompts_for_half(share, int(size))
    prompts = (
        f"about {needed:,.0f} prompts would make it half"
        if needed < 1e6
        else "no number of prompts that could be told would make it half"
    )
    finding = (
        f"{share:.0%} of the {words} gradient is signal at {size} prompts an update (over {len(products)}"
        f" measurements); {prompts}."
    )
    return Advice(f"{term}_noise", finding, f"The update is mostly noise. It needs more {what}.")


def balance(run: Run, late: list[Record]) -> Advice | None:
    """One term's gradient far longer than the other's, where one coefficient weighs SFT against RL. The norms are of
    the terms as they enter the loss. CHORD's two weights go against each other, so that no one of them is told.
    """
    measured = [(record.get("signal/rl_norm"), record.get("signal/sft_norm")) for record in run.rl]
    pairs = [(rl, sft) for rl, sft in measured if rl is not None and sft is not None]
    coefficient = run.setting("objective.sft_coef")
    if not pairs or coefficient is None or sft_settings(run) != ("objective.sft_coef",):
        return None
    of_rl, of_sft = (math.hypot(*norms) for norms in zip(*pairs, strict=True))
    if min(of_rl, of_sft) <= 0 or max(of_rl, of_sft) <= OUTWEIGHS * min(of_rl, of_sft):
        return None
    long, short, ratio = ("SFT", "RL", of_sft / of_rl) if of_sft > of_rl else ("RL", "SFT", of_rl / of_sft)
    return Advice(
        "balance",
        f"The gradient of {long} is {ratio:,.0f} times as long as that of {short} (L2 norms over {len(pairs)}"
        f" measurements, noise included, with objective.sft_coef={coefficient:g} in that of SFT): the update is nearly"
        f" all {long}.",
        f"objective.sft_coef={coefficient * of_rl / of_sft:.2g} would make them equally long. They needn't be, but the"
        " shorter one hardly counts.",
    )


def resolution(run: Run, late: list[Record]) -> Advice | None:
    """Updates too small for bfloat16: they gather in the main weights, and the policy hardly changes."""
    moved = [
        record["policy/moved"] * record.get("policy/updates", 1)
        for record in [*run.warmup, *run.rl]
        if record.get("policy/moved") is not None
    ]
    if not moved or sum(moved) >= FEW_MOVED:
        return None
    finding = f"All {len(moved)} steps together changed at most {sum(moved):.0%} of the weights in bfloat16."
    return Advice(
        "resolution",
        finding,
        "The updates are smaller than bfloat16 can show: more steps, a higher"
        f" {'optimizer' if run.has_rl else 'warmup'}.lr, or policy.precision=fp32.",
    )


def imitation(run: Run, late: list[Record]) -> Advice | None:
    """Whether held-out traces still become likelier."""
    found = trend_of_traces(run)
    return None if found is None else Advice("imitation", *found)


def reliance(run: Run, late: list[Record]) -> Advice | None:
    """A privilege gap on successes that is above 0 and grows, by more than chance explains. Below 0 it says nothing:
    rollouts are drawn without the trace, so that over all of them it can't be above 0 in expectation.
    """
    values = known(run.rl, "latent/gap_success")
    if len(values) < 4 or run.setting("traces.control") is not None:
        return None
    half = len(values) // 2
    early, now = mean(values[:half]), mean(values[half:])
    error = math.sqrt(sum(variance(part) / len(part) for part in (values[:half], values[half:])))
    if now - early <= 2 * error or now < LARGE_GAP:
        return None
    finding = f"The privilege gap on successes grew from {early:.2f} to {now:.2f} nats a token."
    more = " or ".join(["objective.anchor_prob", *(sft_settings(run) or ["objective.sft_coef"])])
    return Advice("reliance", finding, f"The policy relies on the trace: raise {more}.")
