"""Certificates for both doors.

Rules of this file:
- The files are read and checked once, at start, before a port is opened; a renewed certificate takes a restart.
- Both doors show the same certificate and ask for the same client certificates; TLS 1.2 is the oldest spoken.
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
    """The files of a certificate, its key and, for mutual TLS, the authorities of the clients."""

    certificate: Path
    key: Path
    client_ca: Path | None

    def check(self) -> None:
        """Raises UnusableFile; the doors' own words of a bad file would not say which."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for path in (self.certificate, self.key):
            _read(path)
        try:
            # A password is never asked for: nobody is there to type it.
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
        """For the gRPC door."""
        return grpc.ssl_server_credentials(
            [(_read(self.key), _read(self.certificate))],
            root_certificates=None if self.client_ca is None else _read(self.client_ca),
            require_client_auth=self.client_ca is not None,
        )


def tls_of(settings: ServeSettings) -> Tls | None:
    """None where the doors speak plain text."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return Tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnusableFile(path, f"cannot be read: {error.strerror}") from error
