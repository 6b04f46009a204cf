"""Imports gRPC so that a process that has used a client may fork workers, and they clients of their own.

Rules of this file:
- It is the first that the package imports. Where gRPC was imported before, the caller's choice stands.
- Without gRPC's handlers a child of such a process hangs; our children shall not inherit the variable.
"""

import os

_NAME = "GRPC_ENABLE_FORK_SUPPORT"

if _NAME in os.environ:
    import grpc
else:
    os.environ[_NAME] = "1"  # read when gRPC is imported, and never again
    try:
        import grpc
    finally:
        del os.environ[_NAME]

__all__ = ["grpc"]
