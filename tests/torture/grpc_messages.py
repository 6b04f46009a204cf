"""Sends damaged gRPC messages: each must get an answer or a client error, never a server error."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

import grpc
import grpc.aio
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from labelmint.gateway.grpc import reflection
from labelmint.v1 import sample_service_pb2 as pb
from tests.conftest import Service
from tests.torture.outcome import Outcome, Watch

AT_ONCE = 16
# The messages to read of a stream before the client disconnects. A health watch sends no second one until the health
# changes.
MAX_ANSWERS = 1
DEADLINE_SECONDS = 60.0
SERVICES = (
    *pb.DESCRIPTOR.services_by_name.values(),
    *health_pb2.DESCRIPTOR.services_by_name.values(),
    *reflection_pb2.DESCRIPTOR.services_by_name.values(),
    reflection.SERVICE,
)
# A damaged message may still be valid, so OK is allowed. UNAVAILABLE is declared for an unavailable Triton, but here
# Triton is available.
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def methods() -> dict[str, MethodDescriptor]:
    """Return every RPC of the gateway by its path, including those of a new service or method."""
    return {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}


def raw_call(channel: grpc.aio.Channel, path: str, method: MethodDescriptor) -> Callable[..., object]:
    """Return a call of the right kind that sends and receives raw bytes."""
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    made: Callable[..., object] = getattr(channel, kind)(path)
    return made


async def ask(
    channel: grpc.aio.Channel,
    path: str,
    method: MethodDescriptor,
    content: bytes,
    metadata: tuple[tuple[str, str], ...],
) -> tuple[grpc.StatusCode, str]:
    """Return the status and details of one call. Of a stream, the first messages are read."""
    for _ in range(10):
        request: object = iter([content]) if method.client_streaming else content
        call = raw_call(channel, path, method)(request, metadata=metadata, timeout=DEADLINE_SECONDS)
        code, details = await _status(call, method)
        # grpc.aio's client loses one in thirty of the refusals that come before it has written the request
        # (grpc/grpc#36066). It then reports these details itself; no server does.
        if not (method.client_streaming and details == "Internal error from Core"):
            break
    return code, details


async def _status(call: object, method: MethodDescriptor) -> tuple[grpc.StatusCode, str]:
    try:
        if not method.server_streaming:
            await call  # type: ignore[misc]
        else:
            for _ in range(MAX_ANSWERS):
                if await call.read() is grpc.aio.EOF:  # type: ignore[attr-defined]
                    break
            else:
                call.cancel()  # type: ignore[attr-defined]
        return grpc.StatusCode.OK, ""
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""


def valid_messages(model: str) -> dict[str, list[bytes]]:
    """Return valid requests of each method, as bytes: every field of every message has a value in one of them."""
    options = pb.SampleOptions(
        max_js=1e9,
        include_rejected=True,
        image_encoding=pb.ENCODING_RAW,
        label_encoding=pb.ENCODING_PNG,
        include_js_map=True,
    )
    mixed = pb.SampleOptions(truncation_psi=0.7, max_js=1e9, style_seed=5, crossover=1, omit_image=True)
    styled = pb.SampleOptions(max_js=1e9, crossover=1, omit_label=True)
    wanted: list[tuple[str, Message]] = [
        ("GetSample", pb.GetSampleRequest(model=model, seed=7, options=options, model_version="1")),
        ("GetSample", pb.GetSampleRequest(model=model, seed=2**32 - 1, options=mixed)),
        ("BatchGetSamples", pb.BatchGetSamplesRequest(model=model, seeds=[1, 2, 2**31], options=options)),
        (
            "BatchGetSamples",
            pb.BatchGetSamplesRequest(model=model, seeds=[1, 2], style_seeds=[3, 4], options=styled, model_version="1"),
        ),
        (
            "StreamSamples",
            pb.StreamSamplesRequest(
                model=model,
                start_seed=3,
                count=2,
                shard_index=1,
                shard_count=3,
                window=2,
                options=options,
                model_version="1",
            ),
        ),
        (
            "ListSeeds",
            pb.ListSeedsRequest(
                model=model, start_seed=3, end_seed=90, options=options, page_size=40, model_version="1"
            ),
        ),
        ("GetModel", pb.GetModelRequest(model=model, model_version="1")),
        ("ListModels", pb.ListModelsRequest()),
        ("Check", health_pb2.HealthCheckRequest(service="labelmint.v1.SampleService")),
        ("Watch", health_pb2.HealthCheckRequest(service="labelmint.v1.SampleService")),
        ("ServerReflectionInfo", reflection_pb2.ServerReflectionRequest(list_services="*")),
        ("ServerReflectionInfo", reflection_pb2.ServerReflectionRequest(file_containing_symbol="labelmint.v1.Sample")),
    ]
    found: dict[str, list[bytes]] = {path: [] for path in methods()}
    for path in found:
        found[path] = [message.SerializeToString() for name, message in wanted if path.endswith(f"/{name}")]
        # A new method starts with an empty message and its damaged forms.
        found[path] = found[path] or [message_class(path)().SerializeToString()]
    return found


def message_class(path: str) -> type[Message]:
    name = methods()[path].input_type.full_name
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))


def varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(0x80 | value & 0x7F)
        value >>= 7
    return bytes([*groups, value])


def spoiled(message: bytes, rng: random.Random) -> bytes:
    """Make one to three changes: of bits, length, fields, numbers or text."""
    for _ in range(rng.randint(1, 3)):
        message = rng.choice(_CHANGES)(message, rng)
    return message


def _flip(message: bytes, rng: random.Random) -> bytes:
    changed = bytearray(message or b"\0")
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(message: bytes, rng: random.Random) -> bytes:
    return message[: rng.randrange(len(message) + 1)]


def _swap(message: bytes, rng: random.Random) -> bytes:
    """Swap two pieces: fields come in another order, or within each other."""
    a, b, c = sorted(rng.randrange(len(message) + 1) for _ in range(3))
    return message[:a] + message[b:c] + message[a:b] + message[c:]


def _huge(message: bytes, rng: random.Random) -> bytes:
    """Add a field of any number with a value at the edge of its type, or with more bytes than a varint may have."""
    value = rng.choice([2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**70])
    return message + varint(rng.randint(0, 40) << 3) + varint(value)


def _number(message: bytes, rng: random.Random) -> bytes:
    """Add a double that is NaN or infinite."""
    bits = rng.choice([b"\0\0\0\0\0\0\xf0\x7f", b"\0\0\0\0\0\0\xf0\xff", b"\1\0\0\0\0\0\xf8\x7f", b"\xff" * 8])
    options = varint(rng.choice([1, 2, 3]) << 3 | 1) + bits
    return message + varint(rng.randint(1, 8) << 3 | 2) + varint(len(options)) + options


def _many(message: bytes, rng: random.Random) -> bytes:
    """Add a field thousands of times: packed, unpacked, or nested in itself."""
    number, times = rng.randint(1, 10), rng.choice([65, 1000, 50_000])
    if rng.random() < 0.4:
        packed = bytes(rng.randrange(128) for _ in range(min(times, 1000))) * (times // 1000 or 1)
        return message + varint(number << 3 | 2) + varint(len(packed)) + packed
    if rng.random() < 0.5:
        return message + (varint(number << 3) + b"\x07") * times
    nested = b""
    for _ in range(min(times, 200)):
        nested = varint(number << 3 | 2) + varint(len(nested)) + nested
    return message + nested


def _text(message: bytes, rng: random.Random) -> bytes:
    """Add text that is not UTF-8, has control characters, or is very long."""
    text = rng.choice(
        [b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b"a\nb\r\x1b[31m", b"..\xe2\x80\xae", b"x" * 70_000]
    )
    return message + varint(rng.choice([1, 2, 3, 4, 5, 8, 9]) << 3 | 2) + varint(len(text)) + text


def _declared(message: bytes, rng: random.Random) -> bytes:
    """Add a length without its bytes, or the end of a group that did not begin."""
    return (
        message + varint(rng.randint(1, 9) << 3 | rng.choice([2, 3, 4, 6, 7])) + varint(rng.choice([1, 2**28, 2**63]))
    )


_CHANGES = (_flip, _cut, _swap, _huge, _number, _many, _text, _declared)


# gRPC's own services have only a few fields; a tenth of the messages is enough for them.
OTHERS_SHARE = 10


async def fuzz(
    service: Service, model: str, count: int, seed: int = 8, metadata: tuple[tuple[str, str], ...] = ()
) -> list[Outcome]:
    """Send `count` damaged messages to each of labelmint's methods. Returns an outcome for each method."""
    good = valid_messages(model)
    outcomes = []
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        for path, method in methods().items():
            wanted = count if method.containing_service.file is pb.DESCRIPTOR else count // OTHERS_SHARE
            outcome, rng, codes = Outcome(f"messages to {path[1:]}"), random.Random(f"{seed} {path}"), Counter[str]()
            for message in good[path]:  # warm-up, and proof that the messages are valid before the damage
                code, details = await ask(channel, path, method, message, metadata)
                without_index = path.endswith("/ListSeeds") and code is grpc.StatusCode.FAILED_PRECONDITION
                if not (code is grpc.StatusCode.OK or without_index):
                    outcome.found(f"{code.name} to the good message {message.hex()[:60]}: {details}")
            watch = Watch(service)
            gate = asyncio.Semaphore(AT_ONCE)

            async def one(
                content: bytes,
                path: str = path,
                method: MethodDescriptor = method,
                outcome: Outcome = outcome,
                codes: Counter[str] = codes,
                gate: asyncio.Semaphore = gate,
            ) -> None:
                async with gate:
                    code, details = await ask(channel, path, method, content, metadata)
                codes[code.name] += 1
                if code not in ALLOWED:
                    outcome.found(f"{code.name} to {content.hex()[:80]}: {details}")

            while outcome.tries < wanted:
                batch = [spoiled(rng.choice(good[path]), rng) for _ in range(min(500, wanted - outcome.tries))]
                await asyncio.gather(*map(one, batch))
                outcome.tries += len(batch)
            outcome.note = ", ".join(f"{code} {times}" for code, times in codes.most_common()) + "; "
            watch.look(outcome)
            outcomes.append(outcome)
    return outcomes
