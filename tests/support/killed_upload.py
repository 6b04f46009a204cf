"""An upload that kills itself with SIGKILL at its n-th step; run as a program.

A step is a read of a file that is uploaded, so every file and every chunk of a large one can be reached.

python -m tests.support.killed_upload OUT URL N     N 0: not at all. Prints the number of steps.
"""

import os
import signal
import sys

from labelmint_client.pull import uploading


def main(out: str, url: str, kill_at: str) -> None:
    steps, read = 0, uploading._Reader.read

    def step(reader: uploading._Reader, size: int = -1) -> bytes:
        nonlocal steps
        steps += 1
        if steps == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(reader, size)

    uploading._Reader.read = step  # type: ignore[method-assign]
    uploading.upload(out, url)
    print(steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
