"""The user's class or module as the tools of an agent: each rollout in a process of its own, or in a thread."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from pact_nemo.environments.own import wire
from pact_nemo.environments.own.classes import Instance, Offered
from pact_nemo.environments.own.importer import Importer, ImporterLost, Lost
from pact_nemo.environments.own.settings import OwnConfig
from pact_nemo.errors import EnvironmentFailure

log = logging.getLogger(__name__)

SLOT_S = 600.0  #: that a rollout waits for one of ``agent.workers``
_LOGGED = 20  #: tracebacks of a host that are shown; more are there at the level DEBUG


class Link(Protocol):
    """Where the tools of one rollout run."""

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a request. Raises Lost."""
        ...

    def end(self) -> Any:
        """Give it up; safe to call twice."""
        ...


class ClassHost:
    """A :class:`~pact_nemo.environments.own.hosts.ToolHost` of Python code. Thread-safe.

    With ``isolation="process"`` the user's file is never imported into this process. What a rollout does (crash, hang,
    change a module's globals) ends with its process. What tools print goes nowhere.

    Args:
        reference: ``path/to/file.py:Class``, ``module:Class``, ``path/to/file.py`` or ``module``.
        config: ``include``, ``isolation``, ``timeout``, ``workers`` and ``memory_mb`` of it.

    Attributes:
        warnings: what would make the tools better, e.g. a docstring that is missing.

    Raises:
        ConfigError: the tools can't be imported, or can't be described to a model.
    """

    def __init__(self, reference: str, config: OwnConfig):
        self._reference, self._config = reference, config
        self._lock = threading.Lock()
        self._slots = _Slots(config.workers)
        self._offered: Offered | None = None
        self._importer: Importer | None = None
        self._traces = 0
        if config.isolation == "thread":
            self._offered = Offered(reference, config.include, shadow=False)
            report = {key: getattr(self._offered, key) for key in ("schemas", "offers", "warnings", "name")}
        else:
            self._importer = Importer(reference, config)
            report = self._importer.report
        self._report = report
        self.schemas: list[dict[str, Any]] = report["schemas"]
        self.offers: frozenset[str] = frozenset(report["offers"])
        self.warnings: list[str] = report["warnings"]
        atexit.register(self.close)

    def open(self, task: Mapping[str, Any]) -> OpenClass:
        """See :class:`~pact_nemo.environments.own.hosts.ToolHost`. Waits where ``agent.workers`` rollouts are open.

        Raises:
            EnvironmentFailure: there is no process for it, or the constructor or ``reset()`` failed.
        """
        what = f"task {task.get('id', '?')!r}"
        self._slots.take(what)
        try:
            link = self._link()
        except (Lost, ImporterLost) as error:
            self._slots.give()
            raise EnvironmentFailure(f"{what}: {error}") from error
        except BaseException:
            self._slots.give()
            raise
        opened = OpenClass(self, link, what, self._config.timeout)
        opened.start(task, str(self._report["name"]))
        return opened

    def _link(self) -> Link:
        if self._offered is not None:
            return ThreadLink(self._offered)
        with self._lock:
            importer = self._importer
        if importer is None:
            raise EnvironmentFailure("the tools are closed")
        try:
            return importer.fork()
        except ImporterLost as error:
            return self._restarted(importer, error).fork()

    def _restarted(self, lost: Importer, error: ImporterLost) -> Importer:
        """Another importing process, started once for all threads that miss the lost one."""
        with self._lock:
            if self._importer is None:
                raise EnvironmentFailure("the tools are closed")
            if self._importer is lost:
                log.warning("%s; it is started again, and the rollouts in it are lost", error)
                lost.close()
                try:
                    self._importer = Importer(self._reference, self._config)
                except Exception as fatal:
                    raise EnvironmentFailure(f"{error}, and can't be started again: {fatal}") from fatal
            if self._importer.report != self._report:
                raise EnvironmentFailure(f"agent.tools={self._reference!r}: its tools changed during the run")
            return self._importer

    def close(self) -> None:
        """Stop everything; safe to call twice."""
        self._slots.close()
        with self._lock:
            importer, self._importer = self._importer, None
        if importer is not None:
            importer.close()
        atexit.unregister(self.close)

    def give_back(self) -> None:
        """A rollout has ended."""
        self._slots.give()

    def log_traceback(self, what: str, text: str) -> None:
        """Show the first ones; a tool that always fails would fill every log."""
        with self._lock:
            self._traces += 1
            number = self._traces
        log.log(logging.INFO if number <= _LOGGED else logging.DEBUG, "%s raised:\n%s", what, text)
        if number == _LOGGED:
            log.info("further tracebacks of tools are logged at the level DEBUG")


class OpenClass:
    """:class:`~pact_nemo.environments.own.hosts.OpenTools` of a class or module.

    Attributes:
        opening: what ``reset()`` returned, for the end of the first user message.
    """

    def __init__(self, host: ClassHost, link: Link, task: str, seconds: float):
        self._host, self._link, self._task, self._seconds = host, link, task, seconds
        self._failure: str | None = None
        self._ended = False
        self.opening = ""

    def start(self, task: Mapping[str, Any], name: str) -> None:
        """Make the instance.

        Raises:
            EnvironmentFailure: that failed; nothing is left of it.
        """
        self.opening = self._ask(f"the start of {name}", {"do": "open", "task": dict(task)})

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """See :class:`~pact_nemo.environments.own.hosts.OpenTools`."""
        request = {"do": "call", "name": name, "arguments": dict(arguments)}
        text: str = self._ask(f"tool {name[:60]!r}", request)
        return text

    def state(self) -> Any:
        """See :class:`~pact_nemo.environments.own.hosts.OpenTools`."""
        return self._ask("state()", {"do": "state"})

    def score(self, episode: Mapping[str, Any]) -> float:
        """See :class:`~pact_nemo.environments.own.hosts.OpenTools`."""
        return float(self._ask("score()", {"do": "score", "episode": dict(episode)}))

    def close(self) -> None:
        """See :class:`~pact_nemo.environments.own.hosts.OpenTools`. A ``close()`` that fails is logged only."""
        if self._ended:
            return
        try:
            answer = self._link.ask({"do": "close"}, self._seconds)
            if "failure" in answer:
                log.warning("%s: %s", self._task, answer["failure"])
        except Lost as error:
            log.warning("%s: close(): %s", self._task, error)
        finally:
            self._failure = f"{self._task}: its tools are closed"
            self._end()

    def _ask(self, what: str, request: dict[str, Any]) -> Any:
        if self._failure is not None:
            raise EnvironmentFailure(self._failure)
        try:
            answer = self._link.ask(request, self._seconds)
        except Lost as error:
            raise self._failed(f"{what}: {error}") from error
        except BaseException:
            self._failed(f"{what} was broken off")
            raise
        if "traceback" in answer:
            self._host.log_traceback(f"{self._task}: {what}", str(answer["traceback"]))
        if "failure" in answer:
            raise self._failed(str(answer["failure"]))
        return answer.get("value")

    def _failed(self, text: str) -> EnvironmentFailure:
        self._failure = f"{self._task}: {text}"
        self._end()
        return EnvironmentFailure(self._failure)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            try:
                self._link.end()
            finally:
                self._host.give_back()


class ThreadLink:
    """A rollout in a thread of this process. A thread that is late is left to itself: Python can't end it."""

    def __init__(self, offered: Offered):
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        instance = Instance(offered)

        def run() -> None:
            while (request := self._requests.get()) is not None:
                self._answers.put(instance.answer(wire.decoded(request)))

        threading.Thread(target=run, name="own-tools", daemon=True).start()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """See :class:`Link`. The user's code gets copies, as it does in a process."""
        try:
            self._requests.put(wire.encoded(request)[4:])
            return self._answers.get(timeout=seconds)
        except queue.Empty:
            raise Lost(f"took longer than {seconds:g} s; its thread goes on until it ends by itself") from None
        except wire.TooLong as error:
            raise Lost(f"its message is too long ({error})") from None

    def end(self) -> None:
        """See :class:`Link`."""
        self._requests.put(None)


class _Slots:
    """As many rollouts at once as ``agent.workers`` says."""

    def __init__(self, count: int):
        self._count, self._left, self._closed = count, count, False
        self._changed = threading.Condition()

    def take(self, what: str) -> None:
        """Raises EnvironmentFailure where none comes free in time, or everything is closed."""
        deadline = time.monotonic() + SLOT_S
        with self._changed:
            while not self._closed and self._left == 0:
                if not self._changed.wait(max(deadline - time.monotonic(), 0.0)) and time.monotonic() >= deadline:
                    raise EnvironmentFailure(
                        f"{what}: no rollout ended within {SLOT_S:g} s, and agent.workers={self._count} are open"
                    )
            if self._closed:
                raise EnvironmentFailure(f"{what}: the tools are closed")
            self._left -= 1

    def give(self) -> None:
        with self._changed:
            self._left += 1
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
