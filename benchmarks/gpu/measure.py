"""Measures labelmint on this machine's GPU: one command, eight minutes, one file of results.

Rules of this file:
- It needs this repository, PyTorch, the Triton language, numpy and onnx. It uses no network and installs nothing. If
  ONNX Runtime for CUDA is installed, it is measured too.
- Every case runs in a process of its own (`worker.py`) with a share of the time. A process that crashes or that stays
  at one arm for too long is started again without that arm.
- The results are written after each arm, so whatever ends the run leaves a valid file that says what is missing.

Run it as `python benchmarks/gpu/measure.py --out results.json`. `--device cpu --tiny` rehearses it on a CPU.
`python benchmarks/report.py` makes docs/gpu.md of benchmarks/results/gpu.json.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # imports take seconds of the run's time

import argparse
import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent
PATHS = [str(BENCHMARKS.parent / "service"), str(BENCHMARKS)]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

from gpu.cases import cases_of
from gpu.machine import dying_with
from gpu.page import missing
from gpu.results import NOT_REACHED, OUT_OF_TIME, Results

WORKER = (sys.executable, "-m", "gpu.worker")
# The tasks in the order of their importance, and the share of the time that each may take. The last ones also get what
# the others leave.
SHARES = {
    "r1024_k20": 0.24,
    "r512_k20": 0.13,
    "soak": 0.17,
    "r1024_k34": 0.15,
    "r256_k20": 0.10,
    "service": 0.12,
    "r512_k34": 0.10,
    "r256_k34": 0.10,
}
SHARES_OF_TINY = {"r16_k5": 0.6, "soak": 0.2, "service": 0.4}
STUCK = 0.12  # of the time: an arm that takes longer is given up
LEAST_SECONDS = 5.0  # a task with less time left is not started
END_SECONDS = 5.0  # kept free at the end of a task, for the last figures


@dataclass
class Ended:
    """How a worker ended: its exit code, or None if it was killed; and what it printed last."""

    code: int | None
    said: str


def run_worker(
    arguments: Sequence[str],
    *,
    worker: Sequence[str],
    ends: float,
    stuck: Callable[[], float],
    take: Callable[[dict[str, Any]], None],
) -> Ended:
    """Run a worker until it ends, until `ends`, or until it has printed nothing for `stuck()` seconds."""
    earlier = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*PATHS, *([earlier] if earlier else [])])}
    if "cpu" in arguments:
        environment["TRITON_INTERPRET"] = "1"  # the kernel runs in the interpreter of the Triton language
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*dying_with(os.getpid()), *worker, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        killed = False
        try:
            while (line := lines.get(timeout=max(0.1, min(stuck(), ends - time.monotonic())))) is not None:
                take(json.loads(line))
        except queue.Empty:
            killed = True
        finally:
            _kill_group(process)
        log.seek(0)
        said = [line.strip() for line in log.read().splitlines() if line.strip()]
        return Ended(None if killed else process.returncode, said[-1][:200] if said else "")


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    process.wait()
    lines.put(None)


def _kill_group(process: subprocess.Popen[str]) -> None:
    """End the worker and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure_case(
    results: Results, case: str, *, options: Sequence[str], worker: Sequence[str], ends: float, stuck: float
) -> None:
    """Measure one case; start again without an arm at which the worker crashed or stayed."""
    without: list[str] = []
    while ends - time.monotonic() > LEAST_SECONDS:
        current: list[str] = []

        def take(event: dict[str, Any], current: list[str] = current) -> None:
            if event["event"] == "begin":
                current[:] = [event["part"], event["arm"]]
            elif event["event"] == "machine":
                results.figures["machine"] = event["figures"]
                results.write()
            else:
                results.put(case, event["part"], event["arm"], figures=event["figures"])
                current.clear()

        seconds = ends - time.monotonic() - END_SECONDS
        arguments = [case, *options, "--seconds", f"{seconds:.1f}", "--without", *without]
        ended = run_worker(
            arguments, worker=worker, ends=ends, stuck=lambda c=current: stuck if c else math.inf, take=take
        )
        if ended.code == 0:
            results.explain(case, "failed: the process did not say why")
            return
        out_of_time = ended.code is None
        why = OUT_OF_TIME if out_of_time else f"failed: the process ended with code {ended.code}: {ended.said}"
        if current:
            results.put(case, current[0], current[1], figures={"missing": why})
        if f"{'/'.join(current)}" in without or (not current and not out_of_time):
            results.explain(case, why)
            return
        if current:
            without.append("/".join(current))
        elif out_of_time:
            break
    results.explain(case, OUT_OF_TIME)


def measure_task(results: Results, task: str, *, options: Sequence[str], worker: Sequence[str], ends: float) -> None:
    """Measure the soak or the service."""

    def take(event: dict[str, Any]) -> None:
        results.figures[task] = event["figures"]
        results.write()

    seconds = ends - time.monotonic() - END_SECONDS
    arguments = [task, *options, "--seconds", f"{seconds:.1f}"]
    ended = run_worker(arguments, worker=worker, ends=ends, stuck=lambda: math.inf, take=take)
    if results.figures[task].get("missing") == NOT_REACHED:
        why = OUT_OF_TIME if ended.code is None else f"failed: the process ended with code {ended.code}: {ended.said}"
        results.figures[task] = {"missing": why}
        results.write()


def run(
    out: Path, *, device: str, tiny: bool, minutes: float, worker: Sequence[str] = WORKER, started: float | None = None
) -> Results:
    """Measure everything that the time allows; `started` is when the time began (None: now)."""
    started = time.monotonic() if started is None else started
    total = 60 * minutes
    results = Results(out, device=device, tiny=tiny, minutes=minutes)
    results.write()
    options = ["--device", device, *(["--tiny"] if tiny else [])]
    names = [case.name for case in cases_of(tiny)]
    shares = SHARES_OF_TINY if tiny else SHARES
    for task in shares:
        ends = min(started + total, time.monotonic() + shares[task] * total)
        print(f"{time.monotonic() - started:5.0f} s  {task}", flush=True)
        if ends - time.monotonic() <= LEAST_SECONDS:
            if task in names:
                results.explain(task, OUT_OF_TIME)
            else:
                results.figures[task] = {"missing": OUT_OF_TIME}
        elif task in names:
            measure_case(results, task, options=options, worker=worker, ends=ends, stuck=STUCK * total)
        else:
            measure_task(results, task, options=options, worker=worker, ends=ends)
    results.figures["complete"] = True
    results.figures["seconds"] = time.monotonic() - started
    results.write()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file of the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to rehearse")
    parser.add_argument("--minutes", type=float, default=8.0, help="end after so many minutes (%(default)g)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the worker too
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("PyTorch sees no GPU; `--device cpu --tiny` rehearses without one")
    results = run(
        arguments.out, device=arguments.device, tiny=arguments.tiny, minutes=arguments.minutes, started=STARTED
    )
    for name, why in missing(results.figures).items():
        print(f"not measured: {name}: {why}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
