"""Becomes the command that follows, which SIGTERM ends when the process that started it vanishes, however it vanishes.

Rules of this file:
- It is run as a program, not imported: nothing of ours may run between fork and exec. The parent has threads of gRPC,
  and a fork of such a process that runs Python first dies one time in four, before it says anything.
- Standard library only: it is started without site-packages.

Run it as `python -I -S die_with_parent.py PARENT_PID COMMAND...` (Linux).
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    # Survives exec; the kernel's own list of what does is in prctl(2).
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that wanted this command has ended")
    os.execv(sys.argv[2], sys.argv[2:])
