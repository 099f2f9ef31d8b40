"""A stop signal ends the command, also one that arrives where Python drops what its handler raises."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

_BOUND_S = 30
_COMMAND = """
    import sys, time
    from distill_ray.interrupts import Interrupts, Stop

    class Busy:
        def __del__(self):
            print("deleting", flush=True)
            time.sleep(20)

    def waits():
        print("waiting", flush=True)
        time.sleep(20)

    def loses_it():
        busy = Busy()
        del busy
        print("on", flush=True)
        time.sleep(20)

    def cleans_up_slowly():
        try:
            waits()
        finally:
            time.sleep(3)
            print("clean", flush=True)

    interrupts = Interrupts()
    interrupts.install()
    try:
        {work}()
        print("lost")
    except KeyboardInterrupt as error:
        interrupts.leaving()
        assert isinstance(error, Stop)
        print("stopped")
"""


def _begun(work: str, *before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*before, sys.executable, "-c", textwrap.dedent(_COMMAND).format(work=work)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() in ("deleting\n", "waiting\n")
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("work", "said"), [("waits", "stopped\n"), ("loses_it", "on\nstopped\n"), ("cleans_up_slowly", "clean\nstopped\n")]
)
def test_a_stop_signal_is_never_lost_and_never_cuts_the_cleaning_up(work: str, said: str, how: signal.Signals) -> None:
    process = _begun(work)
    process.send_signal(how)
    assert process.communicate(timeout=_BOUND_S) == (said, "")


def test_what_the_shell_has_ignored_stays_ignored() -> None:
    process = _begun("waits", "nohup")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=_BOUND_S)[0] == "stopped\n"
