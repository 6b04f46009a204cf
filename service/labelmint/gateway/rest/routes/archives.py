"""The route of samples.tar: the samples of a walk as one WebDataset shard.

Rules of this file:
- HEAD checks the request and generates no sample.
- An archive has the same limits as a gRPC stream: the maximum connection age, the gateway's shutdown and the caller's
  rate.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query, Request, Response

from labelmint.core.policy import Walk, gate_of, mixing_of
from labelmint.gateway.encoding.tar import archive
from labelmint.gateway.rest.documented import documented_bytes
from labelmint.gateway.rest.messages import TarQuery
from labelmint.gateway.rest.resources import IfNoneMatch, ModelName, Resources, not_modified
from labelmint.gateway.rest.streamed import Streamed
from labelmint.gateway.sampling.lifecycle import Lifecycle

_MEDIA_TYPE = "application/x-tar"


def add_archives(app: FastAPI, resources: Resources, lifecycle: Lifecycle) -> None:
    @app.get(
        "/v1/models/{model}/samples.tar",
        responses=documented_bytes(_MEDIA_TYPE),
        summary="The samples of a walk as a WebDataset shard",
        description=(
            "The members of each accepted sample, in order: `SEED.image.png`, `SEED.label.npy` (class ids; not for "
            "keypoint models) and `SEED.json`. `shard_index` and `shard_count` select disjoint archives of `count` "
            "samples each. To continue with another archive, start at `next_seed` of the last JSON. If the archive "
            "fails midway, the connection closes without the end of the body."
        ),
        response_class=Response,
    )
    async def get_tar(
        request: Request, model: ModelName, query: Annotated[TarQuery, Query()], if_none_match: IfNoneMatch = None
    ) -> Response:
        owed = resources.sampler.owed_at_first(0, query.count)
        found = await resources.find(request, model, query, owed=owed)
        caching = resources.caching(request, found, "tar", query=query)
        walk, options = Walk(query.start_seed, query.shard_index, query.shard_count), query.to_sample_options()
        mixing_of(found, options)
        gate_of(found, options)
        if caching.held(if_none_match, exists=True):
            return not_modified(caching)
        if request.method == "HEAD":
            response = Response(media_type=_MEDIA_TYPE, headers=caching.headers)
            del response.headers["content-length"]  # GET does not know it either
            return response
        samples = resources.sampler.walk(found, walk, options, count=query.count)
        return Streamed(archive(lifecycle.guard(samples, walk.start)), _MEDIA_TYPE, caching.headers)
