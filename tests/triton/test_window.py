"""Windows: single events, and clients before a simulated Triton that answers in order. The clock is a number."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from labelmint.triton.window import ANSWER_SECONDS, INITIAL, MOST_SECONDS, SMALLEST, Window

pytestmark = pytest.mark.unit


def fill(window: Window, now: float) -> list[float]:
    """Send samples until there is no room. Returns when each began."""
    begun = []
    while window.room(now):
        window.begin(now)
        begun.append(now)
    return begun


def size(window: Window, now: float) -> int:
    return window.inside + window.room(now)


def grown(target: int) -> tuple[Window, float]:
    """An empty window of at least this size, and the time at which it was full last."""
    window, now = Window(), 0.0
    while size(window, now) < target:
        now += 1.0
        assert now < 100, "it does not grow"
        for begun in fill(window, now):
            window.end(begun, now, answered=True)
    return window, now


def test_a_new_triton_gets_the_initial_size_and_no_more_until_it_answers() -> None:
    window = Window()
    assert len(fill(window, 0.0)) == INITIAL
    assert fill(window, ANSWER_SECONDS) == fill(window, 1e6) == []


def test_a_round_of_answers_in_time_enlarges_a_window_that_was_full() -> None:
    window = Window()
    for begun in fill(window, 0.0):
        window.end(begun, ANSWER_SECONDS, answered=True)
    assert INITIAL + 5 <= window.room(ANSWER_SECONDS) <= 2 * INITIAL and window.inside == 0


def test_a_small_window_at_most_doubles_in_a_round() -> None:
    window = Window()
    for begun in fill(window, 0.0):
        window.end(begun, 1e4, answered=True)
    for begun in fill(window, 1e4):
        window.end(begun, 1e4 + 1.0, answered=True)
    assert window.room(1e4 + 1.0) == 2 * SMALLEST


def test_a_large_window_grows_by_the_initial_size_in_a_round() -> None:
    window, now = grown(100)
    before, now = window.room(now), now + 1.0
    for begun in fill(window, now):
        window.end(begun, now, answered=True)
    assert before + INITIAL - 1 <= window.room(now) <= before + INITIAL


def test_a_window_that_is_not_full_does_not_grow() -> None:
    window = Window()
    for begun in fill(window, 0.0):
        window.end(begun, 0.1, answered=False)
    for _ in range(100):
        window.begin(1.0)
        window.end(1.0, 1.1, answered=True)
    assert window.room(1.1) == INITIAL


def test_who_was_in_a_full_window_enlarges_it_whenever_the_answer_comes() -> None:
    """The answers of a batch come together: after the first the window is no longer full."""
    window = Window()
    first, *others = fill(window, 0.0)
    window.end(first, 1.0, answered=True)
    assert size(window, 1.0) == INITIAL + 1
    window.end(others[0], 1.0, answered=True)
    assert window.load(1.0) * int(INITIAL + 1 + INITIAL / (INITIAL + 1)) == INITIAL - 2


def test_late_answers_reduce_a_window_to_what_would_have_been_in_time_once_per_round() -> None:
    window, now = grown(40)
    before = size(window, now)
    begun = fill(window, now)
    for each in begun[:10]:
        window.end(each, now + 2 * ANSWER_SECONDS, answered=True)
    assert window.room(now + 2 * ANSWER_SECONDS) == 0
    assert window.load(now + 2 * ANSWER_SECONDS) == (before - 10) / (before // 2)
    window.end(begun[10], now + 4 * ANSWER_SECONDS, answered=True)  # the last of a round tells most
    assert window.load(now + 4 * ANSWER_SECONDS) == (before - 11) / (before // 4)
    window.end(begun[11], now + 2 * ANSWER_SECONDS, answered=True)
    assert window.load(now + 4 * ANSWER_SECONDS) == (before - 12) / (before // 4)


def test_each_late_round_reduces_the_window() -> None:
    window, now = grown(40)
    sizes = [size(window, now)]
    for _ in range(3):
        begun, now = fill(window, now), now + 2 * ANSWER_SECONDS
        for each in begun:
            window.end(each, now, answered=True)
        sizes.append(size(window, now))
    assert sizes[1:] == [sizes[0] // 2, sizes[0] // 4, sizes[0] // 8]


def test_an_answer_that_is_just_in_time_is_not_late() -> None:
    window = Window()
    window.end(fill(window, 0.0)[-1], ANSWER_SECONDS, answered=True)
    assert size(window, ANSWER_SECONDS) == INITIAL + 1


def test_the_smallest_window_keeps_triton_busy() -> None:
    window = Window()
    for begun in fill(window, 0.0):
        window.end(begun, 1e4, answered=True)
    assert window.room(1e4) == SMALLEST == 2


def test_a_triton_that_fails_at_once_does_not_get_more() -> None:
    window = Window()
    for now in range(100):
        for begun in fill(window, now):
            window.end(begun, now, answered=False)
    assert window.room(100.0) == INITIAL


def test_a_call_that_fails_late_tells_that_triton_is_slow() -> None:
    window = Window()
    window.end(fill(window, 0.0)[-1], 2 * ANSWER_SECONDS, answered=False)
    assert window.load(2 * ANSWER_SECONDS) == (INITIAL - 1) / (INITIAL // 2)


def test_what_is_sent_without_room_counts() -> None:
    window = Window()
    fill(window, 0.0)
    window.begin(0.0)
    assert window.room(0.0) == 0 and window.load(0.0) > 1
    window.end(0.0, 0.1, answered=False)
    assert window.room(0.1) == 0 and window.load(0.1) == 1


def test_a_size_that_is_not_needed_for_long_is_forgotten() -> None:
    window, now = grown(100)
    assert window.room(now + ANSWER_SECONDS) >= 90
    for _ in range(20):
        window.begin(now + ANSWER_SECONDS)
    for seconds in range(int(ANSWER_SECONDS), int(4 * ANSWER_SECONDS)):  # 20 or 21 are inside
        window.begin(now + seconds)
        window.end(now + seconds, now + seconds + 0.1, answered=True)
    assert 21 <= size(window, now + 4 * ANSWER_SECONDS) <= 22


def test_what_is_needed_again_and_again_is_not_forgotten() -> None:
    """The samples of a batch leave together, so that little is inside for a moment."""
    window, now = grown(100)
    for _ in range(100):
        for _ in range(50):
            window.begin(now)
        now += 1.0
        for _ in range(50):
            window.end(now - 1.0, now, answered=True)
    assert 50 <= window.room(now) <= 52


def test_an_idle_window_has_its_initial_size_again() -> None:
    window, now = grown(100)
    assert window.room(now + 3 * ANSWER_SECONDS) == INITIAL
    assert len(fill(window, now + 3 * ANSWER_SECONDS)) == INITIAL


def test_a_full_window_keeps_its_size_however_long_it_waits() -> None:
    window, now = grown(100)
    inside = len(fill(window, now))
    assert inside >= 100 and size(window, now + 5 * ANSWER_SECONDS) == inside


def test_a_small_size_is_not_forgotten() -> None:
    window = Window()
    for begun in fill(window, 0.0):
        window.end(begun, 1e4, answered=True)
    assert window.room(1e6) == SMALLEST


@dataclass
class Client:
    """Sends what its window has room for, from `since` on, up to `until`."""

    since: float = 0.0
    until: float = float("inf")
    window: Window = field(default_factory=Window)
    answers: list[tuple[float, float]] = field(default_factory=list)  # when, and after how long


Rate = Callable[[float], float]


def simulate(clients: Sequence[Client], rate: Rate, seconds: float, batch: int = 1) -> float:
    """Let the clients share a Triton that answers `rate(now)` samples per second, `batch` at a time in order of
    arrival. Returns the seconds in which it had nothing to do after the first sample."""
    now, idle = min(client.since for client in clients), 0.0
    queue: list[tuple[Client, float]] = []
    arrivals = [(client.since, index) for index, client in enumerate(clients)]
    heapq.heapify(arrivals)
    while now < seconds:
        while arrivals and arrivals[0][0] <= now:
            heapq.heappop(arrivals)
        for client in clients:
            if client.since <= now < client.until:
                queue += [(client, begun) for begun in fill(client.window, now)]
        if not queue:
            later = arrivals[0][0] if arrivals else seconds
            now, idle = later, idle + later - now
            continue
        done, queue = queue[:batch], queue[batch:]
        now += len(done) / rate(now)
        for client, begun in done:
            client.window.end(begun, now, answered=True)
            client.answers.append((now, now - begun))
    return idle


# The first samples of all clients must be answered in time.
RATES = [
    (rate, clients)
    for rate in (1.0, 3.0, 10.0, 100.0)
    for clients in (1, 2, 3, 10)
    if INITIAL * clients <= rate * ANSWER_SECONDS
]


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(("rate", "clients"), RATES)
def test_no_answer_takes_longer_than_promised_and_triton_is_never_idle(rate: float, clients: int, batch: int) -> None:
    crowd = [Client(since=float(7 * index)) for index in range(clients)]
    assert simulate(crowd, lambda _: rate, 600.0, batch) == 0.0
    longest = max(took for client in crowd for _, took in client.answers)
    assert ANSWER_SECONDS / 2 <= longest <= MOST_SECONDS


@pytest.mark.parametrize("rate", [3.0, 10.0])
def test_clients_that_come_later_get_their_share(rate: float) -> None:
    crowd = [Client(), Client(since=300.0), Client(since=310.0)]
    simulate(crowd, lambda _: rate, 1200.0)
    counts = [sum(when > 900.0 for when, _ in client.answers) for client in crowd]
    assert max(counts) <= 2 * min(counts), counts


def test_one_that_was_idle_does_not_bring_back_its_old_window() -> None:
    """Ten clients were alone in turn, and then come together."""
    rate, alone = 10.0, 100.0
    windows = [Window() for _ in range(10)]
    crowd = [Client(100.0 * n, 100.0 * n + alone, window) for n, window in enumerate(windows)]
    crowd += [Client(2000.0, window=window) for window in windows]
    simulate(crowd, lambda _: rate, 2600.0)
    assert max(took for client in crowd[:10] for _, took in client.answers) > ANSWER_SECONDS / 2
    assert max(took for client in crowd[10:] for _, took in client.answers) <= MOST_SECONDS


def test_a_window_follows_the_speed_of_its_triton() -> None:
    """A Triton of 3 samples per second has 30 for 300 s, then of 1, then of 10 per second."""
    client = Client()
    simulate([client], lambda now: 3.0 if now < 300 else 1.0 if now < 700 else 10.0, 1000.0)

    def longest(since: float, until: float) -> float:
        return max(took for when, took in client.answers if since < when <= until)

    assert ANSWER_SECONDS / 2 < longest(100, 300) <= MOST_SECONDS
    assert ANSWER_SECONDS / 2 < longest(400, 700) <= MOST_SECONDS, "it shrank"
    assert sum(800 < when <= 1000 for when, _ in client.answers) >= 0.95 * 10 * 200, "it grew"
    assert longest(800, 1000) <= MOST_SECONDS and size(client.window, 1000.0) > 50
