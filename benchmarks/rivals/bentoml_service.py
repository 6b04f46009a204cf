"""BentoML over eager torch: a batchable service, and a service in front of it that takes requests.

Rules of this file:
- It follows BentoML's documentation for requests with several fields: the batchable method takes a list of a Pydantic
  model, and a second service wraps each request into a list of one. The wrapper is asynchronous, so that concurrent
  requests share a batch.
- The number of workers is the batchable service's `workers`.

Run by benchmarks/alternatives.py.
"""

from __future__ import annotations

from typing import Annotated

import bentoml
import numpy as np
from bentoml.validators import ContentType
from pydantic import BaseModel

from rivals.model import Painter, Request
from rivals.settings import Settings

settings = Settings.of_environment()
LATENCY_MS = 600_000  # BentoML refuses slower requests; here it must refuse none


class Ask(BaseModel):
    seed: int
    truncation_psi: float
    crossover: int


@bentoml.service(workers=settings.workers, traffic={"timeout": 600})
class Model:
    def __init__(self) -> None:
        self.painter = Painter(settings)

    @bentoml.api(batchable=True, max_batch_size=settings.batch, max_latency_ms=LATENCY_MS)
    def paint(self, asks: list[Ask]) -> np.ndarray:
        """Return the bodies of a batch, uint8 [B,bytes]."""
        bodies = self.painter.bodies([Request(**ask.model_dump()) for ask in asks])
        return np.stack([np.frombuffer(body, np.uint8) for body in bodies])


@bentoml.service(traffic={"timeout": 600})
class Samples:
    model = bentoml.depends(Model)

    @bentoml.api
    async def sample(
        self, seed: int, truncation_psi: float, crossover: int
    ) -> Annotated[bytes, ContentType("application/octet-stream")]:
        bodies = await self.model.to_async.paint([Ask(seed=seed, truncation_psi=truncation_psi, crossover=crossover)])
        return bodies[0].tobytes()
