"""BFCL's web search: off unless asked for, played on a recorded index without a network, and the key stays here."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pact_nemo.config.load import load_config
from pact_nemo.data.tasks import build_environment, refuse_evaluation_only
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.bfcl import web_search
from pact_nemo.environments.bfcl.agentic_data import load_agentic
from pact_nemo.environments.bfcl.environment import BFCLEnvironment
from pact_nemo.environments.bfcl.settings import BFCLConfig
from pact_nemo.environments.bfcl.web_search import HIDDEN, KEY, RATE_LIMITED, _refuse_private
from pact_nemo.errors import ConfigError, DataError, EnvironmentFailure, MissingDependency
from tests.test_evaluate_tool import ChatServer, evaluate
from tests.workers.bfcl_play import left_behind

SECRET = "sk+very/secret 1"
PAGE = "<html><script>hide()</script><body><h1>Tea</h1><p>Zhang Yiming is <b>the richest</b>.</p></body></html>"
INDEX = {
    "searches": [
        {
            "keywords": "Richest billionaire in China",
            "results": [
                {"title": "A list", "link": "https://lists.example/richest", "snippet": "Who leads"},
                {"title": "Another", "link": "https://lists.example/other", "snippet": "Who follows"},
            ],
        }
    ],
    "pages": {"https://lists.example/richest": PAGE},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but this machine can be reached, whatever the code does."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def here(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), f"a connection to {address}"
        connect(self, address)

    def no_names(host: Any, *words: Any, **more: Any) -> Any:
        assert host in ("127.0.0.1", "localhost"), f"{host} was looked up"
        return look_up(host, *words, **more)

    monkeypatch.setattr(socket.socket, "connect", here)
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    path = tmp_path / "index.json"
    path.write_text(json.dumps(INDEX))
    return path


def web(setting: Path | str, *categories: str) -> BFCLEnvironment:
    return BFCLEnvironment(BFCLConfig(categories=list(categories) or ["web_search_base"], web_search=str(setting)))


def search(words: str = "richest billionaire in china", **more: Any) -> ToolCall:
    return ToolCall("search_engine_query", {"keywords": words, **more})


@pytest.mark.parametrize("category", ["web_search_base", "web_search_no_snippet"])
def test_entries_are_the_packages_own(category: str) -> None:
    from bfcl_eval.utils import load_dataset_entry, load_ground_truth_entry

    official = load_dataset_entry(category, include_language_specific_hint=False)
    ours, answers = load_agentic(category), load_ground_truth_entry(category)
    assert len(ours) == len(official) == len(answers)
    for entry, row, answer in zip(ours, official, answers, strict=True):
        assert entry.id == row["id"] and list(entry.answers) == answer["ground_truth"]
        assert [list(turn) for turn in entry.user_turns] == row["question"]
        assert [tool["name"] for tool in entry.tools] == [tool["name"] for tool in row["function"]]
        assert entry.chain == entry.id.replace(category, "web_search"), "both categories split alike"


def test_a_recorded_index_goes_through_bfcls_own_class(index: Path) -> None:
    env = web(index, "web_search_base", "web_search_no_snippet")
    tasks = {task.id: task for task in env.tasks()}
    session = env.start(tasks["web_search_base_0"])
    listed, unknown, markdown, text, raw, missing, odd = session.execute(
        [
            search(max_results=1),
            search("nothing like it"),
            ToolCall("fetch_url_content", {"url": "https://lists.example/richest", "mode": "markdown"}),
            ToolCall("fetch_url_content", {"url": "https://lists.example/richest", "mode": "truncate"}),
            ToolCall("fetch_url_content", {"url": "https://lists.example/richest"}),
            ToolCall("fetch_url_content", {"url": "https://lists.example/gone"}),
            ToolCall("fetch_url_content", {"url": "file:///etc/passwd"}),
        ]
    )
    assert listed == str([{"title": "A list", "href": "https://lists.example/richest", "body": "Who leads"}])
    assert "Failed to retrieve the search results" in unknown
    assert "**the richest**" in json.loads(markdown)["content"] and "hide" not in json.loads(text)["content"]
    assert json.loads(raw)["content"] == PAGE
    assert "no such page" in json.loads(missing)["error"] and "Invalid URL" in odd
    assert session.next_user_turn("{'answer': 'Zhang Yiming', 'context': 'A list.'}") is None
    assert session.outcome().success
    session.close()
    bare = env.start(tasks["web_search_no_snippet_0"])
    assert "body" not in bare.execute([search()])[0]
    bare.close()
    assert left_behind() == [] and "serpapi" not in sys.modules


def test_every_published_answer_passes_and_a_wrong_one_fails(index: Path) -> None:
    env = web(index)
    for task in env.tasks():
        for answer, good in ((task.data["entry"].answers[0], True), ("I do not know", False)):
            session = env.start(task)
            session.next_user_turn(f"{{'answer': '{answer}'}}")
            assert session.outcome().success is good, task.id
            session.close()


def test_an_evaluation_on_a_recorded_index(tmp_path: Path, index: Path) -> None:
    def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
        if messages[-1]["role"] == "tool":
            found = "Zhang Yiming" if "Zhang Yiming" in messages[-1]["content"] else "I do not know"
            return {"content": f"{{'answer': '{found}'}}"}
        words = json.dumps({"url": "https://lists.example/richest", "mode": "markdown"})
        return {
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "fetch_url_content", "arguments": words}}],
        }

    server = ChatServer(answer)
    result = evaluate(
        *("--model", server.url, "--name", "scripted", "--out", str(tmp_path / "out"), "--limit", "3"),
        *("environment_config.categories=[web_search_base]", f"environment_config.web_search={index}"),
    )
    server.server.shutdown()
    assert result["n"] == 3 and result["score"] == pytest.approx(1 / 3) and "prerequisites" not in result
    scores = tmp_path / "out" / "score" / "scripted" / "agentic" / "BFCL_v4_web_search_base_score.json"
    assert json.loads(scores.read_text().splitlines()[0])["correct_count"] == 1


def test_it_is_off_and_asks_for_the_users_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="searches the web, which is off"):
        load_config([], ["environment=bfcl", "environment_config.categories=[web_search_base]"])
    with pytest.raises(ConfigError, match=f"your own SerpAPI key: set it in the variable {KEY}"):
        web("live")
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setitem(sys.modules, "serpapi", None)
    with pytest.raises(MissingDependency, match="google-search-results"):
        web("live")


def test_it_is_never_trained_on(index: Path) -> None:
    words = ["environment_config.categories=[web_search_base]", f"environment_config.web_search={index}"]
    config = load_config([], ["environment=bfcl", *words])
    with pytest.raises(ConfigError, match="web_search_base can only be evaluated"):
        refuse_evaluation_only(config, build_environment(config).tasks())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no recorded index can be read"),
        ("[]", "an object of"),
        ('{"searches": {}, "pages": {}}', r"\[field searches\]"),
        ('{"searches": [{"keywords": "a", "results": [{"title": "b"}]}], "pages": {}}', r"\[field searches\[0\]\]"),
        ('{"searches": [], "pages": {"a": 1}}', r"\[field pages\]"),
    ],
)
def test_a_file_that_is_no_index_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises((ConfigError, DataError), match=message):
        web(tmp_path / "index.json")


class Engine:
    """SerpAPI's client as far as BFCL's class uses it; what it answers is set by the test."""

    answers: list[Any] = []
    asked: list[dict[str, Any]] = []

    def __init__(self, params: dict[str, Any]):
        self.asked.append(params)

    def get_dict(self) -> dict[str, Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, dict)
        return answer


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> BFCLEnvironment:
    engine = ModuleType("serpapi")
    engine.__spec__ = SimpleNamespace(name="serpapi")  # type: ignore[assignment]
    engine.GoogleSearch = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "serpapi", engine)
    monkeypatch.setenv(KEY, SECRET)
    Engine.answers, Engine.asked = [], []
    environment = web("live")
    monkeypatch.setattr(environment._agentic._web._module.time, "sleep", lambda seconds: None)  # type: ignore[union-attr]
    return environment


def test_the_key_goes_to_the_engine_and_nowhere_else(
    live: BFCLEnvironment, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    session = live.start(live.tasks()[0])
    echo = {"title": SECRET, "link": "https://a.example/?k=sk%2Bvery%2Fsecret+1", "snippet": "x"}
    Engine.answers = [{"error": "429 too many"}, {"organic_results": [echo]}]
    [shown] = session.execute([search()])
    assert [asked["api_key"] for asked in Engine.asked] == [SECRET, SECRET]
    assert HIDDEN in shown and "secret" not in shown
    Engine.answers = [OSError(f"GET /search?api_key=sk%2Bvery%2Fsecret+1 failed; {SECRET}")]
    with pytest.raises(EnvironmentFailure) as raised:
        session.execute([search()])
    assert "web search failed" in str(raised.value) and "secret" not in str(raised.value)
    logging.getLogger("urllib3.connectionpool").debug("GET %s", f"/search?api_key={SECRET}")
    assert HIDDEN in caplog.text and "429" in caplog.text
    assert "secret" not in caplog.text + "".join(capfd.readouterr()) + repr(live) + repr(raised.value.__cause__)
    session.close()


def test_what_the_engine_refuses_fails_the_episode_and_scores_nothing(live: BFCLEnvironment) -> None:
    session = live.start(live.tasks()[0])
    for answers, message in (
        ([{"error": f"Invalid API key: {SECRET}"}], "Invalid API key"),
        ([{"error": "Your account has run out of searches."}], "run out of searches"),
        ([{"error": "429"}] * RATE_LIMITED, f"429 {RATE_LIMITED} times"),
    ):
        Engine.answers = list(answers)
        with pytest.raises(EnvironmentFailure, match=message):
            session.execute([search()])
        assert Engine.answers == []
    Engine.answers = [{"error": "DuckDuckGo hasn't returned any results for this query."}]
    assert "Failed to retrieve the search results" in session.execute([search()])[0]
    session.close()


def test_pages_of_private_hosts_are_not_fetched(live: BFCLEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    session = live.start(live.tasks()[0])
    for url in ("http://127.0.0.1:9/", "http://localhost/admin"):
        [text] = session.execute([ToolCall("fetch_url_content", {"url": url})])
        assert "is no public host" in json.loads(text)["error"]
    session.close()
    for address, refused in (("169.254.169.254", True), ("10.0.0.1", True), ("::1", True), ("8.8.8.8", False)):
        found = [(0, 0, 0, "", (address, 0))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *words, found=found: found)
        if refused:
            with pytest.raises(OSError, match="no public host"):
                _refuse_private("https://names.example/")
        else:
            _refuse_private("https://names.example/")


def test_a_redirect_to_a_private_host_is_not_followed(live: BFCLEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Redirects(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302 if self.path == "/start" else 200)
            self.send_header("Location", "/inside")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: Any) -> None: ...

    def refuse(url: str) -> None:
        if url.endswith("/inside"):
            raise OSError("inside is no public host")

    monkeypatch.setattr(web_search, "_refuse_private", refuse)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Redirects)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    session = live.start(live.tasks()[0])
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for path, wanted in (("/start", "no public host"), ("/plain", "content")):
        assert wanted in session.execute([ToolCall("fetch_url_content", {"url": url + path})])[0]
    session.close()
    server.shutdown()
    assert asked == ["/start", "/plain"]
