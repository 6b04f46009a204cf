"""Attacks the gRPC port below its messages: bombs in gRPC's compression, broken HTTP/2, endless metadata.

Each case is one connection. gRPC's core answers INTERNAL to input that breaks gRPC's framing, before labelmint's code
runs. Its specification prescribes that, so such cases are marked (`may_be_internal`).
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.exceptions
from hpack import Encoder
from hyperframe.frame import Frame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame

from labelmint.v1 import sample_service_pb2 as pb
from tests.conftest import Service
from tests.support.memory import memory
from tests.torture.outcome import Outcome, Watch

ANSWER_SECONDS = 3.0  # without a byte
PATH = "/labelmint.v1.SampleService/GetModel"
UNKNOWN, INTERNAL = 2, 13
# The most memory that a bomb may take for a moment: a message has at most one megabyte.
MOMENT_MEGABYTES = 64


@dataclass(frozen=True)
class Call:
    """One HTTP/2 request like that of a gRPC client, except for the given changes."""

    name: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    replaced: dict[str, str | None] = field(default_factory=dict)
    may_be_internal: bool = False


def framed(message: bytes, flag: int = 0, length: int | None = None) -> bytes:
    return bytes([flag]) + (len(message) if length is None else length).to_bytes(4, "big") + message


def calls(model: str) -> list[Call]:
    good = framed(pb.GetModelRequest(model=model).SerializeToString())
    # A megabyte that expands to a gigabyte of one unknown field. Compressed, it is below the limit.
    field_of_gigabyte = b"\x7a" + b"\x80\x80\x80\x80\x04"
    pressed = gzip.compress(field_of_gigabyte + bytes(1 << 26), 9)
    squared = gzip.compress(pressed * 12, 9)
    gzipped = (("grpc-encoding", "gzip"),)
    return [
        Call("a good call", good),
        Call("good, compressed", framed(gzip.compress(good[5:]), 1), gzipped),
        Call("gzip bomb of 64 MB", framed(pressed, 1), gzipped),
        Call("ten gzip bombs in a row", framed(pressed, 1) * 10, gzipped),
        Call("gzip in gzip", framed(squared, 1), gzipped),
        Call("gzip of many members", framed(gzip.compress(bytes(1 << 20), 9) * 900, 1), gzipped, may_be_internal=True),
        Call("deflate bomb", framed(zlib.compress(bytes(1 << 26), 9), 1), (("grpc-encoding", "deflate"),)),
        Call("compressed rubbish", framed(b"\x1f\x8b" + b"\xff" * 100, 1), gzipped, may_be_internal=True),
        Call("cut off gzip", framed(gzip.compress(good)[:-6], 1), gzipped, may_be_internal=True),
        Call(
            "compressed with what nobody knows", framed(b"x", 1), (("grpc-encoding", "brotli"),), may_be_internal=True
        ),
        Call("compressed and no encoding said", framed(gzip.compress(good), 1), may_be_internal=True),
        Call("flag 255", framed(good, 255), may_be_internal=True),
        Call("length of 4 GB", framed(b"x", 0, 2**32 - 1)),
        Call("length that is not there", framed(b"x", 0, 1000), may_be_internal=True),
        Call("more than the limit", framed(bytes((1 << 20) + 1))),
        Call("two messages of one", good * 2),
        Call("a thousand messages of one", good * 1000),
        Call("no message", b"", may_be_internal=True),
        Call("half a head", b"\0\0", may_be_internal=True),
        Call("no gRPC", good, replaced={"content-type": "text/html"}),
        Call("no content type", good, replaced={"content-type": None}),
        Call("no trailers wanted", good, replaced={"te": None}),
        Call("GET", good, replaced={":method": "GET"}),
        Call("no path", good, replaced={":path": ""}),
        Call("path of another service", good, replaced={":path": "/labelmint.v2.SampleService/GetModel"}),
        Call("path of no method", good, replaced={":path": "/labelmint.v1.SampleService/__init__"}),
        Call("path of 4 KB", good, replaced={":path": "/" + "a" * 4000}),
        Call(
            "path that leads elsewhere",
            good,
            replaced={":path": "/grpc.health.v1.Health/../labelmint.v1.SampleService/GetModel"},
        ),
        Call("path with percent signs", good, replaced={":path": PATH.replace("/G", "%2fG")}),
        Call("two slashes", good, replaced={":path": "/" + PATH}),
        *(
            Call(f"timeout {value}", good, (("grpc-timeout", value),), may_be_internal=True)
            for value in ("x", "-1S", "99999999H", "1" * 30 + "S", "0n")
        ),
        Call("metadata that is not base64", good, (("x-bin", "%%%"),), may_be_internal=True),
        Call("metadata of 7 KB", good, (("x-a", "a" * 7000),)),
        Call("metadata of 60 KB", good, (("x-a", "a" * 60_000),)),
        Call("five hundred values", good, tuple(("x-a", str(i)) for i in range(500))),
        Call("id that breaks lines", good, (("x-request-id", "a\tb"),)),
        Call("token of 4 KB", good, (("authorization", "Bearer " + "a" * 4000),)),
    ]


async def call(target: str, case: Call, seconds: float = ANSWER_SECONDS) -> tuple[int | None, str]:
    """Return gRPC's status and message; the status is None if the connection ended or nothing came."""
    host, _, port = target.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    config = h2.config.H2Configuration(
        validate_outbound_headers=False, normalize_outbound_headers=False, validate_inbound_headers=False
    )
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": PATH,
        ":authority": target,
        "te": "trailers",
        "content-type": "application/grpc",
        **case.replaced,
    }
    connection.send_headers(1, [(k, v) for k, v in headers.items() if v is not None] + list(case.headers))
    body, status, ended = case.body, None, False
    said = ""
    try:
        while True:
            while body and not ended and (room := min(connection.local_flow_control_window(1), 16384)) > 0:
                connection.send_data(1, body[:room])
                body = body[room:]
            if not body and not ended:
                connection.end_stream(1)
                ended = True
            writer.write(connection.data_to_send())
            await writer.drain()
            data = await asyncio.wait_for(reader.read(1 << 16), seconds)
            if not data:
                return status, said
            for event in connection.receive_data(data):
                if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                    fields = {bytes(k).decode(): bytes(v).decode("utf-8", "replace") for k, v in event.headers or []}
                    if "grpc-status" in fields:
                        return int(fields["grpc-status"]), fields.get("grpc-message", "")
                if isinstance(event, (h2.events.StreamReset, h2.events.ConnectionTerminated)):
                    return status, repr(event)
    except (asyncio.TimeoutError, ConnectionError, h2.exceptions.ProtocolError) as error:
        return None, repr(error)
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def floods() -> dict[str, list[Frame] | bytes]:
    """Return frames that belong to no call, a few thousand per case.

    Headers that never end are left out: gRPC's core collects those of a connection and retains some of their memory
    (seen with grpcio 1.74 and 1.85, and no option changes it). SECURITY.md says what to do about it.
    """

    def opened(stream: int, flags: tuple[str, ...]) -> HeadersFrame:
        fields = [(":method", "POST"), (":scheme", "http"), (":path", PATH), (":authority", "a"), ("te", "trailers")]
        frame = HeadersFrame(stream, Encoder().encode([*fields, ("content-type", "application/grpc")]))
        for flag in flags:
            frame.flags.add(flag)
        return frame

    resets: list[Frame] = []
    for stream in range(1, 4001, 2):
        resets += [opened(stream, ("END_HEADERS",)), RstStreamFrame(stream, error_code=8)]
    return {
        "opened and reset": resets,
        "settings": [SettingsFrame(0, settings={4: 65535 + i}) for i in range(5000)],
        "pings": [PingFrame(0, bytes(8)) for _ in range(5000)],
        "a thousand streams": [opened(stream, ("END_HEADERS",)) for stream in range(1, 2001, 2)],
        "rubbish": bytes(range(256)) * 1000,
    }


async def flood(target: str, frames: list[Frame] | bytes) -> None:
    """Write all frames, whatever the server answers meanwhile."""
    host, _, port = target.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()
    content += frames if isinstance(frames, bytes) else b"".join(frame.serialize() for frame in frames)
    try:
        writer.write(content)
        await asyncio.wait_for(writer.drain(), ANSWER_SECONDS)
        while await asyncio.wait_for(reader.read(1 << 16), 1.0):
            pass
    except (asyncio.TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def abuse(service: Service, model: str, count: int) -> list[Outcome]:
    """Run every case `count` times."""
    good = calls(model)[0]
    assert (await call(service.grpc, good, 60.0))[0] == 0
    outcomes = []
    outcome, watch = Outcome("calls below gRPC"), Watch(service)
    for case in calls(model):
        before = memory(service.process.pid, "VmHWM")
        for status, said in await asyncio.gather(*(call(service.grpc, case) for _ in range(count))):
            outcome.tries += 1
            if status == UNKNOWN or (status == INTERNAL and not case.may_be_internal):
                outcome.found(f"{case.name}: status {status}, {said}")
        grown = memory(service.process.pid, "VmHWM") - before
        if grown > MOMENT_MEGABYTES:
            outcome.found(f"{case.name}: took {grown:.0f} MB for a moment")
    watch.look(outcome)
    outcomes.append(outcome)
    outcome, watch = Outcome("floods of HTTP/2 frames"), Watch(service)
    for name, frames in floods().items():
        await asyncio.gather(*(flood(service.grpc, frames) for _ in range(count)))
        outcome.tries += count
        if (await call(service.grpc, good, 60.0))[0] != 0:
            outcome.found(f"{name}: nothing is answered afterwards")
    watch.look(outcome)
    outcomes.append(outcome)
    return outcomes
