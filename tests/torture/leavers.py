"""Clients that disconnect at any moment, by a deadline or a cancellation; Triton must go on for the others.

Triton 2.51 ends with SIGSEGV if a call is cancelled at the moment of its answer. With direct calls this takes about
20,000 cancellations. The gateway never cancels a call that Triton has begun.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter

import grpc
import grpc.aio

from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc
from tests.conftest import Service
from tests.support.processes import triton_pid
from tests.torture.outcome import Outcome, Watch

AT_ONCE = 16
ANY = pb.SampleOptions(max_js=1e9)
LEFT = {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


async def leave(service: Service, model: str, count: int, seed: int = 8) -> Outcome:
    """Make `count` calls whose clients wait only for a random time, and then one that waits for its answer.

    The time is at most twice that of an answer on this machine, so that about half of the calls are answered.
    """
    outcome, rng, codes = Outcome("clients that leave"), random.Random(seed), Counter[str]()
    left = iter(range(count))
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub = pb_grpc.SampleServiceStub(channel)
        longest = 2.0 * statistics.median([await _seconds(stub, model) for _ in range(5)])
        watch, triton = Watch(service), triton_pid(service)

        async def client() -> None:
            for number in left:
                code, details = await _LEAVING[number % len(_LEAVING)](stub, model, rng.random() * longest)
                codes[code.name] += 1
                if code not in LEFT:
                    outcome.found(f"{code.name} to a client that leaves: {details}")
                outcome.tries += 1

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
        code, details = await _stay(stub, model)
        if code is not grpc.StatusCode.OK:
            outcome.found(f"{code.name} to a client that stays: {details}")
    if triton_pid(service) != triton:
        outcome.found("Triton ended and was started again")
    outcome.note = ", ".join(f"{code} {times}" for code, times in codes.most_common()) + "; "
    watch.look(outcome)
    return outcome


async def _seconds(stub: pb_grpc.SampleServiceStub, model: str) -> float:
    """Return the seconds until as many calls at once as there are clients are answered."""
    began = time.monotonic()
    await asyncio.gather(*(_stay(stub, model) for _ in range(AT_ONCE)))
    return time.monotonic() - began


async def _deadline(stub: pb_grpc.SampleServiceStub, model: str, seconds: float) -> tuple[grpc.StatusCode, str]:
    return await _status(stub.GetSample(pb.GetSampleRequest(model=model, options=ANY), timeout=seconds))


async def _call_off(stub: pb_grpc.SampleServiceStub, model: str, seconds: float) -> tuple[grpc.StatusCode, str]:
    call = stub.GetSample(pb.GetSampleRequest(model=model, options=ANY))
    await asyncio.sleep(seconds)
    call.cancel()
    return await _status(call)


async def _stay(stub: pb_grpc.SampleServiceStub, model: str) -> tuple[grpc.StatusCode, str]:
    return await _deadline(stub, model, 60.0)


_LEAVING = (_deadline, _call_off)


async def _status(call: grpc.aio.UnaryUnaryCall[pb.GetSampleRequest, pb.Sample]) -> tuple[grpc.StatusCode, str]:
    try:
        await call
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
    except grpc.aio.AioRpcError:
        pass
    return await call.code(), await call.details() or ""
