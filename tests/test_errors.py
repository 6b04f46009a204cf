"""The error tree: each class carries its wire status, once."""

import grpc
import pytest

from labelmint.core import errors
from labelmint.core.errors import LabelmintError

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


def test_only_the_base_is_an_internal_server_error() -> None:
    assert [error.__name__ for error in every_error() if error.http_status == 500] == ["LabelmintError"]
