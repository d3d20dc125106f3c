"""Processes of this machine: which are alive, and what dead ones left behind."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


def alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def owner() -> str:
    """This process by a short name MACHINE-PID: containers that share a folder count
    their processes each for itself.
    """
    return f"{_machine()}-{os.getpid()}"


def is_gone(name: str) -> bool:
    """Whether an :func:`owner` is of this machine and no longer runs.

    >>> is_gone(owner()), is_gone("0a0a0a-1"), is_gone("nobody")
    (False, False, False)
    """
    machine, _, pid = name.partition("-")
    return machine == _machine() and pid.isdigit() and not alive(int(pid))


def end_with(pid: int) -> None:
    """Let this process end when its parent ``pid`` is gone, also one that was killed."""

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def skip_grammars() -> None:
    """Begin sooner: whatever imports jsonschema, as nbformat does, compiles 38 grammars of
    internationalised addresses, 1.9 of its 2.3 seconds, and no notebook has such an
    address. Only for a process that is ours alone: jsonschema takes any text for one there.
    """
    sys.modules.setdefault("rfc3987_syntax", None)


@contextmanager
def spawned(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes, which end with this one, and at once when the block
    does with an error or a stop.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=end_with, initargs=(os.getpid(),)
    ) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]
