"""Measures one case in a process of its own, and prints each figure as one line of JSON as soon as it is known.

Rules of this file:
- The process that starts this one (`measure.py`) keeps what was printed, so a crash loses one arm and no figures.
- Every arm is prepared, checked and timed once; then all arms take turns until the time is over, so that a GPU that
  slows down slows all of them down.
- An arm that fails is reported and left out. If it broke the GPU's context, the process ends: nothing could follow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu import arms, checks, machine, service, soaking, timing
from gpu.cases import Case, case_named
from gpu.machine import dying_with

ROUNDS = {True: 2, False: 8}  # by tiny
COMPARED = 4  # samples
SLOW_SECONDS = {True: 0.1, False: 2.0}  # by tiny: a call that takes longer is timed in the first round only
BROKEN = 3  # the exit code when the GPU's context is unusable
LATE = {"torchscript": 1, "onnxruntime": 2, "compiled": 3, "reference": 4}
Figures = dict[str, Any]
Emit = Callable[..., None]


class Arm:
    """One prepared arm of a case, and the seconds of its timed calls by batch."""

    def __init__(self, part: str, name: str, run: arms.Run, inputs: Sequence[Tensor]) -> None:
        self.part, self.name, self.run = part, name, run
        self._inputs = inputs
        self.figures: Figures = {"batches": {}}
        self.seconds: dict[int, list[float]] = {}
        self.rounds: dict[int, int] = {}

    def inputs(self, batch: int) -> list[Tensor]:
        return [x[:batch] for x in self._inputs]

    def sample(self, row: int) -> list[Tensor]:
        return [x[row : row + 1] for x in self._inputs]

    def time(self, batch: int, device: torch.device) -> None:
        """Add one round."""
        inputs, known = self.inputs(batch), self.seconds.setdefault(batch, [])
        calls = timing.calls_of_a_round(known[-1]) if known else 1
        known += timing.timed(lambda: self.run(inputs), calls, device)
        self.rounds[batch] = self.rounds.get(batch, 0) + 1


class Bench(arms.Bench):
    """A case with the inputs of each part."""

    def prepare_inputs(self) -> None:
        latents = list(self.case.latents(self.device))
        draw = arms.eager("generator", arms.BASELINE)(self)
        rows = [draw([x[row : row + 1] for x in latents]) for row in range(len(latents[0]))]
        features = [torch.cat([each[name] for each in rows]) for name in rows[0] if name != "image"]
        self.inputs = {"machine": [], "generator": latents, "pair": latents, "interpreter": features}


def work(case: Case, device: torch.device, emit: Emit, *, seconds: float, without: Sequence[str]) -> None:
    ends = time.monotonic() + seconds
    emit("machine", figures=machine.described(device))
    with tempfile.TemporaryDirectory() as files, exporting(case, Path(files)):
        bench = Bench(case, device, Path(files), export_seconds=seconds / 2)
        bench.prepare_inputs()
        ready: dict[tuple[str, str], Arm] = {}
        wanted: dict[str, list[checks.Outputs]] = {}
        for part, name, prepare in in_order(ready):
            if f"{part}/{name}" in without:
                continue
            emit("begin", part=part, arm=name)
            if time.monotonic() > ends:
                emit("figures", part=part, arm=name, figures={"missing": "out of time"})
                continue
            try:
                arm = Arm(part, name, prepare(bench), bench.inputs[part])
                ready[part, name] = arm
                first_round(arm, bench, wanted)
                emit("figures", part=part, arm=name, figures=summary(arm, case, ready))
            except Exception as error:
                ready.pop((part, name), None)
                emit("figures", part=part, arm=name, figures={"missing": explained(error)})
                stop_if_broken(device)
    for _ in range(ROUNDS[case.tiny] - 1):
        take_turns(list(ready.values()), device, ends=ends, slow=SLOW_SECONDS[case.tiny])
        for arm in ready.values():
            emit("figures", part=arm.part, arm=arm.name, figures=summary(arm, case, ready))


def in_order(ready: dict[tuple[str, str], Arm]) -> Iterator[tuple[str, str, Callable[[Bench], arms.Run]]]:
    """Yield the arms in the order of preparation, and each pair as soon as both of its arms are known."""
    single = [("machine", name, prepare) for name, prepare in arms.MACHINE.items()]
    single += [("generator", name, prepare) for name, prepare in arms.GENERATOR.items()]
    single += [("interpreter", name, prepare) for name, prepare in arms.INTERPRETER.items()]
    single.sort(key=lambda each: LATE.get(each[1].partition("_")[0], 0))
    left, done = list(arms.PAIRS), set()
    for part, name, prepare in single:
        yield part, name, prepare
        done.add((part, name))
        for pair in [pair for pair in left if {("generator", pair[0]), ("interpreter", pair[1])} <= done]:
            left.remove(pair)
            yield "pair", arms.pair_name(*pair), lambda _, pair=pair: pair_of(pair, ready)


def pair_of(pair: tuple[str, str], ready: dict[tuple[str, str], Arm]) -> arms.Run:
    found = []
    for key in zip(("generator", "interpreter"), pair, strict=True):
        if key not in ready:
            raise arms.Unavailable(f"needs {key[0]} {key[1]}, which is missing")
        found.append(ready[key].run)
    return arms.chained(*found)


def first_round(arm: Arm, bench: Bench, wanted: dict[str, list[checks.Outputs]]) -> None:
    """Check the arm's outputs and the identity of its samples, and time each batch once."""
    device, batches = bench.device, bench.case.batches
    if arm.part == "machine":
        arm.run([])
        arm.time(1, device)
        arm.time(1, device)
        return
    alone = [arm.run(arm.sample(row)) for row in range(min(COMPARED, max(batches)))]
    timing.synchronize(device)
    arm.figures |= checks.compared(alone, wanted.setdefault(arm.part, alone))
    arm.figures["digest"] = checks.digest(alone[0])
    arm.figures["same_bytes"] = same = {"after other samples": checks.same_bytes(arm.run(arm.sample(0)), alone[0])}
    for batch in batches:
        figures: Figures = arm.figures["batches"].setdefault(str(batch), {})
        try:
            found, figures["peak_bytes"] = timing.peak_bytes(lambda b=batch: arm.run(arm.inputs(b)), device)
            if batch > 1:
                same[f"in a batch of {batch}"] = checks.same_rows(found, alone[:batch])
            del found
            arm.time(batch, device)
        except torch.cuda.OutOfMemoryError as error:
            figures["missing"] = explained(error)
            arm.seconds.pop(batch, None)
    if arm.name.startswith("kernel_"):
        arm.figures["kernels"] = timing.kernel_seconds(lambda: arm.run(arm.sample(0)), device)


def take_turns(ready: Sequence[Arm], device: torch.device, *, ends: float, slow: float) -> None:
    """Time every arm and batch once more, as long as there is time."""
    for arm in ready:
        for batch, known in arm.seconds.items():
            if known[-1] < slow and time.monotonic() + known[-1] < ends:
                arm.time(batch, device)


def summary(arm: Arm, case: Case, ready: dict[tuple[str, str], Arm]) -> Figures:
    """Return the arm's figures with the seconds of all rounds, and the rates that follow from them."""
    found = {**arm.figures, "batches": dict(arm.figures["batches"])}
    for batch, known in arm.seconds.items():
        seconds = timing.spread(known)
        figures = {**found["batches"].get(str(batch), {}), "seconds": seconds, "rounds": arm.rounds[batch]}
        figures |= rates(arm, case, batch, ready=ready)
        found["batches"][str(batch)] = figures
    return found


def rates(arm: Arm, case: Case, batch: int, *, ready: dict[tuple[str, str], Arm]) -> Figures:
    """Return operations and bytes, those that a sample needs, per second, and the share of the machine's own rates."""
    seconds = timing.spread(arm.seconds[batch])["median"]
    if arm.part == "machine":
        if arm.name == "copy":
            return {"bytes_per_second": 2 * arms.copied_bytes(case) / seconds}
        return {"flops_per_second": 2 * arms.side_of(case) ** 3 / seconds}
    flops, moved = case.costs(arm.part)
    found = {
        "samples_per_second": batch / seconds,
        "flops_per_second": batch * flops / seconds,
        "bytes_per_second": batch * moved / seconds,
    }
    gemm, copy = ready.get(("machine", f"gemm_{precision_of(arm.name)}")), ready.get(("machine", "copy"))
    if gemm is not None:
        best = rates(gemm, case, 1, ready=ready)["flops_per_second"]
        found["share_of_gemm"] = found["flops_per_second"] / best
    if copy is not None:
        best = rates(copy, case, 1, ready=ready)["bytes_per_second"]
        found["share_of_copy"] = found["bytes_per_second"] / best
    return found


def precision_of(arm: str) -> str:
    """Return the precision of the products that an arm uses. Torch and ONNX Runtime convolve as TF32 by default."""
    last = arm.rpartition("_")[2].rpartition(" ")[2]
    return last if last in arms.PRECISIONS else "tf32"


def explained(error: BaseException) -> str:
    """Return why an arm has no figures, in one line."""
    if isinstance(error, arms.Unavailable):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    said = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return f"out of memory: {said}".rstrip(": ")[:300]
    return f"failed: {type(error).__name__}: {said}"[:300]


def stop_if_broken(device: torch.device) -> None:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the GPU's context is unusable: {error}", file=sys.stderr)
        sys.exit(BROKEN)


@contextlib.contextmanager
def exporting(case: Case, files: Path) -> Iterator[None]:
    """Export the case's files in another process during the block."""
    command = [sys.executable, "-m", "gpu.exporting", case.name, str(files)]
    process = subprocess.Popen([*dying_with(os.getpid()), *command], stdout=sys.stderr)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def printing() -> Emit:
    """Return the function that prints an event. What libraries print goes to stderr."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(event: str, **content: object) -> None:
        stream.write(json.dumps({"event": event, **content}) + "\n")
        stream.flush()

    return emit


OTHERS = {"soak": soaking.soak, "service": service.serve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", help="a case, such as r1024_k20; soak; or service")
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--without", nargs="*", default=[], help="arms to leave out, such as pair/float32")
    arguments = parser.parse_args()
    emit, device = printing(), torch.device(arguments.device)
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(1)  # the rehearsal's tensors are tiny, and threads wait for each other
    if arguments.task in OTHERS:
        try:
            figures = OTHERS[arguments.task](device, tiny=arguments.tiny, seconds=arguments.seconds)
        except Exception as error:
            traceback.print_exc()
            figures = {"missing": explained(error)}
        emit("figures", figures=figures)
    else:
        work(case_named(arguments.task), device, emit, seconds=arguments.seconds, without=arguments.without)


if __name__ == "__main__":
    main()
