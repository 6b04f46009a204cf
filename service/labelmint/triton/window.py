"""How many samples one client may have in one Triton, so that Triton answers each of them within a stated time.

Rules of this file:
- By Little's law, a client that has n samples in a Triton which answers r of them per second waits n / r seconds for an
  answer. It may therefore have r * ANSWER_SECONDS samples there. The other samples wait in the client, which can still
  order them fairly, drop them, or send them to another Triton.
- No client knows r: it changes with the models, the batches and the other clients. So each client measures the time of
  its answers. An answer within ANSWER_SECONDS enlarges a window that was full: by one sample, or by INITIAL samples per
  round of answers if that is less. Later answers multiply the window, once per round, by ANSWER_SECONDS / their time.
  All clients add the same and give up the same share, so their windows become equal (additive increase, multiplicative
  decrease, as in TCP).
- A window at most doubles while Triton answers what is in it. So no answer takes longer than MOST_SECONDS, if Triton
  keeps its speed and answers the first INITIAL samples of every client within ANSWER_SECONDS.
- What was measured gets old: what a window did not need in the last one or two times ANSWER_SECONDS, it loses, down to
  its initial size. Otherwise clients that were busy one after the other could all use large windows at once.
- A call that fails tells how slow Triton is, but not how fast: a broken Triton refuses at once.
- It does no I/O and reads no clock. The caller passes the time.
"""

from __future__ import annotations

# Shorter than a client waits by default, and long enough for two batches of a CPU.
ANSWER_SECONDS = 10.0
# A test holds that this is less than the time for which Triton lets a call run after the age of its connection.
MOST_SECONDS = 2 * ANSWER_SECONDS
# Half a batch: two gateways fill one.
INITIAL = 8
# One sample is in progress, and one waits, so that Triton does not idle in between.
SMALLEST = 2


class Window:
    def __init__(self) -> None:
        self.inside = 0
        self._size = float(INITIAL)
        self._full_at = float("-inf")  # when a sample filled it last
        # The most samples that were inside since then; every ANSWER_SECONDS it begins anew.
        self._since, self._most = float("-inf"), 0
        # The round of answers that was late: its samples began before, and the window had this size.
        self._late_at = float("-inf")
        self._late_size = self._size

    def room(self, now: float) -> int:
        """How many more samples the client may send."""
        return max(0, int(self._size_at(now)) - self.inside)

    def load(self, now: float) -> float:
        """The samples inside as a share of the window; 1 or more if it is full."""
        return self.inside / int(self._size_at(now))

    def begin(self, now: float) -> None:
        """A sample goes to Triton, whether there is room or not."""
        self._forget(now)
        self.inside += 1
        self._most = max(self._most, self.inside)
        if not self.room(now):
            self._full_at = now

    def end(self, begun: float, now: float, *, answered: bool) -> None:
        """The call of a sample has ended that began at `begun`; `answered` with a result."""
        self._forget(now)
        self.inside -= 1
        if now - begun > ANSWER_SECONDS:
            if begun >= self._late_at:
                self._late_at, self._late_size = now, self._size
            in_time = self._late_size * ANSWER_SECONDS / (now - begun)
            self._size = max(SMALLEST, min(self._size, in_time))
        elif answered and self._full_at >= begun:
            self._size += min(1.0, INITIAL / self._size)

    def _forget(self, now: float) -> None:
        if now - self._since > ANSWER_SECONDS:
            self._size = self._size_at(now)
            self._since, self._most = now, self.inside

    def _size_at(self, now: float) -> float:
        seconds = now - self._since
        if seconds <= ANSWER_SECONDS:
            return self._size
        needed = self._most if seconds <= 2 * ANSWER_SECONDS else self.inside
        return min(self._size, max(INITIAL, needed + 1))
