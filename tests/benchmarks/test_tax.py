"""Tests of the benchmark of the servers' cost: its arithmetic on rounds with known figures, and how a round resumes."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
import in_process
import load
import resuming
import tax

pytestmark = pytest.mark.torch


def round_of(grpc: float, rest: float, triton: float, bare: float) -> tax.Figures:
    """Return a round with these samples per second of each way at each concurrency."""

    def figures(rate: float) -> tax.Figures:
        return {"samples_per_second": rate, "failures": {}} | dict.fromkeys(load.PERCENTILES, 1 / rate)

    rates = dict(zip(tax.WAYS, (grpc, rest, triton, bare), strict=True))
    found: tax.Figures = {way: {str(c): figures(rate) for c in tax.CONCURRENCIES} for way, rate in rates.items()}
    return found | {tax.arrivals_of(way): {"rate": 3.0} | figures(3.0) for way in tax.SERVED}


def test_ratios_are_taken_within_a_round() -> None:
    # In the second round the machine was half as fast, and the gateway's share of the cost was the same.
    found = tax.summary([round_of(9, 8, 10, 12.5), round_of(4.5, 4, 5, 6.25), round_of(10, 5, 10, 10)])
    ratio = found["ratios"]["gateway gRPC to Triton"]
    assert ratio["bar"] == 0.95 and ratio["by_concurrency"]["16"] == {"median": 0.9, "least": 0.9, "most": 1.0}
    assert found["ratios"]["Triton to in-process"]["by_concurrency"]["1"]["median"] == pytest.approx(0.8)
    assert found["ratios"]["gateway REST to Triton"]["bar"] is None
    assert found["closed"]["in-process"]["64"]["samples_per_second"]["median"] == 10.0
    assert found["arrivals"]["ways"]["Triton"]["failures"] == 0


def test_every_way_begins_a_round_once() -> None:
    orders = [resuming.rotated(tax.WAYS, index) for index in range(4)]
    assert {order[0] for order in orders} == set(tax.WAYS) and all(set(order) == set(tax.WAYS) for order in orders)


def test_a_round_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "BUILD", tmp_path)
    kept = resuming.Kept("some", "fingerprint")
    index, _ = kept.begin("ab")
    kept.keep(index, "a", {"x": 1})
    kept = resuming.Kept("some", "fingerprint")
    assert kept.begin("ab") == (0, {"a": {"x": 1}}) and kept.complete("ab") == []
    kept.keep(0, "b", {"x": 2})
    assert kept.begin("ab") == (1, {}) and len(kept.complete("ab")) == 1
    assert resuming.Kept("some", "another").rounds == []


def test_measured_rounds_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "BUILD", tmp_path)
    count = itertools.count()
    parts = {part: lambda: {"x": next(count)} for part in "ab"}
    with pytest.raises(SystemExit):
        resuming.measured("some", "fingerprint", parts, rounds=2, budget=-1.0)
    first = resuming.measured("some", "fingerprint", parts, rounds=2, budget=60.0)
    assert first == [{"a": {"x": 0}, "b": {"x": 1}}, {"a": {"x": 2}, "b": {"x": 3}}]
    assert resuming.measured("some", "fingerprint", parts, rounds=1, budget=60.0) == first[:1]


# All 40 have an answer after the third batch, which also had callers of the second turn. Callers waiting then are
# answered too.
@pytest.mark.parametrize(("callers", "batches"), [(1, [1]), (4, [4]), (40, [16, 16, 16, 16, 8])])
def test_without_a_server_a_batch_is_who_waits(callers: int, batches: list[int]) -> None:
    seen: list[list[int]] = []
    pipeline = SimpleNamespace(max_batch=16, infer=seen.append)
    calls = in_process.closed(pipeline, callers, 0.0, answers=callers, first_seed=0)  # type: ignore[arg-type]
    assert list(map(len, seen)) == batches and len(calls) == sum(batches)
    assert list(itertools.chain.from_iterable(seen)) == list(range(len(calls))), "each call has a different seed"
