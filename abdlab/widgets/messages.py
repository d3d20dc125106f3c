"""What a page tells the widgets, one message after another.

JupyterLab sends the messages of widgets to subshells where the kernel has them (ipykernel
7), and some to the main shell still: two threads, so that a click would be answered in the
middle of what a click before it began.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

#: the message of a page to a widget that is there
_TOLD = "comm_msg"
_turn = threading.RLock()
_kept: list[bool] = []


def in_turn(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, entered by one thread at a time.

    >>> in_turn(len)([1, 2])
    2
    """

    @functools.wraps(handler)
    def entered(*args: Any, **more: Any) -> Any:
        with _turn:
            return handler(*args, **more)

    return entered


def one_at_a_time() -> None:
    """Answer the messages of this kernel's pages one after another, whichever thread they
    come to. Cells still run beside them. Once per process; nothing where there is no kernel.
    """
    try:
        from IPython import get_ipython
    except ImportError:
        return
    handlers = getattr(getattr(get_ipython(), "kernel", None), "shell_handlers", {})
    if _TOLD in handlers and not _kept:
        _kept.append(True)
        handlers[_TOLD] = in_turn(handlers[_TOLD])
