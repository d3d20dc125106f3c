"""Several training streams at once in one process, each pulled by a thread of its own:
one small network cannot fill an accelerator.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")

#: id of a network -> the threads that train or ask it, by the run; a run changes its
#: networks' modes and hooks while it steps
_USERS: dict[int, dict[object, int]] = {}
_LOCK = threading.Lock()

#: how a stream ends that ends well
_DONE = object()


@contextmanager
def claimed(**models: nn.Module) -> Iterator[None]:
    """For one step of one run: no other thread may use these networks, given by their
    roles, while the block runs.

    Raises:
        ValueError: when another thread is using one of them.
    """
    me, token = threading.get_ident(), object()
    with ExitStack() as held:
        for role, model in models.items():
            with _LOCK:
                users = _USERS.setdefault(id(model), {})
                if any(thread != me for thread in users.values()):
                    raise ValueError(
                        f"two runs side by side use the same {role}: give each run a copy of its"
                        f" own, copy.deepcopy({role})"
                    )
                users[token] = me
            held.callback(_release, id(model), token)
        yield


def _release(key: int, token: object) -> None:
    with _LOCK:
        del _USERS[key][token]
        if not _USERS[key]:
            del _USERS[key]


def side_by_side(streams: Iterable[Iterator[T]]) -> Iterator[tuple[int, T]]:
    """Pull several streams at once, such as those of :func:`abdlab.distill.distill`;
    (number of the stream, Step) as they come.

    Each stream has a thread and, on a CUDA device, a CUDA stream of its own; it is at
    most one step ahead of what was taken. The numbers of a run are those that it has
    alone, when torch has as many threads. On a CPU the streams share the cores, and
    processes of their own (:func:`abdlab.students.distill_all`) are faster: Python runs in
    one thread at a time.

    Closing it closes all streams, which then save their checkpoints. An error in one
    closes the others, and is raised. Every run needs a teacher of its own: two that
    share one are an error.

    Args:
        streams: generators that nobody else pulls, started or not.
    """
    streams = list(streams)
    ready: queue.Queue = queue.Queue()
    stop, turns = threading.Event(), [threading.Semaphore(1) for _ in streams]
    threads_of_torch = torch.get_num_threads()
    default = torch.cuda.current_stream() if torch.cuda.is_available() else None
    # asked for in a row, so that no two runs have the same one of torch's 32
    owned = [torch.cuda.Stream() if default is not None else None for _ in streams]

    def pull(number: int) -> None:
        torch.set_num_threads(threads_of_torch)
        own = owned[number]
        error = None
        try:
            with torch.cuda.stream(own) if own is not None else nullcontext():
                if own is not None:
                    own.wait_stream(
                        default
                    )  # the networks and the data were put on the device there
                try:
                    while turns[number].acquire() and not stop.is_set():
                        ready.put((number, next(streams[number]), None))
                except StopIteration:
                    pass
                finally:
                    if hasattr(streams[number], "close"):
                        streams[number].close()
                    if own is not None:
                        own.synchronize()  # whoever takes the student next may be on any stream
        except BaseException as raised:  # it belongs to whoever pulls
            error = raised
        ready.put((number, None, _DONE if error is None else error))

    threads = [
        threading.Thread(target=pull, args=(i,), daemon=True, name=f"stream {i}")
        for i in range(len(streams))
    ]
    for thread in threads:
        thread.start()
    left, failed = len(streams), None
    try:
        while left:
            number, step, ended = ready.get()
            if ended is None:
                yield number, step
                turns[number].release()
            else:
                left -= 1
                if ended is not _DONE:
                    failed = ended
                    break
    finally:
        stop.set()
        for turn in turns:
            turn.release()
        for thread in threads:
            thread.join()
        # also of a run that was being closed: a checkpoint that cannot be written, say
        ends = [failed, *(ready.get()[2] for _ in range(ready.qsize()))]
        if found := next((end for end in ends if end is not None and end is not _DONE), None):
            raise found
