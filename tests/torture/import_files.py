"""The child process of files.py: reads hostile files as the commands do, and reports the result of each.

Rules of this file:
- The address space is limited and every audit event is recorded, so that a successful attack is detected.
- Only the file's own directory may be opened. Nothing may be written unless the whole file was read and is valid.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch  # noqa: F401  loaded here, because its memory and events would count for the first file

from labelmint.checkpoints.importing import ImportOptions, import_file
from labelmint.gateway.process.own_triton import OwnTriton
from labelmint.gateway.process.settings import ServeSettings
from labelmint.models.annotations.keypoints import read_keypoints
from labelmint.models.annotations.masks import read_masks
from labelmint.models.store import load_generator, load_interpreter
from tests.support.memory import memory

LIMIT_BYTES = 3 << 30
# Audit events that run something or reach beyond the files. Reading needs none of them.
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "pty.spawn",
    "socket.",
    "urllib.Request",
    "shutil.",
    "os.remove",
    "os.chmod",
    "os.symlink",
    "os.link",
    "pickle.find_class",
    "ctypes.dlopen",
)
READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": lambda path: import_file(path, path.parent / "out" / "g.safetensors", None, options=ImportOptions()),
    "generator": load_generator,
    "interpreter": load_interpreter,
    "masks": lambda path: read_masks(path, "png"),
    "labelme": lambda path: read_masks(path, "labelme"),
    "coco": lambda path: read_masks(path, "coco"),
    "keypoints": lambda path: read_keypoints(path, "coco"),
    "repository": lambda path: OwnTriton(ServeSettings(model_repository=path)),
}


def main(plan: Path) -> None:
    """Read the files of `plan`, a JSON file with [[kind, path], ...].

    Prints a line per file with a JSON object: outcome, message, events, seconds, megabytes.
    """
    with Path("/proc/self/statm").open() as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    events: list[str] = []
    sys.addaudithook(lambda event, arguments: events.append(event) if event.startswith(FORBIDDEN) else None)
    for kind, path in json.loads(plan.read_text()):
        before, started = memory("self", "VmHWM"), time.perf_counter()
        events.clear()
        try:
            READERS[kind](Path(path))
            outcome, message = "read", ""
        except Exception as error:
            outcome, message = type(error).__name__, str(error)
        grown = memory("self", "VmHWM") - before
        seconds = time.perf_counter() - started
        row = {"outcome": outcome, "message": message, "events": events[:9], "seconds": seconds, "megabytes": grown}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
