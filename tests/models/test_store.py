"""Weights on disk: whole, named, and the same bytes for the same tensors."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from labelmint.core.errors import UnusableFile
from labelmint.models.generator import Generator
from labelmint.models.store import load_generator, load_interpreter, read_notes, save_generator, save_interpreter
from labelmint.models.stylegan2 import StyleGAN2Spec
from tests.conftest import ROOT
from tests.support.interpreters import interpreter
from tests.torture.files import generator_file

pytestmark = pytest.mark.torch


SPEC = StyleGAN2Spec(z_dim=8, w_dim=8, mapping_layers=2, resolution=16, channels={4: 8, 8: 8, 16: 4})


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(SPEC)


def test_generator_returns_as_it_was(tmp_path: Path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator, {"psnr_db": 26.5})
    loaded = load_generator(path)
    assert loaded.spec == SPEC
    assert read_notes(path) == {"psnr_db": 26.5}
    for name, value in generator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_interpreter_returns_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "interpreter.safetensors"
    built = interpreter()
    save_interpreter(path, built, {})
    loaded = load_interpreter(path, "top10_mean")
    assert loaded.spec == built.spec and loaded.score_kind == "top10_mean"
    for name, value in built.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_same_tensors_same_bytes(tmp_path: Path, generator: Generator) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_generator(first, generator, {"x": 1})
    save_generator(second, generator, {"x": 1})
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda tensors: tensors.pop("synthesis.const"), "lacks the tensor 'synthesis.const'"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "has an unexpected tensor 'extra'"),
        (
            lambda tensors: tensors.update({"synthesis.const": torch.zeros(2, 4, 4)}),
            r"has 'synthesis.const' of shape \(2, 4, 4\), expected \(8, 4, 4\)",
        ),
        (lambda tensors: tensors["mapping.w_avg"].fill_(float("nan")), "has NaN or infinity in 'mapping.w_avg'"),
    ],
)
def test_damage_is_named(tmp_path: Path, generator: Generator, damage: object, problem: str) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator, {})
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    damage(tensors)  # type: ignore[operator]
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(UnusableFile, match=problem):
        load_generator(path)


def test_wrong_files_are_named(tmp_path: Path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    with pytest.raises(UnusableFile, match="does not exist"):
        load_generator(path)
    save_generator(path, generator, {})
    with pytest.raises(UnusableFile, match="holds a stylegan2, not a style_interpreter"):
        load_interpreter(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnusableFile, match="is not a whole safetensors file"):
        load_generator(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UnusableFile, match="was not written by labelmint"):
        load_generator(path)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        # With less care these would be refused too, by the allocator: what a file lacks is said before it is asked.
        ({"z_dim": 10**10}, "lacks the tensor 'mapping.layers.0.bias'"),
        ({"channels": {"4": 10**6, "8": 10**6}}, "lacks the tensor 'mapping.layers.0.bias'"),
        ({"channels": {"4": 10**10, "8": 10**10}}, "from which no network can be built"),
        ({"mapping_layers": 10**9}, "1 to 64 layers"),
        ({"z_dim": -1}, "from which no network can be built"),
    ],
)
def test_declared_sizes_take_no_memory_until_they_are_true(
    tmp_path: Path, spec: dict[str, object], problem: str
) -> None:
    path = tmp_path / "generator.safetensors"
    path.write_bytes(generator_file(**spec))
    with pytest.raises(UnusableFile, match=problem):
        load_generator(path)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"resolution": 1 << 40}, "8 to 4096 pixels per side"),
        ({"channels": {"4": 10**10}}, "has an unexpected tensor 'projection.16'"),
        ({"channels": {str(1 << 40): 4}}, "features of at most as many"),
        ({"channels": {str(r): 4 for r in range(1, 2000)}, "resolution": 4096}, "4, 8, 16, ... pixels per side, not 1"),
        ({"num_heads": 10**15}, "has 'bias1' of shape"),
        ({"hidden": [10**12, 10**12]}, "from which no network can be built"),
        ({"hidden": [float("inf"), 1]}, "from which no network can be built"),
        ({"channels": {"4": float("inf")}}, "from which no network can be built"),
    ],
)
def test_an_interpreter_declares_no_more_than_it_has(tmp_path: Path, spec: dict[str, object], problem: str) -> None:
    path = tmp_path / "interpreter.safetensors"
    save_interpreter(path, interpreter(), {})
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["labelmint"])
    header["spec"] |= spec
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata | {"labelmint": json.dumps(header)})
    with pytest.raises(UnusableFile, match=problem):
        load_interpreter(path)


def test_one_mechanism_builds_what_files_declare() -> None:
    """A `Generator(...)` of a file's spec elsewhere would take memory before the file was compared with it."""
    holders = [ROOT / "service" / "labelmint" / "models" / "store.py"]
    holders += (ROOT / "service" / "labelmint" / "checkpoints").glob("*.py")
    built = [line.strip() for path in holders for line in path.read_text().splitlines() if " Generator(" in line]
    assert len(built) == 2 and all("build_module(path, lambda: Generator(spec), " in line for line in built)
