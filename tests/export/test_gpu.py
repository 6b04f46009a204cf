"""The GPU format: the interpreter as a model of Triton's Python backend, the generator as ONNX with CUDA's settings.

Rules of this file:
- No machine of the suite has a GPU. `tests/triton/test_gpu_model.py` runs the exported model in a real Triton.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.errors import IncompatibleWeights, UnusableFile
from labelmint.export import gpu_export
from labelmint.export.gpu_export import FLAGS_FILE, export_gpu, pool_bytes, rehearsed
from labelmint.export.modules import StyleInterpreterStep
from labelmint.export.repository import export_repository
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter
from labelmint.models.store import save_generator, save_interpreter
from labelmint.models.tasks import build_interpreter
from labelmint.triton.artifacts import check_models
from labelmint.triton.model_config import GPU_FILES, check_artifacts, ensembles, read_config, write_config
from tests.conftest import ROOT
from tests.support.models import files, small
from tests.support.processes import refused_start

pytestmark = [pytest.mark.torch, pytest.mark.minutes]

STEP = "tiny_style_interpreter"
Exported = Callable[[str], Path]  # the fixture `small_repository`


def digest(repository: Path) -> str:
    return str(ensembles(repository)["tiny"].parameters["model_digest"].string_value)


@pytest.fixture
def copy(small_repository: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_repository("gpu"), tmp_path / "repository"))


def test_only_the_interpreter_and_the_settings_differ_from_native(small_repository: Exported) -> None:
    native, gpu = (files(small_repository(file_format)) for file_format in ("native", "gpu"))
    fused = ("tiny/", "tiny_generator/", f"{STEP}/")
    code = {f"{STEP}/1/{name}" for name in GPU_FILES if name.endswith(".py")}
    assert set(gpu) == {name for name in native if name.startswith(fused)} | code | {FLAGS_FILE}
    differ = {name for name in set(native) & set(gpu) if native[name] != gpu[name]}
    assert differ == {f"{name}config.pbtxt" for name in fused}


def test_everything_is_on_the_gpu_that_has_the_pool(small_repository: Exported) -> None:
    for name in ("tiny_generator", STEP):
        config = read_config(small_repository("gpu") / name / "config.pbtxt")
        (group,) = config.instance_group
        assert (group.kind, list(group.gpus), group.count) == (pb.ModelInstanceGroup.KIND_GPU, [0], 1)
        assert not config.HasField("dynamic_batching"), "a sample's bytes would depend on its batch"
        if name == STEP:
            assert config.backend == "python" and not config.model_warmup
            assert config.parameters["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"
            assert config.parameters["precision"].string_value == "float16"
        else:
            assert config.max_batch_size == 1
    assert ensembles(small_repository("gpu"))["tiny"].max_batch_size == 1


@pytest.mark.parametrize(("precision", "tf32"), [("float32", "0"), ("tf32", "1"), ("bfloat16", "1")])
def test_the_precision_reaches_both_steps_and_the_digest(
    small_repository: Exported, tmp_path: Path, precision: str, tf32: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_export, "compare", lambda *_: {})  # the files are those of the other export
    export_repository(tmp_path, "tiny", small(), file_format="gpu", precision=precision)
    assert read_config(tmp_path / STEP / "config.pbtxt").parameters["precision"].string_value == precision
    config = read_config(tmp_path / "tiny_generator" / "config.pbtxt")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, accelerator.parameters["use_tf32"]) == ("cuda", tf32)
    assert digest(tmp_path) != digest(small_repository("gpu"))
    one, two = files(tmp_path), files(small_repository("gpu"))
    assert {name for name in one if one[name] != two[name]} <= {
        *(f"{name}/config.pbtxt" for name in ("tiny", "tiny_generator", STEP)),
    }


@pytest.mark.parametrize("name", GPU_FILES)
def test_the_digest_covers_every_file(copy: Path, name: str) -> None:
    config = ensembles(copy)["tiny"]
    check_artifacts(copy, config)
    path = copy / STEP / "1" / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UnusableFile, match="model digest that does not match its steps"):
        check_artifacts(copy, config)
    path.unlink()
    with pytest.raises(UnusableFile, match=f"{name} is missing"):
        check_artifacts(copy, config)


def test_the_digest_covers_the_precision(copy: Path) -> None:
    config = read_config(copy / STEP / "config.pbtxt")
    config.parameters["precision"].string_value = "tf32"
    write_config(copy / STEP / "config.pbtxt", config)
    with pytest.raises(UnusableFile, match="model digest that does not match its steps"):
        check_artifacts(copy, ensembles(copy)["tiny"])


def test_the_gateways_own_triton_refuses_it_in_one_line(copy: Path) -> None:
    with pytest.raises(UnusableFile, match=r"as exports for GPUs do.*--triton-url.* or export the model .*onnx`"):
        check_models(copy, ["tiny"])
    said = refused_start("--model-repository", str(copy))
    assert f"{copy / STEP / 'config.pbtxt'} names the backend 'python'" in said and said.count("\n") <= 1


def test_the_pool_holds_two_samples_of_every_gpu_model(copy: Path, small_repository: Exported) -> None:
    """The sizes come from the configurations. One is changed here, so that they exceed Triton's default."""
    default = pool_bytes(copy)
    assert default == 64 << 20 and f"CUDA_MEMORY_POOL_BYTES={default}\n" in (copy / FLAGS_FILE).read_text()
    shipped = ROOT / "k8s" / "components" / "gpu-kernel" / FLAGS_FILE
    assert shipped.read_text() == (copy / FLAGS_FILE).read_text(), "the component's file is one that an export writes"
    config = read_config(copy / "tiny_generator" / "config.pbtxt")
    config.output[1].dims[:] = [100, 1024, 1024]
    write_config(copy / "tiny_generator" / "config.pbtxt", config)
    one = pool_bytes(copy)
    assert 0 <= one - 2 * 4 * 100 * 1024 * 1024 < 2 << 20
    shutil.copytree(copy / "tiny", copy / "second")
    assert 0 <= 2 * one - pool_bytes(copy) <= 1 << 20
    gpu_export.write_flags(copy)
    assert f"CUDA_MEMORY_POOL_BYTES={pool_bytes(copy)}\n" in (copy / FLAGS_FILE).read_text()
    assert pool_bytes(small_repository("native")) == 0 and gpu_export.advice(small_repository("native")) == ""


def test_another_format_in_its_place_needs_no_flags(copy: Path) -> None:
    export_repository(copy, "tiny", small(), file_format="native", staged=False)
    assert not (copy / FLAGS_FILE).exists()
    check_models(copy, ["tiny"])


def larger() -> StyleInterpreter:
    """An interpreter of 128x128 with other channels on each level."""
    channels = {4: 3, 8: 5, 16: 6, 32: 7, 64: 9, 128: 10}
    spec = InterpreterSpec("paper", 128, channels, 2, (4, 4), ("a", "b"), ((0, 0, 0), (1, 1, 1)))
    interpreter = build_interpreter(spec, "top10_mean")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in interpreter.parameters():
            parameter.normal_()
    return interpreter


def test_a_large_interpreter_is_compared_by_its_highest_levels() -> None:
    whole = larger()
    smaller = rehearsed(whole)
    assert dict(smaller.spec.channels) == {4: 6, 8: 7, 16: 9, 32: 10} and smaller.score_kind == "top10_mean"
    assert smaller.spec.resolution == 32 and smaller.projection["32"].equal(whole.projection["128"])
    assert smaller.weight3.equal(whole.weight3) and smaller.bias1.equal(whole.bias1)
    exported = export_gpu(StyleInterpreterStep(whole))
    assert exported.difference["js_map"] < 1e-5 and exported.difference["label"] == 0.0
    said = gpu_export.compared(whole)
    assert "on the CPU, at 32x32 with the weights of the highest levels" in said and said.endswith("no GPU has run it")


def test_an_interpreter_that_differs_from_torch_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provoked by a bias that is changed on its way into the file."""
    written = gpu_export.weights_file

    def tampered(interpreter: StyleInterpreter) -> bytes:
        changed = rehearsed(interpreter)
        with torch.no_grad():
            changed.bias3.copy_(changed.bias3.flip(1))
        return written(changed)

    monkeypatch.setattr(gpu_export, "weights_file", tampered)
    with pytest.raises(RuntimeError, match=r"differs from torch|values differ"):
        export_gpu(StyleInterpreterStep(small()[1]))


def test_what_the_kernel_cannot_run_is_refused() -> None:
    spec = InterpreterSpec("paper", 8, {4: 4, 8: 8}, 2, (4, 4), ("a", "b"), ((0, 0, 0), (1, 1, 1)))
    with pytest.raises(IncompatibleWeights, match=r"^the interpreter .*; export it with `--format onnx`$"):
        export_gpu(StyleInterpreterStep(StyleInterpreter(spec)))


def test_features_beyond_float16_are_refused(tmp_path: Path) -> None:
    generator, interpreter = small()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1e6)
    with pytest.raises(IncompatibleWeights, match=r"reach .*e\+\d\d, and float16 ends at 65504; .*`--precision tf32`"):
        export_repository(tmp_path, "tiny", (generator, interpreter), file_format="gpu")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    generator, interpreter = small()
    save_generator(tmp_path / "generator.safetensors", generator, {})
    save_interpreter(tmp_path / "interpreter.safetensors", interpreter, {})
    return tmp_path


def command(weights: Path, *options: str, before: str = "") -> subprocess.CompletedProcess[str]:
    script = f"import sys; {before}\nfrom labelmint.cli import main; main()"
    words = ["export", "tiny", "--generator", "generator.safetensors", "--interpreter", "interpreter.safetensors"]
    return subprocess.run(
        [sys.executable, "-c", script, *words, *options], cwd=weights, capture_output=True, text=True, timeout=300
    )


def test_the_command_says_what_it_compared_and_what_triton_needs(weights: Path) -> None:
    done = command(weights, "--format", "gpu", "--precision", "tf32")
    assert done.returncode == 0, done.stderr
    assert "style_interpreter: compared in float32 on the CPU, at 16x16; no GPU has run it\n" in done.stdout
    assert "Triton needs --cuda-memory-pool-byte-size=0:67108864 (64 MiB of GPU 0)" in done.stdout
    assert "staged" not in done.stdout and "on a CPU to serve" not in done.stdout
    config = read_config(weights / "model_repository" / STEP / "config.pbtxt")
    assert config.parameters["precision"].string_value == "tf32"


def test_a_precision_without_the_format_is_refused(weights: Path) -> None:
    done = command(weights, "--precision", "tf32")
    assert done.returncode == 2 and done.stderr == "labelmint: precision does not apply to --format onnx\n"


def test_without_triton_the_command_says_what_to_install(weights: Path) -> None:
    done = command(weights, "--format", "gpu", before="sys.modules['triton'] = None")
    assert done.returncode == 2 and not (weights / "model_repository" / STEP).exists()
    assert done.stderr.splitlines()[-1] == (
        "labelmint: `--format gpu` needs the compiler of the Triton language; run `pip install '.[gpu]'` in a clone of "
        "labelmint"
    )
