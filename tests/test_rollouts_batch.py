"""A batch of episodes: its order, how many run at once, how it is broken off, and which server each task goes to."""

import asyncio
import threading
import time

import pytest

from pact_nemo.errors import Interrupted, ServerError
from pact_nemo.rollouts.batch import run_batch
from pact_nemo.rollouts.chat_episode import read_calls
from pact_nemo.rollouts.episode import EpisodeSetup
from pact_nemo.serving.client import Completion
from pact_nemo.serving.config import Sampling
from tests.workers.episode_kit import LIMITS, SEEDS, ScriptedEnvironment, ScriptedPolicy, make_task


def test_a_batch_is_ordered_limited_and_reported(chat):
    """Order by (task, sample) whatever finishes first; a fault in one rollout leaves the others alone."""
    running, peak, reports = 0, 0, []

    class Policy(ScriptedPolicy):
        async def generate(self, request):
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            delay = (request.seed % 7) / 500
            await asyncio.sleep(delay)
            running -= 1
            if "task 2" in chat.tokenizer.decode(list(request.prompt_ids)):
                raise ServerError("only this one")
            ids = [*chat.encode_assistant("Fine.")[0], chat.eos_ids[0]]
            return Completion(ids, [-1.0] * len(ids), "stop", 3)

    tasks = [make_task(f"t{i}", f"This is task {i}.") for i in range(5)]
    rollouts = asyncio.run(
        run_batch(
            tasks,
            3,
            setup=EpisodeSetup(ScriptedEnvironment(), chat, LIMITS, Sampling(), SEEDS),
            clients=[Policy(chat, [])],
            concurrency=4,
            on_progress=lambda *counts: reports.append(counts),
        )
    )
    assert [(r.task_id, r.sample) for r in rollouts] == [(f"t{i}", k) for i in range(5) for k in range(3)]
    assert [r.status for r in rollouts] == ["ok"] * 6 + ["failed"] * 3 + ["ok"] * 6
    assert 1 < peak <= 4
    assert [done for done, _, _ in reports] == list(range(1, 16)) and reports[-1][1:] == (
        15,
        sum(sum(r.loss_mask) for r in rollouts),
    )


def test_a_batch_is_broken_off_when_the_check_says_so_and_leaves_no_session_open(chat):
    asked, sessions = 0, []

    class Environment(ScriptedEnvironment):
        def start(self, task):
            sessions.append(super().start(task))
            return sessions[-1]

    class Slow(ScriptedPolicy):
        async def generate(self, request):
            await asyncio.sleep(60)

    def check():
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Interrupted("SIGTERM: stopping")

    started = time.perf_counter()
    with pytest.raises(Interrupted, match="SIGTERM"):
        asyncio.run(
            run_batch(
                [make_task()],
                3,
                setup=EpisodeSetup(Environment(), chat, LIMITS, Sampling(), SEEDS),
                clients=[Slow(chat, [])],
                concurrency=2,
                check=check,
            )
        )
    assert time.perf_counter() - started < 20 and asked == 3
    assert len(sessions) == 2 and all(session.closed for session in sessions)


def test_tools_that_wait_hold_up_no_other_episode(chat):
    open_episodes = 40  # above what asyncio's own pool would run at once on any machine
    together = threading.Barrier(open_episodes)

    class Environment(ScriptedEnvironment):
        def start(self, task):
            together.wait(timeout=30)  # passes only once all of them are here
            return super().start(task)

    class Cut(ScriptedPolicy):
        async def generate(self, request):
            raise ServerError("no policy needed")

    settings = dict(setup=EpisodeSetup(Environment(), chat, LIMITS, Sampling(), SEEDS), concurrency=open_episodes)
    rollouts = asyncio.run(run_batch([make_task()], open_episodes, clients=[Cut(chat, [])], **settings))
    assert {rollout.error for rollout in rollouts} == {"ServerError: no policy needed"}


def test_tasks_go_to_the_servers_in_turn_and_stay_there(chat):
    asked = {0: set(), 1: set()}

    class Policy(ScriptedPolicy):
        def __init__(self, number):
            super().__init__(chat, [])
            self.number = number

        async def generate(self, request):
            asked[self.number].add(chat.tokenizer.decode(list(request.prompt_ids)).partition("task ")[2][:1])
            ids = [*chat.encode_assistant("Fine.")[0], chat.eos_ids[0]]
            return Completion(ids, [-1.0] * len(ids), "stop", 3)

    tasks = [make_task(f"t{i}", f"This is task {i}.") for i in range(5)]
    settings = dict(setup=EpisodeSetup(ScriptedEnvironment(), chat, LIMITS, Sampling(), SEEDS), concurrency=4)
    rollouts = asyncio.run(run_batch(tasks, 2, clients=[Policy(0), Policy(1)], **settings))
    assert [(r.task_id, r.sample) for r in rollouts] == [(f"t{i}", k) for i in range(5) for k in range(2)]
    assert asked == {0: {"0", "2", "4"}, 1: {"1", "3"}}


@pytest.mark.parametrize("given", [3, "find", {"name": "find"}])
def test_an_endpoint_whose_calls_are_no_list_fails_one_call_and_not_the_evaluation(given: object) -> None:
    ((identifier, fault),) = read_calls({"role": "assistant", "tool_calls": given})
    assert identifier == "0" and "tool_calls is no list" in str(fault)
    assert read_calls({"tool_calls": None}) == [] == read_calls({})
