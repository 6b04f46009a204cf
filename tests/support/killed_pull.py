"""A pull that kills itself with SIGKILL at its n-th step; run as a program.

A step is a sample or anything that it does to a file of the directory (open, rename, make, remove), which Python's own
audit events tell: so every point of the code can be reached, and the same one again on any machine.

python -m tests.support.killed_pull ENDPOINT OUT OPTIONS_JSON N     N 0: not at all. Prints the number of steps.
"""

import json
import os
import signal
import sys
from pathlib import Path

from labelmint_client import Client
from labelmint_client.pull import PullOptions, pull

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def main(endpoint: str, out: str, options: str, kill_at: str) -> None:
    steps = 0

    def step(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(out):
            step()

    sys.addaudithook(audit)
    with Client(endpoint) as client:
        pull(client, PullOptions.from_json(json.loads(options)), Path(out), on_progress=step)
    print(steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
