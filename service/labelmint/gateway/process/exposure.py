"""Checks that a gateway which other machines can reach requires authentication.

Rules of this file:
- The check looks at the addresses that a host name resolves to. A name of the loopback address thus counts as loopback.
"""

from __future__ import annotations

import ipaddress
import socket

from labelmint.core.errors import Exposed
from labelmint.gateway.process.settings import ServeSettings


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
