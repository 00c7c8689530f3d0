"""Refits that bring adapters alone, with a server that has faults on order: whole or absent, never a stale one,
wherever the server is killed. (With vLLM: test_rollouts_adapters.py.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.errors import CheckpointError, ServerError
from pact_nemo.serving.client import Completion, GenerationRequest, RolloutClient, StaleWeights
from pact_nemo.serving.fleet import Fleet
from pact_nemo.serving.refit import check_export, load
from pact_nemo.serving.supervisor import SupervisedServer
from tests.faults.server_bench import Bench, content, play

PATIENT = {
    "request_timeout_s": 10.0,
    "heartbeat_timeout_s": 10.0,
    "refit_timeout_s": 20.0,
}  #: where no fault is waited for
#: of a refit from one adapter to the next: pause, label, names, three of the load, drop, cache, label, resume, look
CALLS = 11


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, adapters=True)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """By weight version."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed"), adapters=True)
    try:
        served = bench.launch(**PATIENT)
        found = {0: content(play(served))}
        for version in (1, 2, 3):
            before = calls(bench)
            bench.refit(version)
            assert calls(bench) - before == CALLS - (version == 1), "the first one has nothing to drop"
            (name,) = served.client.admin.adapters()
            assert served.client.model == name and name.startswith(f"policy-v{version:06d}-")
            found[version] = content(play(served, version))
        assert served.health.restarts == 0
        assert len({str(rollouts) for rollouts in found.values()}) == 4
        return found
    finally:
        bench.close()


def calls(bench: Bench) -> int:
    count = bench.folder / "call.count"
    return int(count.read_text()) if count.exists() else 0


@pytest.mark.parametrize(
    "number",
    [number if number in (4, 6, 9) else pytest.param(number, marks=pytest.mark.slow) for number in range(1, CALLS + 1)],
)
def test_a_server_that_is_killed_at_any_call_comes_back_with_the_adapter(
    bench: Bench, undisturbed: dict[int, list[Any]], number: int
) -> None:
    served = bench.launch(**PATIENT)
    bench.refit(1)
    bench.fault({"of": "call", "at": calls(bench) + number, "do": "exit"})
    bench.refit(2)
    assert served.health.restarts == 1 and served.health.serves(2)
    assert content(play(served, 2)) == undisturbed[2]


def test_what_is_answered_after_a_failure_at_any_call_is_never_another_versions(bench: Bench) -> None:
    """Nobody restarts the server here. It then answers the old version as the old one, the new one as the new one, or
    nothing.
    """
    served, answered = bench.launch(**PATIENT), []
    for number in range(1, CALLS + 1):
        before, after = 2 * number - 1, 2 * number
        bench.refit(before)
        want, folder = {before: sample(served.client)}, bench.export(after)
        bench.fault({"of": "call", "at": calls(bench) + number, "do": "refuse"})
        with pytest.raises(ServerError, match="HTTP 500"):
            load(served.client, folder, after)
        assert served.client.weight_version == before, "it has not succeeded"
        served.client.admin.resume()
        names, found = served.client.admin.adapters(), {}
        for version in (before, after):
            with suppress(StaleWeights):
                found[version] = sample(asking(served, version, names))
        bench.fault()
        bench.refit(after)  # as a supervisor does, here on the very process
        want[after] = sample(served.client)
        assert want[before].token_ids != want[after].token_ids
        assert all(want[version] == got for version, got in found.items()), number
        answered.append([version - before for version in found])
    # as long as the label was not touched it is the old one; when only the last look failed, it is the new one
    assert answered[:2] == [[0], [0]] and answered[-2:] == [[1], [1]] and all(row == [] for row in answered[2:-2])
    assert served.health.restarts == 0


def asking(served: SupervisedServer, version: int, names: list[str]) -> RolloutClient:
    """A client that expects this version, and asks for its adapter where there is one."""
    client = RolloutClient(
        served.server.endpoint, weight_version=version, request_timeout_s=5, connect_retries=0, admin_timeout_s=5
    )
    client.model = next((name for name in names if f"v{version:06d}" in name), f"policy-v{version:06d}-absent")
    return client


def sample(client: RolloutClient) -> Completion:
    async def ask() -> Completion:
        async with client:
            return await client.generate(GenerationRequest((7, 8, 9), 12, 1.0, 1.0, (1,), 3))

    return asyncio.run(ask())


def test_an_adapter_that_vanished_is_noticed_and_not_answered_by_the_base(
    bench: Bench, undisturbed: dict[int, list[Any]]
) -> None:
    served = bench.launch(**PATIENT)
    bench.refit(1)
    served.client.admin.drop_adapter(served.client.model)
    assert content(play(served, 1)) == undisturbed[1]
    assert served.health.restarts == 1 and "no policy-v000001" in bench.notes[0]


@pytest.mark.parametrize("what", ["exit", "stop", "fail", "keep"])
def test_a_load_that_fails_is_made_good_by_a_restart(
    bench: Bench, undisturbed: dict[int, list[Any]], what: str
) -> None:
    """``keep``: the server says that it loaded the adapter, and did not."""
    served = bench.launch({"at": 2, "do": what, "of": "load"}, refit_timeout_s=1.0)
    bench.refit(1)
    bench.refit(2)
    assert served.health.restarts == 1 and content(play(served, 2)) == undisturbed[2]


def test_engines_that_sleep_between_two_adapters_keep_their_base(
    bench: Bench, undisturbed: dict[int, list[Any]]
) -> None:
    """The trainer asks for sleep without weights, since a refit follows. One of an adapter brings no base."""
    served = bench.launch(**PATIENT)
    bench.refit(1)
    fleet = Fleet([served], min_share=0.5, note=bench.notes.append)
    fleet.sleep(drop=True)
    fleet.wake("weights")
    fleet.refit(bench.export(2), 2, like=bench.folder / "model")
    fleet.wake("kv_cache")
    assert content(play(served, 2)) == undisturbed[2] and served.health.restarts == 0


def test_what_is_no_adapter_of_the_servers_base_is_refused_before_the_server_hears_of_it(bench: Bench) -> None:
    served, model = bench.launch(), bench.folder / "model"
    bench.refit(2)
    before, other = calls(bench), bench.folder / "other"
    bench._model(other, 5)
    folder = bench.export(3)
    for version, like, message in (
        (3, other, "trained on another base than"),
        (2, model, "says version 3, expected 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_export([served.client], folder, version, like=like)
    with pytest.raises(CheckpointError, match="versions only grow"):
        check_export([served.client], bench.export(1), 1, like=model)
    torn = bench.export(4) / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="adapter_model.safetensors has"):
        check_export([served.client], torn.parent, 4, like=model)
    assert calls(bench) == before and served.client.weight_version == 2
