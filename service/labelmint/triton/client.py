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
- A name may have many addresses, each a Triton with models of its own (`triton/addresses.py`). What any of them has is
  offered; a call goes to those that have its model with its digest, in turn, and from one that refuses to the next.
- Behind one address may be several Tritons too (a balancer): a refusal there is asked again over a new connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar
from weakref import WeakSet

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig as Config
from tritonclient.utils import triton_to_np_dtype

from labelmint import tracing
from labelmint.core.errors import (
    DeadlineExceeded,
    InferenceFailed,
    LabelmintError,
    Overloaded,
    TritonUnavailable,
)
from labelmint.triton.addresses import Addresses
from labelmint.triton.proxies import proxy_advice

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
T = TypeVar("T")
Key: TypeAlias = tuple[str, str]  # a model's name in Triton, and the version

_QUEUE_FULL = ("exceeds maximum queue size",)
_QUEUE_TIMEOUT = ("request timeout expired",)
_NO_SHARED_MEMORY = ("shared memory pool size", "shared memory key")
# Arrays of a whole batch of large images come in one message.
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # For names that gRPC resolves: they are looked up again when a connection ends.
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # A new connection is one: gRPC would share the old one.
    ("grpc.use_local_subchannel_pool", 1),
    # A Triton that comes back is found within two seconds, not two minutes; one that froze is noticed.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
# A sample that takes longer is given up, whatever that does to Triton; one that froze is noticed by the keepalive.
_HUNG_SECONDS = 600.0
# A look at what a Triton has ends after it. One that is late is not waited for when another one has answered.
_LOOK_SECONDS = 5.0
_LATE_SECONDS = 1.0
# So often is something asked for behind an address that has it, and says that it does not.
_TRIES = 5
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


class _Triton:
    """One connection to the Triton at an address, and what that Triton has ready as far as it told."""

    def __init__(self, address: str, options: Sequence[tuple[str, Any]], configs: Mapping[Key, Config] | None) -> None:
        self.address = address
        self.configs = configs  # as last told; None: never
        self.failure: grpc.aio.AioRpcError | None = None  # of the last look that ended
        self.doubtful = False  # it refused or is late: the others go first
        self.turn = 0  # the smallest is next
        self.channel = grpc.aio.insecure_channel(address, options=[*_CHANNEL_OPTIONS, *options])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.looking: asyncio.Task[None] | None = None

    def look(self) -> asyncio.Task[None]:
        """Have it tell `configs`, or else `failure`; one question at a time."""
        if self.looking is None or self.looking.done():
            self.looking = asyncio.create_task(self._look())
        return self.looking

    async def _look(self) -> None:
        try:
            self.configs = await self._read(time.monotonic() + _LOOK_SECONDS)
        except grpc.aio.AioRpcError as error:
            self.failure, self.doubtful = error, True
        else:
            self.failure, self.doubtful = None, False

    async def _read(self, end: float) -> dict[Key, Config]:
        index = await self.stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=_LOOK_SECONDS)
        ready = [(entry.name, entry.version) for entry in index.models if entry.state == "READY"]
        configs = await asyncio.gather(*(self._config(key, end) for key in ready))
        return {key: config for key, config in zip(ready, configs, strict=True) if config is not None}

    async def _config(self, key: Key, end: float) -> Config | None:
        """None where it has gone since the index was told."""
        request = pb.ModelConfigRequest(name=key[0], version=key[1])
        for _ in range(_TRIES):
            try:
                return (await self.stub.ModelConfig(request, timeout=max(0.0, end - time.monotonic()))).config
            except grpc.aio.AioRpcError as error:
                if not _is_missing(error):
                    raise
        return None

    def had(self, model: str, version: str, digest: str) -> bool:
        """Whether it had that model ready when it last answered; any digest where it is ""."""
        config = (self.configs or {}).get((model, version))
        return config is not None and digest in ("", digest_of(config))

    def may_have(self, model: str, version: str, digest: str) -> bool:
        """Whether it may be asked for that model; only with digest "" also where that is not known."""
        # Once a connection broke another Triton may answer at the address. One that hangs still has what it had.
        broken = self.failure is not None and self.failure.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        if self.configs is None or broken:
            return not digest
        return self.had(model, version, digest)


class TritonClient:
    """Talks gRPC to the Tritons of one name. Safe for concurrent use within one event loop.

    `url` is a target as gRPC takes it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._addresses = Addresses(url)
        self._tritons: dict[str, _Triton] = {}  # by address
        # With those in which something may still run though a new connection took their place.
        self._connected: WeakSet[_Triton] = WeakSet()
        # Addresses that answered last, and those that did before.
        self._answered: set[str] = set()
        self._away: set[str] = set()
        self._turn = 0

    async def close(self) -> None:
        """Give what Triton has begun a moment to end, then let go of it."""
        if looks := [look for triton in list(self._connected) if (look := triton.looking) is not None]:
            await asyncio.wait(looks)  # they end within _LOOK_SECONDS
        await asyncio.gather(*(triton.channel.close(_CLOSING_SECONDS) for triton in list(self._connected)))

    async def is_ready(self, model: str) -> bool:
        """Whether Triton answers and has the model ready; False instead of an error when it does not answer."""
        await self._follow()
        for triton in self._in_turn(model, "", "")[:1]:
            self._take_turn(triton)
            try:
                return bool((await triton.stub.ModelReady(pb.ModelReadyRequest(name=model), timeout=2.0)).ready)
            except grpc.aio.AioRpcError:
                pass
        return False

    async def model_configs(self) -> dict[Key, dict[str, Config]]:
        """The configurations of all ready models, by (name, version): what each Triton has, by its address.

        Raises TritonUnavailable where no Triton answers. A Triton that is late counts with what it had; its failure
        starts with a new connection: gRPC itself asks for the addresses of a name that had none after two minutes only.
        """
        await self._follow()
        tritons = list(self._tritons.values())
        if not tritons:
            raise TritonUnavailable(f"{self._addresses.failure}; try again later")
        looks = [triton.look() for triton in tritons]
        _, late = await asyncio.wait(looks, timeout=_LATE_SECONDS)
        if len(late) == len(looks):
            await asyncio.wait(looks, return_when=asyncio.FIRST_COMPLETED)
        self._tell_changes(tritons)
        for triton, look in zip(tritons, looks, strict=True):
            if not look.done():
                triton.doubtful = True
                continue
            look.result()
            if triton.failure is not None:
                self._addresses.doubt()
                self._renew(triton)
        answering = [triton for triton in tritons if triton.failure is None and triton.configs is not None]
        if not answering:
            failure = next(triton.failure for triton in tritons if triton.failure is not None)
            raise self._unavailable(failure) from failure
        found: dict[Key, dict[str, Config]] = {}
        for triton in answering:
            for key, config in (triton.configs or {}).items():
                found.setdefault(key, {})[triton.address] = config
        return found

    def may_return(self, model: str, version: str, digest: str) -> bool:
        """Whether a Triton that had that model is away by now, and nobody can tell whether it still has it."""
        tritons = self._tritons.values()
        return any(triton.failure is not None and triton.had(model, version, digest) for triton in tritons)

    async def load(self, model: str) -> None:
        """Have Triton load a model, or take over what changed of it; raises TritonUnavailable with Triton's words."""
        request = pb.RepositoryModelLoadRequest(model_name=model)
        await self._follow()
        try:
            for triton in list(self._tritons.values()):
                await triton.stub.RepositoryModelLoad(request, timeout=LOAD_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise TritonUnavailable(f"Triton could not load {model!r}: {error.details()}") from error

    async def unload(self, model: str) -> None:
        """Have Triton unload an ensemble with its steps, once what runs in it has ended."""
        request = pb.RepositoryModelUnloadRequest(model_name=model)
        request.parameters["unload_dependents"].bool_param = True
        await self._follow()
        try:
            for triton in list(self._tritons.values()):
                await triton.stub.RepositoryModelUnload(request, timeout=LOAD_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise TritonUnavailable(f"Triton could not unload {model!r}: {error.details()}") from error

    async def infer(
        self,
        model: str,
        version: str,
        latents: Latents,
        outputs: Sequence[str],
        timeout_seconds: float | None = None,
        *,
        digest: str = "",
    ) -> dict[str, Array]:
        """Run an ensemble for one sample; arrays without the batch dimension, by output name.

        Only a Triton whose model has that `digest` is asked, any where it is "". What one refuses, or cannot end, is
        asked of the others: a sample is the same wherever it is made.

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
        with tracing.span("triton infer", model=model, version=version):
            answer = await self._infer(request, digest)
        arrays = {
            tensor.name: np.frombuffer(raw, triton_to_np_dtype(tensor.datatype)).reshape(tuple(tensor.shape)[1:])
            for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
        if missing := set(outputs) - arrays.keys():
            raise InferenceFailed(f"Triton's answer for model {model!r} lacks the outputs {sorted(missing)}")
        return arrays

    async def _infer(self, request: pb.ModelInferRequest, digest: str) -> pb.ModelInferResponse:
        if not self._tritons:
            await self._follow()
        headers = tuple(tracing.outgoing_headers().items())
        failure: LabelmintError = TritonUnavailable(
            f"no Triton at {self.url} has {request.model_name!r} version {request.model_version} ready; try again later"
        )
        cause: grpc.aio.AioRpcError | None = None
        for _ in range(_TRIES):
            lacking = []
            for triton in self._in_turn(request.model_name, request.model_version, digest):
                self._take_turn(triton)
                try:
                    call = triton.stub.ModelInfer(request, metadata=headers, timeout=_HUNG_SECONDS)
                    return await _to_its_end(call)
                except grpc.aio.AioRpcError as error:
                    failure, cause = translate(error), error
                    if not isinstance(failure, TritonUnavailable):
                        raise failure from error
                    triton.doubtful = True
                    if _is_missing(error):
                        lacking.append(triton)
            if not lacking:
                break
            for triton in lacking:
                self._renew(triton)
        raise failure from cause

    def _in_turn(self, model: str, version: str, digest: str) -> list[_Triton]:
        """The Tritons that may have a model, the next one first."""
        able = [triton for triton in self._tritons.values() if not version or triton.may_have(model, version, digest)]
        return sorted(able, key=lambda triton: (triton.doubtful, triton.turn))

    def _take_turn(self, triton: _Triton) -> None:
        self._turn += 1
        triton.turn = self._turn

    async def _follow(self) -> None:
        """Let the connections be those to the addresses that the name has now."""
        found = await self._addresses.now()
        if set(found) != self._tritons.keys():
            self._answered.intersection_update(found)
            self._away.intersection_update(found)
            self._tritons = {address: self._tritons.get(address) or self._connect(address) for address in found}

    def _connect(self, address: str, configs: Mapping[Key, Config] | None = None) -> _Triton:
        triton = _Triton(address, self._addresses.options(address), configs)
        self._connected.add(triton)
        return triton

    def _renew(self, triton: _Triton) -> None:
        """Connect anew, unless somebody did; what is in flight holds the old connection, and ends in it."""
        if self._tritons.get(triton.address) is triton:
            renewed = self._tritons[triton.address] = self._connect(triton.address, triton.configs)
            renewed.failure, renewed.doubtful, renewed.turn = triton.failure, triton.doubtful, triton.turn

    def _tell_changes(self, tritons: Sequence[_Triton]) -> None:
        """Log once when one of several Tritons goes away or comes back; who calls logs when all are."""
        for triton in tritons:
            address = triton.address
            if triton.failure is not None and address in self._answered:
                self._answered.remove(address)
                self._away.add(address)
                if len(tritons) > 1:
                    logger.warning("Triton at %s is away: %s", address, triton.failure.details())
            elif triton.failure is None and triton.configs is not None:
                self._answered.add(address)
                if address in self._away:
                    self._away.remove(address)
                    if len(tritons) > 1:
                        logger.warning("Triton at %s is back", address)

    def _unavailable(self, error: grpc.aio.AioRpcError) -> LabelmintError:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:  # no sample was asked for: Triton itself hangs
            return TritonUnavailable(f"Triton at {self.url} does not answer; try again later{proxy_advice(self.url)}")
        translated = translate(error)
        if isinstance(translated, TritonUnavailable):
            translated.message += proxy_advice(self.url)
        return translated


def digest_of(config: Config) -> str:
    """The digest of a labelmint ensemble; "" of any other model."""
    return config.parameters["model_digest"].string_value if "model_digest" in config.parameters else ""


def _is_missing(error: grpc.aio.AioRpcError) -> bool:
    """Whether a Triton answered that it does not have what it is asked for."""
    return error.code() is grpc.StatusCode.NOT_FOUND or "unknown model" in (error.details() or "").lower()


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
