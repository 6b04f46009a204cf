"""Slow and hanging Tritons beside others: what waits stays in the gateway, and goes where it is answered.

Rules of this file:
- The gateway's test has two real Tritons. `held` of the first one holds what it gets, and that of the second does not.
- The other tests join the real client and the real slots to stand-ins on real sockets, which answer when the test says
  so. The client's clock is the test's, so nothing depends on the speed of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as messages

from labelmint.core.errors import InferenceFailed, TritonUnavailable
from labelmint.gateway.sampling.slots import Model, Requester, Slots
from labelmint.triton import client as client_module
from labelmint.triton.client import Latents, TritonClient
from labelmint.triton.server import TritonServer, wait_until_ready
from labelmint.triton.window import ANSWER_SECONDS, INITIAL
from labelmint.v1 import sample_service_pb2 as pb
from tests.conftest import start_service
from tests.support.gateways import Gateway, inferences, release
from tests.support.metrics import IN_TRITON
from tests.support.repositories import copy_model
from tests.support.running import Running
from tests.support.waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.torch]

ANY = pb.SampleOptions(max_js=1e9, omit_image=True)
WAITING = 'labelmint_queue_depth_samples{kind="request"}'
ASKED = 40
LATENT = np.zeros((1, 8), np.float32)
LATENTS = Latents(LATENT, LATENT, 6, 1.0)
FACES, OTHER = Model("faces", "1", "digest"), Model("other", "1", "digest")


async def test_a_new_triton_gets_at_once_what_a_hanging_one_did_not_take(
    tmp_path: Path, small_triton: TritonServer, light_repository: Path
) -> None:
    repository = Path(shutil.copytree(light_repository, tmp_path / "repository"))
    copy_model(repository, "light", "held")
    before, later = (await inferences(small_triton, "held_generator"))[0], TritonServer(repository, ["held"])
    flags = ("--triton-slots", str(ASKED), "--triton-url", f"ipv4:{small_triton.grpc_url},{later.grpc_url}")
    service = await asyncio.to_thread(start_service, tmp_path / "serve.log", *flags, repository=tmp_path / "unused")
    running = Running(service, tmp_path)
    gateway = Gateway(service, running.stub, running.http)
    requests = [pb.GetSampleRequest(model="held", seed=seed, options=ANY) for seed in range(ASKED)]
    try:
        asked = [asyncio.ensure_future(running.stub.GetSample(request, timeout=300.0)) for request in requests]
        await gateway.until(WAITING, lambda depth: depth == ASKED - INITIAL)
        await gateway.until(IN_TRITON, lambda samples: samples == INITIAL)
        await later.start()
        await wait_until_ready(later)

        async def answered() -> bool:
            assert (await running.http.get("/readyz")).status_code == 200  # as the kubelet does all the time
            return sum(call.done() for call in asked) == ASKED - INITIAL

        await until(answered, 120.0)
        assert await gateway.metric(WAITING) == 0 and await gateway.metric(IN_TRITON) == INITIAL
        await release(small_triton, 16 - INITIAL)  # fails if the first one has more or fewer
        assert [answer.sample.seed for answer in await asyncio.gather(*asked)] == list(range(ASKED))
        assert (await inferences(small_triton, "held_generator"))[0] == before + 16
    finally:
        await running.close()
        await later.stop()


class Told(grpc.GenericRpcHandler):
    """A Triton with some models, which answers a sample when it is told to."""

    def __init__(self, *models: Model) -> None:
        self.address = ""
        self.models = list(models)
        self.hangs = self.fails = False
        self.pending: list[asyncio.Future[None]] = []
        self.calls = 0

    def answer(self) -> None:
        """Answer all that is pending."""
        for answer in self.pending:
            answer.set_result(None)
        self.pending.clear()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = details.method.rpartition("/")[2]
        request = getattr(messages, f"{name}Request")
        return grpc.unary_unary_rpc_method_handler(
            getattr(self, f"_{name}"), request.FromString, lambda answer: answer.SerializeToString()
        )

    async def _RepositoryIndex(self, _: object, __: object) -> messages.RepositoryIndexResponse:
        while self.hangs:
            await asyncio.sleep(0.01)
        states = [{"name": model.name, "version": model.version, "state": "READY"} for model in self.models]
        return messages.RepositoryIndexResponse(models=states)

    async def _ModelConfig(self, request: messages.ModelConfigRequest, _: object) -> messages.ModelConfigResponse:
        config = model_config_pb2.ModelConfig(name=request.name)
        (model,) = [model for model in self.models if model.name == request.name]
        config.parameters["model_digest"].string_value = model.digest
        return messages.ModelConfigResponse(config=config)

    async def _ModelInfer(
        self, _: messages.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> messages.ModelInferResponse:
        self.calls += 1
        if self.fails:
            await context.abort(grpc.StatusCode.INTERNAL, "CUDA error")
        self.pending.append(answer := asyncio.get_running_loop().create_future())
        await answer
        output = {"name": "js_score", "datatype": "FP32", "shape": [1, 1]}
        return messages.ModelInferResponse(outputs=[output], raw_output_contents=[bytes(4)])


@contextlib.asynccontextmanager
async def serving(*tritons: Told) -> AsyncIterator[TritonClient]:
    servers = []
    for triton in tritons:
        server = grpc.aio.server(handlers=[triton])
        triton.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        servers.append(server)
    client = TritonClient(f"ipv4:{','.join(triton.address for triton in tritons)}")
    try:
        yield client
    finally:
        for triton in tritons:
            triton.hangs = False
            triton.answer()
        await client.close()
        for server in servers:
            await server.stop(None)


@dataclass(eq=False)
class Waiter:
    requester: Requester


class Work:
    """Samples that wait for slots and then go to Tritons, as in the gateway."""

    def __init__(self, client: TritonClient, limit: int = 1000) -> None:
        self.client = client
        self.slots = Slots(limit, lambda model: client.room(*model))
        self.in_triton = 0
        self.failed: list[BaseException] = []
        self.tasks: list[asyncio.Task[None]] = []
        client.on_more_room = self.slots.grant

    def add(self, count: int, model: Model = FACES) -> None:
        waiters = [Waiter(Requester("stream", model)) for _ in range(count)]
        self.tasks += [asyncio.create_task(self._run(waiter, model)) for waiter in waiters]

    async def _run(self, waiter: Waiter, model: Model) -> None:
        async with self.slots.slot(waiter):
            self.in_triton += 1
            try:
                name, version, digest = model
                await self.client.infer(name, version, LATENTS, outputs=["js_score"], digest=digest)
            except (InferenceFailed, TritonUnavailable) as error:
                self.failed.append(error)
            finally:
                self.in_triton -= 1

    async def settle(self, *tritons: Told) -> None:
        """Wait until everything that has a slot is pending in a Triton, and nothing that waits has room."""

        def settled() -> bool:
            return sum(len(triton.pending) for triton in tritons) == self.in_triton

        for _ in range(3):  # an answer on its way may still free a slot
            await until(settled)
            await asyncio.sleep(0.01)
        await until(settled)

    async def end(self, *tritons: Told) -> None:
        while not all(task.done() for task in self.tasks):
            for triton in tritons:
                triton.answer()
            await asyncio.sleep(0.01)
        await asyncio.gather(*self.tasks)


class Clock:
    """The time as the client sees it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(client_module, "time", clock)
    return clock


async def test_the_samples_go_where_they_are_answered_when_the_slow_one_becomes_fast(clock: Clock) -> None:
    one, other, slots = Told(FACES), Told(FACES), 24
    async with serving(one, other) as client:
        await client.model_configs()
        work = Work(client, slots)
        work.add(1000)
        await work.settle(one, other)
        assert len(one.pending) == len(other.pending) == INITIAL
        for fast, slow in ((one, other), (other, one)):
            for _ in range(3):
                for _ in range(5):  # the slow one's answers come after four times the stated time
                    clock.now += 0.8 * ANSWER_SECONDS
                    fast.answer()
                    await work.settle(one, other)
                slow.answer()
                await work.settle(one, other)
            assert len(slow.pending) <= 3 and len(fast.pending) >= slots - 3
        await work.end(one, other)
        assert not work.failed


async def test_one_that_hangs_gets_no_more_over_new_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_LOOK_SECONDS", 0.2)
    triton = Told(FACES)
    async with serving(triton) as client:
        await client.model_configs()
        work = Work(client)
        work.add(20)
        await work.settle(triton)
        triton.hangs = True
        for _ in range(3):
            with pytest.raises(TritonUnavailable):
                await client.model_configs()
        assert client.room(*FACES) == 0
        await work.settle(triton)
        assert len(triton.pending) == INITIAL and work.slots.depth("stream") == 20 - INITIAL
        await work.end(triton)


async def test_one_that_fails_everything_at_once_does_not_get_what_waits_for_the_others() -> None:
    good, broken = Told(FACES), Told(FACES)
    async with serving(good, broken) as client:
        await client.model_configs()
        broken.fails = True
        work = Work(client)
        work.add(200)
        await until(lambda: len(good.pending) == INITIAL and work.in_triton == INITIAL)
        assert broken.calls == len(work.failed) <= INITIAL
        assert client.room(*FACES) == 0
        await work.end(good)
        assert broken.calls == len(work.failed) <= INITIAL


async def test_one_that_fails_at_once_is_not_taken_for_a_fast_one() -> None:
    broken = Told(FACES)
    broken.fails = True
    async with serving(broken) as client:
        await client.model_configs()
        work = Work(client)
        work.add(10 * INITIAL)
        await asyncio.wait_for(asyncio.gather(*work.tasks), 60)
        assert broken.calls == len(work.failed) == 10 * INITIAL and client.room(*FACES) == INITIAL


async def test_samples_of_a_model_wait_for_a_triton_that_has_it() -> None:
    """In a roll-out only the first new Triton has the new version, and all ask for it."""
    old, new = Told(FACES), Told(FACES, OTHER)
    async with serving(old, new) as client:
        await client.model_configs()
        assert (client.room(*FACES), client.room(*OTHER)) == (2 * INITIAL, INITIAL)
        work = Work(client)
        work.add(50, OTHER)
        await work.settle(old, new)
        assert (len(old.pending), len(new.pending)) == (0, INITIAL)
        work.add(5, FACES)  # these pass
        await work.settle(old, new)
        assert (len(old.pending), len(new.pending)) == (5, INITIAL)
        await work.end(old, new)
        assert not work.failed


async def test_where_nobody_has_the_model_a_few_samples_find_out() -> None:
    triton = Told(FACES)
    async with serving(triton) as client:
        assert client.room(*OTHER) == INITIAL, "before the first look"
        await client.model_configs()
        assert client.room(*OTHER) == INITIAL
        work = Work(client)
        work.add(3 * INITIAL, OTHER)
        await asyncio.wait_for(asyncio.gather(*work.tasks), 60)
        assert len(work.failed) == 3 * INITIAL and triton.calls == 0


async def test_what_waits_goes_on_when_a_look_finds_a_triton_that_has_room() -> None:
    full, new = Told(FACES), Told()
    async with serving(full, new) as client:
        await client.model_configs()
        work = Work(client)
        work.add(2 * INITIAL + 4)
        await work.settle(full, new)
        assert (len(full.pending), len(new.pending)) == (INITIAL, 0)
        new.models.append(FACES)
        await client.model_configs()
        await work.settle(full, new)
        assert (len(full.pending), len(new.pending)) == (INITIAL, INITIAL)
        await work.end(full, new)
