"""A rollout server without a model: vLLM's paths over real HTTP in a real process, and every fault that a server can
have.

Started in the place of vLLM (``RolloutServer.program``) with vLLM's arguments behind the folder of ``faults.json``.
What it samples is a function of the weights that are loaded, of the prompt and of the seed, so that a completion of
other weights, or of a prefix cache of theirs, is seen. ``answers.json`` beside it maps prompts (token ids joined by
spaces) to token ids that are sampled half of the time. It leaves when its parent does. ``faults.json`` is a list of
{"at": number of the generation request, counted over all processes; "do": what}; each fault happens once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs


class Engine:
    def __init__(self, model: Path, faults: Path):
        self.faults = faults
        self.label, self.version, self.cache = "default", None, ""
        self.weights = self._read(model)
        self.adapters: dict[str, str] = {}  # name -> digest of what it holds
        self.expected: str | None = None  # folder of the adapter that is about to be loaded
        self.asleep: set[str] = set()  # parts whose memory is given back
        self.stuck, self.dead = threading.Event(), threading.Event()
        answers = faults / "answers.json"
        self.answers: dict[str, list[int]] = json.loads(answers.read_text()) if answers.exists() else {}
        if (faults / "no-start").exists():
            sys.exit(3)

    def _read(self, folder: Path) -> str:
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    def fault(self, kind: str) -> str | None:
        """What is to happen at this request; counts it. Of all processes together."""
        with open(self.faults / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            count = self.faults / f"{kind}.count"
            number = int(count.read_text()) + 1 if count.exists() else 1
            (self.faults / f"{kind}.new").write_text(str(number))
            os.replace(self.faults / f"{kind}.new", count)  # whole, when this process is killed meanwhile
            plan = json.loads((self.faults / "faults.json").read_text())
            return next((row["do"] for row in plan if row["at"] == number and row.get("of", "generate") == kind), None)

    def sleep(self, level: int) -> None:
        """As vLLM on a GPU: at level 2 the weights are gone, and memory that is mapped for them later holds anything.
        Their version is still said.
        """
        assert not self.asleep
        self.asleep, self.cache = {"weights", "kv_cache"}, ""
        if level == 2:
            self.weights = "nothing"

    def wake(self, tags: list[str]) -> None:
        self.asleep -= set(tags) or {"weights", "kv_cache"}

    def load(self, folder: str | None, version: int | None) -> None:
        what = self.fault("load")
        if what == "exit":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "fail":
            self.version = -1
            raise RuntimeError("load failed half way")
        if "weights" in self.asleep:
            raise RuntimeError("no memory for weights")
        assert folder is not None
        if version is not None:
            assert json.loads((Path(folder) / "manifest.json").read_text())["version"] == version
        if what != "keep":  # "keep": says it loaded them, and did not
            self.weights, self.version = self._read(Path(folder)), version

    def load_adapter(self, name: str, folder: Path) -> None:
        """As vLLM: under a new name, read when it is asked for."""
        assert name not in self.adapters and str(folder) == self.expected and "weights" not in self.asleep
        what = self.fault("load")
        if what in ("exit", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if what == "exit" else signal.SIGSTOP)
        if what == "fail":
            raise RuntimeError("load failed half way")
        if what == "keep":  # says it loaded it, and did not
            return
        self.adapters[name] = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()

    def rpc(self, method: str, args: list[Any]) -> Any:
        """What :mod:`pact_nemo.serving.worker` does; raises RuntimeError where that refuses."""
        if method == "pact_load_weights":
            self.load(*args[:2])
        if method == "pact_expect_adapter":
            if json.loads((Path(args[0]) / "manifest.json").read_text())["version"] != args[1]:
                raise RuntimeError("another version")
            self.expected, self.version, self.held = args[0], -1, len(self.adapters)
        if method == "pact_adapter_loaded":
            if len(self.adapters) != self.held + 1:
                raise RuntimeError("0 adapters were loaded instead of it alone")
            self.version = args[1]

    def stop_short(self, what: str | None) -> None:
        """Faults of the process and its engine, before anything is sampled."""
        if self.stuck.is_set():
            time.sleep(3600)
        if what == "exit":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop":  # the whole process hangs
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "stuck":  # the front end lives, its engine doesn't
            self.stuck.set()
            time.sleep(3600)
        if what == "engine dead":  # the front end notices at once, and leaves a little later
            self.dead.set()
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def dawdle_or_swap(self, what: str | None) -> None:
        """Faults of a living engine: an answer that is late or never comes, and weights that somebody else changed."""
        if what == "lost":  # this request only
            time.sleep(3600)
        if what == "late":
            time.sleep(1.0)
        if what == "old weights":  # somebody else restarted it
            self.label, self.version, self.weights, self.cache = "default", None, "old", ""
            self.adapters.clear()
        if what == "other weights":  # and gave it the right label
            self.version, self.weights, self.cache = None, "old", ""

    def sample(self, body: dict[str, Any]) -> dict[str, Any]:
        weights = self.weights + self.adapters.get(body["model"], "")
        if not self.cache:
            self.cache = weights  # the prefix cache is of the weights that filled it
        settings = body["sampling_params"]
        draw = random.Random(f"{weights}{self.cache}{body['token_ids']}{settings['seed']}")
        known = self.answers.get(" ".join(map(str, body["token_ids"])))
        if known is not None and draw.random() < 0.5:
            ids = known[: settings["max_tokens"]]
        else:
            ids = [draw.randrange(2, 50) for _ in range(draw.randint(1, settings["max_tokens"] - 1))] + [
                settings["stop_token_ids"][0]
            ]
        content = [{"token_id": token, "logprob": -draw.random()} for token in ids]
        spans = [{"version": self.label, "start": 0, "end": len(ids)}]
        return {
            "model": body["model"],
            "choices": [
                {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop", "weight_versions": spans}
            ],
        }


def spoil(choice: dict[str, Any], what: str | None) -> None:
    """Faults of what was sampled."""
    if what == "wrong version":
        choice["weight_versions"][0]["version"] = "4711"
    if what == "two versions":
        choice["weight_versions"].append({"version": "4711", "start": 1, "end": 2})
    if what == "nan":
        choice["logprobs"]["content"][0]["logprob"] = float("nan")
    if what == "other tokens":
        choice["token_ids"][0] += 1
    if what == "no tokens":
        choice["token_ids"], choice["logprobs"]["content"] = [], []
    if what == "too many":
        choice["token_ids"] *= 100
        choice["logprobs"]["content"] *= 100
    if what == "aborted":
        choice["finish_reason"] = "abort"


class Handler(BaseHTTPRequestHandler):
    engine: Engine
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.reply({})
        what = self.engine.fault("call")
        if what == "exit":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "refuse":
            return self.reply({"error": "no"}, status=500)
        if self.path == "/v1/models":
            rows = [
                {"id": "policy", "parent": None},
                *({"id": name, "parent": "policy"} for name in self.engine.adapters),
            ]
            return self.reply({"data": rows})
        return self.reply({"weight_version": self.engine.label})

    def do_POST(self) -> None:
        engine, path = self.engine, self.path.split("?")[0]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            return self.reply({}, status=401)
        if not path.startswith("/inference") and body.get("method") != "pact_heartbeat":
            what = engine.fault("call")
            if what == "exit":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "refuse":
                return self.reply({"error": "no"}, status=500)
        if path == "/update_weight_version":
            engine.label = body["new_version"]
        elif path == "/reset_prefix_cache":
            if engine.fault("reset") == "fail":
                return self.reply({"success": False})
            engine.cache = ""
            return self.reply({"success": True})
        elif path == "/collective_rpc":
            if body["method"] == "pact_heartbeat":
                if engine.dead.is_set():
                    return self.reply({"error": "EngineDeadError"}, status=500)
                if engine.stuck.is_set():
                    time.sleep(3600)
                return self.reply({"results": [{"version": engine.version}]})
            try:
                return self.reply({"results": [engine.rpc(body["method"], body["args"])]})
            except RuntimeError as error:
                return self.reply({"error": str(error)}, status=500)
        elif path == "/v1/load_lora_adapter":
            try:
                engine.load_adapter(body["lora_name"], Path(body["lora_path"]))
            except RuntimeError as error:
                return self.reply({"error": str(error)}, status=500)
            return self.reply(b"Success")
        elif path == "/v1/unload_lora_adapter":
            del engine.adapters[body["lora_name"]]
            return self.reply(b"Success")
        elif path in ("/sleep", "/wake_up"):
            what = engine.fault(path[1:])
            if what == "exit":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "fail":
                return self.reply({"error": "out of memory"}, status=500)
            query = parse_qs(self.path.partition("?")[2])
            if path == "/sleep":
                engine.sleep(int(query["level"][0]))
            else:
                engine.wake(query.get("tags", []))
        elif path.startswith("/inference"):
            if engine.asleep:  # vLLM would keep it waiting; here it is seen
                return self.reply({"error": "asked while asleep"}, status=400)
            if body["model"] not in ("policy", *engine.adapters):
                return self.reply({"error": f"The model `{body['model']}` does not exist."}, status=404)
            return self.generate(body)
        return self.reply({})

    def generate(self, body: dict[str, Any]) -> None:
        engine = self.engine
        what = engine.fault("generate")
        time.sleep(0.005)
        engine.stop_short(what)
        if engine.dead.is_set():
            return self.reply({"error": "EngineDeadError"}, status=500)
        engine.dawdle_or_swap(what)
        answer = engine.sample(body)
        spoil(answer["choices"][0], what)
        return self.deliver(answer, what)

    def deliver(self, answer: dict[str, Any], what: str | None) -> None:
        """The answer, or what a fault on the way makes of it."""
        if what == "500":
            return self.reply({"error": "oops"}, status=500)
        if what == "503":
            return self.reply({"error": "busy"}, status=503)
        if what == "garbage":
            return self.reply(b"\x00\xff<html>")
        if what == "empty":
            return self.reply(b"")
        if what == "half":
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        if what == "drop":
            self.close_connection = True
            return None
        return self.reply(answer)

    def reply(self, value: Any, *, status: int = 200) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def leave_with(parent: int) -> None:
    """As the real server's process does (``serving/serve_process.py``)."""
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(0)


def main() -> None:
    threading.Thread(target=leave_with, args=(int(os.environ["PACT_ROLLOUT_PARENT"]),), daemon=True).start()
    options = dict(word[2:].partition("=")[::2] for word in sys.argv[2:] if word.startswith("--"))
    Handler.engine = Engine(Path(options["model"]), Path(sys.argv[1]))
    server = ThreadingHTTPServer(("127.0.0.1", int(options["port"])), Handler)
    server.daemon_threads = True
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
