"""The gateways of the clients' tests."""

from tests.clients.conftest import gateway, options, start_gateway, tiny_triton

__all__ = ["gateway", "options", "start_gateway", "tiny_triton"]
