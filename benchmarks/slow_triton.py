"""Measures three gateways with 128 slots each before one Triton on a CPU, and a second Triton that joins them.

Rules of this file:
- Both Tritons serve the demo. All clients together owe more samples than the gateways have slots.
- A relay before each Triton forwards the calls and notes when each ModelInfer begins and ends. The second Triton runs
  from the start, so that loading takes no time; it joins when its relay begins to listen.
- A call that has not ended at the end of the measurement counts with its time until then.

Run it as `python benchmarks/slow_triton.py`; it prints one line of JSON per phase. It takes `--alone` and `--together`
seconds. Both Tritons share the machine, so the second one adds no speed; only the times of calls and the start count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from serving import gateway

from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint.v1 import sample_service_pb2 as pb
from labelmint.v1 import sample_service_pb2_grpc as pb_grpc

REPOSITORY = Path(__file__).parent.parent / "model_repository"
MODEL = "faces"
GATEWAYS, SLOTS, STREAMS, WINDOW = 3, 128, 3, 64
OPTIONS = pb.SampleOptions(include_rejected=True, omit_image=True, label_encoding=pb.ENCODING_RAW)
UNBOUNDED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass
class Call:
    begun: float
    ended: float = float("inf")


class Relay(grpc.GenericRpcHandler):
    """Forwards unary calls to a Triton, and notes the times of ModelInfer."""

    def __init__(self, target: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.calls: list[Call] = []
        self._channel = grpc.aio.insecure_channel(target, options=UNBOUNDED)
        self._server: Any = None

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        forward = self._channel.unary_unary(details.method)

        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            call = Call(time.monotonic())
            if details.method.endswith("/ModelInfer"):
                self.calls.append(call)
            try:
                result: bytes = await forward(request)
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "")
            finally:
                call.ended = time.monotonic()
            return result

        return grpc.unary_unary_rpc_method_handler(answer)

    async def listen(self) -> None:
        self._server = grpc.aio.server(handlers=[self], options=UNBOUNDED)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
        await self._channel.close()

    def figures(self, since: float) -> dict[str, float]:
        """Of the calls that ended after `since` or still run."""
        now = time.monotonic()
        calls = [call for call in self.calls if call.ended >= since]
        ages = [min(call.ended, now) - call.begun for call in calls]
        running = sum(call.ended > now for call in calls)
        return {
            "answers_per_second": round((len(calls) - running) / (now - since), 2),
            "in_triton": running,
            "longest_call_seconds": round(max(ages, default=0.0), 1),
            **{f"calls_over_{limit}_seconds": sum(age > limit for age in ages) for limit in (10, 30, 90)},
        }


@contextlib.asynccontextmanager
async def triton() -> AsyncIterator[Relay]:
    server = TritonServer(REPOSITORY, [MODEL])
    await server.start()
    try:
        await wait_until_ready(server)
        relay = Relay(server.grpc_url)
        try:
            yield relay
        finally:
            await relay.close()
    finally:
        await server.stop()


async def pull(address: str, number: int) -> None:
    async with grpc.aio.insecure_channel(address, options=UNBOUNDED) as channel:
        request = pb.StreamSamplesRequest(model=MODEL, start_seed=100_000 * number, window=WINDOW, options=OPTIONS)
        async for _ in pb_grpc.SampleServiceStub(channel).StreamSamples(request):
            pass


async def probe(url: str) -> None:
    """Ask for readiness every second, as the kubelet does. The gateway looks for Tritons then."""
    while True:
        with contextlib.suppress(OSError):
            await asyncio.to_thread(lambda: urllib.request.urlopen(f"{url}/readyz", timeout=10).close())
        await asyncio.sleep(1.0)


async def measure(alone: float, together: float) -> None:
    async with triton() as first, triton() as second, contextlib.AsyncExitStack() as stack:
        await first.listen()
        url = f"ipv4:{first.address},{second.address}"
        arguments = ("--triton-url", url, "--triton-slots", str(SLOTS), "--grace-seconds", "0")
        run = lambda: stack.enter_context(gateway(*arguments))  # noqa: E731
        served = [await asyncio.to_thread(run) for _ in range(GATEWAYS)]
        tasks = [asyncio.create_task(probe(each.http)) for each in served]
        streams = [each.grpc for each in served for _ in range(STREAMS)]
        tasks += [asyncio.create_task(pull(address, number)) for number, address in enumerate(streams)]
        begun = time.monotonic()
        await asyncio.sleep(alone)
        print(json.dumps({"phase": "one Triton", **first.figures(begun)}), flush=True)
        joined = time.monotonic()
        await second.listen()
        await asyncio.sleep(together)
        starts = sorted(call.begun - joined for call in second.calls)
        answers = sorted(call.ended - joined for call in second.calls if call.ended < time.monotonic())
        joining = {
            "first_call_seconds": round(starts[0], 2) if starts else None,
            "first_answer_seconds": round(answers[0], 2) if answers else None,
            "calls_in_first_5_seconds": sum(start < 5 for start in starts),
            "answers_in_first_30_seconds": sum(answer < 30 for answer in answers),
        }
        print(json.dumps({"phase": "two, the first one", **first.figures(joined)}), flush=True)
        print(json.dumps({"phase": "two, the second one", **second.figures(joined), **joining}), flush=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alone", type=float, default=120.0)
    parser.add_argument("--together", type=float, default=60.0)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.alone, arguments.together))


if __name__ == "__main__":
    main()
