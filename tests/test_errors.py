"""The error tree: each class carries its wire status, once."""

import re
from collections.abc import Callable
from copy import copy
from pathlib import Path

import grpc
import pytest

from labelmint.core import errors
from labelmint.core.errors import LabelmintError
from tests.conftest import ROOT

pytestmark = pytest.mark.unit


def every_error() -> list[type[LabelmintError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LabelmintError)]


def test_reasons_are_stable_and_unique() -> None:
    reasons = [error.reason for error in every_error()]
    assert len(set(reasons)) == len(reasons)
    assert all(reason == reason.upper() and " " not in reason for reason in reasons)


def test_every_error_has_both_statuses_and_is_in_the_tree() -> None:
    assert errors.__doc__ is not None
    for error in every_error():
        assert isinstance(error.grpc_code, grpc.StatusCode) and error.grpc_code is not grpc.StatusCode.OK
        assert 400 <= error.http_status < 600
        assert error.__name__ in errors.__doc__


def test_the_proto_lists_the_codes_and_reasons_of_the_gateway() -> None:
    proto = (ROOT / "protos" / "labelmint" / "v1" / "sample_service.proto").read_text()
    rows = re.findall(r"^//   ([A-Z_]+) +([A-Z_]+(?:, [A-Z_]+)*)  ", proto, re.MULTILINE)
    listed = {reason: code for code, reasons in rows for reason in reasons.split(", ")}
    assert len(listed) == 17
    assert listed == {kind.reason: kind.grpc_code.name for kind in every_error() if kind.reason in listed}


def test_http_statuses_are_the_ones_that_clients_know() -> None:
    statuses: dict[int, set[str]] = {}
    for kind in every_error():
        statuses.setdefault(kind.http_status, set()).add(kind.__name__)
    assert statuses == {
        400: {"InvalidRequest", "Uncalibrated"},
        401: {"Unauthenticated"},
        404: {"ModelNotFound"},
        409: {"RevisionChanged", "ChangedElsewhere", "TooFew"},
        410: {"ModelVersionGone"},
        413: {"RequestTooLarge"},
        422: {
            *("SampleRejected", "ContentMissing", "ContentNotFound", "NotIndexed"),
            *("IncompatibleWeights", "UnusableFile", "Exposed"),
        },
        429: {"Overloaded", "LimitReached"},
        500: {"LabelmintError"},
        502: {"InferenceFailed"},
        503: {
            *("TritonUnavailable", "ServerDraining", "StreamExpired"),
            *("CannotListen", "InsufficientResources"),
        },
        504: {"DeadlineExceeded"},
        507: {"CannotSave"},
    }


def test_a_pause_is_asked_for_only_where_waiting_helps() -> None:
    pauses = {kind.__name__: kind.retry_after_seconds for kind in every_error() if kind.retry_after_seconds}
    assert pauses == {"Overloaded": 1, "LimitReached": 1, "TritonUnavailable": 2, "ServerDraining": 1}


def test_only_the_verdict_on_a_sample_may_be_kept_in_a_cache() -> None:
    assert [kind.__name__ for kind in every_error() if kind.lasting] == ["SampleRejected", "ContentMissing"]


def test_only_the_base_is_an_internal_server_error() -> None:
    assert [error.__name__ for error in every_error() if error.http_status == 500] == ["LabelmintError"]


@pytest.mark.parametrize(
    ("kind", "arguments", "message", "metadata"),
    [
        (errors.InvalidRequest, ("seed", "is odd"), "seed: is odd", {"field": "seed"}),
        (
            errors.ModelNotFound,
            ("hats", ("faces", "tiny")),
            "no model named 'hats'; served: faces, tiny",
            {"model": "hats"},
        ),
        (errors.ModelNotFound, ("hats", ()), "no model named 'hats'; served: none", {"model": "hats"}),
        (
            errors.ModelNotFound,
            ("faces", ("1", "2"), "3"),
            "no version '3' of model 'faces'; served: 1, 2",
            {"model": "faces", "model_version": "3"},
        ),
        (
            errors.ModelVersionGone,
            ("faces", "3", "0123456789abcdef" * 4),
            "version 3 of model 'faces' with digest 0123456789ab... is no longer served",
            {"model": "faces", "model_version": "3", "model_digest": "0123456789abcdef" * 4},
        ),
        (
            errors.SampleRejected,
            (7, 2 / 3, 0.5, "c" * 16),
            "seed 7 has JS score 0.666667, above the threshold 0.5",
            {"seed": "7", "js_score": "0.6666666666666666", "threshold": "0.5", "calibration_id": "c" * 16},
        ),
        (
            errors.ContentMissing,
            (7, {"hair": 0.25, "hät": 1 / 3}, "hair has area 0.25, not hair:0.3.."),
            "seed 7 does not satisfy where: hair has area 0.25, not hair:0.3..; ask for another seed",
            {"seed": "7", "content": '{"hair": 0.25, "hät": 0.3333333333333333}'},
        ),
        (
            errors.ContentNotFound,
            (500, "hair:0.3.."),
            "none of 500 seeds in a row gave a sample with where hair:0.3..; change where, or go on at next_seed",
            {"seed_count": "500"},
        ),
        (
            errors.RevisionChanged,
            ("faces", "ab12"),
            "model 'faces' is served at revision 'ab12', not at the requested one",
            {"model": "faces", "revision": "ab12"},
        ),
        (errors.LimitReached, ("too many streams",), "too many streams", {}),
        (errors.ServerDraining, (), "this gateway is shutting down", {}),
        (errors.StreamExpired, (90.0,), "streams end after 90 s", {}),
        (errors.DeadlineExceeded, (), "the sample was not ready within the deadline", {}),
        (errors.UnusableFile, (Path("a/b"), "does not exist"), "a/b does not exist", {"path": "a/b"}),
    ],
)
def test_an_error_says_what_is_wrong_and_carries_its_data(
    kind: Callable[..., LabelmintError], arguments: tuple[object, ...], message: str, metadata: dict[str, str]
) -> None:
    error = kind(*arguments)
    assert str(error).startswith(message)
    assert error.message == str(error) and error.metadata == metadata


@pytest.mark.parametrize(("length", "shown"), [(64, "x" * 64), (65, "x" * 64 + "...")])
def test_a_long_name_of_a_caller_is_cut_before_it_is_repeated(length: int, shown: str) -> None:
    error = errors.ModelNotFound("x" * length, (), "x" * length)
    assert str(error) == f"no version '{shown}' of model '{shown}'; served: none"
    assert error.metadata == {"model": shown, "model_version": shown}


def test_an_error_with_more_metadata_is_a_copy() -> None:
    error = errors.LimitReached("too many streams", 7)
    more = error.with_metadata(next_seed="5").with_metadata(shard="1")
    assert type(more) is errors.LimitReached and more.retry_after_seconds == 7
    assert str(more) == more.message == "too many streams"
    assert more.metadata == {"next_seed": "5", "shard": "1"} and error.metadata == {}
    assert errors.InvalidRequest("seed", "is odd").with_metadata(field="seeds").metadata == {"field": "seeds"}


def test_an_error_of_any_signature_can_be_copied() -> None:
    error = errors.SampleRejected(7, 0.7, 0.5, "")
    assert type(copy(error)) is errors.SampleRejected
    assert str(copy(error)) == str(error) and vars(copy(error)) == vars(error)


def test_http_says_how_to_go_on() -> None:
    assert errors.LimitReached("too many streams").http_headers == {"Retry-After": "1"}
    assert errors.LimitReached("too many streams", 7).http_headers == {"Retry-After": "7"}
    assert errors.InvalidRequest("seed", "is odd").http_headers == {}
    assert errors.Unauthenticated("no token").http_headers == {"WWW-Authenticate": 'Bearer realm="labelmint"'}
