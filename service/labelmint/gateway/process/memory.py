"""Returns freed memory to the operating system after a peak of requests.

Rules of this file:
- glibc keeps freed memory in per-thread arenas, and a later peak uses another arena. Under repeated floods, a gateway
  would grow for hours although most memory is free (18 MB of 267 in use after eight times 20,000 calls at once).
- If the C library has no malloc_trim, this does nothing.
"""

from __future__ import annotations

import asyncio
import ctypes

PAUSE_SECONDS = 5.0


async def give_back() -> None:
    """Trim the heap every few seconds until cancelled; in a thread, because a trim may take milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:
        await asyncio.sleep(PAUSE_SECONDS)
        await asyncio.to_thread(trim, 0)
