"""What a rollout is, in memory and on disk. Nothing here has room for a trace: generation sees the prompt only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pact_nemo.chat.thoughts import visible_text
from pact_nemo.environments.base import Outcome, ToolCall

Status = Literal["ok", "truncated", "failed"]
#: What truncated an episode: the token limit of one assistant message; the number of assistant messages, so that the
#: policy never closed its turn; or the room for the whole response.
Limit = Literal["turn_tokens", "turns", "response_tokens"]
LIMITS: tuple[Limit, ...] = ("turn_tokens", "turns", "response_tokens")


@dataclass
class Turn:
    """One assistant turn (u_t, a_t, o_t) or the final answer y.

    Attributes:
        start, end: half-open range of this turn's policy-written tokens within ``Rollout.token_ids``.
        text: the decoded tokens, end-of-turn token left out.
        visible: what ``text`` says outside of its thoughts (:func:`~pact_nemo.chat.thoughts.visible_text`): the only
            text that environments and rewards read. Empty for a message that is thought only. Derived from ``text``
            where it isn't given (older dumps).
        calls: parsed calls; empty for a message without calls.
        call_errors: one message per malformed call text; shown to the model as an error observation.
        observations: what the environment (or the parser) answered, one per call or error.
        user_turn: index of the user turn this assistant turn belongs to.
        finish_reason: the server's: ``stop`` or ``length``.
        reply: what the user said next, where this turn closed a user turn; empty in older dumps.
    """

    start: int
    end: int
    text: str
    calls: list[ToolCall] = field(default_factory=list)
    call_errors: list[str] = field(default_factory=list)
    observations: list[str] = field(default_factory=list)
    user_turn: int = 0
    finish_reason: str = "stop"
    visible: str = None  # type: ignore[assignment]  # never None after __post_init__
    reply: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.visible is None:
            self.visible = visible_text(self.text)

    @property
    def is_tool_turn(self) -> bool:
        """A turn that asked for a tool, well-formed or not."""
        return bool(self.calls or self.call_errors)


@dataclass
class Rollout:
    """One complete episode, as sampled: token-in-token-out, nothing is ever re-tokenised.

    Attributes:
        prompt_ids: x, [P] token ids.
        token_ids: tau, [N] token ids in the order in which they were sampled or appended, policy-written and
            observation tokens interleaved.
        loss_mask: [N], 1 for policy-written tokens (the set M(tau)), 0 for observation, role and delimiter tokens.
        sampler_logprobs: [N], natural log; the rollout engine's log-prob of each policy-written token, 0.0 elsewhere.
        turns: assistant turns in order.
        outcome: checker verdict; None when ``status == "failed"``.
        weight_version: version of the policy weights that every token was sampled from.
        status: ``ok``; ``truncated`` (a limit ended it); ``failed`` (not the policy's fault: masked from the loss and
            counted).
        error: why it was truncated or failed.
        limit: which limit truncated it; None where none did, or where a dump doesn't tell.
        seconds: wall time of the episode.
        rewinds: where the context was cut back, because the chat template drops thoughts of earlier messages: (position
            in ``token_ids``, tokens after x that stay in front of it). A negative number takes tokens of x itself away.
            What the model still sees of what was cut off is repeated from that position on, without loss. Empty:
            ``token_ids`` is one sequence after x.
    """

    task_id: str
    sample: int
    prompt_ids: list[int]
    token_ids: list[int]
    loss_mask: list[int]
    sampler_logprobs: list[float]
    turns: list[Turn]
    outcome: Outcome | None
    weight_version: int
    status: Status = "ok"
    error: str | None = None
    seconds: float = 0.0
    limit: Limit | None = None
    rewinds: list[tuple[int, int]] = field(default_factory=list)

    def stretches(self) -> list[tuple[int, int, int]]:
        """(start, end, keep) of each part of ``token_ids`` between two rewinds: its tokens follow the first ``keep``
        tokens after x of the context before it. Every token is in one of them."""
        cuts = [(0, 0), *self.rewinds]
        ends = [*(start for start, _ in self.rewinds), len(self.token_ids)]
        return [(start, end, keep) for (start, keep), end in zip(cuts, ends, strict=True)]

    def context_ids(self, position: int) -> list[int]:
        """What the model sees before ``token_ids[position]``: prompt and response tokens."""
        context, prompt = list(self.prompt_ids), len(self.prompt_ids)
        for start, end, keep in self.stretches():
            if start > position:
                break
            context = context[: prompt + keep] + self.token_ids[start : min(end, position)]
        return context

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Rollout:
        """Rebuild from :meth:`to_dict` output (a dumped rollout), e.g. to replay a step without a server."""
        turns = [Turn(**{**t, "calls": [ToolCall(**c) for c in t["calls"]]}) for t in row["turns"]]
        outcome = Outcome(**row["outcome"]) if row["outcome"] is not None else None
        rewinds = [(start, keep) for start, keep in row.get("rewinds", ())]
        return cls(**{**row, "turns": turns, "outcome": outcome, "rewinds": rewinds})
