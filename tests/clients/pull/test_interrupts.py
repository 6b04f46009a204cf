"""A signal in the midst of a step waits for its end, a second one does not."""

import signal
import threading

import pytest

from labelmint_client.pull.interrupts import put_off

pytestmark = pytest.mark.unit


def test_the_first_signal_waits_and_the_second_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt), put_off():
        signal.raise_signal(signal.SIGINT)
        done.append("whole")
    with pytest.raises(KeyboardInterrupt), put_off():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("never")
    assert done == ["whole"] and signal.getsignal(signal.SIGINT) is before


def test_other_threads_have_no_signals() -> None:
    done = []

    def step() -> None:
        with put_off():
            done.append("whole")

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert done == ["whole"]
