"""Nodes and pods of Triton: the time until a requested replica serves, and its cost.

Rules of this file:
- A pod takes an empty node, or a new one is created for it. Then it needs the image, the models, and the gateways' next
  look-up of addresses. A node without a pod stays for a while and is then removed.
- A GPU is paid from the launch of its node to its removal.
- As in a ReplicaSet, pods that do not serve yet are removed first, then the youngest.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import simpy

from simulation.service import Gateway, Profile, Triton


@dataclass(frozen=True)
class Provisioning:
    """Seconds until a replica serves. They are predictions, because there was no cluster. Each is the median of a
    log-normal distribution with the spread `sigma`. `lifetime_seconds`: mean life of a spot node; 0 means no end."""

    node_seconds: float = 90.0  # launch, boot, join, GPU driver
    image_seconds: float = 100.0  # pulling NVIDIA's image to a new node
    load_seconds: float = 30.0  # models read and warmed up
    sigma: float = 0.2
    lifetime_seconds: float = 0.0


class Node:
    def __init__(self, launched_at: float) -> None:
        self.launched_at = launched_at
        self.up = False  # the node runs and has the image
        self.alive = True
        self.pod: Pod | None = None
        self.emptied = 0  # how often; distinguishes an old timer from the newest


class Pod:
    def __init__(self, node: Node) -> None:
        self.node = node
        self.triton: Triton | None = None  # set when it is ready
        self.deleted = False


class Cluster:
    """The Deployment of Triton. `pods` are the pods that it owns; `gpu_seconds()` is the time paid so far."""

    def __init__(
        self,
        env: simpy.Environment,
        gateway: Gateway,
        profile: Profile,
        *,
        provisioning: Provisioning,
        connection_age_seconds: float,
        drain_seconds: float,
        node_idle_seconds: float,
        rng: np.random.Generator,
    ) -> None:
        self._env = env
        self._gateway = gateway
        self._profile = profile
        self._provisioning = provisioning
        self._connection_age_seconds = connection_age_seconds
        self._drain_seconds = drain_seconds
        self._node_idle_seconds = node_idle_seconds
        self._rng = rng
        self._nodes: list[Node] = []
        self._paid_seconds = 0.0
        self.pods: list[Pod] = []

    @property
    def tritons(self) -> list[Triton]:
        """Return the ready Tritons."""
        return [pod.triton for pod in self.pods if pod.triton is not None]

    def gpu_seconds(self) -> float:
        return self._paid_seconds + sum(self._env.now - node.launched_at for node in self._nodes)

    def scale(self, replicas: int) -> None:
        """Set the Deployment's replicas."""
        while len(self.pods) < replicas:
            self._create()
        starting = [pod for pod in self.pods if pod.triton is None]
        serving = [pod for pod in self.pods if pod.triton is not None]
        excess = max(0, len(self.pods) - replicas)
        for pod in (starting[::-1] + serving[::-1])[:excess]:
            self._delete(pod)

    def take_away(self, share: float) -> None:
        """Remove a share of the nodes at once, without warning."""
        nodes = [node for node in self._nodes if node.up]
        for index in self._rng.permutation(len(nodes))[: math.ceil(share * len(nodes))]:
            self._vanish(nodes[index])

    def _create(self) -> None:
        empty = [node for node in self._nodes if node.up and node.pod is None]
        node = empty[0] if empty else Node(self._env.now)
        if not empty:
            self._nodes.append(node)
        pod = Pod(node)
        node.pod = pod
        self.pods.append(pod)
        self._env.process(self._start(pod))

    def _start(self, pod: Pod) -> Generator[simpy.Event, None, None]:
        node, times = pod.node, self._provisioning
        if not node.up:
            yield self._env.timeout(self._about(times.node_seconds) + self._about(times.image_seconds))
            node.up = True
            if times.lifetime_seconds:
                self._env.process(self._live(node))
            if pod.deleted:
                self._emptied(node)
        if pod.deleted:
            return
        yield self._env.timeout(self._about(times.load_seconds))
        if pod.deleted or not node.alive:
            return
        pod.triton = Triton(self._env, self._profile, self._gateway.finished)
        # A gateway looks up addresses when one of its connections ends at its maximum age.
        yield self._env.timeout(self._rng.uniform(0.0, self._connection_age_seconds))
        if not pod.deleted and node.alive:
            self._gateway.add(pod.triton)

    def _delete(self, pod: Pod) -> None:
        self.pods.remove(pod)
        pod.deleted = True
        if pod.triton is None:
            if pod.node.up:
                self._emptied(pod.node)
        else:
            self._env.process(self._drain(pod, pod.triton))

    def _drain(self, pod: Pod, triton: Triton) -> Generator[simpy.Event, None, None]:
        """Let the Triton finish the samples that it has. It gets no new ones once its address is gone."""
        self._gateway.remove(triton)
        yield self._env.timeout(self._drain_seconds)
        if pod.node.alive:
            for party, count in triton.lost():
                self._gateway.retry(party, count)
            self._emptied(pod.node)

    def _emptied(self, node: Node) -> None:
        node.pod = None
        node.emptied += 1
        timer = self._env.timeout(self._node_idle_seconds, value=node.emptied)

        def consolidate(event: simpy.Event) -> None:
            if node.alive and node.pod is None and event.value == node.emptied:
                self._remove(node)

        timer.callbacks.append(consolidate)

    def _live(self, node: Node) -> Generator[simpy.Event, None, None]:
        yield self._env.timeout(self._rng.exponential(self._provisioning.lifetime_seconds))
        self._vanish(node)

    def _vanish(self, node: Node) -> None:
        if not node.alive:
            return
        self._remove(node)
        pod = node.pod
        if pod is None:
            return
        if pod.triton is not None:
            self._gateway.remove(pod.triton)
            for party, count in pod.triton.lost():
                self._gateway.retry(party, count)
        if pod in self.pods:  # the Deployment will replace it
            self.pods.remove(pod)
            pod.deleted = True
            self._create()

    def _remove(self, node: Node) -> None:
        node.alive = False
        self._nodes.remove(node)
        self._paid_seconds += self._env.now - node.launched_at

    def _about(self, median: float) -> float:
        return median * math.exp(self._rng.normal(0.0, self._provisioning.sigma))
