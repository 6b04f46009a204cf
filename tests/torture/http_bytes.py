"""Attacks the REST port with bytes that no client library sends: broken headers, hidden requests, odd paths, bombs.

Each case is one connection. It sends bytes, reads until the end or a timeout, and checks that the response is allowed.
"""

from __future__ import annotations

import asyncio
import gzip
import random
import re
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.conftest import Service
from tests.torture.outcome import Outcome, Watch

AT_ONCE = 64
READ_SECONDS = 3.0  # without another byte
# The gateway may close without a response, wait for more (then the test closes), or answer. 503 is declared, but not
# allowed here, because Triton is available.
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_HOST = b"Host: gateway.example\r\n"
_CLOSE = b"Connection: close\r\n\r\n"


@dataclass(frozen=True)
class Bytes:
    """The bytes to send, whether more would follow, and the statuses that must not be among the answers."""

    name: str
    content: bytes
    forbidden: tuple[int, ...] = ()
    most_answers: int = 1


def get(target: bytes, headers: bytes = b"") -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\n" + _HOST + headers + _CLOSE


def post(target: bytes, headers: bytes, body: bytes) -> bytes:
    length = b"" if b"ength:" in headers or b"ncoding: chunked" in headers else b"Content-Length: %d\r\n" % len(body)
    return b"POST " + target + b" HTTP/1.1\r\n" + _HOST + headers + length + _CLOSE + body


def crafted(model: str) -> list[Bytes]:
    """Return the named cases. 200 is forbidden if it would mean that the attack succeeded."""
    sample = f"/v1/models/{model}/samples/7?max_js=1e9".encode()
    batch = f"/v1/models/{model}/samples:batchGet".encode()
    json_type = b"Content-Type: application/json\r\n"
    body = b'{"seeds": [1], "max_js": 1e9}'
    hidden = get(b"/metrics")
    cases = [
        # Heads.
        Bytes("empty line first", b"\r\n\r\n" + get(sample)),
        Bytes("no request", b"\0" * 4096, (200,)),
        Bytes("a TLS hello to plain text", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500, (200,)),
        Bytes("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (200,), 2),  # parsed as two invalid requests
        Bytes("HTTP/9.9", b"GET / HTTP/9.9\r\n" + _HOST + _CLOSE),
        Bytes("HTTP/0.9", b"GET /metrics\r\n", (200,)),
        Bytes("no host", b"GET " + sample + b" HTTP/1.1\r\n" + _CLOSE, (200,)),
        Bytes("two hosts", get(sample, b"Host: other.example\r\n")),
        Bytes("header of a megabyte", get(sample, b"X: " + b"a" * (1 << 20) + b"\r\n"), (200,)),
        Bytes("name of a megabyte", get(sample, b"a" * (1 << 20) + b": x\r\n"), (200,)),
        Bytes("fifty thousand headers", get(sample, b"X: a\r\n" * 50_000), (200,)),
        Bytes("target of a megabyte", get(b"/" + b"a" * (1 << 20)), (200,)),
        Bytes("query of 32 KB", get(sample + b"&x=" + b"a" * (32 << 10)), (200,)),
        Bytes("ten thousand parameters", get(sample + b"&a=1" * 10_000), (200,)),
        Bytes("folded header", get(sample, b"X: a\r\n b\r\n")),
        Bytes("space before the colon", get(sample, b"X : a\r\n"), (200,)),
        Bytes("null in a value", get(sample, b"X: a\0b\r\n"), (200,)),
        Bytes("latin-1 in a value", get(sample, b"If-None-Match: \xff\xfe\r\n")),
        Bytes("latin-1 in the traceparent", get(sample, b"Traceparent: \xff\r\nX-Request-Id: \xff\r\n")),
        Bytes("bare line feeds", b"GET /healthz HTTP/1.1\nHost: a\n\n"),
        Bytes("bare carriage return", get(sample, b"X: a\rY: b\r\n"), (200,)),
        Bytes("method of a megabyte", b"A" * (1 << 20) + get(sample), (200,)),
        Bytes("unknown method", b"BREW " + sample + b" HTTP/1.1\r\n" + _HOST + _CLOSE, (200,)),
        Bytes("TRACE", b"TRACE / HTTP/1.1\r\n" + _HOST + _CLOSE, (200,)),
        Bytes("CONNECT", b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + _HOST + _CLOSE, (200,)),
        Bytes("OPTIONS *", b"OPTIONS * HTTP/1.1\r\n" + _HOST + _CLOSE, (200,)),
        Bytes("upgrade to h2c", get(sample, b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n")),
        Bytes(
            "upgrade to a websocket",
            get(b"/v1/models", b"Upgrade: websocket\r\nSec-WebSocket-Key: AAAA\r\nSec-WebSocket-Version: 13\r\n"),
        ),
        Bytes("expect what is not there", get(sample, b"Expect: 418\r\n")),
        # A proxy may parse these as two requests. The gateway must answer one of them, or refuse.
        Bytes(
            "length and chunked",
            post(batch, b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + hidden),
        ),
        Bytes("two lengths", post(batch, b"Content-Length: 0\r\nContent-Length: 90\r\n", hidden), (200,)),
        Bytes("list of lengths", post(batch, b"Content-Length: 0, 90\r\n", hidden), (200,)),
        Bytes("negative length", post(batch, b"Content-Length: -1\r\n", body), (200,)),
        Bytes("length with a plus", post(batch, b"Content-Length: +29\r\n", body), (200,)),
        Bytes("length of 2^64", post(batch, b"Content-Length: 18446744073709551616\r\n", body), (200,)),
        Bytes("length of a gigabyte", post(batch, b"Content-Length: 1073741824\r\n", body), (200,)),
        Bytes("length in other digits", post(batch, "Content-Length: ²\r\n".encode("latin-1"), body), (200,)),
        Bytes("chunked twice", post(batch, b"Transfer-Encoding: chunked, chunked\r\n", b"0\r\n\r\n" + hidden), (200,)),
        Bytes("chunked with a tab", post(batch, b"Transfer-Encoding:\tchunked\r\n", b"0\r\n\r\n" + hidden)),
        Bytes(
            "chunked is not the last",
            post(batch, b"Transfer-Encoding: chunked, identity\r\n", b"0\r\n\r\n" + hidden),
            (200,),
        ),
        Bytes("xchunked", post(batch, b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n" + hidden), (200,)),
        Bytes("chunk of 2^64", post(batch, b"Transfer-Encoding: chunked\r\n", b"ffffffffffffffffff\r\nx\r\n"), (200,)),
        Bytes("negative chunk", post(batch, b"Transfer-Encoding: chunked\r\n", b"-1\r\nx\r\n0\r\n\r\n"), (200,)),
        Bytes("chunk without end", post(batch, b"Transfer-Encoding: chunked\r\n", b"1;" + b"a" * (1 << 20)), (200,)),
        Bytes(
            "trailers without end",
            post(batch, b"Transfer-Encoding: chunked\r\n", b"0\r\n" + b"X: a\r\n" * 50_000),
            (200,),
        ),
        Bytes(
            "a megabyte of small chunks",
            post(batch, b"Transfer-Encoding: chunked\r\n", b"1\r\n[\r\n" * 300_000),
            (200,),
        ),
        Bytes("body of a GET", b"GET " + sample + b" HTTP/1.1\r\n" + _HOST + b"Content-Length: 90\r\n\r\n" + hidden),
        # Paths that lead elsewhere.
        *(
            Bytes(f"path {target.decode('latin-1')}", get(target), (200,))
            for target in (
                b"/docs/../../../../etc/passwd",
                b"/docs/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
                b"/docs/..%2f..%2f..%2fetc%2fpasswd",
                b"/docs/....//....//etc/passwd",
                b"/docs/..\\..\\etc\\passwd",
                b"/docs//etc/passwd",
                b"//etc/passwd",
                b"/gallery/page.js/../../../access.py",
                b"/gallery/page.js%00.png",
                b"/docs/%00",
                b"/docs/swagger-ui.css%00",
                b"/%ff%fe",
                b"/%",
                b"/%zz",
                b"/v1/models/%2e%2e%2f%2e%2e%2fmetrics",
                b"/v1/models/../../metrics",
                b"/v1/models/..;/metrics",
                b"http://127.0.0.1:22/",
                b"http://127.0.0.1/metrics",
                b"*",
                b"metrics",
                b"/metrics/",
                b"/v1/models/x\xe2\x80\xae",
                b"/v1/models/{model}",
                b"/v1/models/$%7Bjndi:ldap://127.0.0.1/%7D",
                f"/v1/models/{model}/samples/7;jsessionid=1".encode(),
                f"/v1/models/{model}/samples/0x7".encode(),
                f"/v1/models/{model}/samples/-0".encode(),
                f"/v1/models/{model}/samples/{'9' * 5000}".encode(),
                f"/v1/models/{model}/samples/1e3".encode(),
                f"/v1/models/{model}/samples/%d9%a7.npz".encode(),
            )
        ),
        # Numbers and texts.
        *(
            Bytes(f"query {query.decode()}", get(sample.split(b"?")[0] + b"?" + query), (200,))
            for query in (
                b"max_js=nan",
                b"max_js=inf",
                b"max_js=-1",
                b"max_js=1e999",
                b"max_quantile=nan",
                b"truncation_psi=1e308&max_js=1",
                b"style_seed=99999999999999999999&crossover=1&max_js=1",
                b"crossover=-1&style_seed=1&max_js=1",
                b"max_js=%00",
                b"max_js=1&max_js=2&max_quantile=1",
                b"revision=%ff%fe",
                b"model_version=" + b"1" * 5000,
            )
        ),
        # Bodies.
        Bytes("JSON of brackets", post(batch, json_type, b"[" * 1_000_000), (200,)),
        Bytes("JSON of objects", post(batch, json_type, b'{"seeds":' * 100_000), (200,)),
        Bytes("number of digits", post(batch, json_type, b'{"seeds": [' + b"9" * 900_000 + b"]}"), (200,)),
        Bytes("number of exponents", post(batch, json_type, b'{"seeds": [1e999999999]}'), (200,)),
        Bytes("NaN in JSON", post(batch, json_type, b'{"seeds": [NaN], "max_js": Infinity}'), (200,)),
        Bytes("many seeds", post(batch, json_type, b'{"seeds": [' + b"1," * 400_000 + b"1]}"), (200,)),
        Bytes("lone surrogate", post(batch, json_type, b'{"seeds": [1], "\\ud800": "\\udfff"}'), (200,)),
        Bytes("JSON that is not UTF-8", post(batch, json_type, b'{"seeds": [1], "\xff": 1}'), (200,)),
        Bytes("UTF-16", post(batch, json_type, body.decode().encode("utf-16"))),
        Bytes(
            "repeated keys", post(batch, json_type, b'{"seeds": [1], ' + b'"max_js": 1, ' * 70_000 + b'"max_js": 1}')
        ),
        Bytes("form", post(batch, b"Content-Type: application/x-www-form-urlencoded\r\n", b"seeds=1"), (200,)),
        Bytes(
            "multipart", post(batch, b"Content-Type: multipart/form-data; boundary=x\r\n", b"--x\r\n" * 100_000), (200,)
        ),
        Bytes("other charset", post(batch, b"Content-Type: application/json; charset=utf-7\r\n", body)),
        # The gateway must not decompress anything.
        Bytes(
            "gzip bomb",
            post(batch, json_type + b"Content-Encoding: gzip\r\n", gzip.compress(bytes(1 << 26), 9)),
            (200,),
        ),
        Bytes(
            "gzip in gzip",
            post(batch, json_type + b"Content-Encoding: gzip, gzip\r\n", gzip.compress(gzip.compress(body))),
            (200,),
        ),
        Bytes("deflate", post(batch, json_type + b"Content-Encoding: deflate\r\n", b"\x78\x9c" + b"\0" * 100), (200,)),
        Bytes("answer in a bomb's coding", get(sample, b"Accept-Encoding: gzip;q=1.0, br, *;q=nan\r\n")),
    ]
    # With pipelining, each request of a connection gets its own answer. This case checks the count.
    pipelined = get(b"/healthz").replace(_CLOSE, b"\r\n") * 200 + get(b"/healthz")
    cases.append(Bytes("two hundred at once", pipelined, (), 201))
    return cases


def mutated(model: str, rng: random.Random) -> Bytes:
    """Return a crafted request with bytes flipped, cut, doubled or set to values that often break parsers."""
    base = rng.choice([case for case in crafted_once(model) if len(case.content) < 4096])
    content = bytearray(base.content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content))
        kind = rng.randrange(4)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at : at + rng.randint(1, 30)]
        elif kind == 2:
            content[at:at] = content[at : at + rng.randint(1, 30)]
        else:
            content[at:at] = rng.choice([b"\r\n", b"\n", b"\0", b":", b" ", b"\t", b"%00", b"..", b"\xff", b"chunked"])
        content = content or bytearray(b"\0")
    return Bytes(f"mutation of {base.name}", bytes(content), (), 201)


_CRAFTED: dict[str, list[Bytes]] = {}


def crafted_once(model: str) -> list[Bytes]:
    if model not in _CRAFTED:
        _CRAFTED[model] = crafted(model)
    return _CRAFTED[model]


async def send(url: str, content: bytes, ca: ssl.SSLContext | None = None, read_seconds: float = READ_SECONDS) -> bytes:
    """Send these bytes and return the response. Any end of the connection counts as a response."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=ca)
    answer = b""

    async def write() -> None:
        writer.write(content)
        await writer.drain()

    writing = asyncio.create_task(write())
    try:
        while piece := await asyncio.wait_for(reader.read(1 << 16), read_seconds):
            answer += piece
    except (asyncio.TimeoutError, ConnectionError):
        pass
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    return answer


async def abuse(service: Service, model: str, count: int, seed: int = 8) -> list[Outcome]:
    """Send all crafted cases, and `count` mutations of them."""
    rng = random.Random(seed)
    await send(service.http, get(f"/v1/models/{model}/samples/7?max_js=1e9".encode()))
    outcomes = []
    for title, cases in (
        ("crafted HTTP", crafted_once(model)),
        ("mutated HTTP", [mutated(model, rng) for _ in range(count)]),
    ):
        outcome, watch = Outcome(title, len(cases)), Watch(service)
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(case: Bytes, outcome: Outcome = outcome, gate: asyncio.Semaphore = gate) -> None:
            async with gate:
                answer = await send(service.http, case.content)
            statuses = [int(status) for status in _STATUS.findall(answer)]
            if any(status >= 500 for status in statuses):
                outcome.found(f"{case.name}: {answer[:200]!r} to {case.content[:120]!r}")
            if set(statuses) & set(case.forbidden):
                outcome.found(f"{case.name}: was answered {statuses}")
            if len(statuses) > case.most_answers:
                outcome.found(f"{case.name}: was answered {len(statuses)} times: {answer[:600]!r}")
            if b"root:" in answer or b"Traceback" in answer:
                outcome.found(f"{case.name}: returned forbidden content: {answer[:200]!r}")

        await asyncio.gather(*map(one, cases))
        after = await send(service.http, get(b"/healthz"), read_seconds=60.0)
        if b" 200 " not in after:
            outcome.found(f"afterwards /healthz says {after[:100]!r}")
        watch.look(outcome)
        outcomes.append(outcome)
    return outcomes
