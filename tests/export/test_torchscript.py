"""TorchScript, the second format: equal to torch to the bit, the same bytes every time, the repository of ONNX."""

import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from labelmint.core.calibration import SCORE_KINDS
from labelmint.core.errors import UnusableFile
from labelmint.core.task import TASKS
from labelmint.export import torchscript_export
from labelmint.export.modules import GeneratorStep, Step, TensorSpec, example_inputs
from labelmint.export.repository import STEPS, export_repository
from labelmint.export.torchscript_export import export_torchscript
from labelmint.models.generator import Generator
from labelmint.models.store import save_generator, save_interpreter
from labelmint.models.stylegan1 import StyleGAN1Spec
from labelmint.models.stylegan2 import StyleGAN2Spec
from labelmint.triton.artifacts import check_models
from labelmint.triton.model_config import check_artifacts, ensembles, read_config
from tests.conftest import ROOT
from tests.support.models import files, random_interpreter, small
from tests.support.processes import refused_start

pytestmark = [pytest.mark.triton, pytest.mark.torch]


Exported = Callable[[str], Path]  # the fixture `small_repository`
SMALL = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "resolution": 16, "channels": {4: 4, 8: 4, 16: 4}}


def step_of(name: str) -> Step:
    return STEPS[name](*small())


def load(data: bytes) -> torch.jit.ScriptModule:
    return torch.jit.load(io.BytesIO(data))


@pytest.mark.parametrize(
    "spec",
    [
        StyleGAN2Spec(**SMALL),
        StyleGAN2Spec(**SMALL, architecture="resnet", image_channels=1, resample_filter=(1.0, 2.0, 3.0, 2.0, 1.0, 1.0)),
        StyleGAN1Spec(**SMALL),
    ],
    ids=["stylegan2", "stylegan2-gray", "stylegan1"],
)
@pytest.mark.parametrize("task", list(TASKS))
def test_files_answer_what_torch_answers_to_the_bit(spec: StyleGAN2Spec | StyleGAN1Spec, task: str) -> None:
    """At batch 1 and 3, which the export compares: the batch is symbolic in the file."""
    torch.manual_seed(0)
    generator = Generator(spec).eval()
    interpreter = random_interpreter(generator, task)
    for name, build in STEPS.items():
        for interpreter.score_kind in SCORE_KINDS if name in ("style_interpreter", "uncertainty") else ("sum",):
            exported = export_torchscript(build(generator, interpreter))
            assert set(exported.difference.values()) == {0.0}, (name, interpreter.score_kind)


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", STEPS)
def test_the_contract_is_in_the_file(name: str) -> None:
    """Inputs by the names of forward's arguments, outputs by their place: what the native backend goes by."""
    step = step_of(name)
    loaded = load(export_torchscript(step).data)
    assert [argument.name for argument in loaded.forward.schema.arguments[1:]] == [spec.name for spec in step.inputs]
    outputs = loaded(*example_inputs(step, batch=2))
    assert isinstance(outputs, tuple)
    for spec, output in zip(step.outputs, outputs, strict=True):
        assert (output.dtype, tuple(output.shape)) == (spec.dtype, (2, *spec.shape)), spec.name


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path, small_repository: Exported) -> None:
    """In one process and in another one, elsewhere; nothing in the files names the machine."""
    export_repository(tmp_path / "two", "tiny", small(), file_format="torchscript")
    script = (
        "from pathlib import Path; from tests.support.models import small\n"
        "from labelmint.export.repository import export_repository\n"
        "export_repository(Path('three'), 'tiny', small(), file_format='torchscript')"
    )
    path = os.pathsep.join([str(ROOT), *sys.path])
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, timeout=300
    )
    assert files(small_repository("torchscript")) == files(tmp_path / "two") == files(tmp_path / "three")
    for file in (tmp_path / "two").rglob("model.pt"):
        data = file.read_bytes()
        assert b"labelmint" not in data and str(ROOT).encode() not in data
        with zipfile.ZipFile(file) as archive:
            assert not [name for name in archive.namelist() if "debug" in name]
            assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_only_the_files_and_their_backend_differ_from_onnx(small_repository: Exported) -> None:
    for name in STEPS:
        one, two = (
            read_config(small_repository(file_format) / f"tiny_{name}" / "config.pbtxt")
            for file_format in ("onnx", "torchscript")
        )
        assert (one.backend, two.backend) == ("onnxruntime", "pytorch")
        assert not two.HasField("dynamic_batching"), "seeds must not share a batch in libtorch"
        assert two.parameters["DISABLE_OPTIMIZED_EXECUTION"].string_value == "true"
        assert one.parameters["enable_mem_pattern"].string_value == "0", "a plan of memory takes twice the memory"
        two.backend = one.backend
        one.parameters.clear()
        two.parameters.clear()
        two.dynamic_batching.CopyFrom(one.dynamic_batching)
        assert one == two
    for name, config in ensembles(small_repository("torchscript")).items():
        other = read_config(small_repository("onnx") / name / "config.pbtxt")
        assert config.parameters["model_digest"] != other.parameters["model_digest"]
        del config.parameters["model_digest"], other.parameters["model_digest"]
        assert config == other


def test_a_format_replaces_the_other(tmp_path: Path, small_repository: Exported) -> None:
    shutil.copytree(small_repository("onnx"), tmp_path, dirs_exist_ok=True)
    export_repository(tmp_path, "tiny", small(), file_format="torchscript")
    assert not list(tmp_path.rglob("model.onnx")) and len(list(tmp_path.rglob("model.pt"))) == len(STEPS)
    for name, config in ensembles(tmp_path).items():
        check_models(tmp_path, [name])
        check_artifacts(tmp_path, config)


def test_a_damaged_file_is_refused_before_triton_starts(tmp_path: Path, small_repository: Exported) -> None:
    shutil.copytree(small_repository("torchscript"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tiny_generator" / "1" / "model.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "a file is damaged or was replaced" in refused_start("--model-repository", str(tmp_path))
    file.rename(file.with_name("model.onnx"))
    with pytest.raises(UnusableFile, match=r"model\.pt is missing"):
        check_artifacts(tmp_path, ensembles(tmp_path)["tiny"])


def test_the_command_line_takes_the_format(tmp_path: Path) -> None:
    generator, interpreter = small()
    save_generator(tmp_path / "generator.safetensors", generator, {})
    save_interpreter(tmp_path / "interpreter.safetensors", interpreter, {})
    command = [sys.executable, "-m", "labelmint.cli", "export", "tiny", "--format", "torchscript"]
    command += ["--generator", "generator.safetensors", "--interpreter", "interpreter.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("differs from torch by at most 0.0e+00") == len(STEPS)
    assert len(list((tmp_path / "model_repository").rglob("model.pt"))) == len(STEPS)


class Custom(Step):
    """A step of one input [B,2] and one output, whose mathematics the test gives."""

    inputs = (TensorSpec("latent", torch.float32, (2,)),)
    outputs = (TensorSpec("image", torch.float32, (2,)),)

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        return (self.function(latent),)


@pytest.mark.parametrize(
    "function",
    [lambda x: x if x.sum() > 0 else -x, lambda x: x if x.shape[0] == 1 else x * 2, lambda x: x * float(x.mean())],
    ids=["values", "batch", "number"],
)
def test_a_trace_that_would_forget_a_decision_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((torch.jit.TracerWarning, SystemError)) as raised:
        export_torchscript(Custom(function))
    assert "Converting a tensor to a Python" in repr((raised.value, raised.value.__cause__))


def test_a_trace_that_fixes_the_device_is_refused() -> None:
    """A range over the batch cannot be folded, and would stay on the CPU when the weights go to a GPU."""
    with pytest.raises(RuntimeError, match="the trace fixed a device"):
        export_torchscript(Custom(lambda x: x + torch.arange(x.shape[0], device=x.device)[:, None]))


def test_a_file_that_differs_from_torch_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provoked by weights that are changed on their way into the file."""
    clean = torchscript_export._clean

    def tampered(archive: bytes) -> bytes:
        changed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(changed, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                if "/constants/" in name and len(data) == 4 * 4 * 3 * 3 * 4:  # a convolution's weights
                    data = np.roll(np.frombuffer(data, np.float32), 1).tobytes()
                new.writestr(name, data)
        return clean(changed.getvalue())

    monkeypatch.setattr(torchscript_export, "_clean", tampered)
    with pytest.raises(RuntimeError, match=r"differs from torch|values differ"):
        export_torchscript(GeneratorStep(*small()))
