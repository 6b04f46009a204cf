"""Steps that the routes share: finding the model of a request, and validating the client's cached copy.

Rules of this file:
- The gateway generates a sample only if the client does not already have its bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Header, Path, Request, Response
from pydantic import BeforeValidator

from labelmint.core.policy import SEED_END
from labelmint.core.served_model import ServedModel
from labelmint.gateway.rest.caching import Caching, caching_of
from labelmint.gateway.rest.messages import PinnedQuery, VersionModel
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.sample import Sample
from labelmint.gateway.sampling.sampler import Sampler

T = TypeVar("T")


def _spelled(seed: str) -> str:
    """Refuse other spellings of a seed, such as 007, -0 or 7.0, so that caches see one URL per sample."""
    if str(int(seed)) != seed:
        raise ValueError("is spelled in another way")  # `problems.py` writes the message for all invalid seeds
    return seed


ModelName = Annotated[str, Path(description="Name of the model, as /v1/models lists it.", examples=["faces"])]
Seed = Annotated[int, Path(ge=0, lt=SEED_END, description="The seed: 0 to 2^32 - 1."), BeforeValidator(_spelled)]
IfNoneMatch = Annotated[str | None, Header(description="ETags of the responses that the client has cached.")]


class Resources:
    def __init__(self, sampler: Sampler, metrics: Metrics, private: bool) -> None:
        """`private`: whether shared caches must not store responses."""
        self.sampler = sampler
        self._metrics = metrics
        self._private = private

    async def find(self, request: Request, name: str, asked: VersionModel, *, owed: int = 1) -> ServedModel:
        """Return the model of a request that owes `owed` samples. From here on the metrics carry its name."""
        model = await self.sampler.find(name, asked.model_version, owed)
        request.state.model = model.name
        return model

    def caching(self, request: Request, model: ServedModel, representation: str, *, query: PinnedQuery) -> Caching:
        """Return how the response may be cached. A permanent error (`lasting`) gets the same Cache-Control."""
        found = caching_of(model, representation, query, pinned=query.revision, private=self._private)
        request.state.cache_control = found.cache_control
        return found

    async def sample(
        self, model: ServedModel, seed: int, query: PinnedQuery, *, js_map: bool, caching: Caching, held: str | None
    ) -> Sample | None:
        """Return a sample, or None if the client already has the response. `held` is its If-None-Match header."""
        if caching.held(held):
            return None
        sample = await self.sampler.sample(model, seed, query.to_sample_options(js_map))
        return None if caching.held(held, exists=True) else sample

    async def encoded(self, model: ServedModel, make: Callable[..., T], *made_from: Any) -> T:
        """Run `make`, which encodes samples of a model, in a thread."""
        with self._metrics.encoding(model.name):
            return await asyncio.to_thread(make, *made_from)


def not_modified(caching: Caching) -> Response:
    return Response(status_code=304, headers=caching.headers)
