"""Order of the tests: files that take minutes first, so that no process is left alone with one of them at the end.
And the code that is tested: this checkout's, in the tests' processes as well. And what several files begin with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fixtures.endpoint import Endpoint

    from pact_nemo.chat.template import ChatFormat

os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")))
)

# The same cases in every run: `pytest --hypothesis-profile=search` looks for others.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=5_000, deadline=None)
settings.load_profile("fixed")

#: files of more than half a minute on two cores, the longest first; a file that is not named here only comes later
LONG = (
    "test_training_runs",
    "test_training_runs_served",
    "test_tracking_run",
    "test_rollouts_server",
    "test_policy_parallel",
    "test_checkpoints_resume",
    "test_policy_export_parallel",
    "test_question_runs",
    "test_planning_activations",
    "test_output_lost",
    "test_traces_spans",
    "test_saves",
    "test_training_fast_paths",
    "test_planning_timing",
    "test_tracking",
    "test_policy_offload",
    "test_time_sharing",
    "test_hangs",
    "test_policy_model_folder",
    "test_benches",
    "test_terminal",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The embedded model."""
    from pact_nemo.checkpoints.embedded import materialise_embedded_model

    return materialise_embedded_model(Path(__file__).parents[1] / ".cache" / "pact_nemo")


@pytest.fixture(scope="session")
def chat(model_dir: Path) -> ChatFormat:
    """The embedded model's chat format."""
    from pact_nemo.chat.template import ChatFormat

    return ChatFormat.from_pretrained(model_dir, "pythonic")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random model of a family, made when it is first asked for."""
    from tests.workers.policy_kit import make_model

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What whole runs start from; each of them has a name of its own."""
    from tests.workers.recipe_runs import make_stage

    return make_stage(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """A small chat-completions endpoint that answers what a test says."""
    from fixtures.endpoint import Endpoint

    running = Endpoint()
    yield running
    running.close()
