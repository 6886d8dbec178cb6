"""Signals that ask a program to end: it says so and ends with the exit code that shells expect, whatever it was doing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 10.0
"""After this long a program that does not come to its end is ended."""


class Stopped(BaseException):
    """Raised wherever the program is when somebody stops it; nothing but the program's end should catch it.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@contextmanager
def stoppable(program: str, advice: str) -> Iterator[None]:
    """While it lasts, Ctrl-C, SIGTERM and SIGHUP end the program with one line on standard error and exit code 130, 143 or 129.

    A signal that is ignored from outside (``nohup``) stays ignored. Work that swallows the exception, or sits in a library that
    does not come back, is ended after :data:`GRACE_SECONDS`. Outside the main thread this does nothing.

    Args:
        program: what the line begins with.
        advice: what to do next, the line's end.

    Raises:
        SystemExit: a signal came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, received = os.getpid(), list[int]()
    screen = os.dup(2)  # a study sends standard error elsewhere while a run lasts

    def say(signum: int) -> None:
        os.write(screen, f"\n{program}: stopped by {signal.Signals(signum).name}; {advice}\n".encode())

    def end(signum: int) -> None:
        say(signum)
        os._exit(128 + signum)

    def handle(signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process forked from this one, such as one that loads data
            os._exit(128 + signum)
        if not received:
            timer = threading.Timer(GRACE_SECONDS, end, [signum])
            timer.daemon = True
            timer.start()
        received.append(signum)
        raise Stopped(signum)

    kept = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum, handler in kept.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, handle)
    try:
        yield
    except BaseException as error:
        if not received and not isinstance(error, KeyboardInterrupt):
            raise
        received.append(signal.SIGINT)  # a Ctrl-C that a library raised; an earlier signal counts
    finally:
        for signum, handler in kept.items():
            signal.signal(signum, signal.SIG_IGN if received else handler)  # what comes now is about what ends already
        if received:
            say(received[0])
        os.close(screen)
        if received:
            sys.exit(128 + received[0])
