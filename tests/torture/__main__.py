"""`python -m tests.torture [NAME ...]`: the attacks at full length, and a table of what they found.

Without names all attacks run: those that measure run alone, the others two at a time. The exit code is 1 if an attack
found something or raised an exception.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.torture.attacks import ATTACKS, run

MEASURE = ("floods",)  # needs the machine for itself


def results(names: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield the results of `run` for each attack, as they end."""
    yield from (run(name) for name in names if name in MEASURE)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        others = [pool.submit(run, name) for name in names if name not in MEASURE]
        yield from (other.result() for other in as_completed(others))


def main(names: list[str]) -> int:
    if unknown := sorted(set(names) - ATTACKS.keys()):
        print(f"no attack named {', '.join(unknown)}; known: {', '.join(ATTACKS)}", file=sys.stderr)
        return 2
    print(f"{'attack':76} {'tries':>8} {'found':>6} {'seconds':>8}  notes", flush=True)
    passed = True
    for rows, clean in results(names or list(ATTACKS)):
        print(rows, flush=True)
        passed &= clean
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
