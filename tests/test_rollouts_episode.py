"""The episode loop against a scripted policy and environment, with the real chat format."""

import asyncio
import threading
from dataclasses import replace

import pytest

from pact_nemo.environments.base import Outcome, ToolCall
from pact_nemo.errors import EnvironmentFailure, ServerError, ToolCallError
from pact_nemo.rollouts.episode import EpisodeSetup, SeedPath, run_episode
from pact_nemo.serving.client import StaleWeights
from pact_nemo.serving.config import Sampling
from tests.workers.episode_kit import CD, LIMITS, LS, SEEDS, ScriptedEnvironment, ScriptedPolicy, make_task


def play(chat, policy, environment=None, limits=LIMITS, task=None):
    environment = environment if environment is not None else ScriptedEnvironment()
    rollout = asyncio.run(
        run_episode(task or make_task(), 0, EpisodeSetup(environment, chat, limits, Sampling(), SEEDS), policy)
    )
    for session in environment.sessions:
        assert session.closed == 1
    n = len(rollout.token_ids)
    assert len(rollout.loss_mask) == len(rollout.sampler_logprobs) == n
    policy_written = {i for turn in rollout.turns for i in range(turn.start, turn.end)}
    assert [i in policy_written for i in range(n)] == [bool(bit) for bit in rollout.loss_mask]
    return rollout


def test_a_tool_episode_is_what_the_template_would_render(chat):
    environment = ScriptedEnvironment(later_turns=[([{"role": "user", "content": "Go to docs."}], [CD])])
    texts = ["Use ls.\n[ls(a=True)]", "There are two files.", "[cd(to='docs')]", "Done."]
    policy = ScriptedPolicy(chat, texts)
    rollout = play(chat, policy, environment)
    assert rollout.status == "ok" and rollout.error is None and rollout.outcome == Outcome(True, 1.0)
    assert [turn.text for turn in rollout.turns] == texts
    assert [turn.user_turn for turn in rollout.turns] == [0, 0, 1, 1]
    assert [turn.observations for turn in rollout.turns] == [["ran ls"], [], ["ran cd"], []]
    assert environment.sessions[0].executed == [ToolCall("ls", {"a": True}), ToolCall("cd", {"to": "docs"})]
    assert threading.get_ident() not in environment.sessions[0].threads  # the event loop is never blocked by a tool

    revealed = f"{chat.tool_format.render_new_tools([CD])}\nGo to docs."
    conversation = [
        *make_task().user_turns[0],
        {"role": "assistant", "content": texts[0]},
        *chat.tool_format.render_observation(["ran ls"]),
        {"role": "assistant", "content": texts[1]},
        {"role": "user", "content": revealed},
        {"role": "assistant", "content": texts[2]},
        *chat.tool_format.render_observation(["ran cd"]),
        {"role": "assistant", "content": texts[3]},
    ]
    rendered = chat.render(conversation, [LS], generation=False)
    sampled = chat.tokenizer.decode(rollout.prompt_ids + rollout.token_ids)
    assert rendered.startswith(sampled) and rendered[len(sampled) :].strip() == ""


def test_each_request_is_prompt_plus_everything_so_far_verbatim(chat):
    policy = ScriptedPolicy(chat, ["[ls()]", "[ls()]", "Done."])
    rollout = play(chat, policy)
    for request, turn in zip(policy.requests, rollout.turns, strict=True):
        assert list(request.prompt_ids) == rollout.prompt_ids + rollout.token_ids[: turn.start]
        assert list(request.stop_token_ids) == chat.eos_ids
    assert rollout.sampler_logprobs == [
        -0.5 - next(k for k, t in enumerate(rollout.turns) if t.start <= i < t.end) if bit else 0.0
        for i, bit in enumerate(rollout.loss_mask)
    ]


def test_a_malformed_call_is_answered_not_raised(chat):
    rollout = play(chat, ScriptedPolicy(chat, ["[ls(a=open('x'))]", "[ls(a=True)]", "Done."]))
    bad = rollout.turns[0]
    assert bad.calls == [] and len(bad.call_errors) == 1 and bad.is_tool_turn
    assert bad.observations == [f"Error: the call could not be read: {bad.call_errors[0]}"]
    shown = chat.tokenizer.decode(rollout.token_ids[bad.end : rollout.turns[1].start])
    assert bad.observations[0] in shown
    assert rollout.status == "ok" and rollout.outcome.success


def test_calls_that_the_environment_refuses_are_observations(chat):
    rollout = play(
        chat, ScriptedPolicy(chat, ["[ls(), ls()]", "Done."]), ScriptedEnvironment(fail=ToolCallError("no such tool"))
    )
    assert rollout.turns[0].observations == ["Error: no such tool"] * 2
    assert rollout.status == "ok"


@pytest.mark.parametrize("failure", [EnvironmentFailure("sandbox gone"), ZeroDivisionError("simulator bug")])
def test_a_broken_environment_fails_the_rollout_only(chat, failure):
    rollout = play(chat, ScriptedPolicy(chat, ["[ls()]", "Done."]), ScriptedEnvironment(fail=failure))
    assert rollout.status == "failed" and rollout.outcome is None
    assert str(failure) in rollout.error


def test_a_broken_start_or_close_is_survived(chat):
    environment = ScriptedEnvironment()
    environment.start = lambda task: 1 / 0
    assert play(chat, ScriptedPolicy(chat, []), environment).status == "failed"
    environment = ScriptedEnvironment()
    rollout = asyncio.run(
        run_episode(
            make_task(),
            0,
            EpisodeSetup(NoClose(environment), chat, LIMITS, Sampling(), SEEDS),
            ScriptedPolicy(chat, ["Hi."]),
        )
    )
    assert rollout.status == "ok"


class NoClose:
    def __init__(self, inner):
        self.inner = inner

    def start(self, task):
        session = self.inner.start(task)
        session.close = lambda: 1 / 0
        return session


@pytest.mark.parametrize("failure", [ServerError("dead"), StaleWeights("version 4, expected 3")])
def test_a_server_failure_marks_the_rollout_failed(chat, failure):
    rollout = play(chat, ScriptedPolicy(chat, ["[ls()]", failure]))
    assert rollout.status == "failed" and rollout.outcome is None
    assert rollout.error == f"{type(failure).__name__}: {failure}"


def test_weights_that_change_within_an_episode_fail_it(chat):
    policy = ScriptedPolicy(chat, ["[ls()]", "Done."])
    original = policy.generate

    async def generate(request):
        completion = await original(request)
        return replace(completion, weight_version=3 + len(policy.requests) - 1)

    policy.generate = generate
    rollout = play(chat, policy)
    assert rollout.status == "failed" and "stale weights" in rollout.error


@pytest.mark.parametrize(
    "limits, texts, cut, turns, reason, limit",
    [
        (
            replace(LIMITS, max_turns_per_user_turn=2),
            ["[ls()]"] * 3,
            (),
            2,
            "2 assistant turns in one user turn",
            "turns",
        ),
        (
            replace(LIMITS, max_turns=3, max_turns_per_user_turn=9),
            ["[ls()]"] * 4,
            (),
            3,
            "more than 3 assistant turns",
            "turns",
        ),
        (
            replace(LIMITS, max_turn_tokens=4),
            ["A rather long sentence about nothing."],
            (),
            1,
            "turn 1 was cut after 4 tokens",
            "turn_tokens",
        ),
        (LIMITS, ["[ls()]", "[ls("], (1,), 2, "assistant turn 2 was cut", "turn_tokens"),
    ],
)
def test_limits_truncate(chat, limits, texts, cut, turns, reason, limit):
    rollout = play(chat, ScriptedPolicy(chat, texts, cut), limits=limits)
    assert rollout.status == "truncated" and reason in rollout.error and rollout.limit == limit
    assert len(rollout.turns) == turns
    assert rollout.outcome is not None  # the checker's verdict is taken of what was done


def test_a_cut_message_is_not_acted_on(chat):
    environment = ScriptedEnvironment()
    rollout = play(chat, ScriptedPolicy(chat, ["[ls()]"], cut=(0,)), environment)
    assert rollout.status == "truncated" and environment.sessions[0].executed == [] and rollout.turns[0].calls == []


@pytest.mark.parametrize("room", range(8, 54, 3))
def test_token_limits_hold_exactly(chat, room):
    texts = ["[ls()]", "[ls(a=True)]", "[ls()]", "Done."]
    response = play(chat, ScriptedPolicy(chat, texts), limits=replace(LIMITS, max_response_tokens=room))
    assert len(response.token_ids) <= room
    assert (response.status, response.limit) == ("truncated", "response_tokens"), "no message is too long by itself"
    prompt = len(response.prompt_ids)
    whole = play(chat, ScriptedPolicy(chat, texts), limits=replace(LIMITS, max_model_len=prompt + room))
    assert len(whole.prompt_ids) + len(whole.token_ids) <= prompt + room
    assert whole.token_ids == response.token_ids


@pytest.mark.parametrize(("own", "limit"), [(4, "turn_tokens"), (30, "response_tokens"), (10**6, "response_tokens")])
def test_a_message_is_cut_by_the_limit_that_is_nearer(chat, own, limit):
    """With one number for both, a later message is cut by what the earlier ones left."""
    texts = ["[ls()]", "Done. " * 40]
    if own == 4:
        texts = texts[1:]
    limits = replace(LIMITS, max_response_tokens=30, max_turn_tokens=own)
    rollout = play(chat, ScriptedPolicy(chat, texts), limits=limits)
    assert (rollout.status, rollout.limit) == ("truncated", limit)


def test_a_prompt_that_fills_the_model_is_truncated_without_a_request(chat):
    policy = ScriptedPolicy(chat, [])
    rollout = play(chat, policy, limits=replace(LIMITS, max_model_len=20))
    assert rollout.status == "truncated" and rollout.turns == [] and policy.requests == []


def test_request_seeds_depend_on_every_part_of_the_path():
    base = (5, 3, "task_1", 2, 4)
    paths = [base] + [
        tuple("x" if j == i and j == 2 else v + (j == i) if j != 2 else v for j, v in enumerate(base)) for i in range(5)
    ]
    seeds = [SeedPath(run, step).seed(task, sample, turn) for run, step, task, sample, turn in paths]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert SeedPath(5, 3).seed("task_1", 2, 4) == seeds[0]
    assert SeedPath(5, "eval/before").seed("t", 0, 0) != SeedPath(5, "eval/after").seed("t", 0, 0)


@pytest.mark.parametrize("opened", [False, True])
def test_environments_see_what_a_message_says_outside_of_its_thought(chat, monkeypatch, opened):
    monkeypatch.setattr(type(chat), "opens_thought", opened)
    heard = []

    class Listening(ScriptedEnvironment):
        def start(self, task):
            session = super().start(task)
            following = session.next_user_turn
            session.next_user_turn = lambda message="": (heard.append(message), following(message))[1]
            return session

    head = "" if opened else "<think>\n"
    texts = [f"{head}Not\n[cd(a=True)]\n</think>\n\n[ls(a=True)]", f"{head}Paris or Rome?\n</think>\n\nRome"]
    environment = Listening()
    rollout = play(chat, ScriptedPolicy(chat, texts), environment)
    assert environment.sessions[0].executed == [ToolCall("ls", {"a": True})] and rollout.turns[0].call_errors == []
    assert heard == ["Rome"] == [rollout.turns[1].visible] and rollout.turns[1].text == texts[1]
    for thought in (
        f"{head}Only a thought",
        f"{head}[ls(a=True)]",
    ):  # never closed: nothing is acted on, nothing is said
        heard.clear()
        rollout = play(chat, ScriptedPolicy(chat, [thought]), Listening())
        assert (rollout.status, heard, rollout.turns[0].calls, rollout.turns[0].visible) == ("ok", [""], [], "")
