"""Traces as tokens: h* right after x, with one component label a token (the masks of eq. 9 come from these).

Rules:
- h* is assistant text + end-of-turn + rendered observations (and user messages), turn after turn, with generation
  prompts between turns. It ends right after the closing delimiter of its last message: ``x + h* + boundary_ids`` is
  what the chat template renders.
- Assistant text is tokenised whole, as a policy would write it. What stands between reasoning and call is the switch to
  the call. It is CALL: a policy that isn't taught it reasons until it is cut. (``switch=OTHER`` is the paper's literal
  rule, an unsupervised delimiter.)
- A thinking model's reasoning stands inside its thought markers, exactly as it samples them, and so does an empty
  thought. The marker that closes the thought is the switch. The marker that opens it has the same label: a switch is
  only reached from a thought. Where the generation prompt opens the thought, that marker is part of the prompt. In a
  message without a call the markers are OTHER.
- A token that covers characters of two parts belongs to the later one. A token that covers reasoning and call
  characters is an error.
- Between two user turns stands the message that closes the first one. It is context: OTHER. So is the whole message of
  a turn that has neither calls nor reasoning. A closing message that is taught is a turn of its own: CALL.
- End-of-turn tokens, delimiters, role markers and user messages are OTHER.
- h* itself keeps every thought: it is what the privileged context shows. Where the policy won't see thoughts of earlier
  messages, ``cuts`` say in which contexts its messages are taught.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace

from pact_nemo.chat.conversation_tokens import Continuation
from pact_nemo.chat.template import ChatFormat
from pact_nemo.errors import ConfigError, DataError
from pact_nemo.objective.components import Component
from pact_nemo.traces.schema import Trace, TraceTurn
from pact_nemo.traces.segments import NO_LEVEL

COMPONENTS = frozenset({"reasoning", "calls", "observations"})
OVERLONG = ("turn", "segment", "drop")  #: what may become of a trace that is longer than its room (:func:`fit_trace`)


@dataclass(frozen=True)
class TraceCut:
    """The context in which the message after some turn of h* is taught, where it is not ``x + h*`` up to there: the
    policy won't see the thoughts of earlier messages then.

    Attributes:
        start: index within h* of that message's first token.
        keep: tokens after x that stay of the context before it; negative where x loses the thought that its generation
            prompt opened.
        context_ids: what follows them, up to the message: earlier messages without their thoughts, the user's, the
            generation prompt.
    """

    start: int
    keep: int
    context_ids: tuple[int, ...]


@dataclass
class TraceTokens:
    """h* as tokens; all per-token lists have length H.

    Attributes:
        token_ids: [H] everything after x.
        component: [H] a :class:`Component` each.
        segment_level: [H] 1…4, the lowest prefix level that contains this reasoning token; −1 for all other tokens, and
            for reasoning from the first preview of the call on.
        turn: [H] index of the trace turn; delimiters, observations and user messages after a turn count to it, as does
            the generation prompt before it.
        turn_ends: one per turn: h* cut at ``[:turn_ends[t]]`` holds turns 0…t and can be followed by ``boundary_ids``.
        cuts: one per turn: how the context of the message after it is cut back; None: it isn't. Empty where no context
            is.
        turns_dropped: how many turns :func:`truncate_at_turn` has cut off.
        cut: whether anything was cut off its end.
        closed: whether its last turn is the taught message that closes it (``traces.closing``).
    """

    token_ids: list[int] = field(default_factory=list)
    component: list[int] = field(default_factory=list)
    segment_level: list[int] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    cuts: list[TraceCut | None] = field(default_factory=list)
    turns_dropped: int = 0
    cut: bool = False
    closed: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def branches(self) -> list[TraceCut]:
        """The cuts before messages of h*, in order."""
        return [cut for cut in self.cuts if cut is not None and cut.start < len(self)]

    @property
    def sft_length(self) -> int:
        """Tokens after x in the last context in which h* is taught, to the end of h*."""
        last = self.branches[-1:]
        return last[0].keep + len(last[0].context_ids) + len(self) - last[0].start if last else len(self)

    @property
    def closing_cut(self) -> TraceCut | None:
        """The cut before a message that follows the whole of h*."""
        return self.cuts[-1] if self.cuts else None

    def _append(self, token: int, turn: int, component: Component = Component.OTHER, level: int = NO_LEVEL) -> None:
        self.token_ids.append(token)
        self.component.append(int(component))
        self.segment_level.append(level)
        self.turn.append(turn)


def encode_trace(
    trace: Trace,
    chat: ChatFormat,
    components: Collection[str] = COMPONENTS,
    end_of_turn: Component = Component.OTHER,
    switch: Component = Component.CALL,
) -> TraceTokens:
    """h* of ``trace`` under a chat format.

    Args:
        trace: what to encode.
        chat: template and tool format; the ones that x is made with.
        components: which of ``reasoning``, ``calls``, ``observations`` to keep in the text (paper table 3 drops one at
            a time).
        end_of_turn: label of the end-of-turn token after a call: OTHER, or CALL to supervise it as the end of the call
            span.
        switch: label of what stands between reasoning and call: CALL, or OTHER to leave it unsupervised.

    Raises:
        ConfigError: unknown component names, or no component at all.
        DataError: the tokenizer merges reasoning and call characters into one token, or makes a special token of what
            the expert wrote.
    """
    kept = frozenset(components)
    if not kept or kept - COMPONENTS:
        raise ConfigError(f"components must be a non-empty subset of {sorted(COMPONENTS)}, not {sorted(kept)}")
    opening = chat.generation_ids()
    result, contexts = TraceTokens(), chat.contexts()
    for index, turn in enumerate(trace.turns):
        if index:
            for token in opening:
                result._append(token, index)
        _append_assistant(result, turn, index, chat, kept, switch, trace.task_id)
        said = result.turn_ends[-1] + len(opening) if index else 0
        label = end_of_turn if turn.calls and "calls" in kept else Component.OTHER
        label = Component.CALL if turn.taught else label
        result._append(chat.end_of_turn_id, index, label)
        contexts.said(result.token_ids[said:])
        said = len(result)
        observations = list(turn.observations) if "observations" in kept else []
        messages = chat.tool_format.render_observation(observations) if observations else []
        _append_interlude(result, _interlude(chat, messages, turn), observations, index)
        result.turn_ends.append(len(result))
        before = contexts.length
        keep, context = contexts.follow([*result.token_ids[said:], *opening], user=bool(turn.user_messages_after))
        result.cuts.append(TraceCut(len(result) + len(opening), keep, tuple(context)) if keep < before else None)
    result.closed = bool(trace.turns) and trace.turns[-1].taught
    return result


def _interlude(chat: ChatFormat, messages: list[dict[str, str]], turn: TraceTurn) -> Continuation:
    closing = [{"role": "assistant", "content": turn.closing_message}] if turn.closing_message else []
    after = [dict(message) for message in turn.user_messages_after]
    if turn.new_tools_after and after:
        after[0]["content"] = f"{chat.tool_format.render_new_tools(turn.new_tools_after)}\n{after[0]['content']}"
    return chat.continuation([*messages, *closing, *after], generation=False)


def _append_assistant(
    result: TraceTokens,
    turn: TraceTurn,
    index: int,
    chat: ChatFormat,
    kept: frozenset[str],
    switch: Component,
    task_id: str,
) -> None:
    reasoning = turn.reasoning if "reasoning" in kept else ""
    calls = chat.tool_format.render_calls(turn.calls) if turn.calls and "calls" in kept else ""
    levels = [
        level for segment, level in zip(turn.segments, turn.segment_levels, strict=True) for _ in segment.text
    ]  # one per character
    if chat.thought is not None:  # templates trim thoughts
        levels = levels[len(reasoning) - len(reasoning.lstrip()) :]
        reasoning = reasoning.strip()
    parts = chat.assistant_parts(reasoning, calls or turn.said)
    marker = switch if calls else Component.OTHER
    written = Component.CALL if calls or turn.taught else Component.OTHER
    thought = len(parts.opening)
    reasoned = thought + len(parts.reasoning)
    switched = reasoned + len(parts.switch)
    ids, offsets = chat.encode_assistant(parts.text)
    chat.check_assistant(ids)
    for token, (start, end) in zip(ids, offsets, strict=True):
        if end <= thought:
            result._append(token, index, marker)
        elif end <= reasoned:
            result._append(token, index, Component.REASONING, levels[end - thought - 1])
        elif end <= switched:
            result._append(token, index, marker)
        elif start >= reasoned:
            result._append(token, index, written)
        else:
            raise DataError(
                f"a token of turn {index} covers both reasoning and call text in the trace of {task_id}; no exact mask"
                " exists"
            )


def _append_interlude(result: TraceTokens, continuation: Continuation, observations: list[str], index: int) -> None:
    spans, position = [], 0
    for text in observations:
        # Llama 3 templates write an observation as a JSON string: the form that occurs first is the rendered one
        forms = [form for form in (text.strip(), json.dumps(text, ensure_ascii=False)) if form]
        found = [(start, len(form)) for form in forms if (start := continuation.text.find(form, position)) >= 0]
        if found:
            start, length = min(found)
            position = start + length
            spans.append((start, position))
    for token, (start, end) in list(zip(continuation.ids, continuation.offsets, strict=True))[1:]:
        inside = any(start < stop and end > begin for begin, stop in spans)
        result._append(token, index, Component.OBSERVATION if inside else Component.OTHER)


def truncate_at_turn(tokens: TraceTokens, max_tokens: int) -> TraceTokens:
    """The longest run of whole turns from the start that has at most ``max_tokens`` tokens; empty if the first turn is
    longer.
    """
    if len(tokens) <= max_tokens:
        return tokens
    keep = sum(end <= max_tokens for end in tokens.turn_ends)
    length = tokens.turn_ends[keep - 1] if keep else 0
    per_token = {
        item.name: getattr(tokens, item.name)[:length]
        for item in fields(tokens)
        if item.name not in ("turn_ends", "cuts", "turns_dropped", "cut", "closed")
    }
    dropped = tokens.turns_dropped + len(tokens.turn_ends) - keep
    ends, cuts = tokens.turn_ends[:keep], tokens.cuts[:keep]
    return replace(tokens, **per_token, turn_ends=ends, cuts=cuts, turns_dropped=dropped, cut=True, closed=False)


def without_closing(tokens: TraceTokens) -> TraceTokens:
    """A trace without the taught message that closes it; the trace itself where it has none."""
    return truncate_at_turn(tokens, tokens.turn_ends[-2]) if tokens.closed else tokens


def fit_trace(
    trace: Trace,
    chat: ChatFormat,
    max_tokens: int,
    overlong: str,
    components: Collection[str] = COMPONENTS,
    end_of_turn: Component = Component.OTHER,
    switch: Component = Component.CALL,
) -> TraceTokens:
    """:func:`encode_trace` within ``max_tokens`` tokens; what doesn't fit goes by ``overlong``, from the trace's end.
    Empty where nothing fits.

    ``turn`` keeps whole turns. ``segment`` also keeps, of the first turn that doesn't fit, its leading reasoning
    segments that do, as an assistant message without a call. ``drop`` keeps nothing of a trace that is too long.
    """
    whole = encode_trace(trace, chat, components, end_of_turn, switch)
    if len(whole) <= max_tokens:
        return whole
    if overlong == "drop":
        return truncate_at_turn(whole, 0)
    kept = truncate_at_turn(whole, max_tokens)
    if overlong == "turn" or "reasoning" not in components:
        return kept
    turns, torn = trace.turns[: len(kept.turn_ends)], trace.turns[len(kept.turn_ends)]
    for count in range(len(torn.segments), 0, -1):
        head = TraceTurn(torn.segments[:count], (), (), torn.user_turn)
        shorter = encode_trace(replace(trace, turns=(*turns, head)), chat, components, end_of_turn, switch)
        if len(shorter) <= max_tokens:
            return replace(shorter, turns_dropped=len(trace.turns) - len(turns) - 1, cut=True)
    return kept
