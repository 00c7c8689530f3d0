"""What an environment says of itself, and what it is built from: the two sides of the door.

Everything outside this package asks an :class:`EnvironmentSpec` and never compares a benchmark's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pact_nemo.config.ranges import Ranges
from pact_nemo.environments.base import Task
from pact_nemo.runtime.quarantine import Quarantine
from pact_nemo.sandbox import Sandbox

#: where expert traces come from without ``traces.path``: reference calls that are executed, recorded sub-answers that a
#: search for calls brings in, or nowhere
ExpertTraces = Literal["ground_truth", "recorded", "none"]
#: what the environment makes of ``tasks.path`` and ``tasks.eval_path``
TasksFile = Literal["none", "optional", "required"]


@dataclass
class EnvironmentConfig:
    """Base of an environment's own settings, the section ``environment_config``. As it is, it has no key.

    A subclass is a dataclass whose fields have types that OmegaConf knows, and defaults. Its ``ranges`` say what its
    numbers may be, by dotted key, as in :mod:`pact_nemo.config.ranges`.
    """

    ranges: ClassVar[Ranges] = {}

    def validate(self) -> None:
        """Checks that types can't express.

        Raises:
            ConfigError: names the key, ``environment_config.KEY``, and the remedy.
        """


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Setup:
    """What an environment is built from.

    Attributes:
        settings: the section ``environment_config``, an instance of the spec's ``config``.
        path: ``tasks.path``.
        max_observation_chars: longer observations are cut for the policy. None: no limit.
        seed: ``tasks.split_seed``; of choices that every run of an experiment shares.
        quarantine: takes bad rows of task files, by the policy of ``run.bad_rows``.
        sandbox: makes a sandbox with the limits of the section ``sandbox``; it starts when it is first used.
        conversations: reads ``traces.path`` where it is a file of conversations, once; None where it is none. For an
            environment whose tasks can be read out of them.
        refuse_conversations: raises DataError where ``traces.path`` is given and no file of conversations; for such an
            environment, where ``conversations`` gave None and there are no other tasks.
        python_names: ``model.tool_format`` writes calls as Python text, so names have to be plain identifiers.
        folder: where it may keep what has to outlive the process, for an evaluation that is cut and goes on. None:
            nothing has to.
    """

    settings: Any
    path: str | None
    max_observation_chars: int | None
    seed: int
    quarantine: Quarantine
    sandbox: Callable[[], Sandbox]
    conversations: Callable[[], Sequence[Any] | None] = _nothing
    refuse_conversations: Callable[[], None] = _nothing
    python_names: bool = False
    folder: Path | None = None


def _no_limit_of_its_own() -> int | None:
    return None


def _trains_on_all(settings: Any) -> str | None:
    return None


def _no_words(settings: Any) -> str:
    return ""


@dataclass(frozen=True)
class EnvironmentSpec:
    """An environment as the rest of the code knows it. Only ``build`` has to be given.

    Attributes:
        build: the environment for a :class:`Setup`; a class with that one argument will do.
        config: dataclass of the section ``environment_config``; its keys and types are checked as settings are read.
        section: how the section ``environment_config`` may be written as well.
        tasks_file: whether ``tasks.path`` (and ``tasks.eval_path``, a file of held-out tasks) is read, or needed.
        expert_traces: where they come from without ``traces.path``. ``ground_truth`` executes ``reference_calls``;
            ``recorded`` needs :meth:`~pact_nemo.environments.base.RecordsAnswers.goals`.
        thread_safe: sessions may be used by several threads at once. False: one call at a time over all sessions.
        uses_sandbox: its tools run in the sandbox, so that several tasks at a time are quicker.
        reference_answers: tasks have a ``reference_answer``, so that ``objective.outcome=answer_f1`` can be computed.
        answer_remedy: what a user changes where a prompt asks for no ``<answer></answer>``.
        official_turns: assistant turns after one user turn in the benchmark's own evaluation, the closing message among
            them. None: evaluation goes by the limit of training.
        describe: its own settings in the plan, in one line.
        checked: every call is held against the protocol, what may be missing is supplied, and observations are cut to
            ``tasks.max_observation_chars`` (:mod:`pact_nemo.environments.outside`). False: its own tests see to that.
        evaluation_only: (its settings) -> why the tasks that they ask for can't be trained on, and the remedy; None
            where they can. Evaluation takes them all the same.
        write_scores: (folder, model name, tasks, task id -> (passed, reason)); writes the files of a leaderboard.
    """

    build: Callable[[Setup], Any]
    config: type[EnvironmentConfig] = EnvironmentConfig
    section: str = "environment_config"
    tasks_file: TasksFile = "optional"
    expert_traces: ExpertTraces = "ground_truth"
    thread_safe: bool = True
    uses_sandbox: bool = False
    reference_answers: bool = True
    answer_remedy: str = "let the prompts ask for it"
    official_turns: Callable[[], int | None] = _no_limit_of_its_own
    checked: bool = True
    describe: Callable[[Any], str] = _no_words
    evaluation_only: Callable[[Any], str | None] = _trains_on_all
    write_scores: Callable[[Path, str, Sequence[Task], Mapping[str, tuple[bool, str | None]]], None] | None = None
