"""The client against a server that misbehaves in every way we can think of. (The real server:
test_rollouts_server.py.)
"""

import asyncio
import json
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pact_nemo.errors import ServerError
from pact_nemo.serving.client import Completion, GenerationRequest, RolloutClient, StaleWeights
from pact_nemo.serving.endpoint import ServerEndpoint

REQUEST = GenerationRequest((1, 2, 3), max_tokens=4, temperature=1.0, top_p=1.0, stop_token_ids=(2,), seed=9)


def answer(ids=(7, 2), logprobs=(-1.0, -0.5), version="5", finish="stop", logprobs_of=None, **more):
    content = [{"token_id": i, "logprob": p} for i, p in zip(logprobs_of or ids, logprobs, strict=False)]
    spans = [{"version": version, "start": 0, "end": len(ids)}] if version is not None else None
    choice = {
        "index": 0,
        "token_ids": list(ids),
        "logprobs": {"content": content},
        "finish_reason": finish,
        "weight_versions": spans,
    }
    return {"choices": [choice | more]}


@contextmanager
def server(*responses):
    """Serves the responses in turn, the last one for ever: (status, body) | "drop" | seconds to sleep."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.headers["Authorization"], json.loads(body)))
            response = responses[min(len(seen), len(responses)) - 1]
            if response == "drop":
                self.connection.close()
                return
            if isinstance(response, float):
                time.sleep(response)
                response = (200, answer())
            status, payload = response
            data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            with suppress(BrokenPipeError):  # a client that gave up
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", seen
    finally:
        httpd.shutdown()
        httpd.server_close()


def client_of(url, *, timeout=5.0, retries=2, version=5, on_request=None):
    return RolloutClient(
        ServerEndpoint(url, "secret"),
        weight_version=version,
        request_timeout_s=timeout,
        connect_retries=retries,
        admin_timeout_s=timeout,
        on_request=on_request,
    )


def generate(client):
    async def call():
        async with client:
            return await client.generate(REQUEST)

    return asyncio.run(call())


def test_a_request_has_no_field_for_a_trace():
    assert [f.name for f in fields(GenerationRequest)] == [
        "prompt_ids",
        "max_tokens",
        "temperature",
        "top_p",
        "stop_token_ids",
        "seed",
    ]


def test_what_is_sent_and_what_comes_back():
    recorded = []
    with server((200, answer())) as (url, seen):
        completion = generate(client_of(url, on_request=recorded.append))
    assert completion == Completion([7, 2], [-1.0, -0.5], "stop", 5)
    [(authorization, body)] = seen
    assert authorization == "Bearer secret" and recorded == [body]
    assert set(body) == {"model", "token_ids", "sampling_params"} and body["token_ids"] == [1, 2, 3]
    sampling = body["sampling_params"]
    assert (sampling["top_k"], sampling["min_p"], sampling["repetition_penalty"]) == (
        0,
        0.0,
        1.0,
    )  # no default may shape the distribution
    assert (sampling["seed"], sampling["stop_token_ids"], sampling["max_tokens"]) == (9, [2], 4)


def test_dropped_connections_are_tried_again():
    with server("drop", "drop", (200, answer())) as (url, seen):
        assert generate(client_of(url)).token_ids == [7, 2]
        assert len(seen) == 3


def test_tries_are_bounded():
    with server("drop") as (url, seen):
        with pytest.raises(ServerError, match="3 tries"):
            generate(client_of(url))
        assert len(seen) == 3
    with pytest.raises(ServerError, match="can't be reached"):
        generate(client_of("http://127.0.0.1:1", retries=0))


def test_a_late_answer_is_an_error():
    with server(3.0) as (url, _):
        started = time.perf_counter()
        with pytest.raises(ServerError, match=r"0\.3 s"):
            generate(client_of(url, timeout=0.3))
        assert time.perf_counter() - started < 2.9


@pytest.mark.parametrize("status", [400, 401, 403, 500, 503])
def test_refusals_are_not_repeated(status):
    with server((status, b"no")) as (url, seen):
        with pytest.raises(ServerError, match=f"HTTP {status}"):
            generate(client_of(url))
        assert len(seen) == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"<html>",
        b"[]",
        {"choices": []},
        answer(ids=[], logprobs=[]),
        answer(ids=[7, 2], logprobs=[-1.0]),
        answer(ids=[7, 2, 3, 4, 5], logprobs=[-1.0] * 5),
        answer(logprobs=[-1.0, 0.7]),
        answer(logprobs=[-1.0, None]),
        answer(logprobs_of=[8, 2]),
        answer(finish="abort"),
        json.dumps(answer()).encode().replace(b"-1.0", b"-Infinity"),
        json.dumps(answer()).encode().replace(b"-1.0", b"NaN"),
    ],
)
def test_garbage_is_an_error_not_a_rollout(payload):
    with server((200, payload)) as (url, _), pytest.raises(ServerError):
        generate(client_of(url))


@pytest.mark.parametrize("version", ["4", "loading-5", "default", None])
def test_stale_weights_are_detected(version):
    with server((200, answer(version=version))) as (url, _), pytest.raises(StaleWeights, match="expected 5"):
        generate(client_of(url))


def test_a_completion_that_spans_two_versions_is_stale():
    spans = [{"version": "5", "start": 0, "end": 1}, {"version": "6", "start": 1, "end": 2}]
    with server((200, answer(weight_versions=spans))) as (url, _), pytest.raises(StaleWeights, match="5/6"):
        generate(client_of(url))


def test_one_client_serves_several_event_loops():
    with server((200, answer())) as (url, seen):
        client = client_of(url)
        generate(client)
        generate(client)
        assert len(seen) == 2
    with pytest.raises(ServerError, match="closed"):
        asyncio.run(client.generate(REQUEST))


def test_the_key_is_not_in_the_repr():
    assert "secret" not in repr(ServerEndpoint("http://x", "secret"))
