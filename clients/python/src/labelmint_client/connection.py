"""gRPC channels to gateways: addresses, certificates, tokens and the common channel options.

Rules of this file:
- There is one channel per endpoint, so the client knows which endpoint answered. gRPC itself spreads calls over the
  addresses of one name.
- A token never leaves this machine in plain text unless the caller sets `insecure`.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", -1),  # a batch of 64 at 1024 x 1024 is half a gigabyte
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.service_config_disable_resolution", 1),
    # Reconnect soon after a gateway restarts: gRPC's default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # the time limit of one connection attempt
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    # Detects a peer that vanished without closing the connection. Open streams receive a message each second; if
    # nothing arrives, gRPC pings the peer.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


@dataclass(frozen=True)
class Tls:
    """TLS to the gateway.

    ca: PEM file with the certificate authorities to trust; None: the public ones that come with gRPC.
    certificate, key: PEM files of the client certificate, for a gateway that requires one.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together; give both")

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))


@dataclass(frozen=True)
class Connection:
    """The settings for reaching gateways. It holds no open connection, so it can be pickled and copied to processes.

    endpoints: HOST:PORT of each gateway's gRPC server, or any other gRPC target (dns:///HOST:PORT, unix:PATH, ...).
    token: sent as `authorization: Bearer TOKEN`.
    tls: None for plain text.
    insecure: send a token in plain text to other machines too. This is for networks that encrypt traffic themselves.
    """

    endpoints: tuple[str, ...]
    token: str | None = None
    tls: Tls | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("no endpoint; give HOST:PORT of a gateway's gRPC server")
        for endpoint in self.endpoints:
            if re.match("https?://", endpoint) or ":" not in endpoint:
                raise ValueError(f"endpoint {endpoint!r} is not the HOST:PORT of a gateway's gRPC server")
            if self.token is not None and self.tls is None and not self.insecure and not is_loopback(endpoint):
                raise ValueError(
                    f"the token would be sent to {endpoint} in plain text: give tls, or insecure=True if you trust the "
                    "network"
                )

    def __repr__(self) -> str:
        return f"Connection({', '.join(self.endpoints)})"  # without the token

    @property
    def metadata(self) -> Sequence[tuple[str, str]]:
        """The metadata of each call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def channels(self) -> list[grpc.Channel]:
        """Return blocking channels, one per endpoint. They connect at the first call."""
        if self.tls is None:
            return [grpc.insecure_channel(endpoint, _options(endpoint)) for endpoint in self.endpoints]
        credentials = self.tls.credentials()
        return [grpc.secure_channel(endpoint, credentials, _options(endpoint)) for endpoint in self.endpoints]

    def aio_channels(self) -> list[grpc.aio.Channel]:
        """Return the same channels for asyncio."""
        if self.tls is None:
            return [grpc.aio.insecure_channel(endpoint, _options(endpoint)) for endpoint in self.endpoints]
        credentials = self.tls.credentials()
        return [grpc.aio.secure_channel(endpoint, credentials, _options(endpoint)) for endpoint in self.endpoints]


def _options(endpoint: str) -> list[tuple[str, int | str]]:
    # A proxy from the environment cannot reach this machine's loopback addresses, so they are used directly.
    return [*_OPTIONS, ("grpc.enable_http_proxy", 0 if is_loopback(endpoint) else 1)]


def is_loopback(endpoint: str) -> bool:
    """Decide by the name alone, because the addresses that a name resolves to may change."""
    if endpoint.startswith("unix"):
        return True
    host = re.sub("^(dns:(///)?|ipv4:|ipv6:)", "", endpoint).rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(path: Path | str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
