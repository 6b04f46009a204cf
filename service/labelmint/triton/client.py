"""The gateway's Triton client: latents in, arrays out, and the one place where Triton's errors are translated.

Rules of this file:
- It knows tensors, not policy: no seeds, gates or models beyond their Triton names.
- Every tritonclient error becomes a LabelmintError here; the cause is kept. A test goes through all gRPC codes.
- Triton 2.51 answers UNAVAILABLE for a full queue and for a queue timeout; only the text tells them from an outage.
- A name may have many addresses, each a Triton with the same models: they take turns, call by call.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as triton
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from labelmint import tracing
from labelmint.errors import (
    DeadlineExceeded,
    InferenceFailed,
    LabelmintError,
    Overloaded,
    TritonUnavailable,
)

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

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
# Without a deadline of the caller's: as long as the queues in the model configurations hold a request.
DEFAULT_TIMEOUT_SECONDS = 60.0
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
        await self._client.close()

    async def is_ready(self, model: str) -> bool:
        """Whether Triton answers and has the model ready; False instead of an error when it does not answer."""
        try:
            return bool(await self._client.is_model_ready(model, client_timeout=2.0))
        except InferenceServerException:
            return False

    async def model_configs(self) -> dict[tuple[str, str], pb.ModelConfig]:
        """The configurations of all ready models, by (name, version).

        A failure starts with a new connection: gRPC itself asks for the addresses of a name that had none after two
        minutes only. What is in flight holds the old one, and ends in it.
        """
        try:
            index = await self._client.get_model_repository_index(client_timeout=5.0)
            ready = [(entry.name, entry.version) for entry in index.models if entry.state == "READY"]
            configs = {}
            for name, version in ready:
                answer = await self._client.get_model_config(name, version, client_timeout=5.0)
                configs[name, version] = answer.config
            return configs
        except InferenceServerException as error:
            translated = translate(error)
            self._connect()
            if isinstance(translated, DeadlineExceeded):  # no sample was asked for: Triton itself hangs
                translated = TritonUnavailable(f"Triton at {self.url} does not answer; try again later")
            raise translated from error

    def _connect(self) -> None:
        self._client = triton.InferenceServerClient(self.url, channel_args=_CHANNEL_OPTIONS)

    async def load(self, model: str) -> None:
        """Have Triton load a model, or take over what changed of it; raises TritonUnavailable with Triton's words."""
        try:
            await self._client.load_model(model, client_timeout=LOAD_TIMEOUT_SECONDS)
        except InferenceServerException as error:
            raise TritonUnavailable(f"Triton could not load {model!r}: {error.message()}") from error

    async def unload(self, model: str) -> None:
        """Have Triton unload an ensemble with its steps, once what runs in it has ended."""
        try:
            await self._client.unload_model(model, unload_dependents=True, client_timeout=LOAD_TIMEOUT_SECONDS)
        except InferenceServerException as error:
            raise TritonUnavailable(f"Triton could not unload {model!r}: {error.message()}") from error

    async def infer(
        self,
        model: str,
        version: str,
        latents: Latents,
        outputs: Sequence[str],
        timeout_seconds: float | None = None,
    ) -> dict[str, Array]:
        """Run an ensemble for one sample; arrays without the batch dimension, by output name.

        `timeout_seconds` bounds the call and Triton's queues (`DEFAULT_TIMEOUT_SECONDS` when None). Cancelling the
        awaiting task cancels the request in Triton and does not wait for it: an ensemble's next step is not begun, but
        what its first step has queued is run (Triton 2.51), other than with a timeout.
        """
        seconds = DEFAULT_TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
        inputs = [
            _input("latent", latents.latent, "FP32"),
            _input("style_latent", latents.style_latent, "FP32"),
            _input("crossover", np.array([[latents.crossover]], np.int32), "INT32"),
            _input("truncation_psi", np.array([[latents.truncation_psi]], np.float32), "FP32"),
        ]
        try:
            with tracing.span("triton infer", model=model, version=version):
                result = await self._client.infer(
                    model,
                    inputs,
                    model_version=version,
                    outputs=[triton.InferRequestedOutput(name) for name in outputs],
                    request_id=tracing.request_id(),  # what Triton says of it carries the id
                    headers=tracing.outgoing_headers(),
                    client_timeout=seconds,
                    timeout=max(1, int(seconds * 1e6)),  # microseconds
                )
        except InferenceServerException as error:
            raise translate(error) from error
        arrays = {}
        for name in outputs:
            array = result.as_numpy(name)
            if array is None:
                raise InferenceFailed(f"Triton's answer for model {model!r} lacks the output {name!r}")
            arrays[name] = array[0]
        return arrays


def translate(error: InferenceServerException) -> LabelmintError:
    """The LabelmintError that says the same as a tritonclient error; what the operator has to mend is logged."""
    status, message = str(error.status() or ""), str(error.message() or "")
    lowered = message.lower()
    if any(text in lowered for text in _QUEUE_FULL):
        return Overloaded("Triton's queue is full; try again later")
    if any(text in lowered for text in _QUEUE_TIMEOUT) or status.endswith(grpc.StatusCode.DEADLINE_EXCEEDED.name):
        return DeadlineExceeded()
    if status.endswith(grpc.StatusCode.RESOURCE_EXHAUSTED.name):
        return Overloaded(f"Triton is overloaded: {message}")
    if any(text in lowered for text in _NO_SHARED_MEMORY):
        logger.error("Triton's shared memory is full, /dev/shm (Docker: --shm-size): %s", message)
        return TritonUnavailable("Triton's shared memory is full; try again later")
    # NOT_FOUND and "not ready" mean that the model left Triton after the gateway had seen it.
    gone = (grpc.StatusCode.UNAVAILABLE.name, grpc.StatusCode.NOT_FOUND.name, grpc.StatusCode.CANCELLED.name)
    if status.endswith(gone):
        return TritonUnavailable(f"Triton does not answer or has no such model ready ({message}); try again later")
    logger.error("Triton failed to run the model: %s", message)
    return InferenceFailed(f"Triton failed to run the model: {message}")


def _input(name: str, array: Array, dtype: str) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), dtype)
    tensor.set_data_from_numpy(array)
    return tensor
