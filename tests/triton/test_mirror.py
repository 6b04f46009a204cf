"""The repository that the child Triton gets: the user's models, and the kernel in the place of ONNX Runtime."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from labelmint.core.executor import Choice
from labelmint.export.repository import export_repository
from labelmint.kernel.interpreter import KernelUnavailable
from labelmint.triton import mirror as mirror_module
from labelmint.triton.mirror import Mirror
from labelmint.triton.model_config import read_config, write_config
from tests.support.models import files, tiny_weights
from tests.support.repositories import exchange

pytestmark = pytest.mark.torch

STEP = "tiny_style_interpreter"
ENSEMBLES = ["tiny", "tiny_staged"]


@pytest.fixture
def copy(second: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(second, tmp_path / "repository"))


def shown(copy: Path, executor: Choice = "kernel", ensembles: list[str] = ENSEMBLES) -> Path:
    directory = copy.parent / "shown"
    Mirror(copy, directory, executor, told=set()).show(ensembles)
    return directory


def content(directory: Path) -> dict[str, bytes]:
    """As Triton reads it, through the links."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.glob("*/**/*") if path.is_file()
    } | {f"{path.parent.name}/config.pbtxt": path.read_bytes() for path in directory.glob("*/config.pbtxt")}


def test_only_the_fused_interpreter_is_another(copy: Path) -> None:
    before = files(copy)
    directory = shown(copy)
    given, seen = content(copy), content(directory)
    steps = {
        step.model_name
        for name in ENSEMBLES
        for step in read_config(copy / name / "config.pbtxt").ensemble_scheduling.step
    }
    assert {path.name for path in directory.iterdir()} == {*ENSEMBLES, *steps}, "nothing of another model"
    own = {f"{STEP}/config.pbtxt", f"{STEP}/1/interpreter.json"}
    assert {name for name in seen if seen[name] != given.get(name)} == own
    assert seen.keys() - given.keys() == {f"{STEP}/1/interpreter.json"}
    assert files(copy) == before, "nothing is written into the repository"
    assert not any(path.is_symlink() for path in directory.iterdir())
    assert (
        sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink()) < 10_000
    )


def test_with_onnx_runtime_every_file_is_the_users(copy: Path) -> None:
    seen, given = content(shown(copy, "onnxruntime")), content(copy)
    assert seen and all(seen[name] == given[name] for name in seen)


def test_a_model_that_did_not_change_is_not_written_again(copy: Path) -> None:
    """Triton would load it again, and nothing of it would be served meanwhile."""
    directory = copy.parent / "shown"
    mirror = Mirror(copy, directory, "kernel", told=set())
    mirror.show(ENSEMBLES)
    paths = [directory, *directory.rglob("*")]
    before = [(path, path.lstat().st_mtime_ns, path.lstat().st_ino) for path in paths]
    mirror.show(ENSEMBLES)
    assert [(path, path.lstat().st_mtime_ns, path.lstat().st_ino) for path in paths] == before


def test_a_model_that_changed_is_shown_as_it_is(copy: Path, second: Path) -> None:
    directory = copy.parent / "shown"
    mirror = Mirror(copy, directory, "kernel", told=set())
    mirror.show(["tiny"])
    described = (directory / STEP / "1" / "interpreter.json").read_bytes()
    exchange(second, copy)
    mirror.show(["tiny"])
    assert (directory / STEP / "1" / "interpreter.json").read_bytes() != described
    generator, interpreter = tiny_weights()
    export_repository(copy, "tiny", (generator, interpreter), file_format="native")
    mirror.show(["tiny"])
    assert (directory / STEP / "1" / "interpreter.npz").exists(), "a link to the user's directory"
    assert not (directory / STEP / "1" / "interpreter.json").exists()
    shutil.rmtree(copy / STEP)
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()), "Triton still can list its models"


def test_what_is_left_to_onnx_runtime_is_said_once(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = read_config(copy / "other_style_interpreter" / "config.pbtxt")
    other.input[0].name = "renamed"
    write_config(copy / "other_style_interpreter" / "config.pbtxt", other)
    told: set[str] = set()
    with caplog.at_level(logging.WARNING):
        for start in ("first", "second"):
            Mirror(copy, copy.parent / start, "kernel", told=told).show(["other", "tiny"])
    said = [record.message for record in caplog.records]
    assert said == [
        "other_style_interpreter runs in ONNX Runtime and not in the kernel, which is faster: "
        "config.pbtxt declares other inputs than model.onnx reads"
    ]
    for start in ("first", "second"):
        configs = {
            name: read_config(copy.parent / start / f"{name}_style_interpreter" / "config.pbtxt")
            for name in ("other", "tiny")
        }
        assert {name: config.backend for name, config in configs.items()} == {
            "other": "onnxruntime",
            "tiny": "labelmint",
        }


def test_without_a_kernel_everything_is_left_to_onnx_runtime(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable() -> None:
        raise KernelUnavailable("no compiled kernel is shipped for this processor")

    monkeypatch.setattr(mirror_module, "library_here", unavailable)
    with caplog.at_level(logging.WARNING):
        seen = content(shown(copy, ensembles=["tiny"]))
    assert all(seen[name] == data for name, data in content(copy).items() if name in seen)
    (record,) = caplog.records
    assert record.message.endswith("which is faster: no compiled kernel is shipped for this processor")


def test_steps_of_other_backends_stay(copy: Path) -> None:
    torch.manual_seed(0)
    export_repository(copy, "tiny", tiny_weights(), file_format="torchscript", staged=False)
    seen, given = content(shown(copy, ensembles=["tiny"])), content(copy)
    assert all(seen[name] == given[name] for name in seen)
