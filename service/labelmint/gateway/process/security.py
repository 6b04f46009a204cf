"""The authentication and TLS of both servers, and the check that a gateway which other machines can reach has them.

Rules of this file:
- All files are read and checked once, at start, before a server listens. A bad file then stops the start with its
  error, and a renewed certificate needs a restart.
- Both servers present the same certificate and accept the same client certificates. The oldest accepted version is
  TLS 1.2.
- The check of the exposure looks at the addresses that a host name resolves to. A name of the loopback address thus
  counts as loopback.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from labelmint.core.errors import Exposed, UnusableFile
from labelmint.gateway.process.settings import ServeSettings
from labelmint.gateway.sampling.access import Tokens


def check_exposure(settings: ServeSettings) -> None:
    """Raises Exposed if clients on other machines need no authentication and the settings do not allow that."""
    restricted = settings.tokens_file is not None or settings.tls_client_ca is not None
    if restricted or settings.insecure:
        return
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(settings.host, None)}
    except socket.gaierror as error:
        raise Exposed(f"--host {settings.host!r} is not an address: {error.strerror}") from error
    if not all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses):
        raise Exposed(
            f"--host {settings.host} can be reached from other machines, and anyone there could send requests: "
            "set --tokens-file (or --tls-client-ca), or pass --insecure if you want this"
        )


@dataclass(frozen=True)
class Tls:
    """The files of a certificate, its key and, for mutual TLS, the authorities that sign client certificates."""

    certificate: Path
    key: Path
    client_ca: Path | None

    def check(self) -> None:
        """Raises UnusableFile, which names the bad file; the servers' own errors would not."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for path in (self.certificate, self.key):
            _read(path)
        try:
            # An empty password: OpenSSL must not prompt for one, because nobody is there to type it.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise UnusableFile(
                self.certificate, f"and {self.key} are not a PEM certificate and its unencrypted key ({error})"
            ) from error
        if self.client_ca is not None:
            _read(self.client_ca)
            try:
                context.load_verify_locations(self.client_ca)
            except ssl.SSLError as error:
                raise UnusableFile(self.client_ca, f"holds no PEM certificates ({error})") from error

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(_read(self.key), _read(self.certificate))],
            root_certificates=None if self.client_ca is None else _read(self.client_ca),
            require_client_auth=self.client_ca is not None,
        )


@dataclass(frozen=True)
class Security:
    """`tokens` is None if clients need no token; `tls` is None if connections are not encrypted."""

    tokens: Tokens | None
    tls: Tls | None

    @classmethod
    def of(cls, settings: ServeSettings) -> Security:
        """Read and check the files that `settings` name. Raises UnusableFile."""
        tls = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            tls = Tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
            tls.check()
        return cls(None if settings.tokens_file is None else Tokens(settings.tokens_file), tls)

    @property
    def private(self) -> bool:
        """Whether only authenticated clients get responses. Shared caches must not store them then."""
        return self.tokens is not None or (self.tls is not None and self.tls.client_ca is not None)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableFile(path, f"cannot be read: {error.strerror}") from error
