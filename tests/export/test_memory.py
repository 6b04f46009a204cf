"""The estimate of Triton's memory is above what real sessions need, not far above it, and follows the models' sizes."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
import triton_memory
from onnx import TensorProto, helper

from labelmint.cli import main
from labelmint.export.memory import ARENA_FACTOR, TRITON_BYTES, WEIGHT_COPIES, advice, live_bytes, needed_bytes
from labelmint.models.store import save_generator, save_interpreter
from labelmint.triton.model_config import read_config, write_config
from tests.conftest import REPOSITORY
from tests.support.models import files, small
from tests.support.repositories import copy_model

pytestmark = pytest.mark.torch

Export = Callable[..., list[str]]


def graph(*nodes: tuple[str, Sequence[str], str], outputs: Sequence[str]) -> onnx.ModelProto:
    """A model of element-wise operators. Its input `x` has 1,000 floats per sample, its weight `w` as many."""
    shape = ["batch", 1000]
    made = helper.make_graph(
        [helper.make_node(operator, inputs, [output]) for operator, inputs, output in nodes],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [helper.make_tensor("w", TensorProto.FLOAT, [1000], [0.0] * 1000)],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])


CHAIN = (("Relu", ["x"], "a"), ("Relu", ["a"], "b"), ("Relu", ["b"], "c"))
GRAPHS = {
    "a tensor ends with its last reader": (graph(*CHAIN, outputs=["c"]), 2),
    "one that is read again waits": (graph(*CHAIN, ("Add", ["x", "c"], "d"), outputs=["d"]), 3),
    "an output stays": (graph(*CHAIN, outputs=["a", "b", "c"]), 3),
    "one that nobody reads ends at once": (graph(("Relu", ["x"], "unread"), *CHAIN, outputs=["c"]), 2),
    "what depends on weights alone is no activation": (
        graph(("Relu", ["w"], "v"), ("Add", ["x", "v"], "a"), outputs=["a"]),
        2,
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("batch", [1, 7])
def test_tensors_are_counted_while_they_are_needed(name: str, batch: int) -> None:
    model, tensors = GRAPHS[name]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    assert live_bytes(copy, batch) == tensors * 4000 * batch


def test_a_size_that_the_file_does_not_determine_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not determine the size of 'a' at batch 3"):
        live_bytes(graph(("NonZero", ["x"], "a"), ("Relu", ["x"], "c"), outputs=["c"]), 3)


@pytest.mark.minutes
@pytest.mark.parametrize(("ensemble", "highest"), [("faces", 1.35), ("faces_staged", 1.6)])
def test_real_sessions_stay_below_the_estimate_and_not_far(ensemble: str, highest: float) -> None:
    """What the staged steps need depends on which of them run at the same moment, so a short run may need less."""
    measured = triton_memory.run(REPOSITORY, [ensemble], "--batches", "4", *triton_memory.BASE)["mebibytes"]
    assert measured < triton_memory.estimated(REPOSITORY, [ensemble]) < highest * measured


def altered(repository: Path, step: str, *, batch: int = 0, instances: int = 0) -> None:
    path = repository / step / "config.pbtxt"
    config = read_config(path)
    config.max_batch_size = batch or config.max_batch_size
    config.instance_group[0].count = instances or config.instance_group[0].count
    write_config(path, config)


def test_it_grows_with_batches_and_instances(tmp_path: Path, tiny_repository: Path) -> None:
    repository = Path(shutil.copytree(tiny_repository, tmp_path / "repository"))
    before, step = needed_bytes(repository, ["tiny"]), "tiny_style_interpreter"
    model = onnx.load(repository / step / "1" / "model.onnx")
    of_batch = live_bytes(model, 16)
    altered(repository, step, batch=32)
    assert needed_bytes(repository, ["tiny"]) - before == pytest.approx(ARENA_FACTOR * of_batch, rel=0.01)
    altered(repository, step, batch=16, instances=3)
    of_weights = WEIGHT_COPIES * (repository / step / "1" / "model.onnx").stat().st_size
    assert needed_bytes(repository, ["tiny"]) - before == pytest.approx(2 * (ARENA_FACTOR * of_batch + of_weights))


def test_it_grows_with_the_number_of_pixels(tiny_repository: Path, light_repository: Path) -> None:
    """The two models have 16x16 and 64x64 pixels, and as many channels at each level."""
    tiny, light = (
        live_bytes(onnx.load(repository / f"{name}_generator" / "1" / "model.onnx"), 16)
        for repository, name in ((tiny_repository, "tiny"), (light_repository, "light"))
    )
    assert 14 < light / tiny < 18


def test_a_step_of_two_ensembles_counts_once() -> None:
    """faces and faces_staged share the generator, faces and faces_keypoints share nothing."""
    faces, staged, keypoints = (
        needed_bytes(REPOSITORY, [name]) - TRITON_BYTES for name in ("faces", "faces_staged", "faces_keypoints")
    )
    assert needed_bytes(REPOSITORY, ["faces", "faces_keypoints"]) == TRITON_BYTES + faces + keypoints
    path = REPOSITORY / "faces_generator" / "1" / "model.onnx"
    generator = WEIGHT_COPIES * path.stat().st_size + ARENA_FACTOR * live_bytes(onnx.load(path), 16)
    both = needed_bytes(REPOSITORY, ["faces", "faces_staged"])
    assert both == pytest.approx(TRITON_BYTES + faces + staged - generator)


def mebibytes(repository: Path, *names: str) -> int:
    return -(-needed_bytes(repository, names) // 2**20)


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """The command `labelmint export` of `tiny` in this process. It returns the lines that it prints."""
    generator, interpreter = small()
    save_generator(tmp_path / "generator.safetensors", generator, {})
    save_interpreter(tmp_path / "interpreter.safetensors", interpreter, {})
    weights = [f"--{part}={tmp_path / f'{part}.safetensors'}" for part in ("generator", "interpreter")]

    def run(*options: str) -> list[str]:
        arguments = ["export", *weights, f"--model-repository={tmp_path / 'repository'}", *options, "tiny"]
        monkeypatch.setattr(sys, "argv", ["labelmint", *arguments])
        main()
        return capsys.readouterr().out.splitlines()

    return run


def test_export_prints_the_memory_with_and_without_the_staged_pipeline(export: Export, tmp_path: Path) -> None:
    *_, said = export()
    repository = tmp_path / "repository"
    both, fused = mebibytes(repository, "tiny", "tiny_staged"), mebibytes(repository, "tiny")
    assert fused < both
    assert said == (
        f"Triton needs up to {both} MiB on a CPU to serve tiny, tiny_staged; "
        f"{fused} MiB without the staged ensembles (--no-staged)"
    )
    before = files(repository)
    lines = export("--no-staged")
    assert lines[-1] == f"Triton needs up to {fused} MiB on a CPU to serve tiny"
    assert not any("staged" in line for line in lines)
    left = {"tiny", "tiny_generator", "tiny_style_interpreter"}
    assert {path.name for path in repository.iterdir()} == left
    wanted = {path: digest for path, digest in before.items() if path.split("/")[0] in left}
    assert files(repository) == wanted, "what is left has the same bytes"


def test_the_sentence_is_about_all_onnx_models_of_the_repository(tmp_path: Path, tiny_repository: Path) -> None:
    repository = Path(shutil.copytree(tiny_repository, tmp_path / "repository"))
    copy_model(repository, "tiny", "other")
    altered(repository, "other_generator", batch=8)  # its own size, which must be in the sum
    copy_model(repository, "tiny", "scripted")
    path = repository / "scripted_style_interpreter" / "config.pbtxt"
    path.write_text(path.read_text().replace('backend: "onnxruntime"', 'backend: "pytorch"'))
    said = advice(repository)
    assert said.startswith(f"Triton needs up to {mebibytes(repository, 'other', 'tiny', 'tiny_staged')} MiB ")
    assert " to serve other, tiny, tiny_staged; " in said
    assert f"; {mebibytes(repository, 'other', 'tiny')} MiB without" in said
    for name in ("tiny", "tiny_staged", "other"):
        shutil.rmtree(repository / name)
    assert advice(repository) == "", "nothing was measured of TorchScript"
