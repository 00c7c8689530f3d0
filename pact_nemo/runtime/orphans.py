"""Helper processes leave when the process that started them is gone, however that died."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

_POLL_SECONDS = 0.5


def leave_with(parent: int, remove: str | None = None) -> None:
    """End this process once ``parent`` is no longer its parent; watched by a daemon thread. (``PR_SET_PDEATHSIG`` would
    fire when the *thread* that started the process ends, which is no reason to leave.) ``remove``: a folder of theirs
    that nobody needs any more then.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        if remove is not None:
            shutil.rmtree(remove, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=watch, name="leave-with-parent", daemon=True).start()


def stop_without(parent: int) -> None:
    """Ask this process to stop, as a scheduler would (SIGTERM), once ``parent`` is no longer its parent; watched by a
    daemon thread.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stop-without-parent", daemon=True).start()
