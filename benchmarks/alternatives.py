"""labelmint against what one would write instead: FastAPI, LitServe, BentoML and PyTriton over eager torch.

Rules of this file:
- Same weights, machine, outputs and load. Each rival is written as its own documentation advises (benchmarks/rivals/),
  with batching on; an answer is image, label and score as raw bytes, everywhere.
- A rival's interpreter is the published one (`reference`), and behind one of them labelmint's own torch module
  (`factored`). What labelmint is held to is the reference; the other shows what is left when a rival has our
  mathematics too.
- Each has the best of a few settings (workers, torch's threads in each, largest batch), which are tried first, and all
  have an allocator that spares eager torch its page faults (rivals/settings.py).
- One server runs at a time and is started anew for its turn; in each round all take a turn, in an order that changes.
  Before it is timed, its labels must be those of labelmint.
- The load is a closed loop from one process. A rate is taken from its start to the last call of a fixed number while
  callers go on asking, so that no server is judged by an end in which it has too little to do.
- A ratio is taken within a round, to the best rival of that round; what is told is the median over the rounds.

Rivals have an environment of their own: `make rivals` makes `.venv-rivals` (the extra `rivals` of pyproject.toml), or
name one with `--python`. Run it as `python benchmarks/alternatives.py` on an idle machine (half an hour); it writes
benchmarks/results/alternatives.json and docs/images/alternatives.png and prints a table. Turns are kept in
build/alternatives: what was interrupted, or stopped by `--seconds`, goes on. Remove it after a change.
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
JUDGED = 16  # the concurrency of the bars
WARM_UP = 8  # calls before, by 4 callers, whose labels are compared
AGREEMENT = 0.9999
START_SECONDS = 120.0
CORES = os.cpu_count() or 1
# Workers, torch's threads in each, largest batch. Small batches stay in a CPU's caches.
CANDIDATES = ((1, CORES, 16), (CORES, 1, max(2, 16 // CORES)), (CORES, 1, 2))
# What each protocol says of a server that has not started.
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
FACTORED_BEHIND = "pytriton"  # of the four the fastest with that module, when all were tried
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
    """The server of a turn until the block ends, once it answers; `settings` are a rival's."""
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
    """A rival's process and its children, until the block ends. What they say goes to build/alternatives/NAME.log."""
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
            # All of its group, which `start_new_session` made: some do not end their workers.
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


async def closed_loop(ask: Ask, concurrency: int, count: int, seeds: Iterator[int], drain: bool) -> Figures:
    """Callers that ask again as soon as they have their answer, until `count` calls have ended.

    Returns samples a second up to then, and p50 and p95 of those calls, in seconds. With `drain` the calls that are
    still under way are waited for, otherwise given up.
    """
    run = await load.closed(ask, concurrency, seeds, answers=count, drain=drain)
    counted = run.calls[:count]
    p50, p95 = np.percentile([ended - begun for begun, ended in counted], (50, 95)).tolist()
    return {"samples_per_second": count / counted[-1][1], "p50": p50, "p95": p95}


async def warm_up(ask: Ask, seeds: range) -> list[Answer]:
    """The answers to `seeds`, asked for by 4 callers."""
    limit = asyncio.Semaphore(4)

    async def one(seed: int) -> Answer:
        async with limit:
            return await ask(seed)

    return list(await asyncio.gather(*(one(seed) for seed in seeds)))


def agreement(answers: list[Answer], expected: list[Answer]) -> Figures:
    """How much the answers of a server are those of another: label pixels, image values, scores."""

    pairs = list(zip(answers, expected, strict=True))
    return {
        "labels": float(np.mean([(a.label == b.label).mean() for a, b in pairs])),
        "image_largest": max(int(np.abs(a.image.astype(int) - b.image).max()) for a, b in pairs),
        "score_largest_relative": max(abs(a.js_score / b.js_score - 1.0) for a, b in pairs),
    }


class Measurement:
    """What was measured so far, on disk after each turn."""

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
        """Try the settings, then measure what is missing of `rounds` rounds."""
        for turn in TURNS[1:]:
            for candidate in CANDIDATES[len(self.tried.setdefault(turn, [])) :]:
                settings = self._settings(turn, dict(zip(("workers", "threads", "batch"), candidate, strict=True)))
                async with running(turn, settings, self._python) as ask:
                    await warm_up(ask, range(WARM_UP))
                    found = await closed_loop(ask, JUDGED, COUNTS[JUDGED], itertools.count(WARM_UP), drain=False)
                tried = {key: getattr(settings, key) for key in ("workers", "threads", "batch")}
                self.tried[turn].append(tried | found)
                print(f"tried {turn}: {tried} {found['samples_per_second']:.2f} samples/s", flush=True)
                self._keep()
        while True:
            if complete(self.rounds) == len(self.rounds):
                if len(self.rounds) >= rounds:
                    return
                self.rounds.append({})
            first = len(self.rounds) - 1  # labelmint begins the first round: its labels are what is expected
            for turn in rotated(TURNS, first):
                if turn not in self.rounds[-1]:
                    self.rounds[-1][turn] = await self._turn(turn, first)
                    self._keep()

    def best(self, turn: str) -> Figures:
        """The settings with which a rival answered most."""
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
                found[str(concurrency)] = await closed_loop(ask, concurrency, count, seeds, concurrency != JUDGED)
        rates = ", ".join(f"{found[str(c)]['samples_per_second']:.2f} at {c}" for c in COUNTS)
        print(f"round {number + 1}, {turn}: {rates} samples/s", flush=True)
        return found

    def _compared(self, turn: str, answers: list[Answer]) -> Figures:
        """Labels that differ end the benchmark: what is not the same work is not compared."""
        path = KEPT / "expected.npz"
        if turn == OURS and not path.exists():
            np.savez(path, **{key: [getattr(each, key) for each in answers] for key in ("image", "label", "js_score")})
        with np.load(path) as kept:
            columns = (kept["image"], kept["label"], kept["js_score"].tolist())
        expected = [Answer(*each) for each in zip(*columns, strict=True)]
        found = agreement(answers, expected)
        if found["labels"] < AGREEMENT:
            raise SystemExit(f"{turn}: {found['labels']:.4%} of the label pixels are those of labelmint: {found}")
        return found


def complete(rounds: list[dict[str, Figures]]) -> int:
    """How many rounds have all turns."""
    return sum(all(turn in each for turn in TURNS) for each in rounds)


def summary(rounds: list[dict[str, Figures]]) -> Figures:
    """Medians over the rounds: of each server's figures, and of what labelmint is to it and to the best of a kind."""

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
    colours = {OURS: "tab:green", "reference": "tab:blue", "factored": "tab:gray"}
    # labelmint at the top, then the published interpreter, then ours inside of the others.
    for panel, key, label in (
        (panels[0], "samples_per_second", "samples a second"),
        (panels[1], "p95", "p95 of a call, s"),
    ):
        for row, turn in enumerate(TURNS):
            each = found["servers"][turn][str(JUDGED)][key]
            error = [[each["median"] - each["least"]], [each["most"] - each["median"]]]
            panel.barh(row, each["median"], xerr=error, color=colours[turn.split()[-1]], capsize=3, ecolor="black")
        ours = found["servers"][OURS][str(JUDGED)][key]["median"]
        bar = ours / 2 if key == "samples_per_second" else ours
        panel.axvline(bar, color="black", ls=":", lw=1)
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_title("the bar: rivals left of half of labelmint's", fontsize=9)
    panels[1].set_title("the bar: rivals right of labelmint's", fontsize=9)
    panels[0].set_yticks(range(len(TURNS)), [" ".join([title(turn), *turn.split()[1:]]) for turn in TURNS], fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle(f"{JUDGED} callers; medians, least and most over the rounds", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def versions(python: Path) -> dict[str, str]:
    """Of what the rivals run on."""
    names = ["torch", *(each.distribution for each in RIVALS.values())]
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    told = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout
    return dict(zip(names, told.split(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the turn in which they end")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-rivals" / "bin" / "python", help="of the rivals")
    arguments = parser.parse_args()
    if not arguments.python.exists():
        raise SystemExit(f"{arguments.python} does not exist: `make rivals` makes it")
    measurement = Measurement(arguments.python, arguments.seconds)
    try:
        asyncio.run(measurement.run(arguments.rounds))
    except OutOfTime:
        print(f"{complete(measurement.rounds)} of {arguments.rounds} rounds so far; run it again to go on")
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
        print(f"against the best {kind}: {rate:.2f} times its samples a second, {tail:.2f} times its p95")


if __name__ == "__main__":
    main()
