"""Executes a command that gets SIGTERM from the kernel when its parent process ends, for whatever reason.

Rules of this file:
- It runs as a program of its own, because no labelmint code may run between fork and exec. The parent has gRPC threads.
  A fork of it that runs Python before exec dies one time in four, without any output.
- It uses only the standard library, because it is started without site-packages.

Run it as `python -I -S die_with_parent.py PARENT_PID COMMAND...` (Linux).
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    # This setting survives exec; see prctl(2).
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent process has already ended")
    os.execv(sys.argv[2], sys.argv[2:])
