"""A day of a cluster, minute by minute: which alert fires in a roll-out, a drain, at zero and in each failure.

Rules of this file:
- A situation is a function that changes the cluster and lets time pass, with the alerts that it must raise: not before
  the first number of minutes, and firing at the second. All other alerts are silent for the whole situation.
- A situation leaves the cluster as it found it, and lasts until its alerts have ended: nothing may reach into the next.
- promtool evaluates the rendered rules once, over the whole day.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.conftest import alerts, run_promtool
from tests.support.cluster import SECONDS_PER_TICK, Cluster

pytestmark = pytest.mark.triton

Between = tuple[float, float]


def night_at_zero(day: Cluster) -> None:
    """The evening's last job ends soon after midnight."""
    day.owed, day.per_minute = 16, 3
    triton = day.new_triton(node=0, load=0)
    day.wait(15)
    day.owed = day.per_minute = 0
    day.wait(10)
    day.end(triton)
    day.wait(60)


def first_job_from_zero(day: Cluster) -> None:
    """A job and some single requests come at night's end. A node, the image and the models take seven minutes."""
    day.owed, day.per_minute = 16, 3
    day.new_triton(node=5, load=2)
    day.wait(53)


def few_requests_of_which_some_fail(day: Cluster) -> None:
    """One request a minute, and a failure every 25 minutes."""
    day.per_minute, day.fails_every = 1, 25
    day.wait(100)
    day.per_minute, day.fails_every = 3, 0
    day.wait(15)


def roll_out_of_gateways(day: Cluster) -> None:
    for old in list(day.gateways):
        day.new_gateway()
        day.wait(1)
        day.end(old)
    day.wait(20)


def roll_out_of_the_only_triton(day: Cluster) -> None:
    """The old one stops first. The node and the image are there, so the new one needs two minutes."""
    replace_triton(day, node=0.5, load=1.5)
    day.wait(28)


def scale_up(day: Cluster) -> None:
    """Three jobs more: two Tritons more, each on a new node."""
    day.owed = 130
    day.new_triton(node=3, load=2)
    day.new_triton(node=0, load=2)
    day.wait(20)


def roll_out_of_three_tritons(day: Cluster) -> None:
    for _ in range(3):
        replace_triton(day, node=0.5, load=1.5)
    day.wait(20)


def drain_of_a_node(day: Cluster) -> None:
    """A gateway and a Triton are on it. The Triton waits for another node."""
    evicted = day.gateways[0]
    day.end(evicted)
    replace_triton(day, node=4, load=2)
    day.new_gateway()
    day.wait(20)


def spot_node_is_taken(day: Cluster) -> None:
    """The Triton is dead at once. Its pod stays, unreachable, until Kubernetes gives the node up."""
    taken = day.tritons[0]
    taken.scraped = taken.works = False
    day.wait(6)
    replace_triton(day, node=3, load=2)
    day.wait(20)


def scale_down_to_zero(day: Cluster) -> None:
    day.owed = day.per_minute = 0
    day.wait(6)
    for _ in range(2):
        day.end(day.tritons[0])
        day.wait(1)
    day.wait(8)
    day.end(day.tritons[0])
    day.wait(20)


def short_jobs_each_from_zero(day: Cluster) -> None:
    """A small data set every ten minutes, and Tritons that leave after five minutes without demand."""
    for _ in range(5):
        day.owed = 16
        triton = day.new_triton(node=0.5, load=1.5)
        day.wait(2)
        day.owed = 0
        day.wait(5)
        day.end(triton)
        day.wait(1)
    day.wait(15)


def no_node_for_a_quarter_of_an_hour(day: Cluster) -> None:
    """Some requests fail after their wait. The one page says why, and no second one follows."""
    day.owed, day.per_minute = 8, 1
    triton = day.new_triton(node=16, load=2)
    day.wait(60)
    day.owed = day.per_minute = 0
    day.wait(10)
    day.end(triton)
    day.wait(5)


def no_node_for_an_hour(day: Cluster) -> None:
    day.owed, day.per_minute = 8, 20
    triton = day.new_triton(node=58, load=2)
    day.per_minute = 0
    day.wait(45)
    day.owed = 0
    day.wait(10)
    day.end(triton)
    day.wait(5)


def triton_crash_loops(day: Cluster) -> None:
    """The only Triton dies a minute after it is ready, at growing distances."""
    day.owed = 16
    triton = day.new_triton(node=1, load=2)
    for pause in (1, 1, 2, 3, 5, 5, 5, 5):
        day.wait(1)
        day.restart(triton, pause)
    day.wait(35)


def one_triton_of_two_crash_loops(day: Cluster) -> None:
    bad = day.new_triton(node=3, load=2)
    for pause in (1, 1, 2, 3):
        day.wait(1.5)
        day.restart(bad, pause + 0.5)
    day.wait(35)
    day.end(bad)


def one_triton_of_two_never_loads(day: Cluster) -> None:
    """Its GPU is too small for the models, say: its pod restarts for ever while the other serves."""
    bad = day.new_triton(node=3, load=0)
    bad.scraped = bad.works = False
    day.wait(30)
    day.end(bad)
    day.wait(10)


def triton_hangs(day: Cluster) -> None:
    """It answers nothing but its metrics and its probes."""
    (triton,) = day.tritons
    triton.works = False
    day.wait(13)
    triton.works = True
    day.wait(15)


def spot_nodes_are_taken_again_and_again(day: Cluster) -> None:
    """Each time a new pod comes on another node, so no single pod restarts."""
    for _ in range(3):
        replace_triton(day, node=2, load=2)
        day.wait(4)
    day.wait(32)


def one_gateway_finds_no_triton(day: Cluster) -> None:
    """A network policy, or a name that it resolves wrongly. Clients are served by the other gateway."""
    day.gateways[0].cut_off = True
    day.wait(14)
    day.gateways[0].cut_off = False
    day.wait(15)


def gateway_crash_loops(day: Cluster) -> None:
    bad = day.gateways[0]
    for pause in (0.5, 0.5, 1, 2):
        day.wait(1)
        day.restart(bad, pause)
    day.wait(35)


def gateway_crashes_before_it_is_scraped(day: Cluster) -> None:
    """A roll-out with a setting that cannot work: the new gateway never listens, and the old ones stay."""
    bad = day.new_gateway()
    bad.scraped = bad.works = False
    day.wait(20)
    day.end(bad)
    day.wait(10)


def some_of_few_requests_are_slow(day: Cluster) -> None:
    """The only requests of an hour: one a minute for a quarter of an hour, every second one slow."""
    day.per_minute, day.slow_in_ten = 1, 5
    day.wait(15)
    day.per_minute = day.slow_in_ten = 0
    day.wait(15)


def one_request_in_fifty_fails(day: Cluster) -> None:
    day.per_minute, day.fails_every = 100, 50
    day.wait(60)
    day.per_minute = day.fails_every = 0
    day.wait(50)


def one_request_in_three_is_slow(day: Cluster) -> None:
    """Tritons are ready and too slow."""
    day.per_minute, day.slow_in_ten, day.queue_seconds = 20, 3, 6
    day.wait(40)
    day.per_minute, day.slow_in_ten, day.queue_seconds = 0, 0, 0.2
    day.wait(20)


def prometheus_lost_its_token(day: Cluster) -> None:
    """The gateways serve, and refuse Prometheus."""
    for pod in day.gateways:
        pod.scraped = False
    day.wait(20)
    for pod in day.gateways:
        pod.scraped = True
    day.wait(15)


def all_gateways_are_gone(day: Cluster) -> None:
    for pod in list(day.gateways):
        day.end(pod)
    day.wait(12)
    for _ in range(2):
        day.new_gateway()
    day.wait(15)


def night_again(day: Cluster) -> None:
    day.owed = day.per_minute = 0
    day.wait(10)
    while day.tritons:
        day.end(day.tritons[0])
    day.wait(24 * 60 - day.minutes)


def replace_triton(day: Cluster, *, node: float, load: float) -> None:
    day.end(day.tritons[0])
    day.new_triton(node=node, load=load)


DAY: dict[Callable[[Cluster], None], dict[str, Between]] = {
    night_at_zero: {},
    first_job_from_zero: {},
    few_requests_of_which_some_fail: {},
    roll_out_of_gateways: {},
    roll_out_of_the_only_triton: {},
    scale_up: {},
    roll_out_of_three_tritons: {},
    drain_of_a_node: {},
    spot_node_is_taken: {},
    scale_down_to_zero: {},
    short_jobs_each_from_zero: {},
    no_node_for_a_quarter_of_an_hour: {"LabelmintDemandWithoutCapacity": (9, 12)},
    no_node_for_an_hour: {
        "LabelmintDemandWithoutCapacity": (9, 12),
        "LabelmintErrorBudgetFast": (15, 20),
        "LabelmintErrorBudgetSlow": (28, 35),
    },
    triton_crash_loops: {"LabelmintTritonRestartLoop": (7, 15), "LabelmintDemandWithoutCapacity": (9, 30)},
    one_triton_of_two_crash_loops: {"LabelmintTritonRestartLoop": (11, 18)},
    one_triton_of_two_never_loads: {"LabelmintTritonUnreachable": (18, 25)},
    triton_hangs: {"LabelmintTritonNotReady": (4.5, 6), "LabelmintDemandWithoutCapacity": (9, 12)},
    spot_nodes_are_taken_again_and_again: {"LabelmintTritonRestartLoop": (15, 20)},
    one_gateway_finds_no_triton: {"LabelmintTritonNotReady": (4.5, 6)},
    gateway_crash_loops: {"LabelmintGatewayRestartLoop": (4, 8)},
    gateway_crashes_before_it_is_scraped: {"LabelmintGatewayUnreachable": (9, 12)},
    some_of_few_requests_are_slow: {},
    one_request_in_fifty_fails: {"LabelmintErrorBudgetFast": (2, 15), "LabelmintErrorBudgetSlow": (15, 45)},
    one_request_in_three_is_slow: {"LabelmintLatencyBudget": (2, 15), "LabelmintQueueWait": (9, 16)},
    prometheus_lost_its_token: {"LabelmintNoGateway": (4, 7), "LabelmintGatewayUnreachable": (9, 12)},
    all_gateways_are_gone: {"LabelmintNoGateway": (4, 7)},
    night_again: {},
}

# What may never be true of the recorded numbers, at any time of the day. Gauges are at once those of the whole cluster,
# and ratios, means and counts are those of its samples, however pods begin and end.
NEVER = {
    "demand_differs": "abs(labelmint:demand_samples:sum - truth_demand_samples) > 0.001",
    "ready_differs": "labelmint:triton_ready:max != truth_triton_ready",
    "queue_wait_is_too_short": "labelmint:triton_queue_seconds:mean5m < 0.199",
    "queue_wait_is_too_long": "labelmint:triton_queue_seconds:mean5m > 6.001",
    "gate_differs": "labelmint:calibrated_share_at_gate:difference_rate1h > 0.001",
    "median_differs": "labelmint:calibrated_share_below_gate:difference_rate1h > 0.001",
    "failures_are_invented": "labelmint:request_errors:increase6h > 1.1 * increase(truth_failed_total[6h]) + 1",
    "slow_samples_are_invented": "labelmint:request_slow:increase1h > 1.1 * increase(truth_slow_total[1h]) + 1",
}


@dataclass(frozen=True)
class Situation:
    """A part of the day, in minutes, and what must fire in it."""

    name: str
    begin: float
    end: float
    fires: dict[str, Between]

    def checks(self, alert: str) -> list[dict[str, Any]]:
        """Return promtool's checks that the alert fires when it should, or never."""
        if alert not in self.fires:
            return [self._silent(alert, self.begin, self.end)]
        earliest, latest = self.fires[alert]
        fires = {
            "expr": f'count(ALERTS{{alertstate="firing", alertname="{alert}"}}) > bool 0 '
            f"# {self.name}: {alert} must fire by minute {latest:g}",
            "eval_time": _seconds(self.begin + latest),
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        return [
            self._silent(alert, self.begin, self.begin + earliest),
            fires,
            # It has ended when the situation ends.
            self._silent(alert, self.end - 1, self.end),
        ]

    def _silent(self, alert: str, begin: float, end: float) -> dict[str, Any]:
        minutes = f"{begin - self.begin:g} to {end - self.begin:g}"
        return {
            "expr": f'count(count_over_time(ALERTS{{alertstate="firing", alertname="{alert}"}}'
            f"[{_seconds(end - begin, less=1)}])) # {self.name}: {alert} must be silent in minutes {minutes}",
            "eval_time": _seconds(end, less=1),
            "exp_samples": [],
        }


def _seconds(minutes: float, *, less: int = 0) -> str:
    """Promtool's notation, `less` some scrapes."""
    return f"{round(minutes * 60) - less * SECONDS_PER_TICK}s"


def live() -> tuple[Cluster, list[Situation]]:
    day, situations = Cluster(), []
    for _ in range(2):
        day.new_gateway()
    for script, fires in DAY.items():
        begin = day.minutes
        script(day)
        situations.append(Situation(script.__name__, begin, day.minutes, fires))
    return day, situations


def failed_checks(rules: Path, directory: Path) -> list[str]:
    """Evaluate the rules over the day. Return the checks that failed, in words."""
    day, situations = live()
    names = sorted({rule["alert"] for rule in alerts(rules)} | {name for fires in DAY.values() for name in fires})
    checks = [check for each in situations for name in names for check in each.checks(name)]
    interval = f"{SECONDS_PER_TICK}s"
    for name, expression in NEVER.items():
        # promtool evaluates no more than 10,000 values in one expression.
        step = "5m" if "[" in expression else interval
        counted = f"count(count_over_time(({expression})[24h:{step}])) # {name}: at some time of the day"
        checks.append({"expr": counted, "eval_time": _seconds(24 * 60, less=1), "exp_samples": []})
    test = {"interval": interval, "input_series": day.in_promtools_notation(), "promql_expr_test": checks}
    path = directory / "day.yaml"
    # JSON is YAML too, and is written faster.
    path.write_text(json.dumps({"rule_files": [str(rules)], "evaluation_interval": interval, "tests": [test]}))
    done = run_promtool("test", "rules", str(path))
    assert " err: " not in done.stderr, done.stderr
    failed = re.findall(r'expr: ".* # (.*)", time', done.stderr)
    assert (done.returncode == 0) == (not failed), done.stdout + done.stderr
    return failed


@pytest.fixture(scope="module")
def failures(rules: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return failed_checks(rules, tmp_path_factory.mktemp("day"))


@pytest.mark.parametrize("situation", [script.__name__ for script in DAY])
def test_exactly_the_right_alerts_fire(situation: str, failures: list[str]) -> None:
    assert [each for each in failures if each.startswith(f"{situation}:")] == []


@pytest.mark.parametrize("never", NEVER)
def test_recorded_numbers_are_those_of_the_living_pods(never: str, failures: list[str]) -> None:
    assert [each for each in failures if each.startswith(f"{never}:")] == []


def test_the_day_is_whole() -> None:
    day, situations = live()
    assert day.minutes == 24 * 60
    assert all(before.end == after.begin for before, after in pairwise(situations))


def test_the_day_names_no_alert_that_does_not_exist(rules: Path) -> None:
    assert {name for fires in DAY.values() for name in fires} <= {rule["alert"] for rule in alerts(rules)}
