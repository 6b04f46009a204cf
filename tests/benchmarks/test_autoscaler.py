"""Tests of the autoscalers' algorithms, against worked examples from the documentation of Kubernetes and KEDA."""

import pytest
from simulation.autoscaler import (
    HorizontalPodAutoscaler,
    Keda,
    Policy,
    Rules,
    average_value_replicas,
    pods_metric_replicas,
)

pytestmark = pytest.mark.unit


FREE = Rules(0, (Policy("Percent", 1000, 15),))
AT_ONCE = Rules(0, (Policy("Percent", 100, 15),))


def course(hpa: HorizontalPodAutoscaler, start: int, proposals: list[int], every: float = 60.0) -> list[int]:
    """Return the replicas after each of these proposals, one every `every` seconds."""
    replicas, found = start, []
    for index, proposed in enumerate(proposals):
        replicas = hpa.decide(index * every, replicas, [proposed])
        found.append(replicas)
    return found


@pytest.mark.parametrize(
    ("usage", "current", "wanted"),
    [
        (200, 1, 2),  # 200m with a target of 100m: doubled
        (100, 2, 1),  # 50m: halved
        (109, 1, 1),  # within the tolerance of 10 %
        (91, 1, 1),
        (329, 3, 3),
        (331, 3, 4),  # rounded up
        (1000, 1, 10),  # a sum does not depend on the number of pods
        (1000, 9, 10),
    ],
)
def test_a_sum_proposes_usage_by_target(usage: float, current: int, wanted: int) -> None:
    assert average_value_replicas(usage, 100, current) == wanted


@pytest.mark.parametrize(
    ("values", "current", "wanted"),
    [
        ([200, 200], 2, 4),
        ([50, 50], 2, 1),
        ([105, 95, 100], 3, 3),
        ([], 3, 3),  # no values, no change
        ([200, 200], 4, 4),  # two pods without a value count as idle: (200 + 200) / 4 is the target
        ([200, 200, 200], 4, 6),
        ([20, 20, 20], 4, 2),  # for a scale-down they count as busy: (60 + 100) / 4 is 40 % of the target
        ([110.5, 110.5], 3, 3),  # 221 / 3 is below the target although 110.5 is above it: no change
    ],
)
def test_pods_that_do_not_tell_yet_damp(values: list[float], current: int, wanted: int) -> None:
    assert pods_metric_replicas(values, 100, current) == wanted


def test_the_larger_of_two_policies_downwards() -> None:
    """80 pods shrink by 10 %: 8, then 8 of 72 (7.2, rounded up). Below 40, the policy of 4 pods removes more."""
    down = Rules(0, (Policy("Pods", 4, 60), Policy("Percent", 10, 60)))
    found = course(HorizontalPodAutoscaler(1, 100, FREE, down), 80, [10] * 14)
    assert found == [72, 64, 57, 51, 45, 40, 36, 32, 28, 24, 20, 16, 12, 10]


def test_the_smaller_of_two_policies_and_none() -> None:
    policies = (Policy("Pods", 5, 60), Policy("Percent", 10, 60))
    assert course(HorizontalPodAutoscaler(1, 100, FREE, Rules(0, policies, "Min")), 80, [10]) == [75]
    assert course(HorizontalPodAutoscaler(1, 100, FREE, Rules(0, policies, "Disabled")), 80, [10]) == [80]


def test_upwards_as_fast_as_the_policy_says() -> None:
    fast = Rules(0, (Policy("Percent", 900, 60),))
    assert course(HorizontalPodAutoscaler(1, 1000, fast, AT_ONCE), 1, [1000] * 3) == [10, 100, 1000]
    slow = Rules(0, (Policy("Pods", 1, 600),))
    found = course(HorizontalPodAutoscaler(1, 1000, slow, AT_ONCE), 1, [1000] * 21)
    assert found == [2] * 10 + [3] * 10 + [4]
    default = Rules(0, (Policy("Percent", 100, 15), Policy("Pods", 4, 15)))
    assert course(HorizontalPodAutoscaler(1, 100, default, AT_ONCE), 1, [100] * 4, 15) == [5, 10, 20, 40]


def test_a_period_counts_what_was_added_in_it() -> None:
    """Four per minute stay four per minute, however often the autoscaler decides."""
    rules = Rules(0, (Policy("Pods", 4, 60),))
    assert course(HorizontalPodAutoscaler(1, 100, rules, AT_ONCE), 1, [3, 50, 50, 50, 50], 15) == [3, 5, 5, 5, 7]


def test_downwards_takes_the_highest_of_the_window() -> None:
    hpa = HorizontalPodAutoscaler(1, 100, FREE, Rules(300, AT_ONCE.policies))
    assert course(hpa, 10, [10, 4, 4, 6, 4, 4, 4, 4, 4]) == [10, 10, 10, 10, 10, 6, 6, 6, 4]


def test_upwards_takes_the_lowest_of_the_window() -> None:
    hpa = HorizontalPodAutoscaler(1, 100, Rules(120, FREE.policies), AT_ONCE)
    assert course(hpa, 2, [2, 8, 9, 10, 10]) == [2, 2, 8, 9, 10]


def test_the_largest_proposal_counts_within_the_limits() -> None:
    hpa = HorizontalPodAutoscaler(2, 8, FREE, AT_ONCE)
    assert hpa.decide(0, 4, [1, 6, 3]) == 6
    assert hpa.decide(15, 6, [50]) == 8
    assert hpa.decide(30, 8, [0]) == 2
    assert hpa.decide(45, 12, [12]) == 8 and hpa.decide(60, 1, [1]) == 2
    assert hpa.decide(75, 0, [5]) == 0, "zero replicas switch the scaler off; KEDA starts the first"


def test_keda_starts_the_first_and_stops_the_last() -> None:
    keda = Keda(polling_seconds=15, cooldown_seconds=300, min_replicas=0)
    assert keda.decide(0, 0, active=False) == 0
    assert keda.decide(15, 0, active=True) == 1
    assert keda.decide(30, 4, active=True) == 4, "from one on, the HorizontalPodAutoscaler decides"
    assert keda.decide(315, 4, active=False) == 4
    assert keda.decide(330, 4, active=False) == 0, "the cooldown counts from the last active time"
    assert Keda(15, 300, min_replicas=2).decide(1e6, 0, active=False) == 2
