"""Fair queueing: `Turns` is tested by method calls, `Slots` by real tasks."""

import asyncio
from collections.abc import Collection
from dataclasses import FrozenInstanceError, dataclass

import pytest

from labelmint.gateway.sampling.slots import Kind, Model, Requester, Slots, Turns

pytestmark = pytest.mark.unit

MODEL = Model("faces", "1", "digest")


def boundless(_: Model) -> int:
    """The room of Tritons that never get too many samples."""
    return 1000


def anyone(_: Requester) -> bool:
    return True


@dataclass(eq=False)
class Waiter:
    requester: Requester


def waiting(*samples: tuple[Requester, str]) -> Turns[str]:
    turns: Turns[str] = Turns()
    for requester, items in samples:
        for item in items:
            turns.add(requester, item)
    return turns


def drained(turns: Turns[str]) -> str:
    return "".join(iter(lambda: turns.take(anyone), None))


async def all_end(tasks: Collection[asyncio.Task[None]]) -> bool:
    """Whether the tasks end within more turns of the event loop than they need, so that a lost slot hangs no test."""
    for _ in range(1000):
        if all(task.done() for task in tasks):
            return True
        await asyncio.sleep(0)
    return False


async def free(slots: Slots) -> int:
    """How many of ten new samples get a slot at once, while no other sample is queued."""
    over = asyncio.Event()

    async def hold() -> None:
        async with slots.slot(Waiter(Requester("stream", MODEL))):
            await over.wait()

    tasks = [asyncio.create_task(hold()) for _ in range(10)]
    await asyncio.sleep(0)
    queued = slots.depth("stream")
    over.set()
    assert await all_end(tasks)
    return 10 - queued


def test_streams_take_turns_whatever_each_has_waiting() -> None:
    greedy, modest, late = (Requester("stream", MODEL) for _ in range(3))
    assert drained(waiting((greedy, "aaaaaa"), (modest, "bb"), (late, "c"))) == "abcabaaaa"


def test_the_samples_of_one_requester_keep_their_order() -> None:
    assert (
        drained(waiting((Requester("stream", MODEL), "abc")))
        == drained(waiting((Requester("request", MODEL), "abc")))
        == "abc"
    )


def test_a_requester_never_changes_because_its_kind_says_where_its_samples_are() -> None:
    with pytest.raises(FrozenInstanceError):
        Requester("stream", MODEL).kind = "request"  # type: ignore[misc]


def test_a_request_passes_all_waiting_samples_of_streams() -> None:
    turns = waiting(*((Requester("stream", MODEL), "s" * 50) for _ in range(4)))
    assert [turns.take(anyone) for _ in range(10)] == ["s"] * 10
    turns.add(Requester("request", MODEL), "r")
    assert turns.take(anyone) == "r"


def test_a_flood_of_requests_leaves_streams_every_second_turn() -> None:
    turns = waiting((Requester("stream", MODEL), "ssss"), *((Requester("request", MODEL), "r") for _ in range(6)))
    assert drained(turns) == "rsrsrsrsrr"


def test_a_large_batch_does_not_hold_up_a_single_request() -> None:
    assert drained(waiting((Requester("request", MODEL), "b" * 64), (Requester("request", MODEL), "r")))[:3] == "brb"


def test_a_large_batch_ends_however_many_requests_come_after_it() -> None:
    turns = waiting((Requester("request", MODEL), "b" * 64), *((Requester("request", MODEL), "r") for _ in range(60)))
    taken = ""
    while "b" * 64 not in taken.replace("r", ""):
        taken += turns.take(anyone) or "nothing"
        turns.add(Requester("request", MODEL), "r")  # another request arrives before each turn of the batch
    assert len(taken) <= 2 * 64 and taken.startswith("brbr")


def test_a_single_request_waits_two_rounds_at_most_beside_a_batch() -> None:
    singles = [(Requester("request", MODEL), name) for name in "rrrrrrrrrrx"]
    assert drained(waiting((Requester("request", MODEL), "b" * 64), *singles)).index("x") <= 2 * 12


def test_nothing_waits_after_it_was_discarded() -> None:
    gone, stays = Requester("request", MODEL), Requester("request", MODEL)
    turns = waiting((gone, "xy"), (stays, "z"))
    turns.discard(gone, "x")
    turns.discard(gone, "y")
    turns.discard(gone, "y")
    assert turns.depth("request") == 1 and turns.depth("stream") == 0
    assert drained(turns) == "z" and turns.take(anyone) is None


@pytest.mark.parametrize("kind", ["request", "stream"])
async def test_slots_are_bounded_and_all_come_back(kind: Kind) -> None:
    slots, holding, most = Slots(3, boundless), 0, 0

    async def hold(requester: Requester) -> None:
        nonlocal holding, most
        async with slots.slot(Waiter(requester)):
            holding += 1
            most = max(most, holding)
            try:
                await asyncio.sleep(0)
            finally:
                holding -= 1

    tasks = [asyncio.create_task(hold(Requester(kind, MODEL))) for _ in range(40)]
    await asyncio.sleep(0)
    assert slots.depth(kind) == 37
    for index, task in enumerate(tasks):  # cancel tasks at every stage: waiting, just granted, holding, done
        if index % 3 == 0:
            task.cancel()
            await asyncio.sleep(0)
    assert await all_end(tasks)
    assert most == 3 and slots.depth(kind) == 0 and await free(slots) == 3


async def test_one_who_moves_to_a_request_waits_in_its_turn() -> None:
    slots, order = Slots(1, boundless), []

    async def hold(waiter: Waiter, name: str) -> None:
        async with slots.slot(waiter):
            order.append(name)

    ahead, moving = Requester("stream", MODEL), Waiter(Requester("stream", MODEL))
    async with slots.slot(Waiter(Requester("request", MODEL))):
        tasks = [asyncio.create_task(hold(Waiter(ahead), "ahead")) for _ in range(9)]
        tasks.append(asyncio.create_task(hold(moving, "moved")))
        await asyncio.sleep(0)
        before, moving.requester = moving.requester, Requester("request", MODEL)
        slots.moved(moving, before)
        assert (slots.depth("request"), slots.depth("stream")) == (1, 9)
        slots.moved(moving, moving.requester)
        assert (slots.depth("request"), slots.depth("stream")) == (1, 9)
    assert await all_end(tasks)
    assert "moved" in order[:2] and len(order) == 10
    assert slots.depth("request") == slots.depth("stream") == 0
    slots.moved(moving, ahead)  # it is no longer queued
    assert slots.depth("request") == 0


async def test_one_that_is_told_to_move_and_has_not_changed_keeps_its_place() -> None:
    slots, order, requester = Slots(1, boundless), [], Requester("request", MODEL)

    async def hold(waiter: Waiter, name: str) -> None:
        async with slots.slot(waiter):
            order.append(name)

    first = Waiter(requester)
    async with slots.slot(Waiter(Requester("request", MODEL))):
        tasks = [asyncio.create_task(hold(first, "first")), asyncio.create_task(hold(Waiter(requester), "second"))]
        await asyncio.sleep(0)
        slots.moved(first, requester)
    assert await all_end(tasks) and order == ["first", "second"]


async def test_one_that_was_cancelled_is_not_queued_again_by_a_move() -> None:
    slots, stream, waiter = Slots(1, boundless), Requester("stream", MODEL), Waiter(Requester("stream", MODEL))

    async def hold() -> None:
        async with slots.slot(waiter):
            pass

    async with slots.slot(Waiter(stream)):
        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        task.cancel()
        assert await all_end([task])
        before, waiter.requester = waiter.requester, Requester("request", MODEL)
        slots.moved(waiter, before)
        assert slots.depth("request") == slots.depth("stream") == 0


class Tritons:
    """The room that Tritons have for each model."""

    def __init__(self, **room: int) -> None:
        self.room = room

    def of(self, model: Model) -> int:
        return self.room[model.name]


def requester(name: str, kind: Kind = "stream") -> Requester:
    return Requester(kind, Model(name, "1", "digest"))


class Crowd:
    """Samples that go to Triton, which then has less room, and stay there until it answers."""

    def __init__(self, limit: int, tritons: Tritons) -> None:
        self.slots = Slots(limit, tritons.of)
        self.tritons = tritons
        self.order = ""
        self.answered = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    def add(self, samples: str, kind: Kind = "stream") -> None:
        """One sample of an own requester for each letter, which is the name of the model."""
        self.tasks += [asyncio.create_task(self._run(requester(name, kind), name)) for name in samples]

    async def _run(self, whose: Requester, name: str) -> None:
        async with self.slots.slot(Waiter(whose)):
            self.order += name
            self.tritons.room[name] -= 1
            await self.answered.wait()
            self.tritons.room[name] += 1

    async def settle(self) -> str:
        for _ in range(50):
            await asyncio.sleep(0)
        return self.order

    async def end(self) -> None:
        self.answered.set()
        assert await all_end(self.tasks)


async def test_no_sample_gets_a_slot_without_room() -> None:
    crowd = Crowd(100, Tritons(a=3))
    crowd.add("a" * 10)
    assert await crowd.settle() == "aaa" and crowd.slots.depth("stream") == 7
    crowd.tritons.room["a"] += 2
    assert await crowd.settle() == "aaa", "nobody said so"
    crowd.slots.grant()
    assert await crowd.settle() == "aaaaa"
    await crowd.end()
    assert len(crowd.order) == 10 and crowd.tritons.room["a"] == 5


async def test_room_that_comes_at_once_is_given_once() -> None:
    """Those that just got a slot are not in Triton yet, so the Tritons' room is still the old one."""
    crowd = Crowd(100, Tritons(a=0))
    crowd.add("a" * 10)
    await crowd.settle()
    crowd.tritons.room["a"] = 4
    for _ in range(3):
        crowd.slots.grant()
    assert await crowd.settle() == "aaaa"
    await crowd.end()


async def test_the_slots_bound_what_the_tritons_would_take() -> None:
    crowd = Crowd(3, Tritons(a=100))
    crowd.add("a" * 10)
    assert await crowd.settle() == "aaa"
    crowd.slots.grant()
    assert await crowd.settle() == "aaa"
    await crowd.end()


@pytest.mark.parametrize("kind", ["request", "stream"])
async def test_samples_without_room_let_others_pass_and_keep_their_turns(kind: Kind) -> None:
    crowd = Crowd(100, Tritons(a=0, b=2))
    crowd.add("aabb", kind)
    assert await crowd.settle() == "bb"
    crowd.add("aaa", kind)
    crowd.tritons.room["a"] = 2
    crowd.slots.grant()
    assert await crowd.settle() == "bbaa" and crowd.slots.depth(kind) == 3
    await crowd.end()


async def test_samples_of_another_model_need_not_wait_for_those_that_start() -> None:
    """There is room for one sample of each model, and nobody knows yet whether that is the same room."""
    crowd = Crowd(100, Tritons(a=0, b=0))
    crowd.add("ab")
    await crowd.settle()
    crowd.tritons.room = {"a": 1, "b": 1}
    crowd.slots.grant()
    assert await crowd.settle() == "ab"
    await crowd.end()


async def test_a_sample_that_is_cancelled_as_it_gets_its_slot_gives_the_room_back() -> None:
    crowd = Crowd(100, Tritons(a=0))
    crowd.add("aaa")
    await crowd.settle()
    crowd.tritons.room["a"] = 1
    crowd.slots.grant()
    crowd.tasks[0].cancel()
    assert await crowd.settle() == "a" and crowd.tasks[0].cancelled() and crowd.slots.depth("stream") == 1
    crowd.tasks = crowd.tasks[1:]
    await crowd.end()
    assert crowd.order == "aa"


def test_requests_without_room_leave_the_oldest_its_turn() -> None:
    old, middle, new = (requester(name, "request") for name in "abc")
    turns = waiting((old, "oo"), (middle, "mm"), (new, "nn"))
    assert [turns.take(lambda each: each is not old) for _ in range(2)] == ["m", "n"]
    assert turns.take(lambda _: False) is None
    assert [turns.take(anyone) for _ in range(3)] == ["o", "m", "o"]
