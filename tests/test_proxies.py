"""Near addresses are asked directly, far ones through the user's proxy, and a proxy that is in the way is named with
the remedy.
"""

from __future__ import annotations

import pytest
from fixtures.endpoint import Endpoint

from pact_nemo.errors import ServerError
from pact_nemo.serving import proxies
from pact_nemo.serving.admin import ServerAdmin
from pact_nemo.serving.chat_endpoint import chat_endpoint
from pact_nemo.serving.endpoint import ServerEndpoint

NOBODY = "http://user:secret@127.0.0.1:9"  # the discard port: refused
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server(endpoint: Endpoint) -> tuple[str, list[str]]:
    """A chat endpoint, or a proxy that answers for every one; the request lines that it saw."""
    endpoint.texts = ["yes"]
    return endpoint.url.removesuffix("/v1"), endpoint.paths


def ask(url: str) -> str:
    return str(chat_endpoint(url, "m", "key", 5.0, 0.0)([{"role": "user", "content": "?"}], [])["content"])


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_this_machine_is_asked_directly(
    variable: str, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = server
    monkeypatch.setenv(variable, NOBODY)
    assert ask(f"{url}/v1") == ask(url.replace("127.0.0.1", "localhost")) == "yes" and seen == [
        "/v1/chat/completions",
        "/chat/completions",
    ]


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_remote_endpoint_is_asked_through_the_proxy(
    variable: str, server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = server
    monkeypatch.setenv(variable, url)
    assert ask("http://8.8.8.8:8000/v1") == "yes" and seen == ["http://8.8.8.8:8000/v1/chat/completions"]
    assert ask("http://teacher.invalid/v1") == "yes"  # a name that only the proxy can look up


def test_a_proxy_in_between_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", NOBODY)
    with pytest.raises(ServerError, match=r"proxy 127.0.0.1:9 \(http_proxy\).*no_proxy=8.8.8.8") as caught:
        ask("http://8.8.8.8:8000/v1")
    assert "secret" not in str(caught.value)


def test_no_proxy_is_obeyed_and_nothing_is_said_of_proxies(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", NOBODY)
    monkeypatch.setenv("no_proxy", "8.8.8.8")
    assert proxies.proxy_for("http://8.8.8.8/v1") is None and proxies.proxy_for("http://8.8.4.4/v1") is not None
    monkeypatch.delenv("http_proxy")
    with pytest.raises(ServerError) as caught:
        ask("http://127.0.0.1:9/v1")
    assert "proxy" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "near"),
    [
        ("localhost", True),
        ("a.localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.1.2.3", True),
        ("172.16.0.9", True),
        ("192.168.1.1", True),
        ("169.254.1.1", True),
        ("100.64.0.1", True),
        ("fd00::1", True),
        ("fe80::1%eth0", True),
        ("0.0.0.0", True),
        ("8.8.8.8", False),
        ("172.32.0.1", False),
        ("2001:4860:4860::8888", False),
        ("a.name.invalid", False),
        ("x" * 300, False),
        ("", False),
    ],
)
def test_near_and_far(host: str, near: bool) -> None:
    assert proxies.near(host) is near


def test_a_name_of_a_private_address_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"node17": ["10.0.0.17"], "both": ["10.0.0.1", "8.8.8.8"]}
    monkeypatch.setattr(
        proxies.socket, "getaddrinfo", lambda host, port: [(0, 0, 0, "", (address, 0)) for address in rows[host]]
    )
    assert proxies.near("node17") and not proxies.near("both")


def test_a_rollout_server_elsewhere_is_never_asked_through_a_proxy(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = server
    monkeypatch.setenv("http_proxy", url)
    for host, told in (("127.0.0.2", False), ("[::ffff:127.0.0.1]", True)):
        with pytest.raises(ServerError) as caught:
            ServerAdmin(ServerEndpoint(f"http://{host}:9", "key"), timeout_s=2).weight_version()
        assert ("asked directly, not through the proxy" in str(caught.value)) is told and not seen
