"""Running inferences: how callers share and join them, their deadlines and turns, and what the cache keeps."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from labelmint.core.errors import DeadlineExceeded, Overloaded, TritonUnavailable
from labelmint.core.policy import SampleOptions, Walk, latent_of
from labelmint.core.served_model import read_served_model
from labelmint.gateway.sampling import inferences
from labelmint.gateway.sampling.cache import SampleCache
from labelmint.gateway.sampling.catalog import Catalog
from labelmint.gateway.sampling.inferences import Inferences
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.gateway.sampling.sampler import Limits, Sampler
from labelmint.gateway.sampling.slots import Model, Requester, Slots
from labelmint.triton.client import Array, Latents
from labelmint.triton.model_config import read_config
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.unit

MODEL = Model("faces", "1", "digest")


def boundless(_: Model) -> int:
    """The room of Tritons that never get too many samples."""
    return 1000


class Minting:
    """Inferences whose arrays have one byte and are ready once `allowed` is set; `made` records the calls."""

    def __init__(self, max_bytes: int = 1000) -> None:
        metrics = Metrics(CollectorRegistry())
        self.slots = Slots(1, boundless)
        self.inferences = Inferences(self.slots, SampleCache(max_bytes, metrics), metrics, hold_seconds=0.0)
        self.allowed = asyncio.Event()
        self.failures: list[Exception] = []
        self.made: list[tuple[str, str]] = []

    def get(
        self, key: str, outputs: Sequence[str], requester: Requester | None = None, deadline: float | None = None
    ) -> asyncio.Task[dict[str, bytes]]:
        async def infer(_: float | None) -> dict[str, Array]:
            self.made.append((key, " ".join(outputs)))
            await self.allowed.wait()
            if self.failures:
                raise self.failures.pop(0)
            return {name: np.frombuffer(name[:1].encode(), np.uint8) for name in outputs}

        async def asked() -> dict[str, bytes]:
            whose = requester or Requester("request", MODEL)
            arrays = await self.inferences.get(key, outputs, infer, model="faces", requester=whose, deadline=deadline)
            return {name: array.tobytes() for name, array in arrays.items()}

        return asyncio.create_task(asked())


@dataclass(eq=False)
class Waiter:
    requester: Requester


async def until_it_waits() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_joins_waits_no_longer_than_the_own_deadline() -> None:
    minting = Minting()
    first = minting.get("7", ["image"], Requester("stream", MODEL))
    await until_it_waits()
    late = minting.get("7", ["image"], Requester("request", MODEL), asyncio.get_running_loop().time() + 0.01)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(late, 30)
    assert not first.done()
    minting.allowed.set()
    assert await first == {"image": b"i"} and minting.made == [("7", "image")]


async def test_a_request_that_joins_what_a_stream_has_waiting_is_next() -> None:
    minting = Minting()
    minting.allowed.set()
    stream = Requester("stream", MODEL)
    async with minting.slots.slot(Waiter(stream)):
        ahead = [minting.get(str(seed), ["image"], stream) for seed in range(20)]
        await until_it_waits()
        asked = minting.get("19", ["image"])
        await until_it_waits()
    await asyncio.gather(asked, *ahead)
    assert ("19", "image") in minting.made[:2] and len(minting.made) == 20


async def test_who_leaves_takes_nothing_from_those_who_joined() -> None:
    minting = Minting()
    first = minting.get("7", ["image", "label"])
    await until_it_waits()
    second = minting.get("7", ["label"])
    await until_it_waits()
    first.cancel()
    await until_it_waits()
    minting.allowed.set()
    assert await second == {"label": b"l"} and len(minting.made) == 1


async def test_what_nobody_waits_for_is_given_up() -> None:
    minting = Minting()
    async with minting.slots.slot(Waiter(Requester("request", MODEL))):
        both = [minting.get("7", ["image"]) for _ in range(2)]
        await until_it_waits()
        for task in both:
            task.cancel()
        await until_it_waits()
    assert minting.made == [] and minting.slots.depth("request") == 0
    minting.allowed.set()
    assert await minting.get("7", ["image"]) == {"image": b"i"}


async def test_outputs_of_one_seed_are_kept_side_by_side() -> None:
    minting = Minting()
    minting.allowed.set()
    for _ in range(3):
        for outputs in (["image", "score"], ["label", "score"]):
            await minting.get("7", outputs)
    await minting.get("7", ["image", "label", "score"])
    assert minting.made == [("7", "image score"), ("7", "label score")]


async def test_where_both_do_not_fit_the_last_is_kept() -> None:
    minting = Minting(max_bytes=1)
    minting.allowed.set()
    for outputs in (["image"], ["label"], ["label"]):
        await minting.get("7", outputs)
    assert minting.made == [("7", "image"), ("7", "label")]


async def test_a_failure_is_that_of_all_who_wait_and_of_nobody_later() -> None:
    minting = Minting()
    minting.failures.append(Overloaded("full"))
    waiting = [minting.get("7", ["image"]) for _ in range(3)]
    await until_it_waits()
    minting.allowed.set()
    failures = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(failure) for failure in failures] == [Overloaded] * 3 and len(set(map(id, failures))) == 3
    assert await minting.get("7", ["image"]) == {"image": b"i"} and len(minting.made) == 2


async def test_what_triton_drops_at_the_deadline_of_one_is_made_for_who_can_wait() -> None:
    minting = Minting()
    minting.failures.append(DeadlineExceeded())
    first = minting.get("7", ["image"])
    await until_it_waits()
    second = minting.get("7", ["image"])
    await until_it_waits()
    minting.allowed.set()
    with pytest.raises(DeadlineExceeded):
        await first
    assert await second == {"image": b"i"} and len(minting.made) == 2


@pytest.mark.parametrize(("seconds", "tries"), [(2.5, 3), (2.0, 3), (1.9, 2), (0.0, 1)])
async def test_a_call_is_held_as_long_as_another_attempt_fits(
    monkeypatch: pytest.MonkeyPatch, seconds: float, tries: int
) -> None:
    now, tried = 10.0, []

    async def sleep(pause: float) -> None:
        nonlocal now
        now += pause

    async def call() -> None:
        tried.append(now)
        raise TritonUnavailable("away")

    monkeypatch.setattr(inferences, "_now", lambda: now)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    metrics = Metrics(CollectorRegistry())
    with pytest.raises(TritonUnavailable):
        await Inferences(Slots(1, boundless), SampleCache(0, metrics), metrics, hold_seconds=seconds).hold(call)
    assert tried == [10.0, 11.0, 12.0][:tries]


async def test_a_call_that_is_retried_has_no_slot_in_between() -> None:
    metrics, back = Metrics(CollectorRegistry()), asyncio.Event()
    minting = Inferences(Slots(1, boundless), SampleCache(0, metrics), metrics, hold_seconds=600.0)

    async def away(_: float | None) -> dict[str, Array]:
        if not back.is_set():
            raise TritonUnavailable("away")
        return {"image": np.zeros(1, np.uint8)}

    async def there(_: float | None) -> dict[str, Array]:
        return {"image": np.ones(1, np.uint8)}

    whose = Requester("request", MODEL)
    held = asyncio.create_task(minting.get("7", ["image"], away, model="faces", requester=whose, deadline=None))
    await until_it_waits()
    assert await asyncio.wait_for(minting.get("8", ["image"], there, model="faces", requester=whose, deadline=None), 30)
    assert not held.done()
    back.set()
    assert await asyncio.wait_for(held, 30)


class SlowTriton:
    """Answers each call when the semaphore `may` lets it; `asked` records the latents of the calls."""

    def __init__(self) -> None:
        self.may = asyncio.Semaphore(0)
        self.asked: list[bytes] = []

    def room(self, *_: str) -> int:
        return 1000

    async def infer(self, _: str, __: str, latents: Latents, *, outputs: Sequence[str], **___: object):  # type: ignore[no-untyped-def]
        self.asked.append(latents.latent.tobytes())
        await self.may.acquire()
        return {name: np.zeros(1, np.float32) for name in outputs}


async def test_a_request_for_what_a_stream_has_waiting_keeps_its_deadline_and_its_turn() -> None:
    model = read_served_model(read_config(REPOSITORY / "faces" / "config.pbtxt"), "1")
    triton, metrics = SlowTriton(), Metrics(CollectorRegistry())
    catalog = Catalog(triton, "fused")  # type: ignore[arg-type]
    catalog._models = {("faces", 1): model}
    limits = Limits(
        max_in_flight=10, triton_slots=1, max_streams=1, max_window=20, max_empty_seeds=20, capacity_wait_seconds=0.0
    )
    sampler = Sampler(catalog, triton, metrics, cache=SampleCache(1 << 20, metrics), limits=limits)  # type: ignore[arg-type]
    options = SampleOptions(max_js=1e9)
    walk = sampler.walk(model, Walk(0), options, count=20, window=20)
    reading = asyncio.create_task(anext(walk))
    while sampler._slots.depth("stream") < 19:
        await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded):  # Triton has seed 0 and takes longer than this deadline
        await asyncio.wait_for(sampler.sample(model, 0, options, timeout_seconds=0.01), 30)
    asked = asyncio.create_task(sampler.sample(model, 19, options))
    while not sampler._slots.depth("request"):
        await asyncio.sleep(0)
    triton.may.release()
    assert (await reading).next_seed == 1
    triton.may.release()
    assert (await asked).seed == 19
    assert triton.asked[:2] == [latent_of(seed, model.z_dim).tobytes() for seed in (0, 19)]
    await walk.aclose()
