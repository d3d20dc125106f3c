"""One training run in a background thread, at most one per kernel; it can be paused and
stopped between two steps.
"""

from __future__ import annotations

import asyncio
import atexit
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from abdlab.stream import Step
from abdlab.threads import computing_with, threads
from abdlab.widgets.looks import page

#: seconds without a page after which a run stops itself: browsers let a hidden tab beat
#: once a minute only
PATIENCE = 150.0
#: seconds that the end of the process waits for a run to save itself
LAST_WORDS = 20.0

_running: list[Worker] = []
_lock = threading.Lock()


class Stopped(Exception):
    """A run was stopped on request; no error."""


class Worker:
    """Runs ``job(worker)`` once.

    Args:
        job: trains; calls :meth:`wait` between steps, or pulls its stream through
            :meth:`gate`.
        end: called with the job's error, or None, in the job's thread, after it no
            longer counts as running.
        needs_page: stop, saving, when the page that shows the widgets has been gone for
            :data:`PATIENCE` seconds.
    """

    def __init__(
        self,
        job: Callable[[Worker], None],
        end: Callable[[BaseException | None], None],
        needs_page: bool = True,
    ):
        self.job, self.end, self.needs_page = job, end, needs_page
        self.why = ""
        self._go, self._stop = threading.Event(), threading.Event()
        self._go.set()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Run in a thread of its own.

        Raises:
            RuntimeError: when this kernel trains already.
        """
        self._claim()
        self._thread = threading.Thread(target=self._run, name="abdlab-run", daemon=True)
        self._thread.start()

    def run_here(self) -> None:
        """Run in the calling thread, to its end; an interrupt saves the run and goes on
        upwards.
        """
        self._claim()
        self._run(reraise=True)

    def _claim(self) -> None:
        with _lock:
            if _running:
                raise RuntimeError(
                    "one run at a time: this kernel trains already, stop that run first"
                )
            _running.append(self)

    def _run(self, reraise: bool = False) -> None:
        error: BaseException | None = None
        try:
            with computing_with(threads()):
                self.job(self)
        except Stopped:
            pass
        except BaseException as caught:
            error = caught
        with _lock:
            _running.remove(self)
        self.end(error)
        if reraise and error is not None:
            raise error

    @property
    def paused(self) -> bool:
        """Whether it waits, or will after its step."""
        return not self._go.is_set()

    @property
    def stopping(self) -> bool:
        """Whether it will end after its step."""
        return self._stop.is_set()

    def pause(self) -> None:
        """Wait after the step under way."""
        self._go.clear()

    def resume(self) -> None:
        """Go on."""
        self._go.set()

    def stop(self, why: str = "", wait: float | None = None) -> None:
        """End after the step under way; with ``wait``, stay here until it has, at most
        so many seconds.
        """
        self.why = self.why or why
        self._stop.set()
        self._go.set()
        if wait and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(wait)

    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Stay here while paused. Raises :class:`Stopped` when it shall end."""
        while True:
            self._notice()
            if self.stopping:
                raise Stopped
            if self._go.wait(1.0):
                if self.stopping:
                    raise Stopped
                return

    def gate(
        self, stream: Iterator[Step], measure: Callable[[], dict[str, float]]
    ) -> Iterator[Step]:
        """The stream, held while paused. When it shall end, its last Step is measured,
        and the stream closed (which saves it).
        """
        try:
            for step in stream:
                self._notice()
                if self.stopping and step.acc is None:
                    found = measure()
                    step = replace(step, acc=found.get("acc"), asr=found.get("asr"))
                yield step
                try:
                    self.wait()
                except Stopped:
                    if step.index < step.total:
                        # stopped while paused: what the student is like now is not
                        # known yet
                        if step.acc is None:
                            found = measure()
                            yield replace(
                                step,
                                acc=found.get("acc"),
                                asr=found.get("asr"),
                                images=None,
                                events=(),
                            )
                        return
        finally:
            stream.close()

    def _notice(self) -> None:
        if self.needs_page and page().silence() > PATIENCE and not _cells:
            self.stop("the page was closed: the run has saved itself, Go on continues it")


#: cells that run in this kernel just now: while one does, a page cannot be heard
_cells: list[bool] = []


def stop_all(why: str = "", wait: float | None = None) -> None:
    """Stop the run of this kernel, if there is one."""
    for worker in list(_running):
        worker.stop(why, wait)


def current() -> Worker | None:
    """The run of this kernel."""
    return _running[0] if _running else None


def _interrupted(_number, _frame) -> None:
    stop_all("the kernel was interrupted: the run has saved itself, Go on continues it")


def watch_kernel() -> None:
    """Let an interrupt of the kernel stop the run, and the kernel's end wait until the
    run has saved itself. Once per process.
    """
    if _watched:
        return
    _watched.append(True)
    atexit.register(lambda: stop_all("the kernel ended", LAST_WORDS))
    try:
        from IPython import get_ipython

        shell = get_ipython()
        if shell is None or not hasattr(shell, "kernel"):
            return
        shell.events.register("pre_run_cell", lambda *_: _cells.append(True))
        shell.events.register("post_run_cell", _cell_ended)
    except ImportError:  # no notebook: whoever interrupts the process interrupts the run
        return


_watched: list[bool] = []


def _cell_ended(result) -> None:
    _cells.clear()
    page().heard = None if page().heard is None else max(page().heard, time.monotonic())
    if isinstance(result.error_in_exec, KeyboardInterrupt):
        _interrupted(None, None)
    # between cells the kernel ignores interrupts, and it sets that anew after each of
    # them: ours must come later
    with suppress(RuntimeError):  # no loop: no kernel to interrupt
        asyncio.get_running_loop().call_later(0.5, _listen)


def _listen() -> None:
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, _interrupted)
