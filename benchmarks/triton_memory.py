"""Measures the memory that models need in Triton, beside labelmint's estimate, and what its threads cost.

Rules of this file:
- Each run is a process of `native_backend.py`, which runs the models as Triton's native ONNX Runtime backend does.
- Memory depends on which steps run at the same moment, so each case has several runs, and all of them are reported.
- The estimate here is without the server itself, which these processes do not contain.
- Threads are measured on idle cores, and while as many other processes as there are cores keep these busy.

Run it as `python benchmarks/triton_memory.py` (ten minutes; `--threads` measures only these); it writes
benchmarks/results/triton_memory.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import floor
import onnxruntime
import random_models
import resuming
from load import spread
from resuming import BUILD, ROOT, Figures

from labelmint.export.memory import TRITON_BYTES, needed_bytes
from labelmint.export.repository import export_repository

RESULTS = ROOT / "benchmarks" / "results" / "triton_memory.json"
PROGRAM = Path(__file__).with_name("native_backend.py")
DEMO = ROOT / "model_repository"
RANDOM = "random_256"
CASES = (
    (DEMO, ("faces",)),
    (DEMO, ("faces", "faces_keypoints")),
    (DEMO, ("faces_staged",)),
    (DEMO, ("faces", "faces_staged")),
    (BUILD / "triton_memory", (RANDOM,)),
)
# The arguments in k8s/base: one pool of two threads.
BASE = ("--one-pool", "--threads", "2")
ARMS = {
    "a pool for each model, a thread for each core (the default)": (),
    "a pool for each model, 16 threads (the default on 16 cores)": ("--threads", "16"),
    "a pool for each model, 1 thread": ("--threads", "1"),
    "one pool, 2 threads (`k8s/base`)": BASE,
    "one pool, 1 thread": ("--one-pool", "--threads", "1"),
    "a pool for each model, not spinning (the Triton of `pip`)": ("--no-spinning",),
}
SAMPLES = 10


def run(repository: Path, names: Sequence[str], *options: str) -> Figures:
    """Run these ensembles in a new process and return what it measured."""
    command = [sys.executable, str(PROGRAM), str(repository), *names, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: Figures = json.loads(done.stdout)
    return found


def estimated(repository: Path, names: Sequence[str]) -> float:
    """Return the estimate in MiB, without the server."""
    return (needed_bytes(repository, names) - TRITON_BYTES) / 2**20


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def memory(runs: int) -> list[Figures]:
    random = BUILD / "triton_memory"
    if not (random / RANDOM).is_dir():
        export_repository(random, RANDOM, random_models.stylegan2(256, 20), staged=False)
    cases = []
    for repository, names in CASES:
        found = [run(repository, names, *BASE)["mebibytes"] for _ in range(runs)]
        cases.append({"ensembles": names, "measured": spread(found), "estimated": estimated(repository, names)})
        print(f"{', '.join(names)}: {max(found):.0f} MiB, estimated {cases[-1]['estimated']:.0f}", flush=True)
    return cases


def threads(runs: int) -> dict[str, Figures]:
    """The runs of the arms alternate, so that a change of the machine's speed affects all of them."""
    rounds = [{arm: hosts(options) for arm, options in ARMS.items()} for _ in range(runs)]
    arms = {}
    for arm in ARMS:
        arms[arm] = {"threads": max(each[arm]["idle"]["threads"] for each in rounds)} | {
            host: {name: spread([each[arm][host][name] for each in rounds]) for name in ("seconds", "cpu_seconds")}
            for host in ("idle", "busy")
        }
        seconds = [arms[arm][host]["seconds"]["median"] for host in ("idle", "busy")]
        print(f"{arm}: {arms[arm]['threads']} threads, {seconds[0]:.2f} s, busy {seconds[1]:.2f} s", flush=True)
    return arms


def hosts(options: Sequence[str]) -> dict[str, Figures]:
    """Run an arm on idle cores, and on busy ones."""

    def measure() -> Figures:
        return run(DEMO, ("faces", "faces_keypoints"), "--alone", "--batches", str(SAMPLES), *options)

    idle = measure()
    with busy_cores(floor.available_cores()):
        return {"idle": idle, "busy": measure()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", action="store_true", help="only measure what threads cost")
    arguments = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if arguments.threads else {"memory": memory(arguments.runs)}
    found |= {
        "onnxruntime": onnxruntime.__version__,
        "cores": floor.available_cores(),
        "runs": arguments.runs,
        "samples": SAMPLES,
        "triton": TRITON_BYTES / 2**20,
        "threads": threads(arguments.runs),
    }
    resuming.write(RESULTS, found)


if __name__ == "__main__":
    main()
