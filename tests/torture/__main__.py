"""`python -m tests.torture [NAME ...]`: the attacks at full length, and a table of what they found.

Without names all of them run, in the order of the table. It ends with 1 where one found something. A new attack is a
function here that returns outcomes, and its name in ATTACKS.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from labelmint.export.repository import export_repository
from tests.checkpoints import reference
from tests.checkpoints.writers import nvlabs_bytes
from tests.conftest import REPOSITORY, ROOT, Service, start_service
from tests.gateway.conftest import tiny_weights
from tests.torture import (
    faults,
    files,
    floods,
    grpc_bytes,
    grpc_messages,
    http_bytes,
    identity,
    openapi,
    pickle_fuzz,
    repositories,
)
from tests.torture.outcome import Outcome

MODEL = "faces"
# Each of our five RPCs is sent so many spoiled messages.
MESSAGES = 100_000
MUTATED_REQUESTS = 5_000
SAMPLES, SEEDS, FLOOD_SECONDS = 10_000, 1_000, 180.0
FUZZ_RUNS, FUZZ_SECONDS = 1_000_000, 150
EXAMPLES, OPENAPI_SECONDS = 30, 120


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[Service]:
    """The demo as `make serve` has it; its log tells what fails and not each request."""
    service = start_service(directory / "serve.log", "--log-level", "warning", repository=REPOSITORY)
    try:
        yield service
    finally:
        service.stop()


def attack_messages(directory: Path) -> list[Outcome]:
    with serving(directory) as service:
        return asyncio.run(grpc_messages.fuzz(service, MODEL, MESSAGES))


def attack_bytes(directory: Path) -> list[Outcome]:
    with serving(directory) as service:
        return [
            *asyncio.run(grpc_bytes.abuse(service, MODEL, 20)),
            *asyncio.run(http_bytes.abuse(service, MODEL, MUTATED_REQUESTS)),
        ]


def attack_openapi(directory: Path) -> list[Outcome]:
    with serving(directory) as service:
        return [openapi.explore(service, directory, EXAMPLES, OPENAPI_SECONDS)]


def attack_files(directory: Path) -> list[Outcome]:
    generator = reference.Generator(channels={4: 2, 8: 2}, mapping={"num_layers": 1})
    tensors = {"g_synthesis.torgb.weight": torch.ones(3, 4, 64, 64)}
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(tensors, zipped)
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    weights = ROOT / "service" / "labelmint" / "demo" / "weights"
    good = {
        "nvlabs": ("checkpoint", nvlabs_bytes({"G_ema": generator})),
        "zip": ("checkpoint", zipped.getvalue()),
        "legacy": ("checkpoint", legacy.getvalue()),
        "interpreter": ("interpreter", (weights / "interpreter.safetensors").read_bytes()),
    }
    outcomes = []
    for name, attack in (
        ("crafted", lambda room: files.crafted(room, True)),
        ("cut", lambda room: files.cut(good, room)),
    ):
        (directory / name).mkdir()
        outcomes.append(attack(directory / name))
    return outcomes


def attack_faults(directory: Path) -> list[Outcome]:
    repository = directory / "repository"
    export_repository(repository, "tiny", *tiny_weights())
    kinds = ["Triton killed"] * 5 + ["gateway killed"] * 3 + ["connections cut"] * 2
    return [told("faults", SAMPLES, lambda: faults.survive(directory, repository, SAMPLES, kinds, 500))]


def attack_identity(directory: Path) -> list[Outcome]:
    return [told("identity", SEEDS, lambda: identity.same_everywhere(directory, SEEDS))]


def attack_floods(directory: Path) -> list[Outcome]:
    found = asyncio.run(floods.flood(directory, FLOOD_SECONDS))
    note = "; ".join(f"{name}: {figure}" for name, figure in found.rows())
    return [Outcome("floods", found.outcomes.total(), found.judge(), note)]


def told(title: str, tries: int, attack: Callable[[], list[tuple[str, str]]]) -> Outcome:
    """Of an attack that raises what it finds and returns rows of figures."""
    outcome = Outcome(title, tries)
    try:
        outcome.note = "; ".join(f"{name}: {figure}" for name, figure in attack())
    except Exception as error:
        outcome.found(f"{type(error).__name__}: {error}")
    return outcome


def attack_pickles(directory: Path) -> list[Outcome]:
    return [pickle_fuzz.fuzz(directory, FUZZ_RUNS, FUZZ_SECONDS)]


def attack_repositories(directory: Path) -> list[Outcome]:
    return [repositories.run(directory)]


ATTACKS: dict[str, Callable[[Path], list[Outcome]]] = {
    "faults": attack_faults,
    "floods": attack_floods,
    "identity": attack_identity,
    "files": attack_files,
    "pickles": attack_pickles,
    "repositories": attack_repositories,
    "openapi": attack_openapi,
    "bytes": attack_bytes,
    "messages": attack_messages,
}


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - ATTACKS.keys())
    if unknown:
        print(f"no attack named {', '.join(unknown)}; known: {', '.join(ATTACKS)}", file=sys.stderr)
        return 2
    print(f"{'attack':64} {'tries':>8} {'found':>6} {'seconds':>8}  notes", flush=True)
    findings = 0
    for name in names or ATTACKS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="labelmint-torture-") as directory:
            outcomes = ATTACKS[name](Path(directory))
        for outcome in outcomes:
            seconds = f"{time.monotonic() - started:8.0f}" if outcome is outcomes[-1] else " " * 8
            print(
                f"{outcome.attack:64} {outcome.tries:8} {len(outcome.findings):6} {seconds}  {outcome.note}", flush=True
            )
            for finding in outcome.findings:
                print(f"    {finding}", flush=True)
            findings += len(outcome.findings)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
