"""A name server whose answers a test chooses."""

import asyncio
import socket
import struct


class Names(asyncio.DatagramProtocol):
    """A name server: every name has the IPv4 `addresses`, and does not exist while there are none."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.lookups = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, sender: object) -> None:
        question = data[12 : data.index(b"\0", 12) + 5]
        wanted = self.addresses if question[-4:-2] == b"\0\x01" else []  # A, not AAAA
        self.lookups += question[-4:-2] == b"\0\x01"
        flags = 0x8580 | (0 if self.addresses else 3)  # NXDOMAIN
        answer = data[:2] + struct.pack(">5H", flags, 1, len(wanted), 0, 0) + question
        for address in wanted:
            answer += b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton(address)
        self.transport.sendto(answer, sender)  # type: ignore[attr-defined]

    def url(self, port: int) -> str:
        return f"dns://127.0.0.1:{self.transport.get_extra_info('sockname')[1]}/triton.test:{port}"
