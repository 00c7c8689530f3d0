"""Token-in-token-out generation over HTTP.

A request can carry a prompt's token ids and sampling settings, nothing else: there is no field that a trace could
travel in.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from pact_nemo.errors import ServerError
from pact_nemo.serving.admin import HEARTBEAT_METHOD, RPC_PATH, ServerAdmin, common_version
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.proxies import left_aside

log = logging.getLogger(__name__)

GENERATE_PATH = "/inference/v1/generate"
_BACKOFF_S = 0.25
_RETRIED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)


class TransientServerError(ServerError):
    """No usable answer came: none at all, none in time, or not a completion. The same request may be sent again."""


class StaleWeights(ServerError):
    """The server sampled with another weight version than the one asked for."""


@dataclass(frozen=True)
class GenerationRequest:
    """One continuation to sample.

    Attributes:
        prompt_ids: token ids of everything before the assistant message, [P].
        max_tokens: most tokens to sample, the stop token included.
        temperature, top_p: sampling distribution; ``temperature=0`` is greedy.
        stop_token_ids: ids that end the message; the one that did is the last of the completion.
        seed: of this request's own random generator.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    stop_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """What the server sampled.

    Attributes:
        token_ids: [N] sampled ids, a stop token included.
        logprobs: [N] natural log-probability of each sampled token under the distribution it was drawn from, i.e. after
            temperature and top-p
            (``processed_logprobs``). With ``temperature=1, top_p=1`` that is the policy's own log-softmax; greedy
            requests report it at temperature 1.
        finish_reason: ``stop`` (a stop token) or ``length`` (``max_tokens``).
        weight_version: the engine's stamp, the same for every token.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_version: int


class RolloutClient:
    """Asynchronous client of one rollout server; an async context manager around each batch.

    Args:
        endpoint: the server.
        weight_version: the version that completions have to carry; :func:`pact_nemo.serving.refit.refit` moves it on.
        request_timeout_s: deadline of one request, retries and queueing included.
        connect_retries: extra tries after a connection error. A repeated request is the same request: it has its own
            seed.
        admin_timeout_s: deadline of each control call.
        on_request: called with every JSON body just before it is sent, e.g. to record what reaches the server.

    Attributes:
        model: what requests ask for: the server's model, or an adapter beside it.
    """

    def __init__(
        self,
        endpoint: ServerEndpoint,
        *,
        weight_version: int,
        request_timeout_s: float,
        connect_retries: int,
        admin_timeout_s: float,
        on_request: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.endpoint = endpoint
        self.weight_version = weight_version
        self.model = endpoint.model
        self.on_request = on_request
        self.in_flight = 0
        self._timeout_s = request_timeout_s
        self._retries = connect_retries
        self._admin = ServerAdmin(endpoint, timeout_s=admin_timeout_s)
        self._http: httpx.AsyncClient | None = None
        self._users = 0

    @property
    def admin(self) -> ServerAdmin:
        """Synchronous control calls to the same server."""
        return self._admin

    async def __aenter__(self) -> RolloutClient:
        if self._users == 0:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
            self._http = httpx.AsyncClient(
                base_url=self.endpoint.url, headers=self.endpoint.headers, timeout=None, limits=limits, trust_env=False
            )
        self._users += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if self._users == 0 and self._http is not None:
            await self._http.aclose()
            self._http = None

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one continuation.

        Raises:
            ServerError: no answer before the deadline, the server is gone, refuses, or answers something else than a
                completion.
            StaleWeights: the completion was sampled from another weight version, or the adapter that was asked for is
                not there.
        """
        if self._http is None:
            raise ServerError("the client is closed: use `async with client:` around generate()")
        body = self._body(request)
        if self.on_request is not None:
            self.on_request(body)
        self.in_flight += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._post(self._http, body)
        except TimeoutError as error:
            raise TransientServerError(
                f"{self.endpoint.url} did not answer within {self._timeout_s:g} s (rollout.server.request_timeout_s)"
            ) from error
        finally:
            self.in_flight -= 1
        if response.status_code == 404 and self.model in response.text:
            raise StaleWeights(f"{self.endpoint.url} has no {self.model} any more: {response.text[:200]}")
        if response.status_code != 200:
            kind = TransientServerError if response.status_code >= 500 else ServerError
            raise kind(
                f"{self.endpoint.url} answered HTTP {response.status_code}:"
                f" {response.text[:500]}{_hint(response.status_code)}"
            )
        return self._completion(response, request)

    async def heartbeat(self, timeout_s: float) -> int | None:
        """Weight version that the engine's workers loaded last; None for the weights that they were started with.

        The question goes through the engine's own loop: a front end that answers for an engine that hangs says nothing.

        Raises:
            ServerError: no answer in time, or none that can be read.
        """
        if self._http is None:
            raise ServerError("the client is closed: use `async with client:` around heartbeat()")
        try:
            response = await self._http.post(RPC_PATH, json={"method": HEARTBEAT_METHOD}, timeout=timeout_s)
            response.raise_for_status()
            return common_version(response.json())
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise TransientServerError(f"{self.endpoint.url} gave no heartbeat ({error!r})") from error

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        # Every setting that changes the distribution is said, so that no default of the server or the model can.
        sampling = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": request.max_tokens,
            "stop_token_ids": list(request.stop_token_ids),
            "seed": request.seed,
            "logprobs": 0,
            "detokenize": False,
        }
        return {"model": self.model, "token_ids": list(request.prompt_ids), "sampling_params": sampling}

    async def _post(self, http: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
        for attempt in range(self._retries + 1):
            try:
                return await http.post(GENERATE_PATH, json=body)
            except _RETRIED as error:
                if attempt == self._retries:
                    raise TransientServerError(
                        f"{self.endpoint.url} can't be reached ({error!r}, {attempt + 1} tries); is the rollout server"
                        " alive?" + left_aside(self.endpoint.url)
                    ) from error
                log.debug("generation request failed (%r), try %d of %d", error, attempt + 1, self._retries + 1)
                await asyncio.sleep(_BACKOFF_S * 2**attempt)
            except httpx.HTTPError as error:
                raise TransientServerError(f"{self.endpoint.url}: {error!r}") from error
        raise AssertionError("unreachable")

    def _completion(self, response: httpx.Response, request: GenerationRequest) -> Completion:
        try:
            answer = response.json()
            choice, model = answer["choices"][0], answer.get("model")
            token_ids = [int(token) for token in choice["token_ids"]]
            content = choice["logprobs"]["content"]
            logprobs = [float(entry["logprob"]) for entry in content]
            if [int(entry["token_id"]) for entry in content] != token_ids:
                raise ValueError("log-probs belong to other tokens")
            finish_reason = str(choice["finish_reason"])
            stamps = [str(span["version"]) for span in choice["weight_versions"] or []]
        except (json.JSONDecodeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise TransientServerError(
                f"{self.endpoint.url} answered no completion ({error!r}): {response.text[:200]!r}"
            ) from error
        if finish_reason not in ("stop", "length"):
            raise TransientServerError(
                f"{self.endpoint.url} ended a request with {finish_reason!r}; only 'stop' and 'length' are usable"
            )
        if not token_ids or len(token_ids) > request.max_tokens:
            raise TransientServerError(
                f"{self.endpoint.url} returned {len(token_ids)} tokens, between 1 and {request.max_tokens} were"
                " asked for"
            )
        if not all(math.isfinite(value) and value <= 1e-3 for value in logprobs):
            raise TransientServerError(
                f"{self.endpoint.url} returned a log-probability that is none: {max(logprobs)!r} .. {min(logprobs)!r}"
            )
        if set(stamps) != {str(self.weight_version)}:
            raise StaleWeights(
                f"{self.endpoint.url} sampled with weight version {'/'.join(stamps) or 'unknown'}, expected"
                f" {self.weight_version}"
            )
        if model != self.model and (model is not None or self.model != self.endpoint.model):
            raise StaleWeights(f"{self.endpoint.url} sampled from {model}, expected {self.model}")
        return Completion(token_ids, logprobs, finish_reason, self.weight_version)


def _hint(status: int) -> str:
    if status == 401:
        return " (wrong API key)"
    if status in (403, 404):
        return " (start the server with --enable-scale-out)"
    return ""
