"""Measures the phases of a start: `labelmint serve` on the committed repository, from the command to a first sample.

Rules of this file:
- Times come from the programs' logs: the gateway's JSON lines and Triton's log, both with this machine's clock. This
  file times only the command and the first sample.
- Starts are warm: an uncounted start before them has read all files.
- A figure is the median of the starts, for each phase separately. The phases of one start add up to its duration.
- Imports are timed separately, in a process that does nothing else; they are part of the first phase.

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
# Each phase ends at the named moment and begins at the previous one; the first begins with the command.
PHASES = {
    "triton_launched": "Python starts, imports, and checks the repository",
    "models_begin": "Triton starts, until it loads a model",
    "models_loaded": "Triton loads and warms up the models",
    "triton_serves": "Triton opens its port",
    "gateway_ready": "the gateway sees Triton and opens its ports",
    "first_sample": "the first sample",
}
READY_PHASE = "gateway_ready"


def gateway_moments(lines: Iterable[str]) -> tuple[dict[str, float], str]:
    """Return the moments in the gateway's JSON lines, in seconds since 1970, and the URL of REST."""
    moments, url = {}, ""
    for line in lines:
        if not line.startswith("{"):  # a warning of a library
            continue
        entry = json.loads(line)
        at = datetime.fromisoformat(entry["time"]).timestamp()
        if entry["message"].startswith("starting Triton"):
            moments["triton_launched"] = at
        elif found := READY.match(entry["message"]):
            moments["gateway_ready"], url = at, found[1]
    return moments, url


def triton_moments(lines: Iterable[str], year: int) -> dict[str, float]:
    """Return the moments in Triton's log in seconds since 1970. The log has no year, and its times are UTC."""
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
    """Return the seconds of each phase, and from the command to ready. Raises ValueError if a moment is missing."""
    missing = [name for name in PHASES if name not in moments]
    if missing:
        raise ValueError(f"the logs do not contain {', '.join(missing)}")
    ends = [command, *(moments[name] for name in PHASES)]
    found = {name: end - begin for name, begin, end in zip(PHASES, ends, ends[1:], strict=False)}
    return {"phases": found, "ready": moments[READY_PHASE] - command}


def start() -> Figures:
    """Measure one start, until its first sample has arrived."""
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
                # The last line may be incomplete.
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
    """Return the seconds of a process that imports the modules that serving needs."""
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
    print(f"ready after {found['ready']['median']:.2f} s of {found['starts']} starts; target: {BAR_SECONDS} s")


if __name__ == "__main__":
    main()
