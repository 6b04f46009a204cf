"""The native format: the interpreter's weights for our kernel, and every other file as in the format onnx."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from labelmint.core.errors import IncompatibleWeights
from labelmint.core.task import TaskName
from labelmint.export.modules import StyleInterpreterStep
from labelmint.export.native_export import export_native
from labelmint.export.repository import STEPS, export_repository
from labelmint.kernel import interpreter as kernel
from labelmint.kernel.interpreter import KernelUnavailable, compiled
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter
from labelmint.models.store import save_generator, save_interpreter
from labelmint.triton.artifacts import check_models
from labelmint.triton.model_config import check_artifacts, ensembles, read_config
from tests.conftest import need_program
from tests.support.models import files, random_interpreter, small

pytestmark = pytest.mark.torch


NATIVE = "tiny_style_interpreter"

Exported = Callable[[str], Path]  # the fixture `small_repository`


@pytest.fixture(autouse=True)
def _compiler() -> None:
    need_program("cc", "gcc")


@pytest.mark.parametrize("task", get_args(TaskName))
def test_the_kernel_answers_what_torch_answers(task: str) -> None:
    """The export compares them, at batch 1 and 3, and gives how far they are apart."""
    generator, _ = small()
    exported = export_native(StyleInterpreterStep(random_interpreter(generator, task)))
    assert exported.difference.pop("keypoints" if task == "keypoints" else "label") == 0.0
    assert all(difference < 1e-5 for difference in exported.difference.values())


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path, small_repository: Exported) -> None:
    export_repository(tmp_path, "tiny", small(), file_format="native")
    assert files(tmp_path) == files(small_repository("native"))
    with zipfile.ZipFile(tmp_path / NATIVE / "1" / "interpreter.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_only_the_interpreter_differs_from_onnx(small_repository: Exported) -> None:
    one, two = (files(small_repository(file_format)) for file_format in ("onnx", "native"))
    mine, theirs = f"{NATIVE}/1/interpreter.npz", f"{NATIVE}/1/model.onnx"
    assert set(two) == set(one) - {theirs} | {mine}
    differ = {name for name in set(one) & set(two) if one[name] != two[name]}
    assert differ == {f"{NATIVE}/config.pbtxt", "tiny/config.pbtxt"}, "of the fused ensemble the digest is another"
    config, other = (
        read_config(small_repository(file_format) / NATIVE / "config.pbtxt") for file_format in ("native", "onnx")
    )
    assert config.backend == "labelmint" and not config.HasField("dynamic_batching")
    assert (config.input, config.output, config.max_batch_size) == (other.input, other.output, other.max_batch_size)


def test_a_format_replaces_the_other(tmp_path: Path, small_repository: Exported) -> None:
    shutil.copytree(small_repository("onnx"), tmp_path, dirs_exist_ok=True)
    export_repository(tmp_path, "tiny", small(), file_format="native")
    assert len(list(tmp_path.rglob("model.onnx"))) == len(STEPS) - 1 and len(list(tmp_path.rglob("*.npz"))) == 1
    for name, config in ensembles(tmp_path).items():
        check_models(tmp_path, [name])
        check_artifacts(tmp_path, config)


def test_the_command_line_takes_the_format(tmp_path: Path) -> None:
    generator, interpreter = small()
    save_generator(tmp_path / "generator.safetensors", generator, {})
    save_interpreter(tmp_path / "interpreter.safetensors", interpreter, {})
    command = [sys.executable, "-m", "labelmint.cli", "export", "tiny", "--format", "native"]
    command += ["--generator", "generator.safetensors", "--interpreter", "interpreter.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model_repository" / NATIVE / "1" / "interpreter.npz").is_file()


def test_levels_that_the_kernel_cannot_read_are_refused() -> None:
    spec = InterpreterSpec("paper", 16, {8: 4, 16: 8}, 2, (4, 4), ("a", "b"), ((0, 0, 0), (1, 1, 1)))
    with pytest.raises(IncompatibleWeights, match=r"not those of .* levels \[4, 8\]; export it with `--format onnx`"):
        export_native(StyleInterpreterStep(StyleInterpreter(spec)))


def test_without_a_compiler_the_export_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "nonesuch-cc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel, "levels_here", tuple)  # as on a processor for which nothing is shipped
    compiled.cache_clear()
    kernel.library_here.cache_clear()
    _, interpreter = small()
    with pytest.raises(KernelUnavailable, match=r"no C compiler 'nonesuch-cc' .*run `apt install gcc libc6-dev`"):
        export_native(StyleInterpreterStep(interpreter))


def test_a_kernel_that_differs_from_torch_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provoked by a bias that is changed on its way into the file."""
    from labelmint.export import native_export

    arrays = native_export.arrays_of

    def tampered(interpreter: StyleInterpreter) -> dict[str, native_export.Array]:
        changed = arrays(interpreter)
        changed["bias3"] = changed["bias3"][:, ::-1].copy()
        return changed

    monkeypatch.setattr(native_export, "arrays_of", tampered)
    with pytest.raises(RuntimeError, match=r"differs from torch|values differ"):
        export_native(StyleInterpreterStep(small()[1]))
