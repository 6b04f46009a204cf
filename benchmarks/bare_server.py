"""A minimal gRPC server of samples in Python: it returns the same answers, already serialised, and does nothing else.

Rules of this file:
- It is grpc.aio's server with default options. An answer is one sample's bytes, whatever the seed. It parses requests
  because a batch must know its seeds.
- As a relay it first requests each sample from Triton with tritonclient's asyncio client, and discards the result. This
  is the least that a request to Triton costs. A stream has as many requests in flight as a gateway's by default.

Run by other benchmarks: `python benchmarks/bare_server.py SAMPLE [--relay TRITON --model-repository DIRECTORY]`, where
SAMPLE is a file with a serialised Sample; it prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import cache
from pathlib import Path

import grpc
import grpc.aio
from direct import Direct

from labelmint.core.policy import DEFAULT_WINDOW
from labelmint.core.served_model import read_served_model
from labelmint.triton.model_config import ensembles
from labelmint.v1 import sample_service_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["SampleService"].full_name
Fetch = Callable[[int], Awaitable[object]]


def handler(sample: pb.Sample, fetch: Fetch | None) -> grpc.GenericRpcHandler:
    """Return the methods that generate samples: they answer `sample` for every seed, after `fetch` of that seed."""
    single = pb.GetSampleResponse(sample=sample).SerializeToString()
    streamed = pb.StreamSamplesResponse(sample=sample, next_seed=1).SerializeToString()

    @cache
    def batch(count: int) -> bytes:
        return pb.BatchGetSamplesResponse(outcomes=[pb.SampleOutcome(sample=sample)] * count).SerializeToString()

    async def get(request: pb.GetSampleRequest, context: grpc.aio.ServicerContext) -> bytes:
        if fetch is not None:
            await fetch(request.seed)
        return single

    async def get_batch(request: pb.BatchGetSamplesRequest, context: grpc.aio.ServicerContext) -> bytes:
        if fetch is not None:
            await asyncio.gather(*map(fetch, request.seeds))
        return batch(len(request.seeds))

    async def stream(request: pb.StreamSamplesRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for _ in _ahead(itertools.count(request.start_seed), fetch):
            yield streamed

    methods = {
        "GetSample": grpc.unary_unary_rpc_method_handler(get, pb.GetSampleRequest.FromString),
        "BatchGetSamples": grpc.unary_unary_rpc_method_handler(get_batch, pb.BatchGetSamplesRequest.FromString),
        "StreamSamples": grpc.unary_stream_rpc_method_handler(stream, pb.StreamSamplesRequest.FromString),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


async def _ahead(seeds: Iterable[int], fetch: Fetch | None) -> AsyncIterator[int]:
    """Yield the seeds, each after its fetch, with a window of fetches in flight."""
    if fetch is None:
        for seed in seeds:
            yield seed
        return
    window: deque[tuple[int, asyncio.Future[object]]] = deque()
    try:
        for seed in seeds:
            window.append((seed, asyncio.ensure_future(fetch(seed))))
            if len(window) == DEFAULT_WINDOW:
                first, fetched = window.popleft()
                await fetched
                yield first
    finally:
        for _, fetched in window:
            fetched.cancel()


async def serve(sample: pb.Sample, triton: str, repository: Path) -> None:
    fetch = None
    if triton:
        (config,) = ensembles(repository).values()
        direct = Direct(triton, read_served_model(config, "1"))

        async def fetch(seed: int) -> None:
            await direct.infer([seed])

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler(sample, fetch),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sample", type=Path)
    parser.add_argument("--relay", default="", metavar="TRITON", help="HOST:PORT of the Triton to relay to")
    parser.add_argument("--model-repository", type=Path, help="the model repository of that Triton")
    arguments = parser.parse_args()
    sample = pb.Sample.FromString(arguments.sample.read_bytes())
    asyncio.run(serve(sample, arguments.relay, arguments.model_repository))


if __name__ == "__main__":
    main()
