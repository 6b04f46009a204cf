"""The TLS certificates of the REST and gRPC servers.

Rules of this file:
- The files are read and checked once, at start, before a server listens. A renewed certificate needs a restart.
- Both servers present the same certificate and accept the same client certificates. The oldest accepted version is
  TLS 1.2.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from labelmint.core.errors import UnusableFile
from labelmint.gateway.process.settings import ServeSettings


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
        """The credentials of the gRPC server."""
        return grpc.ssl_server_credentials(
            [(_read(self.key), _read(self.certificate))],
            root_certificates=None if self.client_ca is None else _read(self.client_ca),
            require_client_auth=self.client_ca is not None,
        )


def tls_of(settings: ServeSettings) -> Tls | None:
    """Return None if the settings have no certificate; connections are then not encrypted."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return Tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableFile(path, f"cannot be read: {error.strerror}") from error
