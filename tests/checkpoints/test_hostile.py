"""Hostile, damaged and cut-off files: one error each, nothing run, nothing written, memory bounded.

The files are imported in a child process whose address space is limited, whose every audit event is recorded, and
whose working directory is empty: what a file makes it do, shows.
"""

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.support.checkpoints import reference
from tests.support.checkpoints.damage import DAMAGE
from tests.support.checkpoints.hostile import CASES
from tests.support.checkpoints.writers import nvlabs_bytes, write_nvlabs

pytestmark = pytest.mark.torch


CHILD = ROOT / "tests" / "checkpoints" / "import_watched.py"
FLIPS = 120
CUTS = 60
# What safetensors and the store do to write a generator that was read.
WRITING = {"object.__setattr__", "os.mkdir", "os.rename"}


def watched(directory: Path) -> dict[str, dict[str, Any]]:
    """Import every file of `directory/in` in a watched process: name to {"outcome", "message", "events", "mended"}."""
    (directory / "work").mkdir()
    done = subprocess.run(
        [sys.executable, str(CHILD), str(directory / "in"), str(directory / "out")],
        cwd=directory / "work",
        env={"PYTHONPATH": f"{ROOT / 'service'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((directory / "work").iterdir()) == [], "a file wrote something"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "in").mkdir()
    for name, (content, _) in CASES.items():
        (directory / "in" / name).write_bytes(content)
    found = watched(directory)
    assert not (directory / "out").exists(), "something was written"
    return found


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_refused(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["outcome"] == "UnusableFile", outcome
    assert CASES[name][1] in outcome["message"]
    assert len(outcome["message"]) < 1000 and "\n" not in outcome["message"]
    assert outcome["events"] == []


def test_memory_stays_bounded(outcomes: dict[str, dict[str, Any]]) -> None:
    """The child's limit is 2 GiB above what it starts with; no file came near it."""
    assert max(outcome["megabytes"] for outcome in outcomes.values()) < 600


@pytest.fixture(scope="module")
def good_files() -> dict[str, bytes]:
    torch.manual_seed(3)
    generator = reference.Generator(channels={4: 4, 8: 3}, mapping={"num_layers": 1})
    tensors = {"g_synthesis.torgb.weight": torch.ones(3, 4, 1, 1), "name": torch.arange(4).half()}
    zip_format, legacy_format = io.BytesIO(), io.BytesIO()
    torch.save(tensors, zip_format)
    torch.save(tensors, legacy_format, _use_new_zipfile_serialization=False)
    return {
        "nvlabs": nvlabs_bytes({"G_ema": generator}),
        "nvlabs3": nvlabs_bytes({"G_ema": generator}, protocol=3),
        "zip": zip_format.getvalue(),
        "legacy": legacy_format.getvalue(),
    }


def test_declared_sizes_take_no_memory(tmp_path: Path) -> None:
    """Networks whose attributes ask for more than is in the file; the last one for 80 GB, to measure its average."""
    (tmp_path / "in").mkdir()
    wanted = {name: DAMAGE[name] for name in ("1e9 layers", "1e15 layers", "1e29 layers", "1e15 latents")}
    for name, (damage, _) in wanted.items():
        network = reference.Generator()
        damage(network)
        write_nvlabs(tmp_path / "in" / name, network)
    mapping = {"num_layers": 2, "layer_features": 1_000_000, "w_avg_beta": None}
    wide = reference.Generator(z_dim=1, w_dim=1, channels={4: 1, 8: 1}, mapping=mapping)
    write_nvlabs(tmp_path / "in" / "wide", wide)
    wanted["wide"] = (None, "has no average latent and a mapping 1000000 wide")
    found = watched(tmp_path)
    for name, (_, problem) in wanted.items():
        assert found[name]["outcome"] == "UnusableFile" and problem in found[name]["message"], (name, found[name])
        assert found[name]["megabytes"] < 200
    assert not (tmp_path / "out").exists()


def spoiled(
    good: dict[str, bytes], directory: Path, spoil: Callable[[bytes, random.Random], bytes], count: int
) -> Path:
    rng = random.Random(20)
    (directory / "in").mkdir()
    for kind, content in good.items():
        for number in range(count):
            (directory / "in" / f"{kind} {number}").write_bytes(spoil(content, rng))
    return directory


def test_cut_off_files_are_refused(good_files: dict[str, bytes], tmp_path: Path) -> None:
    found = watched(spoiled(good_files, tmp_path, lambda data, rng: data[: rng.randrange(len(data))], CUTS))
    assert len(found) == CUTS * len(good_files)
    for name, outcome in found.items():
        assert outcome["outcome"] == "UnusableFile", (name, outcome)
        assert outcome["events"] == []
    assert not (tmp_path / "out").exists()


def flipped(data: bytes, rng: random.Random) -> bytes:
    """One to four bits, half of the time in the first tenth, where the structure is."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(data) if rng.random() < 0.5 else len(data) // 10)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_flipped_bits_give_an_error_or_other_numbers(good_files: dict[str, bytes], tmp_path: Path) -> None:
    directory = spoiled(good_files, tmp_path, flipped, FLIPS)
    (directory / "in" / "0 good").write_bytes(good_files["nvlabs"])  # the first that is built: torch loads its parts
    found = watched(directory)
    assert found.pop("0 good")["outcome"] == "imported"
    assert len(found) == FLIPS * len(good_files)
    for name, outcome in found.items():
        assert outcome["outcome"] in ("UnusableFile", "InvalidRequest", "imported"), (name, outcome)
        done = {event.split()[0] for event in outcome["events"]}
        assert done <= (WRITING if outcome["outcome"] == "imported" else set()), (name, outcome)
    outcomes = [outcome["outcome"] for name, outcome in found.items() if name.startswith("nvlabs ")]
    assert "imported" in outcomes and "UnusableFile" in outcomes
