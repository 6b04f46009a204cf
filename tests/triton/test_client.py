"""Every error that tritonclient can raise becomes one of ours."""

import grpc
import pytest
from tritonclient.utils import InferenceServerException

from labelmint.errors import (
    DeadlineExceeded,
    InferenceFailed,
    LabelmintError,
    Overloaded,
    TritonUnavailable,
)
from labelmint.triton.client import TritonClient, translate

EXPECTED = {
    grpc.StatusCode.UNAVAILABLE: TritonUnavailable,
    grpc.StatusCode.NOT_FOUND: TritonUnavailable,
    grpc.StatusCode.CANCELLED: TritonUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_is_translated(code: grpc.StatusCode) -> None:
    error = translate(InferenceServerException("it broke", status=str(code)))
    assert type(error) is EXPECTED.get(code, InferenceFailed)
    assert "it broke" in error.message or isinstance(error, DeadlineExceeded)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Exceeds maximum queue size", Overloaded),
        ("[request id: 1] Request timeout expired", DeadlineExceeded),
        ("failed to connect to all addresses", TritonUnavailable),
    ],
)
def test_unavailable_is_told_apart_by_its_text(text: str, kind: type[LabelmintError]) -> None:
    assert type(translate(InferenceServerException(text, status="StatusCode.UNAVAILABLE"))) is kind


@pytest.mark.parametrize("status", ["StatusCode.INTERNAL", "StatusCode.UNAVAILABLE"])
def test_full_shared_memory_passes_and_is_logged(status: str, caplog: pytest.LogCaptureFixture) -> None:
    said = "Failed to increase the shared memory pool size for key 'x': No space left on device"
    assert type(translate(InferenceServerException(said, status=status))) is TritonUnavailable
    assert "/dev/shm" in caplog.text and said in caplog.text


def test_an_error_without_status_is_a_failure() -> None:
    assert type(translate(InferenceServerException("what?"))) is InferenceFailed


async def test_nobody_listens() -> None:
    client = TritonClient("127.0.0.1:1")
    try:
        assert await client.is_ready("faces") is False
        with pytest.raises(TritonUnavailable, match="does not answer"):
            await client.model_configs()
    finally:
        await client.close()
