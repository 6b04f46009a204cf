"""Imports every file of a directory and reports what came of it and what the process did: see test_hostile.py."""

import json
import resource
import sys
from pathlib import Path

from labelmint.checkpoints.importing import ImportOptions, import_file
from tests.support.memory import memory

# What reading and comparing cannot do without.
HARMLESS = {"open", "mmap.__new__", "builtins.id"}
LIMIT = 2 << 30


def main(source: Path, out: Path) -> None:
    paths = sorted(source.iterdir())
    report = {}
    events: list[str] = []
    current = ""

    def record(event: str, arguments: tuple[object, ...]) -> None:
        if not current:
            return
        is_own = event in HARMLESS and (event != "open" or str(arguments[0]).startswith((current, str(out))))
        if not is_own:
            events.append(f"{event} {str(arguments)[:200]}")

    with Path("/proc/self/statm").open() as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, used + LIMIT))
    sys.addaudithook(record)
    for path in paths:
        before = memory("self", "VmHWM")
        message, target = "", out / f"{path.name}.safetensors"
        current = str(path)
        try:
            message = import_file(path, target, None, options=ImportOptions())
            outcome = "imported"
        except Exception as error:
            outcome, message = type(error).__name__, str(error)
        current = ""
        grown = memory("self", "VmHWM") - before
        report[path.name] = {"outcome": outcome, "message": message, "events": events[:50], "megabytes": grown}
        events.clear()
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
