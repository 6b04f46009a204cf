"""Memory that a peak of requests took goes back to the system.

Rules of this file:
- glibc keeps what was freed, in arenas of threads, and a later peak finds another arena: a gateway that is flooded
  again and again grows for hours with nothing in use (18 MB of 267 after eight times 20,000 calls at once).
- With a C library that has no malloc_trim nothing is done.
"""

from __future__ import annotations

import asyncio
import ctypes

PAUSE_SECONDS = 5.0


async def give_back() -> None:
    """Until it is cancelled: every few seconds, in a thread, as it may take milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:
        await asyncio.sleep(PAUSE_SECONDS)
        await asyncio.to_thread(trim, 0)
