"""The algorithms of Kubernetes' HorizontalPodAutoscaler (autoscaling/v2) and of KEDA, as documented.

Rules of this file:
- It only decides: the inputs are metrics and time, the outputs are numbers of replicas. Nothing here waits or
  simulates.
- Each metric proposes replicas, and the largest proposal is taken. The behaviour then limits it: first stabilisation,
  then policies.
- KEDA switches between zero and one replica. Above that, its HorizontalPodAutoscaler decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SYNC_SECONDS = 15.0  # kube-controller-manager, --horizontal-pod-autoscaler-sync-period
TOLERANCE = 0.1  # --horizontal-pod-autoscaler-tolerance


@dataclass(frozen=True)
class Policy:
    """Allows a change of at most `value` pods, or per cent of the pods, in `period_seconds`."""

    kind: str  # Pods, Percent
    value: int
    period_seconds: float


@dataclass(frozen=True)
class Rules:
    """`behavior.scaleUp` or `behavior.scaleDown`."""

    stabilization_seconds: float
    policies: tuple[Policy, ...]
    select: str = "Max"  # Max, Min, Disabled

    @classmethod
    def read(cls, manifest: dict[str, Any]) -> Rules:
        policies = tuple(Policy(each["type"], each["value"], each["periodSeconds"]) for each in manifest["policies"])
        return cls(manifest["stabilizationWindowSeconds"], policies, manifest.get("selectPolicy", "Max"))


def average_value_replicas(usage: float, target: float, current: int) -> int:
    """Return the replicas that an External metric with an AverageValue target proposes. `usage` is the sum over all."""
    if abs(usage / (target * current) - 1.0) <= TOLERANCE:
        return current
    return math.ceil(usage / target)


def pods_metric_replicas(values: Sequence[float], target: float, current: int) -> int:
    """Return the replicas that a Pods metric proposes, from the values of the pods (of `current`) that have one.

    Pods without a value (not started, or not ready) count as idle for a scale-up and as exactly at the target for a
    scale-down. If that reverses the decision, nothing changes.
    """
    if not values:
        return current
    ratio = sum(values) / len(values) / target
    without = current - len(values)
    if without > 0:
        assumed = target if ratio < 1.0 else 0.0
        again = (sum(values) + without * assumed) / current / target
        if abs(again - 1.0) <= TOLERANCE or (ratio < 1.0) != (again < 1.0):
            return current
        return math.ceil(again * current)
    return current if abs(ratio - 1.0) <= TOLERANCE else math.ceil(ratio * len(values))


@dataclass
class HorizontalPodAutoscaler:
    """The state of one autoscaler: its recommendations and the scalings that it has made."""

    min_replicas: int
    max_replicas: int
    up: Rules
    down: Rules
    _recommendations: list[tuple[float, int]] = field(default_factory=list)
    _scalings: list[tuple[float, int]] = field(default_factory=list)  # (time, change)

    def decide(self, now: float, current: int, proposals: Sequence[int]) -> int:
        """Return the number of replicas from now on. With `current` 0 the target is switched off and stays at 0."""
        if current == 0:
            return 0
        if current > self.max_replicas or current < self.min_replicas:
            wanted = min(max(current, self.min_replicas), self.max_replicas)
        else:
            wanted = self._limited(now, current, self._stabilized(now, current, max(proposals)))
        if wanted != current:
            self._scalings.append((now, wanted - current))
        return wanted

    def _stabilized(self, now: float, current: int, proposed: int) -> int:
        longest = max(self.up.stabilization_seconds, self.down.stabilization_seconds)
        self._recommendations = [each for each in self._recommendations if each[0] > now - longest]
        upward = downward = proposed
        for time, replicas in self._recommendations:
            if time > now - self.up.stabilization_seconds:
                upward = min(upward, replicas)
            if time > now - self.down.stabilization_seconds:
                downward = max(downward, replicas)
        self._recommendations.append((now, proposed))
        return min(max(current, upward), downward)

    def _limited(self, now: float, current: int, wanted: int) -> int:
        if wanted > current:
            limit = self._limit(now, current, self.up)
            return max(current, min(wanted, limit, self.max_replicas))
        if wanted < current:
            limit = self._limit(now, current, self.down)
            return min(current, max(wanted, limit, self.min_replicas))
        return current

    def _limit(self, now: float, current: int, rules: Rules) -> int:
        """Return the furthest number that the policies allow; `Max` takes the policy that allows the largest change."""
        up = rules is self.up
        if rules.select == "Disabled":
            return current
        limits = []
        for policy in rules.policies:
            recent = sum(change for time, change in self._scalings if time > now - policy.period_seconds)
            begun = current - recent  # replicas at the start of the period
            if policy.kind == "Pods":
                limits.append(begun + policy.value if up else begun - policy.value)
            elif up:
                limits.append(math.ceil(begun * (1 + policy.value / 100)))
            else:
                limits.append(int(begun * (1 - policy.value / 100)))
        highest = up == (rules.select == "Max")
        return max(limits) if highest else min(limits)


@dataclass
class Keda:
    """KEDA's own decision, every `polling_seconds`: whether there is a replica at all."""

    polling_seconds: float
    cooldown_seconds: float
    min_replicas: int
    _active_at: float = -math.inf

    def decide(self, now: float, current: int, active: bool) -> int:
        """Return the replicas. `active`: a trigger's value is above its activationThreshold."""
        if active:
            self._active_at = now
            return max(current, self.min_replicas, 1)
        if self.min_replicas == 0 and now - self._active_at >= self.cooldown_seconds:
            return 0
        return max(current, self.min_replicas)
