"""A headless Chromium, driven over its debugging pipe: no port is opened and no driver package is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from pact_nemo.errors import MissingDependency, PactError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REMEDY = "install one (Debian, Ubuntu: apt-get install chromium), or open report.html in any browser"
FLAGS = (
    "--headless",
    "--no-sandbox",  # containers run as root; the page is our own, has no network and may run no other script
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


#: the browser reads commands from descriptor 3 and writes answers to 4
_LAUNCHER = (
    "import os, sys; [os.dup2(int(end), place) for place, end in enumerate(sys.argv[1:3], 3)]; os.execv(sys.argv[3],"
    " sys.argv[3:])"
)


class BrowserError(PactError):
    """The browser ended, was late, or refused a command."""


def find_browser() -> str | None:
    """Path of a Chromium-family browser, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Browser:
    """One page in one browser process; a context manager.

    Args:
        width: of the page in CSS pixels; phones have 360 to 400.
        dark: whether the page is told that the user prefers dark colours.
        timeout_s: the longest wait for an answer.

    Attributes:
        requests: address of every resource that the page asked for.

    Raises:
        MissingDependency: there is no browser; the message says what to do.
    """

    def __init__(self, width: int, *, dark: bool = False, timeout_s: float = 60.0):
        binary = find_browser()
        if binary is None:
            raise MissingDependency(f"no Chromium on PATH ({', '.join(NAMES)}): {REMEDY}")
        self.requests: list[str] = []
        self._timeout = timeout_s
        self._profile = tempfile.mkdtemp(prefix="report-browser-")
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        ends = tuple(
            fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser, from_browser)
        )  # clear of 3 and 4
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _LAUNCHER,
            *map(str, ends),
            binary,
            *FLAGS,
            f"--user-data-dir={self._profile}",
        ]
        self._process = subprocess.Popen(
            [*command, "about:blank"],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self._loaded = False
        try:
            target = self._command("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime"):
                self._command(f"{domain}.enable")
            self._resize(width, 900)
            self._command(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
            )
        except BaseException:
            self.close()
            raise
        self.width = width

    def _resize(self, width: int, height: int) -> None:
        self._command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            with selectors.DefaultSelector() as selector:
                selector.register(self._in, selectors.EVENT_READ)
                if not selector.select(max(deadline - time.monotonic(), 0.0)):
                    raise BrowserError(f"the browser did not answer within {self._timeout:.0f} s")
            block = os.read(self._in, 1 << 16)
            if not block:
                raise BrowserError(f"the browser ended with exit code {self._process.wait()}")
            self._buffer += block
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") == "Page.loadEventFired":
            self._loaded = True
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def _command(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        try:
            os.write(self._out, json.dumps(message).encode() + b"\0")
        except BrokenPipeError as error:
            raise BrowserError(f"the browser ended with exit code {self._process.wait()}") from error
        deadline = time.monotonic() + self._timeout
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error'].get('message')}")
                return dict(answer["result"])

    def open(self, page: Path) -> None:
        """Load a file and wait until it is there."""
        self._loaded = False
        self._command("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + self._timeout
        while not self._loaded:
            self._receive(deadline)

    def evaluate(self, script: str) -> Any:
        """Value of a JavaScript expression in the page."""
        answer = self._command("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{script[:80]}: {answer['exceptionDetails'].get('text')}")
        return answer["result"].get("value")

    def screenshot(self, out: Path, *, max_height: int = 12000) -> None:
        """The whole page as PNG, at most ``max_height`` pixels high."""
        height = min(int(self.evaluate("document.documentElement.scrollHeight")), max_height)
        self._resize(self.width, height)
        data = self._command("Page.captureScreenshot", format="png")["data"]
        out.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser and remove its profile; safe to call twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for descriptor in (self._in, self._out):
            try:
                os.close(descriptor)
            except OSError:  # closed before
                pass
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_png(page: str | Path, out: str | Path, *, width: int = 1280, dark: bool = False) -> Path:
    """A picture of a report.

    Raises:
        MissingDependency: there is no browser; the message says what to do.
        BrowserError: it could not draw the page.
    """
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with Browser(width, dark=dark) as browser:
        browser.open(Path(page))
        browser.screenshot(target)
    return target
