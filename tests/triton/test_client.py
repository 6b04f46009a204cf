"""Every error that a call to Triton can raise becomes one of ours."""

import asyncio
import contextlib
import gc

import grpc
import grpc.aio
import pytest

from labelmint.core.errors import (
    DeadlineExceeded,
    InferenceFailed,
    LabelmintError,
    Overloaded,
    TritonUnavailable,
)
from labelmint.triton.client import TritonClient, _to_its_end, translate

pytestmark = pytest.mark.unit


EXPECTED = {
    grpc.StatusCode.UNAVAILABLE: TritonUnavailable,
    grpc.StatusCode.NOT_FOUND: TritonUnavailable,
    grpc.StatusCode.CANCELLED: TritonUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
}


def failure(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_is_translated(code: grpc.StatusCode) -> None:
    error = translate(failure(code, "it broke"))
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
    assert type(translate(failure(grpc.StatusCode.UNAVAILABLE, text))) is kind


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE])
def test_full_shared_memory_passes_and_is_logged(code: grpc.StatusCode, caplog: pytest.LogCaptureFixture) -> None:
    said = "Failed to increase the shared memory pool size for key 'x': No space left on device"
    assert type(translate(failure(code, said))) is TritonUnavailable
    assert "/dev/shm" in caplog.text and said in caplog.text


async def test_the_error_of_a_call_that_nobody_waits_for_is_not_logged() -> None:
    logged: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: logged.append(context["message"]))

    async def broken() -> None:
        await asyncio.sleep(0.01)
        raise failure(grpc.StatusCode.INTERNAL, "it broke")

    async def abandoned() -> None:
        waiting = asyncio.ensure_future(_to_its_end(broken()))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

    await abandoned()
    await asyncio.sleep(0.01)
    gc.collect()  # asyncio logs the error when it drops the call
    loop.set_exception_handler(None)
    assert logged == []


async def test_nobody_listens() -> None:
    client = TritonClient("127.0.0.1:1")
    try:
        assert await client.is_ready("faces") is False
        with pytest.raises(TritonUnavailable, match="does not answer"):
            await client.model_configs()
    finally:
        await client.close()
