"""The sandbox against tools that mean harm: none reaches the trainer, the disk outside its scratch folder, the network
or another call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pact_nemo.errors import EnvironmentFailure
from pact_nemo.sandbox import Limits, Sandbox

ROOT = Path(__file__).resolve().parents[1]
FAST = Limits(seconds=2.0, cpu_seconds=2, memory_mb=512, processes=8, scratch_mb=4, output_chars=2000)
GREET = "def greet(name, times=1):\n    return ' '.join(['hello ' + name] * times)\n"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(1, FAST) as box:
        yield box


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("'as it is'", "as it is"),
        ("{'a': [1, None]}", '{"a": [1, null]}'),
        ("3.5", "3.5"),
        ("None", "None"),
        ("'é\\u2028'", "é\u2028"),
        ("{1, 2}", "{1, 2}"),
    ],
)
def test_results_become_text(sandbox: Sandbox, value: str, text: str) -> None:
    result = sandbox.call(f"def f():\n    return {value}", "f", {})
    assert (result.kind, result.text) == ("ok", text)


def test_arguments_and_examples_under_the_definition(sandbox: Sandbox) -> None:
    source = GREET + "print(greet('x'))\nraise SystemError('an example that fails')\n"
    assert sandbox.call(source, "greet", {"name": "Ada", "times": 2}).text == "hello Ada hello Ada"


@pytest.mark.parametrize(
    ("source", "arguments", "kind", "words"),
    [
        ("def f(:", {}, "invalid", "compile"),
        ("x = 1", {}, "invalid", "no function 'f'"),
        ("1/0", {}, "invalid", "ZeroDivisionError"),
        ("def f(a): return a", {"b": 1}, "invalid", "unexpected keyword argument"),
        ("def f(): return len(5)", {}, "raised", "TypeError"),
        ("def f(): raise ValueError('too bad')", {}, "raised", "ValueError: too bad"),
    ],
)
def test_ordinary_errors_are_named(
    sandbox: Sandbox, source: str, arguments: dict[str, int], kind: str, words: str
) -> None:
    result = sandbox.call(source, "f", arguments)
    assert result.kind == kind
    assert words in result.text


HOSTILE = {
    "endless loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "sleep that ignores signals": "import signal, time\n for s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)"
    "\n  except Exception: pass\n time.sleep(60)",
    "os._exit": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(3)",
    "abort": "import os; os.abort()",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "memory": "return len(bytearray(8 << 30))",
    "memory by a list": "x = []\n while True: x.append(bytearray(1 << 20))",
    "deep recursion": "import sys; sys.setrecursionlimit(10**9)\n def g(n): return g(n + 1)\n return g(0)",
    "fork bomb": "import os\n while True: os.fork()",
    "daemon that stays": "import os, time\n if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n   time.sleep(600)"
    "\n  os._exit(0)\n time.sleep(0.1)\n return 'left one behind'",
    "threads": "import threading, time\n for _ in range(10000): threading.Thread(target=time.sleep, args=(60,)).start()",
    "huge result": "return 'x' * 10**8",
    "huge output": "import sys\n while True: sys.stdout.write('x' * 65536)",
    "flood of the result pipe": "import os\n while True: os.write(3, b'x' * 65536)",
    "forged result, then a loop": "import os\n os.write(3, b'[\"ok\", ')\n while True: pass",
    "closed result pipe": "import os, time\n os.close(3); time.sleep(60)",
    "full scratch": "open('/tmp/x', 'wb').write(b'x' * (64 << 20)); return 'wrote it'",
    "many files": "for i in range(10**6): open(f'/tmp/{i}', 'w').close()",
    "kill everything": "import os\n try: os.kill(-1, 9)\n except OSError: pass\n os.kill(1, 9)\n return 'killed process 1'",
    "kill the parent": "import os\n os.kill(os.getppid(), 9)\n return 'killed'",
    "ptrace of the worker": "import ctypes\n l = ctypes.CDLL(None, use_errno=True)"
    "\n assert l.ptrace(16, 1, 0, 0) == 0, 'refused'\n return 'attached'",
    "memory of the worker": "open('/proc/1/mem', 'r+b').read(1); return 'read'",
    "environment of the worker": "return open('/proc/1/environ').read() + 'seen'",
    "network by address": "import socket\n s = socket.create_connection(('1.1.1.1', 53), timeout=1); return 'connected'",
    "network by name": "import urllib.request\n return urllib.request.urlopen('http://example.com', timeout=1).read().decode()",
    "write to the interpreter": "import sys; open(sys.prefix + '/owned', 'w').write('x'); return 'wrote'",
    "write beside the tool": "import sys, os\n open('/usr/owned', 'w').write('x'); return 'wrote'",
    "remount": "import ctypes\n l = ctypes.CDLL(None, use_errno=True)"
    "\n assert l.mount(None, b'/', None, 32, None) == 0, 'refused'\n return 'remounted'",
    "new user namespace": "import ctypes\n l = ctypes.CDLL(None, use_errno=True)"
    "\n assert l.unshare(0x10000000) == 0, 'refused'\n return 'entered'",
    "become root": "import os; os.setuid(0); return 'root'",
    "secrets of the host": "return open('/etc/shadow').read() + 'seen'",
    "home folder": "import os; return str([os.listdir(d) for d in ('/home', '/root/.ssh', '/var')]) + 'seen'",
    "poisoned builtins": "import builtins, json\n builtins.len = lambda x: 666\n json.dumps = lambda *a, **k: 'poison'"
    "\n raise ValueError('poisoned')",
    "raises a BaseException": "raise KeyboardInterrupt('x')",
    "exception that can't be printed": "class E(Exception):\n  def __str__(self): raise RuntimeError('no')\n raise E()",
    "result that can't be printed": "class E:\n  def __str__(self): raise RuntimeError('no')\n return E()",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tool_harms_its_own_call_only(sandbox: Sandbox, name: str) -> None:
    source = "def f():\n " + HOSTILE[name] + "\n"
    started = time.monotonic()
    result = sandbox.call(source, "f", {})
    assert time.monotonic() - started < FAST.seconds + 10
    if result.ok:
        assert name == "daemon that stays", result
    after = sandbox.call(
        "def f():\n import os\n return [sorted(p for p in os.listdir('/proc') if p.isdigit()), os.listdir('/tmp'),"
        " len('four'), os.getcwd()]",
        "f",
        {},
    )
    assert after.kind == "ok", after
    processes, scratch, four, folder = json.loads(after.text)
    assert len(processes) == 2  # the worker and this call: nothing was left behind
    assert scratch == [] and four == 4 and folder == "/tmp"
    assert sandbox.replaced == 0
    assert not (Path(sys.prefix) / "owned").exists() and not Path("/usr/owned").exists()


def test_the_trainers_environment_and_files_stay_out_of_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACT_SECRET", "hunter2")
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    with Sandbox(1, FAST) as box:
        paths = f"os.path.exists({str(secret)!r}), os.path.exists({str(ROOT / 'README.md')!r})"
        source = f"def f():\n import os\n return [dict(os.environ), {paths}, os.getuid()]"
        text = box.call(source, "f", {}).text
        assert "hunter2" not in text
        assert text.count("false") == 2
        assert not text.endswith(" 0]")  # never root
        assert all(value for name, value in box.enforced().items() if "seccomp" not in name)


def test_a_lost_worker_is_replaced_and_its_call_is_an_observation() -> None:
    with Sandbox(1, FAST) as box:
        threading.Timer(0.5, lambda: box._all[0]._process.kill()).start()
        result = box.call("def f():\n import time; time.sleep(60)", "f", {})
        assert result.kind in ("lost", "timeout")
        assert box.call(GREET, "greet", {"name": "again"}).text == "hello again"


def test_calls_from_many_threads_share_the_workers() -> None:
    with Sandbox(2, FAST) as box:
        results: list[str] = []

        def square(i: int) -> None:
            results.append(box.call("def f(i): return i * i", "f", {"i": i}).text)

        threads = [threading.Thread(target=square, args=(i,)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(int, results)) == [i * i for i in range(40)]


def test_a_set_has_the_same_order_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")  # not the trainer's
    source = "def f(): return ' '.join({str(i) + 'word' for i in range(40)})"
    texts = []
    for _ in range(2):
        with Sandbox(1) as box:
            texts.append(box.call(source, "f", {}).text)
    assert texts[0] == texts[1] and len(texts[0].split()) == 40


def test_a_closed_sandbox_leaves_no_process_and_refuses_calls() -> None:
    box = Sandbox(2, FAST)
    assert not box._all, "nothing runs before it is needed"
    box.start()
    pids = [worker._process.pid for worker in box._all]
    box.close()
    box.close()
    assert all(not os.path.exists(f"/proc/{pid}") for pid in pids)
    with pytest.raises(EnvironmentFailure, match="closed"):
        box.call(GREET, "greet", {"name": "x"})


def test_workers_end_with_a_trainer_that_is_killed() -> None:
    program = (
        "import time; from pact_nemo.sandbox import Sandbox\n"
        "box = Sandbox(1); box.start(); print(box._all[0]._process.pid, flush=True); time.sleep(60)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{worker}/exe") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}/exe")


def test_a_system_that_cannot_confine_is_refused_unless_told_by_name() -> None:
    """A process limit of zero new namespaces stands for such a system: an unprivileged worker under a seccomp filter
    that denies unshare.
    """
    program = (
        "import pyseccomp, errno, sys\nrules = pyseccomp.SyscallFilter(pyseccomp.ALLOW);"
        " rules.add_rule(pyseccomp.ERRNO(errno.EPERM), 'unshare'); rules.load()\nfrom pact_nemo.errors import"
        " MissingDependency\nfrom pact_nemo.sandbox import Sandbox\ntry:\n    Sandbox(1).start()\n    sys.exit('it"
        " ran')\nexcept MissingDependency as error:\n    print(error)\nwith Sandbox(1, unconfined=True) as box:\n   "
        " print(box.call('def f(): return 5', 'f', {}).text, box.enforced()['network'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "sandbox.unconfined=true" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "5 False"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_confinement_as_an_ordinary_user() -> None:
    """Through a user namespace, with the system's own interpreter, which every user can read."""
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip("no system interpreter")
    worker = ROOT / "pact_nemo" / "sandbox"
    check = (
        f"import sys; sys.path.insert(0, {str(worker)!r})\nimport confine,"
        " os\nconfine.enter(['/usr'])\nconfine.drop(dict(seconds=1, cpu_seconds=2, memory_mb=512, processes=8,"
        " scratch_mb=4, uid=7), True)\nimport socket\ntry: socket.create_connection(('1.1.1.1', 53), timeout=1);"
        " print('connected')\nexcept OSError as error: print('network:', error.errno)\nprint(os.listdir('/tmp'),"
        " os.path.exists('/etc/passwd'), open('/proc/self/status').read().split('CapEff:')[1].split()[0])\n"
    )
    try:
        nobody = {"user": 65534, "group": 65534, "extra_groups": []}
        done = subprocess.run(
            [python, "-I", "-c", check], **nobody, capture_output=True, text=True, timeout=60, cwd="/"
        )  # type: ignore[call-overload]
    except PermissionError:
        pytest.skip("the project folder can't be read by other users")
    if "unshare" in done.stderr or "uid_map" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"no user namespaces for ordinary users here: {done.stderr.strip().splitlines()[-1]}")
    assert done.stdout.split("\n")[0] == "network: 101", done.stderr
    assert done.stdout.split("\n")[1] == "[] False 0000000000000000"


def test_a_trainer_with_many_open_files_can_start_one() -> None:
    program = (
        "import os, resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n"
        "held = [os.open('/dev/null', os.O_RDONLY) for _ in range(1500)]\n"
        "from pact_nemo.sandbox import Sandbox\n"
        "with Sandbox(1) as box:\n    print(box.call('def f(): return 5', 'f', {}).text)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "5\n", done.stderr
