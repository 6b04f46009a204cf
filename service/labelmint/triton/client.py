"""The gateway's Triton client: it sends latents, returns arrays, and translates all errors of Triton.

Rules of this file:
- It handles tensors, not policy: it knows no seeds and no gates, and models only by their Triton names.
- It uses tritonclient's messages and stub, but not its InferenceServerClient. Building a new request for each sample
  costs ten times as much as copying a template and filling in the tensors.
- Every gRPC error becomes a LabelmintError here, with the gRPC error as its cause. A test covers all gRPC codes.
- Triton 2.51 answers UNAVAILABLE for a full queue and for a queue timeout. Only the text distinguishes these from an
  outage.
- A sample that Triton has begun is never cancelled, neither at a deadline nor when a client disconnects. If a call is
  cancelled at the moment of its response, Triton 2.51 ends with SIGSEGV, and all its other work is lost
  (triton-inference-server/server#7368 and #8034; fixed upstream by #8078). One cancelled call in 20,000 causes this.
- A name may have many addresses, each a Triton with its own models (`triton/addresses.py`). The client offers the
  models of all of them. It sends a call to the Triton with the most room among those that have the model with its
  digest, in turn among equals, and retries a call that one refuses at the next.
- `room` says how many samples the Tritons should get (`triton/window.py`). A call itself never waits for room and
  never fails without it.
- One address may also stand for several Tritons behind a load balancer. The client retries a refusal there over a new
  connection, which may reach another Triton.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
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

from labelmint import conventions, tracing
from labelmint.core.errors import DeadlineExceeded, InferenceFailed, LabelmintError, Overloaded, TritonUnavailable
from labelmint.triton.addresses import Addresses, proxy_advice
from labelmint.triton.window import INITIAL, Window

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
T = TypeVar("T")
Key: TypeAlias = tuple[str, str]  # a model's name in Triton, and the version

_QUEUE_FULL = "exceeds maximum queue size"
_QUEUE_TIMEOUT = "request timeout expired"
_NO_SHARED_MEMORY = ("shared memory pool size", "shared memory key")
# One message may carry the arrays of a whole batch of large images.
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # For names that gRPC resolves: it looks them up again when a connection ends.
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # A new channel must open a new connection; by default gRPC would share the old one.
    ("grpc.use_local_subchannel_pool", 1),
    # Reconnect to a Triton that comes back within two seconds, not two minutes; keepalive detects a frozen one.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
# A sample that takes longer is cancelled, despite the risk for Triton. Keepalive detects a frozen Triton sooner.
_HUNG_SECONDS = 600.0
# Timeout for reading a Triton's models. After _LATE_SECONDS, a late Triton is not waited for if another one answered.
_LOOK_SECONDS = 5.0
_LATE_SECONDS = 1.0
# Attempts at an address if a Triton there lacks a model that the address reported.
_TRIES = 5
# When the client closes, Triton may respond to running calls for this long.
_CLOSING_SECONDS = 5.0
# Triton reads, compiles and warms up large models.
LOAD_TIMEOUT_SECONDS = 180.0


@dataclass(frozen=True)
class Latents:
    """The inputs of an ensemble for one sample: float32 [1,z_dim] twice, then two numbers.

    `class_index` is the class of a conditional generator; the ensembles of other generators have no such input.
    """

    latent: npt.NDArray[np.float32]
    style_latent: npt.NDArray[np.float32]
    crossover: int
    truncation_psi: float
    class_index: int | None = None


class _Triton:
    """One connection to the Triton at an address, and the ready models that this Triton last reported.

    `looked` is called at the end of each look.
    """

    def __init__(self, address: str, options: Sequence[tuple[str, Any]], looked: Callable[[], None]) -> None:
        self.address = address
        self.window = Window()
        self.configs: Mapping[Key, Config] | None = None  # as last reported; None: never reported
        self.failure: grpc.aio.AioRpcError | None = None  # of the last finished look
        self.doubtful = False  # it failed a call or is late; the others are tried first
        self.turn = 0  # the Triton with the smallest value is next
        self.channel = grpc.aio.insecure_channel(address, options=[*_CHANNEL_OPTIONS, *options])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.looking: asyncio.Task[None] | None = None
        self._looked = looked

    def renew(self, before: _Triton) -> None:
        """Take over what is known of the address. Calls may still run in the Triton there, so the window stays."""
        self.window, self.configs, self.failure = before.window, before.configs, before.failure
        self.doubtful, self.turn = before.doubtful, before.turn

    async def infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """Raises grpc.aio.AioRpcError."""
        begun, answered = time.monotonic(), False
        self.window.begin(begun)
        try:
            answer = await self._call(request)
            answered = True
            return answer
        finally:
            self.window.end(begun, time.monotonic(), answered=answered)

    async def _call(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """Call Triton as a span, of which Triton's own spans are children."""
        attributes = {
            **conventions.rpc_call(conventions.MODEL_INFER),
            **conventions.server_at(self.address),
            "labelmint.triton_model": request.model_name,
        }
        with tracing.span(conventions.MODEL_INFER, attributes, client=True) as tell:
            headers = tuple(tracing.outgoing_headers().items())
            call = self.stub.ModelInfer(request, metadata=headers, timeout=_HUNG_SECONDS)
            try:
                answer = await _to_its_end(call)
            except grpc.aio.AioRpcError as error:
                tell({**conventions.rpc_status(error.code()), conventions.ERROR_TYPE: error.code().name})
                raise
            tell(conventions.rpc_status(grpc.StatusCode.OK))
            return answer

    def look(self) -> asyncio.Task[None]:
        """Update `configs` or `failure` from Triton. Only one such look runs at a time."""
        if self.looking is None or self.looking.done():
            self.looking = asyncio.create_task(self._look())
            self.looking.add_done_callback(lambda _: self._looked())
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
        """Return the model's configuration, or None if the model is gone since the index was read."""
        request = pb.ModelConfigRequest(name=key[0], version=key[1])
        for _ in range(_TRIES):
            try:
                return (await self.stub.ModelConfig(request, timeout=max(0.0, end - time.monotonic()))).config
            except grpc.aio.AioRpcError as error:
                if not _is_missing(error):
                    raise
        return None

    def had(self, model: str, version: str, digest: str) -> bool:
        """Whether the model was ready when this Triton last answered; digest "" matches any digest."""
        config = (self.configs or {}).get((model, version))
        return config is not None and digest in ("", digest_of(config))

    def may_have(self, model: str, version: str, digest: str) -> bool:
        """Whether to try this Triton for the model. If its models are unknown, only for digest ""."""
        # After a broken connection, another Triton may answer at the address. A hanging one still has its models.
        broken = self.failure is not None and self.failure.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        if self.configs is None or broken:
            return not digest
        return self.had(model, version, digest)


class TritonClient:
    """Calls the Tritons of one name over gRPC. Safe for concurrent use within one event loop.

    `url` is a gRPC target. `on_more_room` is called when there may be more room, other than by the end of a call.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.on_more_room: Callable[[], None] = lambda: None
        self._addresses = Addresses(url)
        self._tritons: dict[str, _Triton] = {}  # by address
        # Also the replaced connections, in which calls may still run.
        self._connected: WeakSet[_Triton] = WeakSet()
        # Addresses that answered the last look, and those that answered before and are away now.
        self._answered: set[str] = set()
        self._away: set[str] = set()
        self._turn = 0

    async def close(self) -> None:
        """Wait a moment for running calls to end, then close all connections."""
        if looks := [look for triton in list(self._connected) if (look := triton.looking) is not None]:
            await asyncio.wait(looks)  # each ends within _LOOK_SECONDS
        await asyncio.gather(*(triton.channel.close(_CLOSING_SECONDS) for triton in list(self._connected)))

    async def is_ready(self, model: str) -> bool:
        """Whether Triton answers and has the model ready. False, not an error, if it does not answer."""
        await self._follow()
        for triton in self._in_turn(model, "", "")[:1]:
            self._take_turn(triton)
            try:
                return bool((await triton.stub.ModelReady(pb.ModelReadyRequest(name=model), timeout=2.0)).ready)
            except grpc.aio.AioRpcError:
                pass
        return False

    async def model_configs(self) -> dict[Key, dict[str, Config]]:
        """Return the configurations of all ready models: by (name, version), then by the address of the Triton.

        Raises TritonUnavailable if no Triton answers. A late Triton counts with the models that it last reported. After
        a failure the client makes a new connection, because gRPC itself would look up a name that had no addresses only
        after two minutes.
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
        """Whether a Triton that had the model does not answer now, so that it may still have it."""
        tritons = self._tritons.values()
        return any(triton.failure is not None and triton.had(model, version, digest) for triton in tritons)

    def room(self, model: str, version: str, digest: str) -> int:
        """How many more samples of a model the Tritons that have it should get.

        A Triton that failed a call or is late does not count if another one has the model. If none has it, a few
        samples may find out what is wrong.
        """
        able = self._in_turn(model, version, digest)
        if not able:
            return INITIAL
        trusted = [triton for triton in able if not triton.doubtful]
        now = time.monotonic()
        return sum(triton.window.room(now) for triton in trusted or able)

    async def load(self, model: str) -> None:
        """Let Triton load a model, or reload a changed one. Raises TritonUnavailable with Triton's message."""
        request = pb.RepositoryModelLoadRequest(model_name=model)
        await self._follow()
        try:
            for triton in list(self._tritons.values()):
                await triton.stub.RepositoryModelLoad(request, timeout=LOAD_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise TritonUnavailable(f"Triton could not load {model!r}: {error.details()}") from error

    async def unload(self, model: str) -> None:
        """Let Triton unload an ensemble and its steps once their running requests have ended."""
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
        *,
        outputs: Sequence[str],
        timeout_seconds: float | None = None,
        digest: str = "",
    ) -> dict[str, Array]:
        """Run an ensemble for one sample. Return arrays without the batch dimension, by output name.

        Only Tritons whose model has this `digest` are called; with "", any of them. If one refuses the call or ends
        during it, the next one is called: every Triton generates the same sample.

        After `timeout_seconds`, Triton drops the request from a queue whose policy allows that. The call itself lasts
        until Triton responds, even if its task is cancelled. A caller that cannot wait must leave the task running.
        """
        request = pb.ModelInferRequest()
        conditional = latents.class_index is not None
        z_dim = latents.latent.shape[1]
        request.CopyFrom(_template(model, version, tuple(outputs), z_dim=z_dim, conditional=conditional))
        request.id = tracing.request_id()  # Triton's messages about the request carry the id
        if timeout_seconds is not None:
            request.parameters["timeout"].int64_param = max(1, int(timeout_seconds * 1e6))  # microseconds
        numbers = np.array(latents.crossover, "<i4"), np.array(latents.truncation_psi, "<f4")
        tensors = (latents.latent, latents.style_latent, *numbers)
        request.raw_input_contents.extend([tensor.tobytes() for tensor in tensors])
        if conditional:
            request.raw_input_contents.append(np.array(latents.class_index, "<i4").tobytes())
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
        failure: LabelmintError = TritonUnavailable(
            f"no Triton at {self.url} has {request.model_name!r} version {request.model_version} ready; try again later"
        )
        cause: grpc.aio.AioRpcError | None = None
        for _ in range(_TRIES):
            lacking = []
            for triton in self._in_turn(request.model_name, request.model_version, digest):
                self._take_turn(triton)
                try:
                    return await triton.infer(request)
                except grpc.aio.AioRpcError as error:
                    failure, cause = translate(error), error
                    # A Triton that fails every call at once always has room, and would get all samples.
                    triton.doubtful = True
                    if not isinstance(failure, TritonUnavailable):
                        raise failure from error
                    if _is_missing(error):
                        lacking.append(triton)
            if not lacking:
                break
            for triton in lacking:
                self._renew(triton)
        raise failure from cause

    def _in_turn(self, model: str, version: str, digest: str) -> list[_Triton]:
        """Return the Tritons that may have a model, in the order in which to try them."""
        able = [triton for triton in self._tritons.values() if not version or triton.may_have(model, version, digest)]
        now = time.monotonic()
        return sorted(able, key=lambda triton: (triton.doubtful, triton.window.load(now), triton.turn))

    def _take_turn(self, triton: _Triton) -> None:
        self._turn += 1
        triton.turn = self._turn

    async def _follow(self) -> None:
        """Update the connections to the addresses that the name has now."""
        found = await self._addresses.now()
        if set(found) != self._tritons.keys():
            self._answered.intersection_update(found)
            self._away.intersection_update(found)
            self._tritons = {address: self._tritons.get(address) or self._connect(address) for address in found}

    def _connect(self, address: str) -> _Triton:
        triton = _Triton(address, self._addresses.options(address), lambda: self.on_more_room())
        self._connected.add(triton)
        return triton

    def _renew(self, triton: _Triton) -> None:
        """Replace a connection unless that happened already. Running calls keep the old one and end in it."""
        if self._tritons.get(triton.address) is triton:
            renewed = self._tritons[triton.address] = self._connect(triton.address)
            renewed.renew(triton)

    def _tell_changes(self, tritons: Sequence[_Triton]) -> None:
        """Log once when one of several Tritons goes away or comes back. The caller logs when all are away."""
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
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:  # this call requested no sample, so Triton itself hangs
            return TritonUnavailable(f"Triton at {self.url} does not answer; try again later{proxy_advice(self.url)}")
        translated = translate(error)
        if isinstance(translated, TritonUnavailable):
            translated.message += proxy_advice(self.url)
        return translated


def digest_of(config: Config) -> str:
    """Return the digest of a labelmint ensemble; "" for any other model."""
    return config.parameters["model_digest"].string_value if "model_digest" in config.parameters else ""


def _is_missing(error: grpc.aio.AioRpcError) -> bool:
    """Whether Triton responded that it does not have the requested model."""
    return error.code() is grpc.StatusCode.NOT_FOUND or "unknown model" in (error.details() or "").lower()


async def _to_its_end(call: Awaitable[T]) -> T:
    """Return the result of a call. If the task is cancelled meanwhile, the cancellation waits until the call ends."""
    answering = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(answering)
    except asyncio.CancelledError:
        await asyncio.wait([answering])
        if not answering.cancelled():
            answering.exception()  # asyncio logs an exception that nobody asked for, and nobody waits for this one
        raise


@lru_cache(maxsize=256)
def _template(
    model: str, version: str, outputs: tuple[str, ...], *, z_dim: int, conditional: bool
) -> pb.ModelInferRequest:
    """Return the common part of a model's requests: all but the tensors' contents, the id and the timeout."""
    inputs = {
        "latent": ("FP32", z_dim),
        "style_latent": ("FP32", z_dim),
        "crossover": ("INT32", 1),
        "truncation_psi": ("FP32", 1),
        **({"class_index": ("INT32", 1)} if conditional else {}),
    }
    return pb.ModelInferRequest(
        model_name=model,
        model_version=version,
        inputs=[{"name": name, "datatype": dtype, "shape": [1, size]} for name, (dtype, size) in inputs.items()],
        outputs=[{"name": name} for name in outputs],
    )


def translate(error: grpc.aio.AioRpcError) -> LabelmintError:
    """Translate a gRPC error of Triton to a LabelmintError. Log the problems that an operator must fix."""
    code, message = error.code(), error.details() or ""
    lowered = message.lower()
    if _QUEUE_FULL in lowered:
        return Overloaded("Triton's queue is full; try again later")
    if _QUEUE_TIMEOUT in lowered or code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded()
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(f"Triton is overloaded: {message}")
    if any(text in lowered for text in _NO_SHARED_MEMORY):
        logger.error("Triton's shared memory is full; enlarge /dev/shm (Docker: --shm-size): %s", message)
        return TritonUnavailable("Triton's shared memory is full; try again later")
    # NOT_FOUND and "not ready" mean that Triton lost the model after the gateway had seen it.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED):
        return TritonUnavailable(f"Triton does not answer or has no such model ready ({message}); try again later")
    logger.error("Triton failed to run the model: %s", message)
    return InferenceFailed(f"Triton failed to run the model: {message}")
