"""The gateway's Triton client: latents in, arrays out, and the one place where Triton's errors are translated.

Rules of this file:
- It knows tensors, not policy: no seeds, gates or models beyond their Triton names.
- It speaks through tritonclient's messages and stub, without its InferenceServerClient: a request built anew for each
  sample costs ten times what it costs to copy one and to fill in the tensors.
- Every gRPC error becomes a LabelmintError here; the cause is kept. A test goes through all gRPC codes.
- Triton 2.51 answers UNAVAILABLE for a full queue and for a queue timeout; only the text tells them from an outage.
- A sample that Triton has begun is never called off, neither by a deadline nor by a client that left: Triton 2.51 ends
  with SIGSEGV, and with it the work of all others, when a call is cancelled in the moment in which it is answered
  (triton-inference-server/server#7368 and #8034; mended upstream by #8078). One cancelled call in 20,000 does it.
- A name may have many addresses, each a Triton with the same models: they take turns, call by call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import model_config_pb2, service_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import triton_to_np_dtype

from labelmint import tracing
from labelmint.errors import (
    DeadlineExceeded,
    InferenceFailed,
    LabelmintError,
    Overloaded,
    TritonUnavailable,
)
from labelmint.triton.proxies import is_loopback, proxy_advice

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
T = TypeVar("T")

_QUEUE_FULL = ("exceeds maximum queue size",)
_QUEUE_TIMEOUT = ("request timeout expired",)
_NO_SHARED_MEMORY = ("shared memory pool size", "shared memory key")
# Arrays of a whole batch of large images come in one message.
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.lb_policy_name", "round_robin"),
    # The name is looked up again when a connection ends, which finds the Tritons that were added.
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # A Triton that comes back is found within two seconds, not two minutes; one that froze is noticed.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
# A sample that takes longer is given up, whatever that does to Triton; one that froze is noticed by the keepalive.
_HUNG_SECONDS = 600.0
# What Triton has when the client is closed may be answered for so long.
_CLOSING_SECONDS = 5.0
# Large models are read, compiled and warmed up.
LOAD_TIMEOUT_SECONDS = 180.0


@dataclass(frozen=True)
class Latents:
    """What an ensemble takes for one sample: float32 [1,z_dim] twice, then two numbers."""

    latent: npt.NDArray[np.float32]
    style_latent: npt.NDArray[np.float32]
    crossover: int
    truncation_psi: float


class TritonClient:
    """Talks gRPC to the Tritons of one name. Safe for concurrent use within one event loop."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connect()

    async def close(self) -> None:
        """Give what Triton has begun a moment to end, then let go of it."""
        await self._channel.close(_CLOSING_SECONDS)

    async def is_ready(self, model: str) -> bool:
        """Whether Triton answers and has the model ready; False instead of an error when it does not answer."""
        try:
            return bool((await self._stub.ModelReady(pb.ModelReadyRequest(name=model), timeout=2.0)).ready)
        except grpc.aio.AioRpcError:
            return False

    async def model_configs(self) -> dict[tuple[str, str], model_config_pb2.ModelConfig]:
        """The configurations of all ready models, by (name, version).

        A failure starts with a new connection: gRPC itself asks for the addresses of a name that had none after two
        minutes only. What is in flight holds the old one, and ends in it.
        """
        try:
            index = await self._stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=5.0)
            ready = [(entry.name, entry.version) for entry in index.models if entry.state == "READY"]
            configs = {}
            for name, version in ready:
                request = pb.ModelConfigRequest(name=name, version=version)
                configs[name, version] = (await self._stub.ModelConfig(request, timeout=5.0)).config
            return configs
        except grpc.aio.AioRpcError as error:
            translated = translate(error)
            self._connect()
            if isinstance(translated, DeadlineExceeded):  # no sample was asked for: Triton itself hangs
                translated = TritonUnavailable(f"Triton at {self.url} does not answer; try again later")
            if isinstance(translated, TritonUnavailable):
                translated.message += proxy_advice(self.url)
            raise translated from error

    def _connect(self) -> None:
        options = [*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0 if is_loopback(self.url) else 1)]
        self._channel = grpc.aio.insecure_channel(self.url, options=options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def load(self, model: str) -> None:
        """Have Triton load a model, or take over what changed of it; raises TritonUnavailable with Triton's words."""
        try:
            request = pb.RepositoryModelLoadRequest(model_name=model)
            await self._stub.RepositoryModelLoad(request, timeout=LOAD_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise TritonUnavailable(f"Triton could not load {model!r}: {error.details()}") from error

    async def unload(self, model: str) -> None:
        """Have Triton unload an ensemble with its steps, once what runs in it has ended."""
        try:
            request = pb.RepositoryModelUnloadRequest(model_name=model)
            request.parameters["unload_dependents"].bool_param = True
            await self._stub.RepositoryModelUnload(request, timeout=LOAD_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise TritonUnavailable(f"Triton could not unload {model!r}: {error.details()}") from error

    async def infer(
        self,
        model: str,
        version: str,
        latents: Latents,
        outputs: Sequence[str],
        timeout_seconds: float | None = None,
    ) -> dict[str, Array]:
        """Run an ensemble for one sample; arrays without the batch dimension, by output name.

        After `timeout_seconds` it is dropped from a queue of Triton's whose policy allows that; the call itself lasts
        until Triton answers. So does a task that is cancelled meanwhile: who must go at once lets it end by itself.
        """
        request = pb.ModelInferRequest()
        request.CopyFrom(_template(model, version, tuple(outputs), latents.latent.shape[1]))
        request.id = tracing.request_id()  # what Triton says of it carries the id
        if timeout_seconds is not None:
            request.parameters["timeout"].int64_param = max(1, int(timeout_seconds * 1e6))  # microseconds
        numbers = np.array(latents.crossover, "<i4"), np.array(latents.truncation_psi, "<f4")
        tensors = (latents.latent, latents.style_latent, *numbers)
        request.raw_input_contents.extend([tensor.tobytes() for tensor in tensors])
        try:
            with tracing.span("triton infer", model=model, version=version):
                headers = tuple(tracing.outgoing_headers().items())
                answer = await _to_its_end(self._stub.ModelInfer(request, metadata=headers, timeout=_HUNG_SECONDS))
        except grpc.aio.AioRpcError as error:
            raise translate(error) from error
        arrays = {
            tensor.name: np.frombuffer(raw, triton_to_np_dtype(tensor.datatype)).reshape(tuple(tensor.shape)[1:])
            for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
        if missing := set(outputs) - arrays.keys():
            raise InferenceFailed(f"Triton's answer for model {model!r} lacks the outputs {sorted(missing)}")
        return arrays


async def _to_its_end(call: Awaitable[T]) -> T:
    """The outcome of a call; a task that is cancelled meanwhile is so once the call has ended."""
    answering = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(answering)
    except asyncio.CancelledError:
        await asyncio.wait([answering])
        raise


@lru_cache(maxsize=256)
def _template(model: str, version: str, outputs: tuple[str, ...], z_dim: int) -> pb.ModelInferRequest:
    """What the requests for one sample of a model have in common: all but the tensors' contents, id and timeout."""
    inputs = {
        "latent": ("FP32", z_dim),
        "style_latent": ("FP32", z_dim),
        "crossover": ("INT32", 1),
        "truncation_psi": ("FP32", 1),
    }
    return pb.ModelInferRequest(
        model_name=model,
        model_version=version,
        inputs=[{"name": name, "datatype": dtype, "shape": [1, size]} for name, (dtype, size) in inputs.items()],
        outputs=[{"name": name} for name in outputs],
    )


def translate(error: grpc.aio.AioRpcError) -> LabelmintError:
    """The LabelmintError that says the same as an error of the call to Triton; what an operator must mend is logged."""
    code, message = error.code(), error.details() or ""
    lowered = message.lower()
    if any(text in lowered for text in _QUEUE_FULL):
        return Overloaded("Triton's queue is full; try again later")
    if any(text in lowered for text in _QUEUE_TIMEOUT) or code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded()
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(f"Triton is overloaded: {message}")
    if any(text in lowered for text in _NO_SHARED_MEMORY):
        logger.error("Triton's shared memory is full, /dev/shm (Docker: --shm-size): %s", message)
        return TritonUnavailable("Triton's shared memory is full; try again later")
    # NOT_FOUND and "not ready" mean that the model left Triton after the gateway had seen it.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED):
        return TritonUnavailable(f"Triton does not answer or has no such model ready ({message}); try again later")
    logger.error("Triton failed to run the model: %s", message)
    return InferenceFailed(f"Triton failed to run the model: {message}")
