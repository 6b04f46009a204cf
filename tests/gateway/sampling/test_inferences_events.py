"""The decisions about one inference, tested by method calls and without an event loop."""

import pytest

from labelmint.gateway.sampling.inferences import Inference
from labelmint.gateway.sampling.slots import Model, Requester

pytestmark = pytest.mark.unit

MODEL = Model("faces", "1", "digest")


def test_the_latest_deadline_bounds_the_work() -> None:
    inference = Inference(["image"], requester=Requester("stream", MODEL), deadline=5.0)
    assert inference.seconds(2.0) == 3.0
    inference.join(Requester("request", MODEL), 9.0)
    inference.join(Requester("request", MODEL), 3.0)  # a shorter deadline does not shorten the work
    assert inference.seconds(2.0) == 7.0
    inference.join(Requester("request", MODEL), None)
    assert inference.seconds(2.0) is None
    inference.join(Requester("request", MODEL), 4.0)
    assert inference.seconds(2.0) is None


def test_a_request_lends_its_turn_to_a_stream_and_to_nobody_else() -> None:
    stream, other, request = Requester("stream", MODEL), Requester("stream", MODEL), Requester("request", MODEL)
    inference = Inference(["image"], requester=stream, deadline=None)
    inference.join(other, None)
    assert inference.requester is stream
    inference.join(request, None)
    assert inference.requester is request
    for later in (Requester("request", MODEL), other):
        inference.join(later, None)
        assert inference.requester is request


def test_it_is_abandoned_when_the_last_one_leaves() -> None:
    inference = Inference(["image"], requester=Requester("request", MODEL), deadline=None)
    inference.join(Requester("request", MODEL), None)
    inference.leave()
    assert not inference.abandoned
    inference.leave()
    assert inference.abandoned and not inference.serves(["image"])


@pytest.mark.parametrize(("outputs", "serves"), [(["image"], True), (["image", "label"], True), (["js_map"], False)])
def test_it_serves_who_wants_no_more_than_it_makes(outputs: list[str], serves: bool) -> None:
    inference = Inference(["image", "label"], requester=Requester("request", MODEL), deadline=None)
    assert inference.serves(outputs) is serves
    inference.end()
    assert not inference.serves(outputs)
