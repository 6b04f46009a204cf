"""Imports gRPC with fork support, so a process that has used a client may fork workers that create their own clients.

Rules of this file:
- The package imports this module first, because gRPC reads the variable when it is imported. If gRPC was imported
  earlier, the setting at that time stays in force.
- Without gRPC's fork handlers, a child of a process that has used a client hangs.
- A variable that the caller has set is left alone. Otherwise it is removed after the import, so that child processes do
  not inherit it.
"""

import os

_NAME = "GRPC_ENABLE_FORK_SUPPORT"

if _NAME in os.environ:
    import grpc
else:
    os.environ[_NAME] = "1"  # gRPC reads it only once, at import
    try:
        import grpc
    finally:
        del os.environ[_NAME]

__all__ = ["grpc"]
