"""Compares labelmint with alternative servers: FastAPI, LitServe, BentoML and PyTriton over eager torch.

Rules of this file:
- Weights, machine, outputs and load are the same for all. Each rival follows its own documentation
  (benchmarks/rivals/), with batching on. Every server answers with image, label and score as raw bytes.
- A rival uses the published interpreter (`reference`). One of them is also measured with labelmint's torch module
  (`factored`), which shows the rest of the difference when a rival has labelmint's mathematics too.
- A few settings (workers, torch threads per worker, largest batch) are tried first, and each rival gets its best. All
  rivals get an allocator that saves eager torch its page faults (rivals/settings.py).
- One server runs at a time, and is started again for each turn. In each round all take a turn, in a changing order.
  Before a server is timed, its labels are compared with labelmint's: they must agree.
- The load is a closed loop from one process. A rate covers the time from the start to the last of a fixed number of
  calls. Callers keep sending requests until then; otherwise the load would drop at the end and lower the rate.
- A ratio is taken within a round, to the best rival of that round. The reported figure is the median over the rounds.

Rivals need a separate environment: `make rivals` creates `.venv-rivals` (the extra `rivals` of pyproject.toml), or name
one with `--python`. Run `python benchmarks/alternatives.py` on an idle machine (half an hour). It writes
benchmarks/results/alternatives.json and docs/images/alternatives.png and prints a table. Turns are kept in
build/alternatives: a run that was interrupted, or stopped by `--seconds`, resumes. Remove the directory after a change.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import load
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as triton
from load import spread
from resuming import rotated
from rivals.settings import Settings
from serving import gateway, samples_of
from tritonclient.utils import InferenceServerException

from labelmint.models.annotations import write_json

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build" / "alternatives"
MODEL = "faces"
SIZE, NUM_WS = 128, 12  # of the demo's model; a crossover of NUM_WS mixes nothing
COUNTS = {1: 2, 4: 8, 16: 32}  # calls that count, by concurrency
JUDGED = 16  # the concurrency of the targets
TARGETS = {"reference": 2.5, "factored": 1.7}  # times the rate of the best rival
WARM_UP = 8  # calls before the timing, by 4 callers; their labels are compared
AGREEMENT = 0.9999
START_SECONDS = 120.0
CORES = os.cpu_count() or 1
# Workers, torch threads per worker, largest batch. Small batches fit into a CPU's caches.
CANDIDATES = ((1, CORES, 16), (CORES, 1, max(2, 16 // CORES)), (CORES, 1, 2))
# The errors of each protocol while a server has not started.
NOT_YET = (grpc.aio.AioRpcError, httpx.TransportError, httpx.HTTPStatusError, InferenceServerException)
Figures = dict[str, Any]


@dataclass(frozen=True)
class Rival:
    title: str
    distribution: str
    protocol: str  # http or triton
    command: tuple[str, ...]


RIVALS = {
    "fastapi": Rival("FastAPI", "fastapi", "http", ("-m", "rivals.fastapi_server")),
    "litserve": Rival("LitServe", "litserve", "http", ("-m", "rivals.litserve_server")),
    "bentoml": Rival("BentoML", "bentoml", "http", ("-m", "bentoml", "serve", "rivals.bentoml_service:Samples")),
    "pytriton": Rival("PyTriton", "nvidia-pytriton", "triton", ("-m", "rivals.pytriton_server")),
}
OURS = "labelmint"
INTERPRETERS = ("reference", "factored")
FACTORED_BEHIND = "pytriton"  # the fastest of the four with that module, when all were tried
TURNS = (OURS, *(f"{name} {INTERPRETERS[0]}" for name in RIVALS), f"{FACTORED_BEHIND} {INTERPRETERS[1]}")


@dataclass(frozen=True)
class Answer:
    image: npt.NDArray[np.uint8]  # [R*R*3]
    label: npt.NDArray[np.uint8]  # [R*R]
    js_score: float


Ask = Callable[[int], Awaitable[Answer]]  # by seed


class OutOfTime(Exception):
    """`--seconds` have passed."""


@contextlib.asynccontextmanager
async def over_labelmint(endpoint: str) -> AsyncIterator[Ask]:
    async with samples_of(endpoint, MODEL) as sample_of:

        async def ask(seed: int) -> Answer:
            sample = await sample_of(seed)
            image, label = (np.frombuffer(pixels.data, np.uint8) for pixels in (sample.image, sample.label))
            return Answer(image, label, sample.js_score)

        yield ask


@contextlib.asynccontextmanager
async def over_http(port: int) -> AsyncIterator[Ask]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None) as client:

        async def ask(seed: int) -> Answer:
            request = {"seed": seed, "truncation_psi": 1.0, "crossover": NUM_WS}
            body = (await client.post("/sample", json=request)).raise_for_status().content
            score, pixels = np.frombuffer(body, np.float32, 1), np.frombuffer(body, np.uint8, offset=4)
            return Answer(pixels[: 3 * SIZE**2], pixels[3 * SIZE**2 :], float(score[0]))

        yield ask


@contextlib.asynccontextmanager
async def over_triton(port: int) -> AsyncIterator[Ask]:
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")

    async def ask(seed: int) -> Answer:
        inputs = []
        for name, kind, value in (
            ("seed", "INT64", np.array([[seed]], np.int64)),
            ("truncation_psi", "FP32", np.ones((1, 1), np.float32)),
            ("crossover", "INT32", np.full((1, 1), NUM_WS, np.int32)),
        ):
            inputs.append(triton.InferInput(name, [1, 1], kind))
            inputs[-1].set_data_from_numpy(value)
        found = await client.infer("samples", inputs)
        image, label, score = (found.as_numpy(name).ravel() for name in ("image", "label", "js_score"))
        return Answer(image, label, float(score[0]))

    try:
        yield ask
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def running(turn: str, settings: Settings | None, python: Path) -> AsyncIterator[Ask]:
    """Run the server of a turn until the block ends, and enter the block once it answers.

    `settings` are a rival's; None is labelmint.
    """
    if settings is None:
        with gateway() as served:
            async with over_labelmint(served.grpc) as ask:
                await until_it_answers(ask, None)
                yield ask
        return
    name = turn.split()[0]
    with rival(name, settings, python) as process:
        client = over_http if RIVALS[name].protocol == "http" else over_triton
        async with client(settings.port) as ask:
            await until_it_answers(ask, process)
            yield ask


@contextlib.contextmanager
def rival(name: str, settings: Settings, python: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a rival's process and its children until the block ends; they log to build/alternatives/NAME.log."""
    command = [str(python), *RIVALS[name].command]
    if name == "bentoml":
        command += ["--host", "127.0.0.1", "--port", str(settings.port)]
    # PyTriton's installation guide: its Triton needs the running Python's library.
    library = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    environment = os.environ | settings.environment()
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "service")]),
        "LD_LIBRARY_PATH": library,
        "BENTOML_HOME": str(KEPT / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    with (KEPT / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=KEPT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            # Signal the whole process group that `start_new_session` created: some servers do not end their workers.
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)


async def until_it_answers(ask: Ask, process: subprocess.Popen[bytes] | None) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            await ask(0)
            return
        except NOT_YET as error:
            if time.monotonic() > deadline or (process is not None and process.poll() is not None):
                raise SystemExit(f"the server does not answer; its log is in {KEPT}") from error
            await asyncio.sleep(0.2)


async def closed_loop(ask: Ask, concurrency: int, count: int, *, seeds: Iterator[int], drain: bool) -> Figures:
    """Run callers that send the next request as soon as they have an answer, until `count` calls have ended.

    Returns samples per second up to then, and p50 and p95 of those calls, in seconds. With `drain`, waits for the calls
    in progress; otherwise cancels them.
    """
    run = await load.closed(ask, concurrency, seeds, answers=count, drain=drain)
    counted = run.calls[:count]
    p50, p95 = np.percentile([ended - begun for begun, ended in counted], (50, 95)).tolist()
    return {"samples_per_second": count / counted[-1][1], "p50": p50, "p95": p95}


async def warm_up(ask: Ask, seeds: range) -> list[Answer]:
    """Return the answers to `seeds`, requested by 4 callers."""
    limit = asyncio.Semaphore(4)

    async def one(seed: int) -> Answer:
        async with limit:
            return await ask(seed)

    return list(await asyncio.gather(*(one(seed) for seed in seeds)))


def agreement(answers: list[Answer], expected: list[Answer]) -> Figures:
    """Compare the answers of two servers: label pixels, image values, scores."""

    pairs = list(zip(answers, expected, strict=True))
    return {
        "labels": float(np.mean([(a.label == b.label).mean() for a, b in pairs])),
        "image_largest": max(int(np.abs(a.image.astype(int) - b.image).max()) for a, b in pairs),
        "score_largest_relative": max(abs(a.js_score / b.js_score - 1.0) for a, b in pairs),
    }


class Measurement:
    """The measurements so far, written to disk after each turn."""

    def __init__(self, python: Path, seconds: float) -> None:
        self._python = python
        self._ends = time.monotonic() + seconds
        self._path = KEPT / "turns.json"
        KEPT.mkdir(parents=True, exist_ok=True)
        kept = json.loads(self._path.read_text()) if self._path.exists() else {"tried": {}, "rounds": []}
        self.tried: dict[str, list[Figures]] = kept["tried"]
        self.rounds: list[dict[str, Figures]] = kept["rounds"]

    def _keep(self) -> None:
        write_json(self._path, {"tried": self.tried, "rounds": self.rounds})
        if time.monotonic() > self._ends:
            raise OutOfTime

    async def run(self, rounds: int) -> None:
        """Try the settings, then measure the missing turns of `rounds` rounds."""
        for turn in TURNS[1:]:
            for candidate in CANDIDATES[len(self.tried.setdefault(turn, [])) :]:
                settings = self._settings(turn, dict(zip(("workers", "threads", "batch"), candidate, strict=True)))
                async with running(turn, settings, self._python) as ask:
                    await warm_up(ask, range(WARM_UP))
                    found = await closed_loop(ask, JUDGED, COUNTS[JUDGED], seeds=itertools.count(WARM_UP), drain=False)
                tried = {key: getattr(settings, key) for key in ("workers", "threads", "batch")}
                self.tried[turn].append(tried | found)
                print(f"tried {turn}: {tried} {found['samples_per_second']:.2f} samples/s", flush=True)
                self._keep()
        while True:
            if complete(self.rounds) == len(self.rounds):
                if len(self.rounds) >= rounds:
                    return
                self.rounds.append({})
            first = len(self.rounds) - 1  # labelmint begins the first round: its labels are the expected ones
            for turn in rotated(TURNS, first):
                if turn not in self.rounds[-1]:
                    self.rounds[-1][turn] = await self._turn(turn, first)
                    self._keep()

    def best(self, turn: str) -> Figures:
        """Return the settings with which a rival had the highest rate."""
        return max(self.tried[turn], key=lambda each: each["samples_per_second"])

    def _settings(self, turn: str, numbers: Figures) -> Settings:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return Settings(turn.split()[1], numbers["workers"], numbers["threads"], numbers["batch"], port)

    async def _turn(self, turn: str, number: int) -> Figures:
        settings = None if turn == OURS else self._settings(turn, self.best(turn))
        seeds = itertools.count(1000 * (number + 1))
        async with running(turn, settings, self._python) as ask:
            found: Figures = {"agreement": self._compared(turn, await warm_up(ask, range(WARM_UP)))}
            for concurrency, count in COUNTS.items():
                found[str(concurrency)] = await closed_loop(
                    ask, concurrency, count, seeds=seeds, drain=concurrency != JUDGED
                )
        rates = ", ".join(f"{found[str(c)]['samples_per_second']:.2f} at {c}" for c in COUNTS)
        print(f"round {number + 1}, {turn}: {rates} samples/s", flush=True)
        return found

    def _compared(self, turn: str, answers: list[Answer]) -> Figures:
        """Compare the answers with labelmint's. Raises SystemExit if labels differ: the work would not be the same."""
        path = KEPT / "expected.npz"
        if turn == OURS and not path.exists():
            np.savez(path, **{key: [getattr(each, key) for each in answers] for key in ("image", "label", "js_score")})
        with np.load(path) as kept:
            columns = (kept["image"], kept["label"], kept["js_score"].tolist())
        expected = [Answer(*each) for each in zip(*columns, strict=True)]
        found = agreement(answers, expected)
        if found["labels"] < AGREEMENT:
            raise SystemExit(f"{turn}: only {found['labels']:.4%} of the label pixels agree with labelmint's: {found}")
        return found


def complete(rounds: list[dict[str, Figures]]) -> int:
    """Return the number of rounds that have all turns."""
    return sum(all(turn in each for turn in TURNS) for each in rounds)


def summary(rounds: list[dict[str, Figures]]) -> Figures:
    """Return medians over the rounds: each server's figures, and labelmint's ratios to it and to the best of a kind."""

    def values(turn: str, concurrency: int, key: str) -> npt.NDArray[np.float64]:
        return np.array([each[turn][str(concurrency)][key] for each in rounds])

    servers: Figures = {}
    for turn in TURNS:
        rate = values(OURS, JUDGED, "samples_per_second") / values(turn, JUDGED, "samples_per_second")
        servers[turn] = {"agreement": rounds[0][turn]["agreement"], "labelmint_to_it": spread(rate)}
        for concurrency in COUNTS:
            servers[turn][str(concurrency)] = {
                key: spread(values(turn, concurrency, key)) for key in ("samples_per_second", "p50", "p95")
            }
    against: Figures = {}
    for kind in INTERPRETERS:
        turns = [turn for turn in TURNS if turn.endswith(kind)]
        rates = np.array([values(turn, JUDGED, "samples_per_second") for turn in turns])
        tails = np.array([values(turn, JUDGED, "p95") for turn in turns])
        against[kind] = {
            "best": turns[int(np.median(rates, axis=1).argmax())],
            "samples_per_second": spread(values(OURS, JUDGED, "samples_per_second") / rates.max(axis=0)),
            "p95": spread(values(OURS, JUDGED, "p95") / tails.min(axis=0)),
        }
    return {"servers": servers, "against": against}


def title(turn: str) -> str:
    return turn if turn == OURS else RIVALS[turn.split()[0]].title


def plot(found: Figures, path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    targets = [f"{times:g} ({kind})" for kind, times in TARGETS.items()]
    colours = {OURS: "tab:green", "reference": "tab:blue", "factored": "tab:gray"}
    # labelmint is at the top, then rivals with the published interpreter, then a rival with labelmint's module.
    for panel, key, label in (
        (panels[0], "samples_per_second", "samples a second"),
        (panels[1], "p95", "p95 of a call, s"),
    ):
        for row, turn in enumerate(TURNS):
            each = found["servers"][turn][str(JUDGED)][key]
            error = [[each["median"] - each["least"]], [each["most"] - each["median"]]]
            panel.barh(row, each["median"], xerr=error, color=colours[turn.split()[-1]], capsize=3, ecolor="black")
        ours = found["servers"][OURS][str(JUDGED)][key]["median"]
        for kind, times in TARGETS.items() if key == "samples_per_second" else [(OURS, 1.0)]:
            panel.axvline(ours / times, color=colours[kind], ls=":", lw=1.5)
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_title(f"the targets: rivals left of labelmint's divided by {' and '.join(targets)}", fontsize=9)
    panels[1].set_title("the target: rivals right of labelmint's", fontsize=9)
    panels[0].set_yticks(range(len(TURNS)), [" ".join([title(turn), *turn.split()[1:]]) for turn in TURNS], fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle(f"{JUDGED} callers; medians, least and most over the rounds", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the packages that the rivals use."""
    names = ["torch", *(each.distribution for each in RIVALS.values())]
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    told = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout
    return dict(zip(names, told.split(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the turn in which they end")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-rivals" / "bin" / "python", help="for rivals")
    arguments = parser.parse_args()
    if not arguments.python.exists():
        raise SystemExit(f"{arguments.python} does not exist: run `make rivals`")
    measurement = Measurement(arguments.python, arguments.seconds)
    try:
        asyncio.run(measurement.run(arguments.rounds))
    except OutOfTime:
        print(f"{complete(measurement.rounds)} of {arguments.rounds} rounds so far; run it again to resume")
        return
    found = {
        "rounds": len(measurement.rounds),
        "cores": CORES,
        "calls": {str(concurrency): count for concurrency, count in COUNTS.items()},
        "versions": versions(arguments.python),
        "settings": {turn: measurement.best(turn) for turn in TURNS[1:]},
        "tried": measurement.tried,
    } | summary(measurement.rounds)
    write_json(ROOT / "benchmarks" / "results" / "alternatives.json", found)
    plot(found, ROOT / "docs" / "images" / "alternatives.png")
    for turn in TURNS:
        each = found["servers"][turn]
        columns = (f"{each[str(concurrency)]['samples_per_second']['median']:8.2f}" for concurrency in COUNTS)
        print(f"{turn:<20}{''.join(columns)} samples/s, p95 at {JUDGED}: {each[str(JUDGED)]['p95']['median']:.2f} s")
    for kind, each in found["against"].items():
        rate, tail = (each[key]["median"] for key in ("samples_per_second", "p95"))
        print(f"against the best {kind}: {rate:.2f} times its samples per second, {tail:.2f} times its p95")


if __name__ == "__main__":
    main()
