"""Walks of seeds: as many samples in flight as there is room for, results in order, one failure that ends it."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from labelmint import pipeline
from labelmint.core.errors import InferenceFailed
from labelmint.triton.client import Latents
from tests.support.served import MODEL

pytestmark = pytest.mark.unit


class Told:
    """In place of a client: it has room for three samples, and ends them as told."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.fails = fails
        self.begun = self.inside = self.most = self.ended = 0

    def room(self, *_: str) -> int:
        return 3 - self.inside

    async def infer(self, name: str, version: str, latents: Latents, **_: object) -> dict[str, np.ndarray]:
        number, self.begun, self.inside = self.begun, self.begun + 1, self.inside + 1
        self.most = max(self.most, self.inside)
        ending = asyncio.ensure_future(asyncio.sleep(0.001 * (number % 4)))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait([ending])
            raise
        finally:
            self.inside -= 1
        self.ended += 1
        if self.fails(number):
            raise InferenceFailed(str(number))
        return {"js_score": np.array([latents.latent.sum()])}


async def measured_by(client: Told) -> list[float]:
    return await pipeline.measure(
        client,  # type: ignore[arg-type]
        MODEL,
        range(20),
        truncation_psi=1.0,
        outputs=("js_score",),
        reduce=lambda seed, arrays: float(seed),
        title="",
    )


async def test_the_window_bounds_the_samples_and_the_order_is_that_of_the_seeds() -> None:
    client = Told(lambda number: False)
    assert await measured_by(client) == [float(seed) for seed in range(20)]
    assert client.most == 3 and client.begun == client.ended == 20


async def test_a_failure_ends_the_measurement_and_waits_for_what_has_begun() -> None:
    client = Told(lambda number: number == 5)
    with pytest.raises(InferenceFailed, match="^5$"):
        await measured_by(client)
    assert client.inside == 0 and client.begun <= 9, "samples were left running, or begun after the failure"
