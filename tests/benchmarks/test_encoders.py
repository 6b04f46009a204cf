"""Tests of the choice of an encoder, on encoders with known figures."""

import pytest

pytest.importorskip("matplotlib")
import encoders

pytestmark = pytest.mark.torch


def test_the_choice_is_the_fastest_that_is_small_enough() -> None:
    def row(level: int, seconds: float, size: float) -> encoders.Figures:
        return {"level": level, "strategy": "default", "seconds": seconds, "bytes": size}

    rows = [row(0, 0.1, 1000), row(1, 1, 111), row(3, 2, 109), row(4, 3, 105), row(6, 5, 100), row(6, 6, 101)]
    assert encoders.chosen(rows)["level"] == 3


def test_encoders_are_timed_in_turn() -> None:
    asked: list[tuple[str, int]] = []

    def encoder(name: str, size: int) -> encoders.Encoder:
        return lambda index: asked.append((name, index)) or bytes(size)

    found = encoders.timed({"a": encoder("a", 3), "b": encoder("b", 5)}, 2)
    assert found["a"]["bytes"] == 3 and found["b"]["bytes"] == 5
    assert asked == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * encoders.REPEATS
