"""Tests of the comparison with other servers: its arithmetic and its load, on servers with known answers."""

import asyncio
import itertools
import subprocess
import sys
from importlib.metadata import requires

import numpy as np
import pytest

pytest.importorskip("matplotlib")
import alternatives
from rivals.settings import Settings

from tests.conftest import ROOT
from tests.support.bare import missing_modules, without

pytestmark = pytest.mark.unit


def round_of(ours: float, rivals: list[float]) -> alternatives.Figures:
    """Return a round with these samples per second of labelmint and the rivals; p95 is the inverse."""
    rates = dict(zip(alternatives.TURNS, [ours, *rivals], strict=True))
    return {
        turn: {"agreement": {"labels": 1.0}}
        | {
            str(concurrency): {"samples_per_second": rate, "p50": 0.5 / rate, "p95": 1.0 / rate}
            for concurrency in alternatives.COUNTS
        }
        for turn, rate in rates.items()
    }


def test_ratios_are_taken_within_a_round_and_to_its_best() -> None:
    rounds = [
        round_of(8.0, [1, 2, 2, 1, 4]),
        round_of(4.0, [1, 1, 1, 1, 2]),  # a slow machine makes the same ratio
        round_of(9.0, [3, 1, 2, 1, 4]),  # another rival was the best here
    ]
    found = alternatives.summary(rounds)
    assert found["against"]["reference"]["samples_per_second"] == {"median": 4.0, "least": 3.0, "most": 4.0}
    assert found["against"]["reference"]["p95"]["median"] == pytest.approx(0.25)
    assert found["against"]["reference"]["best"] == "bentoml reference"
    assert found["against"]["factored"]["samples_per_second"]["median"] == pytest.approx(2.0)
    assert found["servers"]["labelmint"]["16"]["samples_per_second"] == {"median": 8.0, "least": 4.0, "most": 9.0}


def test_a_round_is_complete_with_all_turns() -> None:
    whole = round_of(8.0, [1.0] * 5)
    assert alternatives.complete([whole, {"labelmint": whole["labelmint"]}]) == 1


def test_agreement_counts_pixels() -> None:
    def answer(*label: int) -> alternatives.Answer:
        return alternatives.Answer(np.array([10, 20], np.uint8), np.array(label, np.uint8), 2.0)

    found = alternatives.agreement([answer(1, 2), answer(3, 4)], [answer(1, 2), answer(3, 5)])
    assert found == {"labels": 0.75, "image_largest": 0, "score_largest_relative": 0.0}


@pytest.mark.parametrize("drain", [True, False])
async def test_callers_ask_until_enough_calls_have_ended(drain: bool) -> None:
    ended: list[int] = []
    under_way = most = 0

    async def ask(seed: int) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await asyncio.sleep(0)
            ended.append(seed)
        finally:
            under_way -= 1

    found = await alternatives.closed_loop(ask, 4, 10, seeds=itertools.count(), drain=drain)
    assert most == 4 and under_way == 0
    assert ended[:10] == list(range(10)) and len(ended) <= 13
    assert found["samples_per_second"] > 0 and 0 < found["p50"] <= found["p95"]


async def test_what_a_call_raises_ends_the_loop() -> None:
    async def ask(seed: int) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await alternatives.closed_loop(ask, 2, 10, seeds=itertools.count(), drain=True)


def test_a_rival_reads_what_the_benchmark_told_it(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings("factored", 2, 1, 8, 5000)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.of_environment() == settings


def test_the_extra_installs_all_that_the_rivals_import() -> None:
    """The rivals themselves are not installed here; their models need the rest of the extra."""
    needed = [each for each in requires("labelmint") or () if "extra ==" not in each or "rivals" in each]
    program = without(missing_modules(needed)) + "import rivals.model"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
