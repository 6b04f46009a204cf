"""`labelmint import`: which format a file is of, options that do not belong, and the command itself."""

import hashlib
from pathlib import Path

import pytest
import torch

from labelmint.checkpoints.importing import FORMATS, FormatName, ImportOptions, import_file
from labelmint.core.errors import InvalidRequest, UnusableFile
from labelmint.models.store import load_generator, read_notes
from tests.support.checkpoints import reference
from tests.support.checkpoints.writers import write_nvlabs
from tests.support.commands import run

pytestmark = pytest.mark.torch


@pytest.fixture
def network(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return write_nvlabs(tmp_path / "network.pkl", reference.Generator())


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_the_same_file_gives_the_same_bytes(tmp_path: Path, network: Path) -> None:
    for name in ("a", "b"):
        import_file(network, tmp_path / name, None, options=ImportOptions())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "content",
    [{}, [], {"state_dict": {}}, {"G": 1, "G_ema": 2}, {"g_ema": []}, {"model_state_dict": 3}, {"g_synthesis.x": 1}, 7],
)
def test_unknown_files_list_what_is_known(tmp_path: Path, content: object) -> None:
    with pytest.raises(UnusableFile, match=f"holds no network of a known format; known formats: {', '.join(FORMATS)}"):
        import_file(saved(tmp_path / "x.pt", content), tmp_path / "out", None, options=ImportOptions())


def test_ambiguous_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"g_ema": {}, "model_state_dict": {}})
    with pytest.raises(UnusableFile, match="could be any of rosinality-stylegan2, datasetgan-classifiers"):
        import_file(path, tmp_path / "out", "rosinality-stylegan2", options=ImportOptions())


def test_a_named_format_must_be_the_files(tmp_path: Path, network: Path) -> None:
    with pytest.raises(UnusableFile, match="is nvlabs-stylegan2, not stylegan1"):
        import_file(network, tmp_path / "out", "stylegan1", options=ImportOptions())
    with pytest.raises(UnusableFile, match="is a directory; stylegan1 is one file"):
        import_file(tmp_path, tmp_path / "out", "stylegan1", options=ImportOptions())


@pytest.mark.parametrize(
    ("format_name", "content", "options"),
    [
        ("nvlabs-stylegan2", None, ImportOptions(average_latent=Path("x"))),
        ("rosinality-stylegan2", {"g_ema": {}}, ImportOptions(class_index=0)),
        ("rosinality-stylegan2", {"g_ema": {}}, ImportOptions(layout="paper")),
        ("stylegan1", {"g_synthesis.torgb.weight": 0}, ImportOptions(generator=Path("x"))),
    ],
)
def test_options_without_use_are_refused(
    tmp_path: Path, network: Path, format_name: FormatName, content: object, options: ImportOptions
) -> None:
    path = network if content is None else saved(tmp_path / "x.pt", content)
    with pytest.raises(InvalidRequest, match=f": does not apply to {format_name} files"):
        import_file(path, tmp_path / "out", None, options=options)


def test_the_source_is_not_overwritten(network: Path) -> None:
    before = network.read_bytes()
    with pytest.raises(InvalidRequest, match="out: would overwrite the file that is imported"):
        import_file(network, network.parent / "." / network.name, None, options=ImportOptions())
    assert network.read_bytes() == before


def test_the_command(tmp_path: Path, network: Path) -> None:
    out = tmp_path / "sub" / "generator.safetensors"
    done = run("import", str(network), str(out))
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert done.stdout == f"{out}: generator of nvlabs-stylegan2, 16x16, z_dim 12, sha256 {digest}\n"
    assert load_generator(out).spec.resolution == 16
    assert read_notes(out)["source_sha256"] == hashlib.sha256(network.read_bytes()).hexdigest()


def test_the_command_says_what_is_wrong(tmp_path: Path, network: Path) -> None:
    out = str(tmp_path / "out.safetensors")
    for arguments, problem in (
        ((str(tmp_path / "nothing"), out), "does not exist"),
        ((str(network), out, "--class-index", "1"), "class_index: this generator has no classes"),
        ((str(tmp_path), out), "generator: classifiers need"),
    ):
        done = run("import", *arguments)
        assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not Path(out).exists()
