"""Ctrl-C and its kin, as an exception that is not lost."""

from __future__ import annotations

import signal
import sys
import threading
import weakref
from types import FrameType

_LOST_AFTER_S, _GRACE_S = 1.0, 0.1
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop(KeyboardInterrupt):
    """What a stop signal raises; a class of ours, since only such can be followed by a weak reference."""


class Interrupts:
    """Raises ``Stop`` in the main thread at a stop signal, again where it got lost, until ``leaving`` is called.

    Python drops what a signal's handler raises inside a ``__del__``, a weak reference's callback, or an attribute
    looked up from C; nothing would then ever end the command. An exception that is on its way up is referred to by
    its frames, also while a ``finally`` works; one that was dropped is not.
    """

    def __init__(self) -> None:
        self._raised: weakref.ref[Stop] | None = None
        self._leaving = threading.Event()

    def install(self) -> None:
        """In the main thread, once for a process. What is ignored (SIGHUP under nohup) stays so."""
        for signum in STOPS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._stop)
        hook = sys.unraisablehook
        sys.unraisablehook = lambda dropped: None if dropped.exc_type is Stop else hook(dropped)

    def leaving(self) -> None:
        """The command is on its way out, with whatever exit code: nothing is left to interrupt."""
        self._leaving.set()

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        raise self._new(signum)  # no name for it here: this frame is in its traceback, and would keep it alive

    def _new(self, signum: int) -> Stop:
        stop = Stop()
        first = self._raised is None
        self._raised = weakref.ref(stop)
        if first:
            threading.Thread(target=self._watch, args=(signum,), name="watch-interrupt", daemon=True).start()
        return stop

    def _watch(self, signum: int) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self._leaving.wait(_LOST_AFTER_S):
            lost = self._raised is not None and self._raised() is None
            # An exception that has done its work is let go of just before ``leaving`` is called.
            if lost and not self._leaving.wait(_GRACE_S):
                signal.pthread_kill(main, signum)
