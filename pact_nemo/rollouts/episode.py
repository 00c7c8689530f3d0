"""One episode: the policy writes, the environment answers, until the task is over or a limit ends it.

Token-in-token-out: the prompt is tokenised once, sampled ids are appended as they came, and observations are tokenised
on their own. Where the chat template drops the thoughts of earlier messages, the context is cut back to before the
first of them, and what follows it is repeated without them (``chat/contexts.py``). No trace can enter: this package
does not import the traces package, and a request has no field for one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pact_nemo.chat.contexts import Contexts
from pact_nemo.chat.thoughts import visible_text
from pact_nemo.environments.base import Environment, Outcome, Session, Task, ToolCall
from pact_nemo.environments.sessions import opening_fault, opening_messages, seed_session
from pact_nemo.errors import ConfigError, DataError, EnvironmentFailure, PactError, ServerError, ToolCallError
from pact_nemo.rollouts.types import Limit, Rollout, Turn
from pact_nemo.serving.client import Completion, GenerationRequest
from pact_nemo.serving.config import EpisodeLimits, Sampling

log = logging.getLogger(__name__)

Tools = Sequence[dict[str, Any]]
T = TypeVar("T")


class ParsedTurn(Protocol):
    """What the tool format made of an assistant message."""

    @property
    def calls(self) -> list[ToolCall]: ...
    @property
    def errors(self) -> list[str]: ...


class Chat(Protocol):
    """The part of :class:`pact_nemo.chat.template.ChatFormat` that episodes use.

    ``opens_thought`` (may be absent, then False): the generation prompt opens a thought, so that every message begins
    inside one.
    """

    @property
    def eos_ids(self) -> list[int]: ...
    @property
    def tool_format(self) -> Any: ...
    def prompt_ids(self, messages: Any, tools: Any) -> list[int]: ...
    def continuation_ids(self, messages: Any, after_eos: bool, new_tools: Any = ()) -> list[int]: ...
    def contexts(self) -> Contexts: ...
    def decode(self, ids: Any) -> str: ...


class Generates(Protocol):
    """The part of :class:`pact_nemo.serving.client.RolloutClient` that episodes use."""

    @property
    def weight_version(self) -> int: ...
    async def generate(self, request: GenerationRequest) -> Completion: ...


@dataclass(frozen=True)
class SeedPath:
    """Where a request stands in a run; its seed is a function of this alone, so a resumed run samples with the same
    seeds.

    Attributes:
        run_seed: the run's seed.
        step: training step, or a name such as ``eval/before`` for generation outside the loop.
    """

    run_seed: int
    step: int | str

    def seed(self, task_id: str, sample: int, turn: int | str) -> int:
        """63-bit seed of one request (BLAKE2b of the path), or of what ``turn`` names."""
        path = "\x1f".join(map(str, (self.run_seed, self.step, task_id, sample, turn)))
        return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class EpisodeSetup:
    """What all episodes of a batch have in common.

    Attributes:
        environment: that they are played in.
        chat: the policy's text and token conventions.
        limits: that end an episode.
        sampling: temperature and top-p.
        seeds: where the batch stands in the run.
        one_prompt: the rollouts are trained on, so a session may only open with ``task.user_turns[0]``.
    """

    environment: Environment
    chat: Chat
    limits: EpisodeLimits
    sampling: Sampling
    seeds: SeedPath
    one_prompt: bool = False


class _Truncated(Exception):
    """A limit ended the episode."""

    def __init__(self, limit: Limit, message: str):
        super().__init__(message)
        self.limit = limit


async def run_episode(task: Task, sample: int, setup: EpisodeSetup, client: Generates) -> Rollout:
    """Play ``task`` once with the policy that ``client`` serves. Never raises for a server or environment failure: the
    rollout says ``failed`` then.

    Malformed calls are answered by error observations that the model sees. A message without calls ends the user turn;
    the environment gets what it says outside of its thought. The checker's verdict is taken of truncated episodes too.

    Raises:
        ConfigError: the session opens with another prompt, and ``setup.one_prompt`` allows none.
    """
    started = time.perf_counter()
    prompt = setup.chat.prompt_ids(list(task.user_turns[0]), list(task.tools))
    rollout = Rollout(task.id, sample, prompt, [], [], [], [], None, client.weight_version)
    session: Session | None = None
    try:
        session = await _in_thread(task, setup.environment.start, task)
        seed_session(session, setup.seeds.seed(task.id, sample, "user"))
        opening = await _in_thread(task, opening_messages, session, task)
        if (fault := opening_fault(task, opening)) is not None:
            if setup.one_prompt:
                raise ConfigError(fault)
            rollout.prompt_ids = setup.chat.prompt_ids(opening, list(task.tools))
        episode = _Episode(task, rollout, session, setup, client)
        try:
            await episode.play()
        except _Truncated as limit:
            rollout.status, rollout.error, rollout.limit = "truncated", str(limit), limit.limit
        rollout.outcome = await _in_thread(task, _verdict, session)
    except (
        EnvironmentFailure,
        ServerError,
        DataError,
    ) as error:  # DataError: the chat template refuses what the environment said
        rollout.status, rollout.outcome = "failed", None
        rollout.error = f"{type(error).__name__}: {error}"
        log.debug("%s, sample %d failed: %s", task.id, sample, error)
    finally:
        if session is not None:
            try:
                await asyncio.to_thread(session.close)
            except Exception:  # a session that can't be closed takes nothing from what was played
                log.warning("%s: the environment session could not be closed", task.id, exc_info=True)
    rollout.seconds = time.perf_counter() - started
    return rollout


class _Episode:
    """State of one running episode."""

    def __init__(self, task: Task, rollout: Rollout, session: Session, setup: EpisodeSetup, client: Generates):
        self.task, self.rollout, self.session = task, rollout, session
        self.chat, self.client = setup.chat, client
        self.limits, self.sampling, self.seeds = setup.limits, setup.sampling, setup.seeds
        self.tools = list(task.tools)
        self.contexts = setup.chat.contexts()
        self.context_ids = list(rollout.prompt_ids)  #: what the server is sent next
        self.user_turn = 0
        self.turns_here = 0

    async def play(self) -> None:
        """Until the task is over. Raises _Truncated when a limit ends it first."""
        while True:
            turn, ended = await self.policy_turn()
            if turn.is_tool_turn:
                turn.observations = await self.observe(turn)
                self.append_context(self.chat.tool_format.render_observation(turn.observations), ended, user=False)
                continue
            following = await _in_thread(self.task, self.session.next_user_turn, turn.visible)
            if following is None:
                return
            messages, revealed = following
            turn.reply = [dict(message) for message in messages]
            self.user_turn += 1
            self.turns_here = 0
            self.tools += revealed
            self.append_context(messages, ended, revealed, user=True)

    async def policy_turn(self) -> tuple[Turn, bool]:
        """Sample one assistant message. Returns the turn and whether it ended with an end-of-turn token."""
        rollout, limits = self.rollout, self.limits
        if self.turns_here >= limits.max_turns_per_user_turn:
            raise _Truncated("turns", f"more than {limits.max_turns_per_user_turn} assistant turns in one user turn")
        if len(rollout.turns) >= limits.max_turns:
            raise _Truncated("turns", f"more than {limits.max_turns} assistant turns")
        room = self.room()
        if room < 1:
            raise _Truncated("response_tokens", self.room_error())
        request = GenerationRequest(
            prompt_ids=tuple(self.context_ids),
            max_tokens=min(limits.max_turn_tokens, room),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            stop_token_ids=tuple(self.chat.eos_ids),
            seed=self.seeds.seed(self.task.id, rollout.sample, len(rollout.turns)),
        )
        completion = await self.client.generate(request)
        if completion.weight_version != rollout.weight_version:
            raise ServerError(
                f"stale weights: version {completion.weight_version} in an episode of version {rollout.weight_version}"
            )
        start = len(rollout.token_ids)
        rollout.token_ids += completion.token_ids
        self.context_ids += completion.token_ids
        self.contexts.said(completion.token_ids)
        rollout.loss_mask += [1] * len(completion.token_ids)
        rollout.sampler_logprobs += completion.logprobs
        text = self.chat.decode(completion.token_ids)
        opened = bool(getattr(self.chat, "opens_thought", False))
        visible = visible_text(text, opened)
        turn = Turn(
            start,
            len(rollout.token_ids),
            text,
            user_turn=self.user_turn,
            finish_reason=completion.finish_reason,
            visible=visible,
        )
        rollout.turns.append(turn)
        self.turns_here += 1
        ended = completion.token_ids[-1] in self.chat.eos_ids
        if not ended:
            # An unfinished message is not acted on: half a call is not what the policy meant to send.
            by_room = room < limits.max_turn_tokens or (room == limits.max_turn_tokens and len(rollout.turns) > 1)
            raise _Truncated(
                "response_tokens" if by_room else "turn_tokens",
                f"assistant turn {len(rollout.turns)} was cut after {len(completion.token_ids)} tokens",
            )
        parse = self.chat.tool_format.parse
        parsed: ParsedTurn = parse(text, self.tools, in_thought=True) if opened else parse(text, self.tools)
        turn.calls, turn.call_errors = list(parsed.calls), list(parsed.errors)
        return turn, ended

    async def observe(self, turn: Turn) -> list[str]:
        """One observation a call, then one an error."""
        observations: list[str] = []
        if turn.calls:
            try:
                observations = list(await _in_thread(self.task, self.session.execute, turn.calls))
            except ToolCallError as error:  # the environment can't take these calls: data, shown to the model
                observations = [f"Error: {error}"] * len(turn.calls)
            if len(observations) != len(turn.calls):
                raise EnvironmentFailure(
                    f"{self.task.id}: {len(turn.calls)} calls got {len(observations)} observations"
                )
        return observations + [f"Error: the call could not be read: {error}" for error in turn.call_errors]

    def append_context(
        self, messages: Sequence[dict[str, str]], after_eos: bool, new_tools: Tools = (), *, user: bool
    ) -> None:
        """Append tool or user messages and the next generation prompt; they carry no loss. Where thoughts of earlier
        messages go, the context is cut back and what stays of it repeated, without loss as well. A limit that this
        would break ends the episode before it.
        """
        rollout = self.rollout
        after = self.chat.continuation_ids(messages, after_eos, new_tools)
        whole = self.contexts.length
        keep, ids = self.contexts.follow(after, user)
        if len(ids) >= self.room(keep):
            raise _Truncated("response_tokens", self.room_error(keep))
        if keep < whole:
            rollout.rewinds.append((len(rollout.token_ids), keep))
            del self.context_ids[len(rollout.prompt_ids) + keep :]
        self.context_ids += ids
        rollout.token_ids += ids
        rollout.loss_mask += [0] * len(ids)
        rollout.sampler_logprobs += [0.0] * len(ids)

    def room(self, used: int | None = None) -> int:
        """Tokens that may still follow. Limits count what the server sees: a thought that is no longer in the context
        takes no room.

        Args:
            used: tokens after x; None = those of the present context.
        """
        used = used if used is not None else self.contexts.length
        return min(
            self.limits.max_response_tokens - used, self.limits.max_model_len - len(self.rollout.prompt_ids) - used
        )

    def room_error(self, used: int | None = None) -> str:
        used = used if used is not None else self.contexts.length
        if self.limits.max_response_tokens - used <= self.limits.max_model_len - len(self.rollout.prompt_ids) - used:
            return f"the response has no room left within {self.limits.max_response_tokens} tokens"
        return f"prompt and response have no room left within {self.limits.max_model_len} tokens"


def _verdict(session: Session) -> Outcome:
    return session.outcome()


async def _in_thread(task: Task, function: Callable[..., T], *args: Any) -> T:
    """Run environment code in a worker thread. What it raises by mistake is the environment's failure, not the
    run's.
    """
    try:
        return await asyncio.to_thread(function, *args)
    except PactError:
        raise
    except Exception as error:
        log.warning("%s: the environment raised %r", task.id, error, exc_info=True)
        raise EnvironmentFailure(f"{task.id}: the environment raised {error!r}") from error
