"""``agent.isolation=sandbox``: code that nobody vouches for reaches nothing outside its rollout, and what it breaks is
that rollout alone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pact_nemo.checking.plays import Script, play
from pact_nemo.config.load import load_config
from pact_nemo.data.tasks import build_environment
from pact_nemo.environments.base import ToolCall
from pact_nemo.environments.own import confinement
from pact_nemo.environments.own.settings import OwnConfig
from pact_nemo.environments.own.workers import ClassHost
from pact_nemo.errors import ConfigError, EnvironmentFailure
from pact_nemo.sandbox import confine
from tests.test_own_worker_life import below, gone

ROOT = Path(__file__).resolve().parents[1]
SOURCE = '''
import ctypes, os, socket, threading, time

class Other:
    def __init__(self, task):
        self.count = 0
        if task.get("reads"):
            self.secret = open(task["reads"]).read()

    def read(self, path: str) -> str:
        """Read a file."""
        return open(os.path.expanduser(path)).read()

    def look(self, path: str) -> list:
        """List a folder."""
        return sorted(os.listdir(path))

    def write(self, path: str) -> str:
        """Write a file."""
        return str(open(path, "w").write("owned"))

    def connect(self, host: str, port: int) -> str:
        """Connect."""
        socket.create_connection((host, port), timeout=2).sendall(b"hello")
        return "connected"

    def bomb(self) -> str:
        """Fork for ever."""
        while True:
            try:
                os.fork()
            except OSError:
                pass

    def fill(self) -> str:
        """Fill the memory."""
        kept = []
        while True:
            kept.append(bytearray(1 << 24))

    def stay(self) -> str:
        """Leave a process behind."""
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        return "left"

    def kill(self, pid: int) -> str:
        """Kill."""
        os.kill(pid, 9)
        return "killed"

    def remount(self) -> str:
        """Undo the confinement."""
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.mount(None, b"/", None, 32, None), libc.unshare(0x10000000), libc.setuid(0)
        return f"{done}"

    def add(self) -> int:
        """Count."""
        self.count += 1
        return self.count

    def environment(self) -> dict:
        """Its environment."""
        return dict(os.environ)
'''
TASK = {"id": "t"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("other")
    (made / "code").mkdir(mode=0o755)
    (made / "code" / "other.py").write_text(SOURCE)
    (made / "code" / "other.py").chmod(0o644)
    (made / "secret.txt").write_text("a secret")
    (made / "secret.txt").chmod(0o644)
    return made


def hosted(folder: Path, **settings: Any) -> ClassHost:
    reference = f"{folder}/code/other.py:Other"
    try:
        return ClassHost(reference, OwnConfig(tools=reference, isolation="sandbox", **{"timeout": 20.0, **settings}))
    except ConfigError as error:
        if "this system can't confine" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[ClassHost]:
    os.environ["PACT_TEST_SECRET"] = "a secret"
    made = hosted(folder)
    yield made
    made.close()
    del os.environ["PACT_TEST_SECRET"]


def test_files_outside_its_folder_are_not_there(host: ClassHost, folder: Path) -> None:
    tools = host.open(TASK)
    home = Path.home()
    for path in (folder / "secret.txt", home / ".ssh" / "id_rsa", "~/.ssh/id_rsa", "/etc/shadow", ROOT / "README.md"):
        said = tools.call("read", {"path": str(path)})
        assert said.startswith(("Error: FileNotFoundError", "Error: PermissionError")), (path, said)
    assert "secret" not in tools.call("environment", {})
    assert tools.call("look", {"path": "/tmp"}) != tools.call("look", {"path": str(folder / "code")})
    assert json.loads(tools.call("look", {"path": str(folder / "code")})) == ["other.py"]
    for path in ("/usr/owned", str(folder / "code" / "owned")):
        assert tools.call("write", {"path": path}).startswith("Error: "), path
    tools.call("write", {"path": str(folder / "owned")})  # refused, or in its own /tmp: without root
    assert tools.call("write", {"path": "/tmp/mine"}) == "5" and "mine" in tools.call("look", {"path": "/tmp"})
    tools.close()
    assert not Path("/tmp/mine").exists() and not (folder / "owned").exists()
    other = host.open(TASK)
    assert "mine" not in other.call("look", {"path": "/tmp"})  # each rollout begins with an empty one
    other.close()


def test_no_socket_leads_out(host: ClassHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        tools = host.open(TASK)
        said = tools.call("connect", {"host": "127.0.0.1", "port": server.getsockname()[1]})
        tools.close()
        assert said.startswith("Error: OSError"), said
        with pytest.raises(TimeoutError):
            server.accept()


def test_privileges_do_not_come_back(host: ClassHost) -> None:
    tools = host.open(TASK)
    assert tools.call("remount", {}) == "(-1, -1, -1)"
    tools.close()


def test_memory_has_an_end(folder: Path) -> None:
    host = hosted(folder, memory_mb=200)
    tools = host.open(TASK)
    assert tools.call("fill", {}).startswith("Error: MemoryError")
    assert tools.call("add", {}) == "1"
    tools.close()
    host.close()


def test_one_rollout_can_not_reach_another(host: ClassHost) -> None:
    other, tools = host.open(TASK), host.open(TASK)
    assert other.call("add", {}) == "1"
    assert json.loads(tools.call("look", {"path": "/proc"}))[0] == "1"
    for pid in (-1, 2, 3, 4):
        tools.call("kill", {"pid": pid})
    assert other.call("add", {}) == "2"
    tools.close()
    other.close()


def test_nothing_is_left_of_a_fork_bomb_and_the_next_rollout_goes_on(folder: Path) -> None:
    host = hosted(folder, timeout=2.0)
    tools, spared = host.open(TASK), host.open(TASK)
    assert tools.call("stay", {}) == "left"
    with pytest.raises(EnvironmentFailure, match="task 't': tool 'bomb': took longer than 2 s"):
        tools.call("bomb", {})
    assert spared.call("add", {}) == "1"
    spared.close()
    outer = host._importer._process.pid  # type: ignore[union-attr]
    left = 1 + 2 * 2  # the process that starts rollouts, and two that wait for the next ones, each with its watcher
    until = time.monotonic() + 10
    while len(below(outer)) > left and time.monotonic() < until:
        time.sleep(0.05)
    pids = below(outer)
    assert len(pids) <= left
    host.close()
    assert gone(pids)


def test_the_rollout_is_masked_by_name(folder: Path, tmp_path: Path) -> None:
    """In a constructor it is no observation: the episode fails, is counted, and is never a reward of 0."""
    rows = [{"id": "bad", "question": "q", "answer": "a", "reads": str(folder / "secret.txt")}]
    rows.append({"id": "good", "question": "q", "answer": "1"})
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"agent.tools={folder}/code/other.py:Other", "agent.isolation=sandbox"]
    preset = ROOT / "conf" / "pact_own-smollm2_135m-cpu.yaml"
    environment = build_environment(load_config(preset, [*words, f"tasks.path={tmp_path}/tasks.jsonl"]))
    try:
        bad, good = environment.tasks()
        script = Script((((ToolCall("add", {}),),),), "1")
        failed = play(environment, bad, script)
        assert failed.outcome is None and failed.failure is not None
        assert failed.failure.startswith("task 'bad': Other() raised FileNotFoundError")
        assert play(environment, good, script).success
    finally:
        environment.close()


def test_the_import_is_confined_as_well(folder: Path) -> None:
    (folder / "code" / "greedy.py").write_text(f"SECRET = open({str(folder / 'secret.txt')!r}).read()\n{SOURCE}")
    reference = f"{folder}/code/greedy.py:Other"
    try:
        with pytest.raises(ConfigError, match=r"greedy\.py.*FileNotFoundError.*secret\.txt"):
            ClassHost(reference, OwnConfig(tools=reference, isolation="sandbox"))
    finally:
        (folder / "code" / "greedy.py").unlink()


def refused(reference: str) -> str:
    with pytest.raises(ConfigError) as error:
        confinement.plan(reference, OwnConfig(tools=reference, isolation="sandbox"))
    return str(error.value)


def test_what_would_show_too_much_or_too_little_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for place in (tmp_path / "home" / "shop.py", tmp_path / "shop.py"):
        assert "put the file into a folder of its own" in refused(f"{place}:Shop")
    assert "no module 'no_such_module'" in refused("no_such_module:Shop")
    if os.geteuid() == 0:
        (tmp_path / "home" / "code").mkdir(mode=0o700)
        (tmp_path / "home" / "code" / "shop.py").touch()
        assert "chmod -R o+rX" in refused(f"{tmp_path}/home/code/shop.py:Shop")


def test_a_system_that_can_not_confine_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise confine.Unconfined(1, "unshare (namespaces): Operation not permitted")

    monkeypatch.setattr(confine, "enter", refuse)
    with pytest.raises(
        ConfigError, match="agent.isolation=sandbox: .*unshare.*user namespaces.*agent.isolation=process"
    ):
        confinement.enter({"read_only": []}, os.getpid())


def test_nothing_outlives_a_trainer_that_was_killed(folder: Path) -> None:
    program = f"""
import os, sys, time
import psutil
from pact_nemo.environments.own.settings import OwnConfig
from pact_nemo.environments.own.workers import ClassHost
reference = {str(folder / "code" / "other.py")!r} + ":Other"
host = ClassHost(reference, OwnConfig(tools=reference, isolation="sandbox"))
tools = [host.open({{"id": "t"}}) for _ in range(4)]
tools[0].call("stay", {{}})
for ended in tools[2:]:
    ended.close()
until = time.monotonic() + 60
while len(psutil.Process(os.getpid()).children(recursive=True)) < 10 and time.monotonic() < until:
    time.sleep(0.05)
print("ready", flush=True)
sys.stdin.read()
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None and trainer.stdout.readline() == "ready\n"
    pids = below(trainer.pid)
    assert len(pids) >= 10  # one that waits, one that starts rollouts, two a rollout, two for each of the next ones
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert gone(pids)


def test_many_rollouts_at_once(host: ClassHost) -> None:
    found: list[str] = []

    def one() -> None:
        tools = host.open(TASK)
        found.extend(tools.call("add", {}) for _ in range(3))
        tools.close()

    work: Callable[[], None] = one
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["1"] * 8 + ["2"] * 8 + ["3"] * 8
