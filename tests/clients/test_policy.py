"""The decisions of a client, without a network: which endpoint when, what is tried again, where a stream goes on."""

import random
from collections.abc import Sequence

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from labelmint.core import errors as service_errors
from labelmint_client import LabelmintError, ModelVersionGone, SampleOptions, errors
from labelmint_client.errors import translated
from labelmint_client.messages import model_of
from labelmint_client.policy import MAX_PAUSE_SECONDS, Attempts, Endpoints, Healing, Walk
from labelmint_client.v1 import sample_service_pb2 as pb

pytestmark = pytest.mark.unit


MODEL = model_of(pb.Model(name="tiny", version="1", digest="d" * 64, task="segmentation"))


class Failed(grpc.RpcError):
    """A failed call, as gRPC hands it over."""

    def __init__(self, code: grpc.StatusCode, reason: str = "", retry_after: float | None = None) -> None:
        self._code = code
        status = status_pb2.Status()
        if reason:
            status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="labelmint"))
        if retry_after is not None:
            delay = duration_pb2.Duration(nanos=int(retry_after * 1e9))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        self._trailers = (("grpc-status-details-bin", status.SerializeToString()),)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "details"

    def trailing_metadata(self) -> Sequence[tuple[str, bytes]]:
        return self._trailers


GONE = Failed(grpc.StatusCode.UNAVAILABLE)
LIMITED = Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED", 0.5)
EXPIRED = Failed(grpc.StatusCode.UNAVAILABLE, "STREAM_EXPIRED")


def endpoints(count: int) -> Endpoints:
    return Endpoints([f"gateway-{index}" for index in range(count)], random.Random(0))


class Longest(random.Random):
    """Starts at `first` and draws the longest pause of a range."""

    def __init__(self, first: int = 0) -> None:
        super().__init__(0)
        self._first = first

    def randrange(self, *_: int) -> int:
        return self._first

    def uniform(self, _: float, high: float) -> float:
        return high


def longest(count: int, first: int = 0) -> Endpoints:
    return Endpoints([f"gateway-{index}" for index in range(count)], Longest(first))


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(each) for each in kind.__subclasses__()))


def test_every_error_of_the_wire_has_its_class() -> None:
    """Those of the same name are the same; where a pause is given, and nowhere else, the client asks again."""
    rest = {"RevisionChanged", "RequestTooLarge"}
    command_line = {"IncompatibleWeights", "UnusableFile", "CannotListen", "Exposed", "InsufficientResources"}
    page = {"CannotSave", "ChangedElsewhere", "TooFew"}  # of the annotation page, which has no gRPC
    elsewhere = rest | command_line | page
    for kind in subclasses(service_errors.LabelmintError):
        if kind.__name__ in elsewhere or kind.__module__ != "labelmint.core.errors":
            continue
        error = translated(Failed(kind.grpc_code, kind.reason), "gateway")
        same = {"TritonUnavailable": "Unavailable", "InferenceFailed": "LabelmintError"}
        assert type(error).__name__ == same.get(kind.__name__, kind.__name__)
        assert error.reason == kind.reason and error.code is kind.grpc_code
        assert error.retryable == (kind.retry_after_seconds is not None or kind.__name__ == "StreamExpired")


@pytest.mark.parametrize(
    ("code", "retryable"),
    [
        (grpc.StatusCode.UNAVAILABLE, True),
        (grpc.StatusCode.CANCELLED, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, False),
        (grpc.StatusCode.INTERNAL, False),
        (grpc.StatusCode.UNKNOWN, False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, False),
        (grpc.StatusCode.UNIMPLEMENTED, False),
    ],
)
def test_errors_that_no_gateway_wrote(code: grpc.StatusCode, retryable: bool) -> None:
    error = translated(Failed(code), "gateway:1")
    assert error.retryable is retryable and str(error) == f"gateway:1: {code.name}: details"


def test_calls_are_spread_by_load_and_in_turn() -> None:
    shared = endpoints(3)
    taken = [shared.take(0.0)[0] for _ in range(6)]
    assert sorted(taken[:3]) == sorted(taken[3:]) == [0, 1, 2]
    shared.give_back(1)
    assert shared.take(0.0)[0] == 1, "the least busy one"
    assert [endpoints(3).take(0.0, turn)[0] for turn in range(4)] == [0, 1, 2, 0]


def test_the_least_busy_endpoint_gets_each_call_however_calls_end() -> None:
    shared, chance = endpoints(3), random.Random(1)
    busy = [0, 0, 0]
    for _ in range(500):
        open_calls = [index for index in range(3) for _ in range(busy[index])]
        if open_calls and chance.random() < 0.5:
            ended = chance.choice(open_calls)
            shared.give_back(ended)
            busy[ended] -= 1
        else:
            index, _ = shared.take(0.0)
            assert busy[index] == min(busy)
            busy[index] += 1


def test_idle_endpoints_take_turns_from_a_random_start() -> None:
    shared, taken = longest(3, first=1), []
    for _ in range(5):
        index, _ = shared.take(0.0)
        shared.give_back(index)
        taken.append(index)
    assert taken == [1, 2, 0, 1, 2]
    assert len({Endpoints(["a", "b", "c"]).take(0.0)[0] for _ in range(100)}) > 1


def test_a_call_begins_at_its_turn_and_goes_on_round_robin() -> None:
    shared = longest(3)
    attempts, taken = Attempts(shared, 100.0, turn=2), []
    for _ in range(3):
        index, _ = attempts.next(0.0)
        shared.give_back(index)
        taken.append(index)
    assert taken == [2, 0, 1]


def test_an_endpoint_that_failed_is_left_at_once_and_asked_again_later() -> None:
    shared = endpoints(2)
    attempts = Attempts(shared, deadline=100.0)
    first, pause = attempts.next(0.0)
    assert pause == 0.0
    attempts.failed(first, Failed(grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING", 1.0), 0.0)
    shared.give_back(first)
    for _ in range(5):
        other, pause = attempts.next(0.0)
        assert other != first and pause == 0.0
        shared.give_back(other)
    attempts.failed(other, GONE, 0.0)
    again, pause = attempts.next(0.0)
    assert again == other and 0.0 <= pause <= 0.1, "all rest: the one that rests shortest, after its pause"


def test_pauses_grow_with_full_jitter_and_honour_the_gateway() -> None:
    shared = endpoints(1)
    now, pauses = 0.0, []
    attempts = Attempts(shared, deadline=1e6)
    for _ in range(40):
        index, pause = attempts.next(now)
        shared.give_back(index)
        pauses.append(pause)
        now += pause
        attempts.failed(index, GONE, now)
    assert max(pauses[1:4]) <= 0.4 and 1.0 < max(pauses) <= MAX_PAUSE_SECONDS and min(pauses[8:]) < 1.0
    shared.worked(0)
    attempts.failed(0, Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 0.5), now)
    assert 0.5 <= attempts.next(now)[1] <= 0.6


def test_the_ceiling_of_the_pauses_doubles_up_to_five_seconds_and_starts_anew_after_an_answer() -> None:
    shared, now, pauses = longest(1), 0.0, []
    for _ in range(9):
        shared.failed(0, translated(GONE, "gateway"), now)
        index, pause = shared.take(now)
        shared.give_back(index)
        pauses.append(round(pause, 9))
        now += pause
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    shared.failed(0, translated(GONE, "gateway"), 0.0)
    shared.worked(0)
    assert shared.take(0.0) == (0, 0.0), "an answer ends the rest"
    shared.failed(0, translated(GONE, "gateway"), 0.0)
    assert shared.take(0.0) == (0, 0.1)


def test_a_rest_that_is_over_leaves_no_mark() -> None:
    shared = longest(2)
    shared.failed(0, translated(GONE, "gateway"), 0.0)
    assert shared.take(0.05, turn=0) == (1, 0.0)
    shared.give_back(1)
    assert shared.take(5.0, turn=1) == (1, 0.0) and shared.take(5.0, turn=1) == (0, 0.0)


def test_the_limit_of_a_token_rests_all_endpoints() -> None:
    shared = endpoints(2)
    attempts = Attempts(shared, deadline=100.0)
    attempts.failed(0, LIMITED, 0.0)
    assert attempts.next(0.0)[1] >= 0.5


def test_an_expired_stream_is_resumed_without_a_pause() -> None:
    attempts = Attempts(endpoints(1), deadline=100.0)
    attempts.failed(0, EXPIRED, 0.0)
    assert attempts.next(0.0) == (0, 0.0)


def test_a_deadline_covers_all_attempts() -> None:
    shared = endpoints(1)
    attempts = Attempts(shared, deadline=10.0)
    index, _ = attempts.next(0.0)
    assert attempts.remaining(4.0) == 6.0 and 0.0 < attempts.remaining(11.0) < 0.1
    attempts.failed(index, LIMITED, 9.9)
    with pytest.raises(LabelmintError) as caught:
        attempts.next(9.9)
    assert isinstance(caught.value, errors.LimitReached)


def test_no_attempt_begins_at_the_deadline_and_none_is_counted() -> None:
    shared = longest(2)
    attempts = Attempts(shared, deadline=10.0)
    index, _ = attempts.next(0.0)
    failure = attempts.failed(index, EXPIRED, 9.0)
    shared.give_back(index)
    assert isinstance(failure, errors.StreamExpired) and failure.retryable
    with pytest.raises(errors.StreamExpired) as caught:
        attempts.next(10.0)
    assert caught.value is failure
    assert shared.take(10.0, turn=1)[0] == 1, "the attempt that was not made keeps no endpoint busy"


def test_the_first_attempt_is_made_at_the_deadline_at_the_latest() -> None:
    """Another call learned that the endpoint rests for longer; gRPC then reports the deadline."""
    shared = longest(1)
    shared.failed(0, translated(LIMITED, "gateway"), 0.0)
    assert Attempts(shared, deadline=0.25).next(0.125) == (0, 0.125)
    assert Attempts(shared, deadline=0.25).next(0.375) == (0, 0.0)


def test_what_is_not_to_be_tried_again_is_raised() -> None:
    error = Failed(grpc.StatusCode.INTERNAL, "INFERENCE_FAILED")
    with pytest.raises(LabelmintError) as caught:
        Attempts(endpoints(2), deadline=10.0).failed(0, error, 0.0)
    assert caught.value.__cause__ is error


def walk(start: int = 0, end: int = 100, count: int = 0, shard: int = 0, shards: int = 1, digest: str = "") -> Walk:
    return Walk(
        MODEL,
        start,
        end_seed=end,
        count=count,
        shard_index=shard,
        shard_count=shards,
        options=SampleOptions(max_js=1e9),
        window=0,
        model_digest=digest,
    )


def message(seed: int, rejected: int = 0, digest: str = MODEL.digest) -> pb.StreamSamplesResponse:
    sample = pb.Sample(seed=seed, model_digest=digest)
    return pb.StreamSamplesResponse(sample=sample, next_seed=seed + 1, rejected_count=rejected)


def test_a_walk_goes_on_where_it_was_with_what_is_left() -> None:
    going = walk(start=10, count=5)
    assert (going.request().start_seed, going.request().count, going.request().model_version) == (10, 5, "1")
    sample = going.take(message(12, rejected=2))
    assert sample is not None and sample.seed == 12
    assert going.take(pb.StreamSamplesResponse(next_seed=20, rejected_count=9)) is None
    request = going.request()
    assert (request.start_seed, request.count, going.rejected_count) == (20, 4, 9)
    going.take(message(21, rejected=1))
    assert going.rejected_count == 10 and going.next_seed == 22
    for seed in (22, 23, 24):
        assert not going.finished
        going.take(message(seed))
    assert going.finished


@pytest.mark.parametrize("options", [SampleOptions(max_js=2.0, omit_image=True), None])
def test_a_request_carries_the_whole_walk(options: SampleOptions | None) -> None:
    going = Walk(
        MODEL,
        10,
        end_seed=100,
        count=5,
        shard_index=1,
        shard_count=4,
        options=options,
        window=8,
        model_digest=MODEL.digest,
    )
    assert going.request() == pb.StreamSamplesRequest(
        model="tiny",
        model_version="1",
        start_seed=10,
        count=5,
        shard_index=1,
        shard_count=4,
        options=(options or SampleOptions()).message("segmentation"),
        window=8,
    )


def test_a_walk_asks_for_no_more_samples_than_its_shard_has_seeds() -> None:
    for start in range(12):
        for shards in range(1, 6):
            for shard in range(shards):
                seeds = [seed for seed in range(start, 12) if seed % shards == shard]
                assert walk(start=start, end=12, shard=shard, shards=shards).request().count == len(seeds)


def test_a_walk_that_the_gateway_ends_is_at_its_end_seed_unless_it_has_all_it_wanted() -> None:
    going, satisfied = walk(end=10), walk(end=10, count=1)
    for each in (going, satisfied):
        each.request()
        each.take(message(3))
        each.ended()
        assert each.finished
    assert going.next_seed == 10 and satisfied.next_seed == 4


def test_a_walk_ends_at_the_end_of_its_range() -> None:
    assert walk(end=10).take(message(9)) is not None and walk(end=10).take(message(10)) is None
    assert not walk(start=2**32 - 1, end=2**32).finished
    going = walk(start=0, end=10, shard=1, shards=4)
    assert going.request().count == 3, "seeds 1, 5 and 9"
    going.take(message(5))
    assert going.request().count == 1
    assert going.take(message(13)) is None, "of a later seed, because one was rejected"
    assert going.finished and going.next_seed == 10
    assert walk(start=10, end=10).finished and walk(start=6, end=9, shard=1, shards=4).finished


def test_a_walk_keeps_to_its_digest() -> None:
    with pytest.raises(ModelVersionGone, match="other weights give other samples") as caught:
        walk().take(message(0, digest="e" * 64))
    error = caught.value
    assert error.metadata == {"model": "tiny", "model_version": "1", "model_digest": MODEL.digest}
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_VERSION_GONE")
    with pytest.raises(ModelVersionGone):
        walk(digest="e" * 64)


@pytest.mark.parametrize(
    "arguments",
    [
        {"start": -1},
        {"end": 2**32 + 1},
        {"start": 5, "end": 4},
        {"shard": 2, "shards": 2},
        {"shard": -1, "shards": 2},
        {"count": -1},
    ],
)
def test_a_walk_that_cannot_be_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        walk(**arguments)


def test_a_cut_is_told_at_first_and_once_a_minute_until_it_is_healed() -> None:
    healing = Healing()
    assert healing.healed(0.0) is None
    told = [second for second in range(10, 150) if healing.cut(float(second))]
    assert told == [10, 70, 130]
    assert healing.healed(150.5) == 140.5 and healing.healed(151.0) is None
    assert healing.cut(152.0), "another one"
