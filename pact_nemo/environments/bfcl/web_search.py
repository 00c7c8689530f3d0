"""BFCL's web search: its own ``WebSearchAPI``, live with the user's key or on a recorded index without a network.

The class is made in a private copy of BFCL's module, so that what it searches and fetches with can be handed to it. The
key is the user's: it is read from the environment, and nothing that leaves here has it.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

from pact_nemo.environments.base import Task, ToolCall
from pact_nemo.environments.bfcl.agentic_data import AgenticEntry
from pact_nemo.environments.bfcl.agentic_session import AgenticSession
from pact_nemo.environments.bfcl.backend import LOCK, Instances
from pact_nemo.environments.bfcl.settings import LIVE
from pact_nemo.errors import ConfigError, DataError, EnvironmentFailure, MissingDependency
from pact_nemo.runtime import strict_json

KEY = "SERPAPI_API_KEY"
HIDDEN = f"[{KEY}]"
RATE_LIMITED = 6  #: answers of "429" to one search, about two minutes of waiting, before the episode fails
_MODULE = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code.web_search"
_SETTING = "environment_config.web_search"
log = logging.getLogger(__name__)


class RecordedIndex:
    """Searches and pages of a file, in place of the web.

    Args:
        path: JSON: ``{"searches": [{"keywords": text, "results": [{"title", "link", "snippet"}]}], "pages": {URL:
            HTML}}``; keywords are compared in lower case.

    Raises:
        ConfigError: the file can't be read.
        DataError: it is something else; names the field.
    """

    def __init__(self, path: str):
        try:
            found = strict_json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{_SETTING}={path}: no recorded index can be read there ({error})") from error
        if not isinstance(found, dict):
            raise DataError('a recorded index is an object of "searches" and "pages"', file=path)
        self._searches: dict[str, list[dict[str, str]]] = {}
        rows, pages = found.get("searches"), found.get("pages")
        if not isinstance(rows, list):
            raise DataError("expected a list of searches", file=path, field="searches")
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or not isinstance(row.get("keywords"), str) or not _is_results(row):
                raise DataError(
                    "a search has keywords, and results with title, link and snippet",
                    file=path,
                    field=f"searches[{number}]",
                )
            self._searches[row["keywords"].lower()] = row["results"]
        if not isinstance(pages, dict) or not all(isinstance(text, str) for text in pages.values()):
            raise DataError("expected the HTML of each page by its URL", file=path, field="pages")
        self._pages: dict[str, str] = pages

    def search(self, params: Mapping[str, Any]) -> SimpleNamespace:
        """In place of SerpAPI's ``GoogleSearch``."""
        results = self._searches.get(str(params["q"]).lower())
        if results is None:
            return SimpleNamespace(get_dict=lambda: {"error": "the recorded index has no results for this query."})
        return SimpleNamespace(get_dict=lambda: {"organic_results": results})

    def get(self, url: str, **words: Any) -> SimpleNamespace:
        """In place of ``requests.get``."""
        if url not in self._pages:
            raise OSError("the recorded index has no such page")
        return SimpleNamespace(text=self._pages[url], raise_for_status=lambda: None)


def _is_results(row: Mapping[str, Any]) -> bool:
    results, keys = row.get("results"), ("title", "link", "snippet")
    return isinstance(results, list) and all(
        isinstance(result, dict) and all(isinstance(result.get(key), str) for key in keys) for result in results
    )


class Hidden:
    """Takes a key out of texts and log records."""

    def __init__(self, key: str):
        self._forms = sorted({key, quote(key), quote_plus(key), repr(key)[1:-1]}, key=len, reverse=True)

    def text(self, text: str) -> str:
        for form in self._forms:
            text = text.replace(form, HIDDEN)
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        """A ``logging`` filter: urllib3 logs the address of each request, which has the key."""
        record.msg, record.args = self.text(record.getMessage()), None
        return True


class LiveWeb:
    """SerpAPI with the user's key, and pages of public hosts.

    What the search engine itself refuses is no observation: it is kept in ``failures`` for the session of that thread,
    whose episode fails then.
    """

    def __init__(self, key: str):
        import requests
        from serpapi import GoogleSearch

        self._engine, self._requests, self.hidden = GoogleSearch, requests, Hidden(key)
        self.failures = threading.local()
        logging.getLogger("urllib3.connectionpool").addFilter(self.hidden.filter)

    def search(self, params: dict[str, Any]) -> SimpleNamespace:
        """In place of ``GoogleSearch``: errors lose the key, and an endless wait ends."""
        return SimpleNamespace(get_dict=lambda: self._answer(params))

    def _answer(self, params: dict[str, Any]) -> dict[str, Any]:
        failure: str | None = None
        try:
            found: dict[str, Any] = self._engine(params).get_dict()
            said = str(found.get("error", ""))
            if any(word in said.lower() for word in ("api key", "api_key", "run out of searches", "account")):
                failure = said
        except Exception as error:
            said, found, failure = str(error), {}, None if "429" in str(error) else repr(error)
        if "429" in said:
            self.failures.waits = getattr(self.failures, "waits", 0) + 1
            if self.failures.waits < RATE_LIMITED:
                return {"error": "429"}
            failure = f"SerpAPI answered 429 {RATE_LIMITED} times"
        self.failures.waits = 0
        if failure is not None:
            self.failures.last = self.hidden.text(failure)
            return {"error": "the search engine can't be reached"}
        return found

    def get(self, url: str, **words: Any) -> Any:
        """``requests.get`` of public hosts only, redirects among them: a model must not read what this machine can."""
        with self._requests.Session() as session:
            session.hooks["response"].append(_refuse_private_redirect)
            _refuse_private(url)
            return session.get(url, **words)


def _refuse_private_redirect(response: Any, **words: Any) -> None:
    if response.is_redirect:
        from urllib.parse import urljoin

        _refuse_private(urljoin(response.url, response.headers["location"]))


def _refuse_private(url: str) -> None:
    """Raises OSError where a host has an address that is not public."""
    host = urlsplit(url).hostname or ""
    for info in socket.getaddrinfo(host, None):
        address = ipaddress.ip_address(str(info[4][0]).split("%")[0])
        if not address.is_global:
            raise OSError(f"{host} is no public host")


def _private_module(source: Any, say: Callable[..., None]) -> ModuleType:
    """A copy of BFCL's module that searches with ``source.search`` and fetches with ``source.get``.

    Raises:
        MissingDependency: a package that it imports is not installed.
    """
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.loader is None:
        raise MissingDependency("web search needs the package bfcl-eval: pip install --no-deps bfcl-eval mpmath")
    missing = [name for name in ("bs4", "html2text", "requests") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"web search needs {', '.join(missing)}: pip install --no-deps beautifulsoup4 soupsieve html2text requests"
        )
    module = importlib.util.module_from_spec(spec)
    with LOCK:
        present = sys.modules.get("serpapi")
        engine = ModuleType("serpapi")
        engine.GoogleSearch = source.search  # type: ignore[attr-defined]
        sys.modules["serpapi"] = engine
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules["serpapi"]
            if present is not None:
                sys.modules["serpapi"] = present
    names: dict[str, Any] = {"requests": SimpleNamespace(get=source.get), "print": say}
    vars(module).update(names)
    return module


class WebSearch:
    """What web-search episodes of an environment share.

    Args:
        setting: ``environment_config.web_search``: ``live`` or the path of a recorded index.

    Raises:
        ConfigError: no key is set, or the index can't be read.
        DataError: the index is no index.
        MissingDependency: a package is not installed.
    """

    def __init__(self, setting: str):
        self._live: LiveWeb | None = None
        source: RecordedIndex | LiveWeb
        if setting == LIVE:
            if not os.environ.get(KEY):
                raise ConfigError(f"{_SETTING}=live searches with your own SerpAPI key: set it in the variable {KEY}")
            if importlib.util.find_spec("serpapi") is None:
                raise MissingDependency(
                    f"{_SETTING}=live needs google-search-results: pip install --no-deps google-search-results"
                )
            source = self._live = LiveWeb(os.environ[KEY])
        else:
            source = RecordedIndex(setting)
        self._module = _private_module(source, self._say)

    def _say(self, *words: object, **_: object) -> None:
        text = " ".join(map(str, words)).strip("*\n ")
        log.warning("%s", text if self._live is None else self._live.hidden.text(text))

    def start(self, task: Task, entry: AgenticEntry, max_observation_chars: int | None) -> WebSession:
        """An episode of ``task``."""
        instance = self._module.WebSearchAPI()
        initial = {"show_snippet": "no_snippet" not in entry.id}
        instance._load_scenario(initial)
        record = {"id": entry.id, "involved_classes": [entry.backend], "initial_config": {entry.backend: initial}}
        return WebSession(task, WebInstances(record, instance), max_observation_chars, self._live)


class WebInstances(Instances):
    """A given instance in place of the one that BFCL would make. Calls wait for the web, so they take no lock: nothing
    but the instance is used, and that is this episode's alone.
    """

    def __init__(self, record: Mapping[str, Any], instance: Any):
        super().__init__(record)
        self._given, self._class = instance, record["involved_classes"][0]
        self.place(self._class, instance)

    def execute(self, calls: Sequence[str]) -> list[str]:
        results, _ = self._run(calls)
        return [str(result).encode("utf-8", "replace").decode("utf-8") for result in results]


class WebSession(AgenticSession):
    """A question to the web."""

    def __init__(self, task: Task, backend: WebInstances, max_observation_chars: int | None, live: LiveWeb | None):
        super().__init__(task, backend, max_observation_chars)
        self._live = live

    def execute(self, calls: list[ToolCall]) -> list[str]:
        """As :meth:`AgenticSession.execute`.

        Raises:
            EnvironmentFailure: also where the search engine refuses the key, its limit is used up, or it can't be
                reached.
        """
        if self._live is None:
            return super().execute(calls)
        self._live.failures.last = None
        observations = [self._live.hidden.text(text) for text in super().execute(calls)]
        if self._live.failures.last is not None:
            raise EnvironmentFailure(f"{self.task.id}: web search failed: {self._live.failures.last}")
        return observations
