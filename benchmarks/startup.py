"""Where the time of a start goes: `labelmint serve` on the repository as committed, from the command to a sample.

Rules of this file:
- Moments are what the programs themselves log: the gateway's JSON lines and Triton's own log, both by this machine's
  clock. Only the command and the first sample are timed from here.
- Starts are warm: one before them, which does not count, has read all files.
- A figure is the median of the starts, of each phase by itself. The phases of one start add up to it.
- Imports are timed apart, in a process that does nothing else; they lie within the first phase.

Run it as `python benchmarks/startup.py` (two minutes); it writes benchmarks/results/startup.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import floor
import resuming
from load import spread
from resuming import ROOT, Figures
from serving import START_SECONDS

RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
REPOSITORY = ROOT / "model_repository"
MODEL = "faces"
BAR_SECONDS = 5.0  # from the command to ready
READY = re.compile(r"ready after \S+ s\. REST (http://[^ ]+) ")
TRITON_LINE = re.compile(r"[A-Z](\d{4} \d\d:\d\d:\d\d\.\d+) +\d+ \S+\] \"?(.*?)\"?$")
IMPORTS = "import labelmint.cli, labelmint.gateway.process.server"
# Each phase ends with a moment, and begins with the one before it; the first begins with the command.
PHASES = {
    "triton_launched": "Python starts, imports, and checks the repository",
    "models_begin": "Triton starts, until it loads a model",
    "models_loaded": "Triton loads and warms up the models",
    "triton_serves": "Triton opens its door",
    "gateway_ready": "the gateway sees it and opens its doors",
    "first_sample": "a first sample",
}
READY_PHASE = "gateway_ready"


def gateway_moments(lines: Iterable[str]) -> tuple[dict[str, float], str]:
    """Of the gateway's JSON lines: seconds since 1970 of what they tell, and the URL of REST."""
    moments, url = {}, ""
    for line in lines:
        if not line.startswith("{"):  # a library's own warning
            continue
        entry = json.loads(line)
        at = datetime.fromisoformat(entry["time"]).timestamp()
        if entry["message"].startswith("starting Triton"):
            moments["triton_launched"] = at
        elif found := READY.match(entry["message"]):
            moments["gateway_ready"], url = at, found[1]
    return moments, url


def triton_moments(lines: Iterable[str], year: int) -> dict[str, float]:
    """Of Triton's log, which tells no year and counts in UTC: seconds since 1970."""
    moments: dict[str, float] = {}
    for line in lines:
        if not (found := TRITON_LINE.match(line.rstrip("\n"))):
            continue
        at = datetime.strptime(f"{year} {found[1]}", "%Y %m%d %H:%M:%S.%f").replace(tzinfo=timezone.utc).timestamp()
        if found[2].startswith("loading: "):
            moments.setdefault("models_begin", at)
        elif found[2].startswith("successfully loaded "):
            moments["models_loaded"] = at
        elif found[2].startswith("Started GRPCInferenceService"):
            moments["triton_serves"] = at
    return moments


def phases(command: float, moments: dict[str, float]) -> Figures:
    """Seconds of each phase, and from the command to ready; raises ValueError where a moment is missing."""
    missing = [name for name in PHASES if name not in moments]
    if missing:
        raise ValueError(f"the logs do not tell {', '.join(missing)}")
    ends = [command, *(moments[name] for name in PHASES)]
    found = {name: end - begin for name, begin, end in zip(PHASES, ends, ends[1:], strict=False)}
    return {"phases": found, "ready": moments[READY_PHASE] - command}


def start() -> Figures:
    """One start, until its first sample has come."""
    with tempfile.TemporaryDirectory() as temporary:
        triton, log = Path(temporary) / "triton.log", Path(temporary) / "serve.log"
        command = [sys.executable, "-m", "labelmint.cli", "serve", "--model-repository", str(REPOSITORY)]
        command += ["--http-port", "0", "--grpc-port", "0", "--log-format", "json", "--triton-log", str(triton)]
        with log.open("w") as stream:
            begun = time.time()
            process = subprocess.Popen(command, stderr=stream)
        try:
            moments, url = {}, ""
            while not url:
                if process.poll() is not None or time.time() > begun + START_SECONDS:
                    raise SystemExit(f"labelmint serve did not become ready:\n{log.read_text()}")
                time.sleep(0.01)
                # The last line may be half written.
                moments, url = gateway_moments(log.read_text().rpartition("\n")[0].splitlines())
            path = f"{url}/v1/models/{MODEL}/samples/0?include_rejected=true"
            urllib.request.urlopen(path, timeout=START_SECONDS).read()
            moments["first_sample"] = time.time()
            moments |= triton_moments(triton.read_text().splitlines(), datetime.now(timezone.utc).year)
        finally:
            process.terminate()
            process.wait()
    return phases(begun, moments)


def imports() -> float:
    """Seconds of a process that imports what serving needs."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - begun


def summary(starts: list[Figures], imported: list[float]) -> Figures:
    return {
        "starts": len(starts),
        "cores": floor.available_cores(),
        "bar": BAR_SECONDS,
        "ready": spread([each["ready"] for each in starts]),
        "imports": spread(imported),
        "phases": {name: spread([each["phases"][name] for each in starts]) for name in PHASES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=5)
    arguments = parser.parse_args()
    start()
    starts, imported = [], []
    for _ in range(arguments.starts):
        imported.append(imports())
        starts.append(start())
        print(f"ready after {starts[-1]['ready']:.2f} s", flush=True)
    found = summary(starts, imported)
    resuming.write(RESULTS, found)
    for name, title in PHASES.items():
        print(f"{title}: {found['phases'][name]['median']:.2f} s")
    print(f"(imports alone: {found['imports']['median']:.2f} s)")
    print(f"ready after {found['ready']['median']:.2f} s of {found['starts']} starts; asked for: {BAR_SECONDS} s")


if __name__ == "__main__":
    main()
