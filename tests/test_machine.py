"""Homes that can't be written, long temporary folders: what libraries and sockets need is found elsewhere, or the
variable is named.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pact_nemo.errors import ConfigError
from pact_nemo.runtime import machine
from pact_nemo.serving import launch
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.endpoint import ServerEndpoint
from pact_nemo.serving.serve_process import SOCKETS_ENV
from pact_nemo.serving.server import RolloutServer

REPO = Path(__file__).resolve().parents[1]
NOBODY = 65534
ASK = """
import json, os, getpass, pathlib
from pact_nemo.runtime import machine
from pact_nemo.serving import launch
from pact_nemo.serving.config import RolloutServerConfig
from pact_nemo.serving.endpoint import ServerEndpoint
machine.prepare()
machine.prepare()
served = launch.engine_environment(RolloutServerConfig(device="cpu"), ServerEndpoint("http://127.0.0.1:1", "key"))
names = ["HOME", *machine.PLACES]
print(json.dumps({
    "set": {name: os.environ.get(name) for name in names}, "served": {name: served.get(name) for name in names},
    "home": str(pathlib.Path.home()), "user": getpass.getuser(),
}))
"""


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test's preparations write into the environment is undone."""
    for name in ("HOME", "TMPDIR", "USER", "LOGNAME", "XDG_RUNTIME_DIR", *machine.PLACES):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        if not os.environ[name]:
            monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that another user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="pact-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def as_user(user: int, folder: Path, program: str = ASK, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program with nothing in its environment, as another user where the tests may become one.

    An interpreter in a home that the other user can't enter is replaced by the system's of the same version, with this
    one's packages.
    """
    words = []
    if os.getuid() == 0:
        words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        os.chown(folder, user, user)
    packages = sysconfig.get_path("purelib")
    words += [
        "env",
        "-i",
        "PATH=/usr/bin:/bin",
        f"PYTHONPATH={REPO}:{packages}",
        f"TMPDIR={folder}",
        "PYTHONDONTWRITEBYTECODE=1",
    ]
    words += [f"{name}={value}" for name, value in environment.items()]
    same = (
        f"import sys; open({str(REPO / 'pyproject.toml')!r}); import psutil; sys.exit(sys.version_info[:2] !="
        f" {sys.version_info[:2]})"
    )
    for interpreter in (sys.executable, "/usr/bin/python3"):
        if (
            os.getuid() != 0
            or subprocess.run([*words, interpreter, "-c", same], capture_output=True, cwd="/").returncode == 0
        ):
            return subprocess.run(
                [*words, interpreter, "-c", program], capture_output=True, text=True, timeout=120, cwd="/"
            )
    pytest.skip("another user can't reach an interpreter of this version and this project")


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
@pytest.mark.parametrize(
    ("user", "home"), [(NOBODY, None), (54321, None), (54321, "/"), (NOBODY, "/nonexistent"), (NOBODY, "relative")]
)
def test_without_a_home_everything_has_a_private_place(user: int, home: str | None, shared: Path) -> None:
    done = as_user(user, shared, **({} if home is None else {"HOME": home}))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    stand_in = shared / f"pact_nemo-{user}"
    assert found["set"]["HOME"] == found["home"] == str(stand_in) and found["user"]
    assert found["set"] == found["served"]
    assert (stand_in.stat().st_mode & 0o777, stand_in.stat().st_uid) == (0o700, user)
    assert done.stderr.count("can't be written: caches and locks go below") == 1  # said once


def test_a_home_that_works_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    machine.prepare()
    assert dict(os.environ) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", machine.PLACES)
def test_one_place_that_can_not_be_written_is_replaced_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in machine.PLACES:
        monkeypatch.delenv(place, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "a file").touch()  # what nobody, not even root, can make folders in
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(name, str(tmp_path / "a file" / "below"))
    machine.prepare()
    changed = {place for place in machine.PLACES if place in os.environ}
    assert changed == {name}
    assert machine.writable(os.environ[name]) and os.environ["HOME"] == str(tmp_path / "home")


def test_a_default_place_that_is_in_the_way_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in machine.PLACES:
        monkeypatch.delenv(place, raising=False)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "huggingface").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    machine.prepare()
    assert machine.writable(os.environ["MEGATRON_CONFIG_LOCK_DIR"]) and machine.writable(os.environ["HF_HOME"])


def test_somebody_elses_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/proc/nothing")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"pact_nemo-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="HOME=/proc/nothing"):
        machine.prepare()


def test_sockets_have_short_private_places_below_any_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    for place in (str(tmp_path), str(long)):
        monkeypatch.setattr(tempfile, "tempdir", place)
        folder = machine.short_folder()
        try:
            assert folder.stat().st_mode & 0o777 == 0o700
            name = folder / "12345678-1234-1234-1234-123456789012"
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(name))
        finally:
            shutil.rmtree(folder)


def test_where_no_short_place_is_left_the_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(machine, "writable", lambda folder: str(folder).startswith(str(long)))
    with pytest.raises(ConfigError, match="TMPDIR=.*shorter folder"):
        machine.prepare()


def test_a_dry_run_names_it_too(tmp_path: Path) -> None:
    program = (
        "from pact_nemo.runtime import machine; machine.writable = lambda folder: False\n"
        "from recipes.pact_bfcl import *; main(run, PRESET, FULL, '')"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", program, "--dry-run"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=REPO,
    )
    assert done.returncode == 2 and "TMPDIR" in done.stderr and not done.stdout


PROGRAM = """
import os, sys, time
open(sys.argv[1], "w").write(os.environ["VLLM_RPC_BASE_PATH"] + " " + os.environ.get("TMPDIR", ""))
time.sleep(60)
"""


def test_the_server_gets_such_a_place_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(RolloutServer, "program", (sys.executable, "-c", PROGRAM, str(tmp_path / "said")))
    monkeypatch.setattr("pact_nemo.serving.server.read_tensors", lambda folder: {})
    (tmp_path / "config.json").write_text("{}")
    server = RolloutServer(RolloutServerConfig(device="cpu"), tmp_path, log_file=tmp_path / "server.log")
    server.launch()
    try:
        for _ in range(200):
            if (tmp_path / "said").exists() and (tmp_path / "said").read_text():
                break
            time.sleep(0.05)
        sockets, temporary = (tmp_path / "said").read_text().split(" ")
        assert (
            sockets == temporary
            and len(sockets) + 40 <= machine.SOCKET_PATH_BYTES
            and Path(sockets).stat().st_mode & 0o777 == 0o700
        )
    finally:
        server.close()
    assert not Path(sockets).exists()
    assert SOCKETS_ENV == "VLLM_RPC_BASE_PATH" and launch.engine_environment(
        RolloutServerConfig(device="cpu"), ServerEndpoint("http://h", "k")
    )


POLICY = """
import torch.distributed as dist
from pact_nemo.policy.megatron_import import prepare_megatron
prepare_megatron()
from pact_nemo.policy.bridge import load_bridge
print(type(load_bridge(MODEL)).__name__)
"""


def test_a_model_is_loaded_without_a_home(shared: Path) -> None:
    from tests.workers.policy_kit import make_model

    model = make_model(shared / "model", "llama", layers=1)
    if os.getuid() == 0:
        for path in (model, *model.rglob("*")):
            path.chmod(0o755)
    done = as_user(NOBODY, shared, POLICY.replace("MODEL", repr(str(model))), HOME="/nonexistent")
    assert done.returncode == 0 and done.stdout.strip() == "AutoBridge", done.stderr
