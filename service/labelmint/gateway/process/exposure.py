"""The check that a gateway which other machines can reach asks its callers for something.

Rules of this file:
- An address is judged by what it resolves to, so that a name of this machine is treated as its loopback address is.
"""

from __future__ import annotations

import ipaddress
import socket

from labelmint.core.errors import Exposed
from labelmint.gateway.process.settings import ServeSettings


def check_exposure(settings: ServeSettings) -> None:
    """Raises Exposed where anyone could ask from outside this machine and nobody said that they may."""
    restricted = settings.tokens_file is not None or settings.tls_client_ca is not None
    if restricted or settings.insecure:
        return
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(settings.host, None)}
    except socket.gaierror as error:
        raise Exposed(f"--host {settings.host!r} is no address: {error.strerror}") from error
    if not all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses):
        raise Exposed(
            f"--host {settings.host} can be reached from other machines, and anyone there could ask: give "
            "--tokens-file (or --tls-client-ca), or say --insecure if that is what you want"
        )
