"""The attacks of `make torture`, by name: each gets an empty directory and returns its outcomes.

To add an attack, write a function here that returns outcomes, and add its name to ATTACKS.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from labelmint.export.repository import export_repository
from tests.conftest import REPOSITORY, ROOT, Service, start_service
from tests.support.checkpoints import reference
from tests.support.checkpoints.writers import nvlabs_bytes
from tests.support.models import tiny_weights
from tests.torture import (
    faults,
    files,
    floods,
    grpc_bytes,
    grpc_messages,
    http_bytes,
    identity,
    leavers,
    openapi,
    pickle_fuzz,
    repositories,
)
from tests.torture.outcome import Outcome

MODEL = "tiny"
# The number of damaged messages to each of labelmint's five RPCs, and of damaged requests to REST.
MESSAGES = 100_000
MUTATED_REQUESTS = 6_000
LEAVERS = 60_000
SAMPLES, SEEDS, FLOOD_SECONDS = 10_000, 1_000, 180.0
FUZZ_RUNS, FUZZ_SECONDS = 1_000_000, 60
EXAMPLES, OPENAPI_SECONDS = 30, 75


@contextlib.contextmanager
def serving(directory: Path, *arguments: str, repository: Path | None = None) -> Iterator[Service]:
    """Serve `repository`, or by default the small MODEL: many damaged requests are still valid, and it is fast.

    Its log has failures, not every request.
    """
    if repository is None:
        repository = directory / "repository"
        export_repository(repository, MODEL, tiny_weights())
    service = start_service(directory / "serve.log", "--log-level", "warning", *arguments, repository=repository)
    try:
        yield service
    finally:
        service.stop()


def attack_messages(directory: Path) -> list[Outcome]:
    # Messages that are still valid mostly request the same seeds. Without the cache, a third of the time would be
    # Triton's.
    with serving(directory, "--cache-bytes", str(100 << 20)) as service:
        return asyncio.run(grpc_messages.fuzz(service, MODEL, MESSAGES))


def attack_leavers(directory: Path) -> list[Outcome]:
    with serving(directory) as service:
        return [asyncio.run(leavers.leave(service, MODEL, LEAVERS))]


def attack_bytes(directory: Path) -> list[Outcome]:
    with serving(directory) as service:
        return [
            *asyncio.run(grpc_bytes.abuse(service, MODEL, 20)),
            *asyncio.run(http_bytes.abuse(service, MODEL, MUTATED_REQUESTS)),
        ]


def attack_openapi(directory: Path) -> list[Outcome]:
    with serving(directory, repository=REPOSITORY) as service:  # the hooks of schemathesis request the demo
        return [openapi.explore(service, directory, EXAMPLES, OPENAPI_SECONDS)]


def attack_files(directory: Path) -> list[Outcome]:
    generator = reference.Generator(channels={4: 2, 8: 2}, mapping={"num_layers": 1})
    tensors = {"g_synthesis.torgb.weight": torch.ones(3, 4, 64, 64)}
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(tensors, zipped)
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    weights = ROOT / "benchmarks" / "demo" / "weights"
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
    export_repository(repository, MODEL, tiny_weights())
    kinds = ["Triton killed"] * 5 + ["gateway killed"] * 3 + ["connections cut"] * 2
    return [Outcome("faults", SAMPLES, note=_told(faults.survive(directory, repository, SAMPLES, kinds, 500)))]


def attack_identity(directory: Path) -> list[Outcome]:
    return [Outcome("identity", SEEDS, note=_told(identity.same_everywhere(directory, SEEDS)))]


def attack_floods(directory: Path) -> list[Outcome]:
    found = asyncio.run(floods.flood(directory, FLOOD_SECONDS))
    return [Outcome("floods", found.outcomes.total(), found.judge(), _told(found.rows()))]


def _told(rows: list[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {figure}" for name, figure in rows)


def attack_pickles(directory: Path) -> list[Outcome]:
    return [pickle_fuzz.fuzz(directory, FUZZ_RUNS, FUZZ_SECONDS)]


def attack_repositories(directory: Path) -> list[Outcome]:
    return [repositories.run(directory)]


# The longest first.
ATTACKS: dict[str, Callable[[Path], list[Outcome]]] = {
    "floods": attack_floods,
    "messages": attack_messages,
    "identity": attack_identity,
    "pickles": attack_pickles,
    "openapi": attack_openapi,
    "faults": attack_faults,
    "bytes": attack_bytes,
    "leavers": attack_leavers,
    "repositories": attack_repositories,
    "files": attack_files,
}


def run(name: str) -> tuple[str, bool]:
    """Run an attack. Returns its rows, with a line below for each finding, and whether there are none.

    If the attack found something, its directory is kept for the logs.
    """
    started = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix=f"labelmint-torture-{name}-"))
    try:
        outcomes = ATTACKS[name](directory)
    except Exception as error:
        outcomes = [Outcome(name)]
        outcomes[0].found(f"{type(error).__name__}: {error}")
    lines = []
    for outcome in outcomes:
        seconds = f"{time.monotonic() - started:8.0f}" if outcome is outcomes[-1] else " " * 8
        lines.append(f"{outcome.attack:76} {outcome.tries:8} {len(outcome.findings):6} {seconds}  {outcome.note}")
        lines += [f"    {finding}" for finding in outcome.findings]
    clean = not any(outcome.findings for outcome in outcomes)
    if clean:
        shutil.rmtree(directory)
    else:
        lines.append(f"    its files and logs: {directory}")
    return "\n".join(lines), clean
