"""Synchronous calls to a rollout server: health, weight version, weight swap."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pact_nemo.errors import ServerError
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.proxies import left_aside

_HEALTH_TIMEOUT_S = 5.0
RPC_PATH = "/collective_rpc"
HEARTBEAT_METHOD = "pact_heartbeat"  #: of :class:`pact_nemo.serving.worker.RefitExtension`


def common_version(answer: dict[str, Any]) -> int | None:
    """The version that all workers hold, from the answer to a heartbeat; None for the weights that they were started
    with.

    Raises:
        ValueError, KeyError, TypeError: not such an answer, or the workers hold different ones.
    """
    versions = {row["version"] for row in answer["results"]}
    if len(versions) != 1:
        raise ValueError(f"the workers hold weight versions {versions}")
    version = versions.pop()
    return int(version) if version is not None else None


@dataclass(frozen=True)
class AdapterFacts:
    """What a server says of adapters.

    Attributes:
        rank: of those that it takes, at most; 0: it takes none.
        targets: matrices that they may have; None: all.
        runtime: it loads and drops them while it runs.
        base: digest of the model that it holds; None: a refit's weights, which are nobody's base.
    """

    rank: int
    targets: list[str] | None
    runtime: bool
    base: str | None


class ServerAdmin:
    """Thin, typed access to the control paths of vLLM's server. Every method raises ServerError when the server
    refuses, is late or is gone.

    Args:
        endpoint: the server.
        timeout_s: deadline of each call.
    """

    def __init__(self, endpoint: ServerEndpoint, *, timeout_s: float):
        self.endpoint = endpoint
        self.timeout_s = timeout_s

    def _call(self, method: str, path: str, *, body: dict[str, Any] | None = None, **query: str) -> dict[str, Any]:
        """The answer, which is JSON."""
        response = self._send(method, path, body=body, **query)
        try:
            answer = response.json() if response.content else {}
        except json.JSONDecodeError as error:
            raise ServerError(f"{method} {path}: the answer is not JSON: {response.text[:200]!r}") from error
        return answer if isinstance(answer, dict) else {"answer": answer}

    def _send(self, method: str, path: str, *, body: dict[str, Any] | None = None, **query: str) -> httpx.Response:
        try:
            # trust_env=False: a proxy setting of the machine must not carry the loopback traffic away.
            response = httpx.request(
                method,
                f"{self.endpoint.url}{path}",
                headers=self.endpoint.headers,
                json=body,
                params=query,
                timeout=self.timeout_s,
                trust_env=False,
            )
        except httpx.TimeoutException as error:
            hint = left_aside(self.endpoint.url)
            raise ServerError(
                f"{method} {path}: no answer within {self.timeout_s:g} s from {self.endpoint.url}{hint}"
            ) from error
        except httpx.HTTPError as error:
            hint = left_aside(self.endpoint.url)
            raise ServerError(
                f"{method} {path}: {self.endpoint.url} can't be reached ({error!r}); is the rollout server alive?{hint}"
            ) from error
        if response.status_code != 200:
            raise ServerError(
                f"{method} {path}: HTTP {response.status_code} from {self.endpoint.url}: {response.text[:500]}"
            )
        return response

    def healthy(self) -> bool:
        """One quick look; False while the server starts or when it is gone."""
        try:
            return (
                httpx.get(f"{self.endpoint.url}/health", timeout=_HEALTH_TIMEOUT_S, trust_env=False).status_code == 200
            )
        except httpx.HTTPError:
            return False

    def weight_version(self) -> str:
        """The version label that the engine stamps completions with."""
        return str(self._call("GET", "/weight_info").get("weight_version"))

    def set_weight_version(self, version: int | str) -> None:
        """Label the weights that are loaded now."""
        self._call("POST", "/update_weight_version", body={"new_version": str(version)})

    def check_weight_version(self, version: int) -> None:
        """Raises ServerError when the server's label is another one."""
        served = self.weight_version()
        if served != str(version):
            raise ServerError(
                f"{self.endpoint.url} serves weight version {served!r}, expected {version}; refit it or restart the run"
            )

    def pause(self) -> None:
        """Let running requests finish, hold new ones."""
        self._call("POST", "/pause", mode="wait")

    def resume(self) -> None:
        """Take requests again."""
        self._call("POST", "/resume")

    def sleep(self, *, drop: bool) -> None:
        """Finish what runs, forget KV blocks, and give a GPU's memory back. On a CPU the memory stays, and requests
        wait all the same.

        Args:
            drop: the weights, too; others have to be loaded. False: they wait on the host.
        """
        self._call("POST", "/sleep", level="2" if drop else "1", mode="wait")

    def wake(self, part: str | None = None) -> None:
        """Take the memory again; requests are taken once all of it is there.

        Args:
            part: ``weights`` or ``kv_cache``; None: both, with the weights of before.
        """
        query = {} if part is None else {"tags": part}
        self._call("POST", "/wake_up", body=None, **query)

    def load_weights(self, folder: Path, version: int | None, *, verify: bool = False) -> None:
        """Make every worker load the weights of an HF folder in place
        (:class:`pact_nemo.serving.worker.RefitExtension`).

        Args:
            folder: as the server sees it.
            version: what the folder's manifest has to say; None: a model as it came, without a manifest.
            verify: check the digests there, too: the server may see another disk, or an older state of it, than who
                verified it here.
        """
        self._call("POST", RPC_PATH, body={"method": "pact_load_weights", "args": [str(folder), version, verify]})

    def adapters(self) -> list[str]:
        """Names of the adapters that requests may give."""
        try:
            rows = self._call("GET", "/v1/models")["data"]
            return [str(row["id"]) for row in rows if row["parent"] is not None]
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self.endpoint.url} does not say which models it has ({error!r})") from error

    def load_adapter(self, name: str, folder: Path, version: int, *, verify: bool = False) -> None:
        """Have an adapter loaded beside the base, and make sure that every worker computes with it.

        Args:
            name: that requests will give it; not one that is there.
            folder, version, verify: as :meth:`load_weights` has them; the folder is in PEFT format.
        """
        where = [str(folder), version]
        self._call("POST", RPC_PATH, body={"method": "pact_expect_adapter", "args": [*where, verify]})
        self._send("POST", "/v1/load_lora_adapter", body={"lora_name": name, "lora_path": str(folder)})
        self._call("POST", RPC_PATH, body={"method": "pact_adapter_loaded", "args": where})

    def drop_adapter(self, name: str) -> None:
        """Requests that give this name are refused from now on."""
        self._send("POST", "/v1/unload_lora_adapter", body={"lora_name": name})

    def adapter_facts(self) -> AdapterFacts:
        """What the server was started with."""
        answer = self._call("POST", RPC_PATH, body={"method": "pact_adapter_facts"})
        try:
            return AdapterFacts(**answer["results"][0])
        except (IndexError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self.endpoint.url} does not say whether it takes adapters ({error!r}); start it with this version of"
                " the package"
            ) from error

    def loaded_version(self) -> int | None:
        """The version that the workers loaded last; None for the weights that they were started with."""
        answer = self._call("POST", RPC_PATH, body={"method": HEARTBEAT_METHOD})
        try:
            return common_version(answer)
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self.endpoint.url} gave no heartbeat ({error!r}); start it with this version of the package"
            ) from error

    def reset_prefix_cache(self) -> None:
        """Forget KV blocks: they were computed with the old weights. Raises ServerError when the engine says that it
        couldn't.
        """
        if self._call("POST", "/reset_prefix_cache").get("success") is not True:
            raise ServerError(
                f"{self.endpoint.url} could not reset its prefix cache: it would answer from the old weights' keys and"
                " values"
            )
