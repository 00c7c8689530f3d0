"""The life of the rollout server: a vLLM process of our own on the loopback, or one that runs elsewhere.

The server is a process group. It ends with the context manager, when the trainer dies (a watchdog in every process of
the group), and when one of its processes dies. Nothing of it is ever left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import pact_nemo
from pact_nemo.errors import CheckpointError, ConfigError, ServerError
from pact_nemo.runtime import machine
from pact_nemo.runtime.tensor_files import read_tensors
from pact_nemo.serving.adapters import AdapterRoom
from pact_nemo.serving.admin import ServerAdmin
from pact_nemo.serving.attached import take_over
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.launch import PORT_ENV, engine_arguments, engine_environment
from pact_nemo.serving.placement import EnginePlace
from pact_nemo.serving.ports import Ports, claim_ports
from pact_nemo.serving.processes import group_members, peak_resident, tail_of
from pact_nemo.serving.proxies import left_aside
from pact_nemo.serving.serve_process import SOCKETS_ENV

log = logging.getLogger(__name__)

Progress = Callable[[float, str], None]
_PORT_TRIES = 3
_TAIL_LINES = 15


class RolloutServer:
    """A vLLM server for rollouts, as a context manager.

    ``with RolloutServer(config, model, log_file=…) as server`` starts it and waits until it answers. To load it in the
    background, call :meth:`launch`, do other work, then :meth:`wait_ready`; :meth:`close` in any case.

    Args:
        config: how to start it, or the ``url`` of one to attach to. An attached server has to be started with
            ``--enable-scale-out``, ``--logprobs-mode processed_logprobs`` and ``VLLM_SERVER_DEV_MODE=1``, must serve
            ``model_path``, and is left running at the end.
        model_path: Hugging Face folder to serve.
        log_file: where the server's output goes (appended).
        version: weight version that ``model_path`` is; every completion is stamped with it.
        place: where it runs, beside other engines of its node.
        adapters: that refits bring; None: they bring whole models. An attached server has to be started with room for
            them.

    Attributes:
        start_seconds: from process start to the first healthy answer; None before that.

    Raises (launch, wait_ready):
        ConfigError: contradictory settings, no API key for an attached server, or one that takes no such adapters.
        ServerError: the process died (with the last lines of its log), or was not healthy before ``start_timeout_s``.
    """

    program: tuple[str, ...] = (sys.executable, "-m", "pact_nemo.serving.serve_process")

    def __init__(
        self,
        config: RolloutServerConfig,
        model_path: str | Path,
        *,
        log_file: str | Path,
        version: int = 0,
        place: EnginePlace | None = None,
        adapters: AdapterRoom | None = None,
    ):
        config.validate()
        self.config, self.place = config, place if place is not None else EnginePlace()
        self.model_path = Path(model_path)
        self.log_file, self.adapters = Path(log_file), adapters
        self.version = version
        self.start_seconds: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._endpoint: ServerEndpoint | None = None
        self._sockets: Path | None = None
        self._ports: Ports | None = None
        self._launched_at = 0.0
        self._peak_memory = 0
        self._lock = threading.RLock()

    @property
    def endpoint(self) -> ServerEndpoint:
        """Address, key and model name. Raises ServerError before :meth:`launch`."""
        if self._endpoint is None:
            raise ServerError("the rollout server was not launched")
        return self._endpoint

    def admin(self) -> ServerAdmin:
        """Synchronous calls to the server: health, weight version, weight swap."""
        return ServerAdmin(self.endpoint, timeout_s=self.config.refit_timeout_s)

    # -- start
    # ------------------------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the process and return at once. With ``config.url`` nothing is started."""
        if self._endpoint is not None:
            raise ServerError("the rollout server was launched already")
        self._launched_at = time.monotonic()
        if self.config.url is not None:
            key = os.environ.get(self.config.api_key_env)
            if not key:
                raise ConfigError(
                    "rollout.server.url is set: put that server's API key into the environment variable"
                    f" {self.config.api_key_env}"
                )
            self._endpoint = ServerEndpoint(self.config.url.rstrip("/"), key)
            return
        if not (self.model_path / "config.json").is_file():
            raise ConfigError(f"{self.model_path} is no Hugging Face model folder (no config.json)")
        try:
            read_tensors(self.model_path)  # vLLM would take a pickled *.bin where there are no safetensors
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        self._spawn()

    def _spawn(self) -> None:
        key = self.place.api_key or os.environ.get(self.config.api_key_env) or secrets.token_urlsafe(32)
        local = self.config.host if self.config.host not in ("0.0.0.0", "::") else "127.0.0.1"
        address = self.place.address or local
        ports = claim_ports()  # others than it has: what is left of a process that went may still listen there
        self._release_ports()
        self._ports = ports
        url = f"http://{f'[{address}]' if ':' in address else address}:{ports.http}"
        self._endpoint = ServerEndpoint(url, key)
        command = [
            *self.program,
            *engine_arguments(self._listening(), self.model_path, self._endpoint, ports.http, self.adapters),
        ]
        environment = engine_environment(self.config, self._endpoint, self.place, self.adapters)
        environment[PORT_ENV] = str(ports.internal)
        self._remove_sockets()
        self._sockets = machine.short_folder()
        environment[SOCKETS_ENV] = str(
            self._sockets
        )  # vLLM's default is the temporary folder, which may be too long for a socket
        if self._sockets.parent != Path(tempfile.gettempdir()):
            environment["TMPDIR"] = str(self._sockets)  # and so would be those of multiprocessing
        root = str(Path(pact_nemo.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(part for part in (root, environment.get("PYTHONPATH")) if part)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_file, "ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        log.info("rollout server: process %d, %s, log %s", self._process.pid, self._endpoint.url, self.log_file)

    def _listening(self) -> RolloutServerConfig:
        """The settings with the address that its place says."""
        return self.config if self.place.address is None else replace(self.config, host=self.place.address)

    def wait_ready(self, on_progress: Progress | None = None) -> RolloutServer:
        """Block until the server answers, then stamp it with the weight version.

        Args:
            on_progress: called about twice a second with (seconds since launch, last line of the server's log).
        """
        endpoint = self.endpoint
        deadline = self._launched_at + self.config.start_timeout_s
        port_tries = _PORT_TRIES
        while not self.admin().healthy():
            if self._process is not None and self._process.poll() is not None:
                tail = self.log_tail()
                if "address already in use" in tail.lower() and port_tries > 0:
                    port_tries -= 1  # another program took the port between our look and the server's bind
                    self._kill_group()
                    self._spawn()
                    endpoint = self.endpoint
                    continue
                code = self._process.returncode
                self.close()
                raise ServerError(
                    f"the rollout server died while starting (exit code {code}); end of {self.log_file}:\n{tail}"
                )
            if time.monotonic() > deadline:
                tail = self.log_tail()
                self.close()
                raise ServerError(
                    f"the rollout server at {endpoint.url} is not healthy after {self.config.start_timeout_s:g} s "
                    f"(rollout.server.start_timeout_s){left_aside(endpoint.url)}; end of {self.log_file}:\n{tail}"
                )
            if on_progress is not None:
                on_progress(time.monotonic() - self._launched_at, self._last_line())
            time.sleep(0.2)
        admin = self.admin()
        if self.config.url is not None:
            take_over(admin, self.model_path, self.adapters)
        admin.set_weight_version(self.version)
        admin.check_weight_version(self.version)
        self.start_seconds = time.monotonic() - self._launched_at
        return self

    # -- while it runs
    # ------------------------------------------------------------------------------------------------------------

    @property
    def elsewhere(self) -> bool:
        """Whether it may see another disk, or another state of it, than this process does."""
        return self.config.url is not None

    @property
    def pid(self) -> int | None:
        """Process (and process group) id of a server that we started."""
        return self._process.pid if self._process is not None else None

    def exit_reason(self) -> str | None:
        """How the process that we started ended; None while it runs, and for an attached server."""
        if self._process is None or self._process.poll() is None:
            return None
        return f"the rollout server died (exit code {self._process.returncode})"

    def check_alive(self) -> None:
        """Raises ServerError with the end of the log when the process has died."""
        reason = self.exit_reason()
        if reason is not None:
            raise ServerError(f"{reason}; end of {self.log_file}:\n{self.log_tail()}")

    def restart(self) -> None:
        """Kill what is left of the process group, hung or stopped processes included, and launch it anew: another port,
        the weights of ``model_path``. An attached server is its owner's to restart; :meth:`wait_ready` then waits for
        it.
        """
        with self._lock:
            if self._process is not None:
                self.peak_memory_bytes()
                self._kill_group()
                self._process = None
            self._endpoint = None
        self.launch()

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Last lines of the server's log."""
        return tail_of(self.log_file, lines, self._endpoint.api_key if self._endpoint is not None else None)

    def rotate_log(self) -> None:
        """Move a log that has outgrown ``log_mb`` to ``<name>.1``. The server appends to the file that it has open, so
        it is copied and emptied: a line written in between is lost.
        """
        with contextlib.suppress(OSError):  # a full disk is met where it matters
            if self.log_file.stat().st_size > self.config.log_mb * 2**20:
                shutil.copyfile(self.log_file, self.log_file.with_name(self.log_file.name + ".1"))
                os.truncate(self.log_file, 0)

    def _last_line(self) -> str:
        return self.log_tail(1).strip()[-200:]

    def peak_memory_bytes(self) -> int:
        """Sum of the peak resident sizes of the server's processes, bytes; 0 for an attached server or off Linux. Stays
        readable after :meth:`close`.
        """
        if self._process is not None:
            self._peak_memory = max(self._peak_memory, peak_resident(self._process.pid))
        return self._peak_memory

    # -- end
    # ------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the whole process group: SIGTERM, ``stop_timeout_s`` to leave, SIGKILL. Safe to call twice; an attached
        server is left running.
        """
        with self._lock:
            if self._process is None:
                return
            self.peak_memory_bytes()
            process = self._process
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self.config.stop_timeout_s)
            self._kill_group()
            self._release_ports()
            self._process = None

    end = close  #: of an engine on another node it waits longer

    def _kill_group(self) -> None:
        """SIGKILL what is left of the group and wait until the kernel has none of it any more."""
        assert self._process is not None
        pid = self._process.pid
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + 5
        while group_members(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._remove_sockets()

    def _remove_sockets(self) -> None:
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None

    def _release_ports(self) -> None:
        if self._ports is not None:
            self._ports.release()
            self._ports = None

    def __enter__(self) -> RolloutServer:
        try:
            self.launch()
            return self.wait_ready()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
