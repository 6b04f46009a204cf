"""The interpreter's kernel in C: torch's answers, the same bits however they are computed, and what it refuses."""

import io
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from labelmint.core.calibration import SCORE_KINDS
from labelmint.export.modules import StyleInterpreterStep
from labelmint.export.native_export import export_native, weights_file
from labelmint.kernel import interpreter as labelmint_kernel
from labelmint.kernel.interpreter import (
    Array,
    Interpreter,
    KernelUnavailable,
    UnusableWeights,
    check_weights,
    compiled,
    levels_here,
    library_here,
    read_weights,
    shipped,
    shipped_file,
)
from tests.conftest import ROOT, need_program
from tests.support.interpreters import features_of, in_torch, random_step

pytestmark = pytest.mark.torch


KERNEL = Path(labelmint_kernel.__file__).parent

# Channels of the levels, heads, hidden widths and classes. None is a multiple of a vector; the third has levels of
# which the kernel keeps a window only, the last a level with more channels than it multiplies at once.
SHAPES = {
    "smallest": ({4: 3, 8: 4}, 2, (4, 4), 2),
    "odd": ({4: 3, 8: 4, 16: 5, 32: 7, 64: 2}, 3, (13, 6), 21),
    "windows": ({4: 3, 8: 4, 16: 5, 32: 7, 64: 2, 128: 3, 256: 5}, 2, (7, 5), 3),
    "ones": ({4: 1, 8: 1, 16: 1}, 2, (1, 1), 2),
    "deep": ({4: 300, 8: 4, 16: 513, 32: 257}, 2, (9, 5), 34),
}
TASKS = ("segmentation", "keypoints")


@pytest.fixture(autouse=True)
def _compiler() -> None:
    need_program("cc", "gcc")


def step_of(shape: str, task: str, score_kind: str = "sum") -> StyleInterpreterStep:
    channels, heads, hidden, classes = SHAPES[shape]
    return random_step(channels, heads, hidden, classes=classes, task=task, score_kind=score_kind)


def file_of(step: StyleInterpreterStep) -> io.BytesIO:
    return io.BytesIO(weights_file(step.interpreter))


def test_it_knows_the_score_kinds_of_the_exports() -> None:
    assert labelmint_kernel.SCORE_KINDS == SCORE_KINDS


@pytest.mark.parametrize("score_kind", SCORE_KINDS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_answers_what_torch_answers(shape: str, task: str, score_kind: str) -> None:
    step = step_of(shape, task, score_kind)
    exported = export_native(step)  # raises beyond the bars of every format
    assert exported.difference.pop("keypoints" if task == "keypoints" else "label") < 1e-4
    assert all(difference < 1e-5 for difference in exported.difference.values()), exported.difference


@pytest.fixture
def maps_as_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Return both maps, which every score is made of, in place of a score: in a sum, the last bits of pixels vanish."""
    monkeypatch.setattr(labelmint_kernel, "_score", lambda js_map, mean_entropy, kind: np.stack([js_map, mean_entropy]))


@pytest.mark.usefixtures("maps_as_score")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_bit_depends_on_threads_or_vectors(shape: str, task: str) -> None:
    step = step_of(shape, task)
    features = features_of(step, 0)
    variants = [
        Interpreter(file_of(step), threads, compiled(*defines))
        for threads, defines in (
            (1, ()),
            (2, ()),
            (7, ()),
            (1, ("-DLANES=4", "-DVECTORS=2")),
            (2, ("-DLANES=16", "-DVECTORS=4", "-DROWS=6")),
            (2, ("-DTILE=32",)),
        )
    ]
    want = variants[0].run(features)
    for variant in variants[1:]:
        for name, got in variant.run(features).items():
            assert got.tobytes() == want[name].tobytes(), name


@pytest.mark.usefixtures("maps_as_score")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_bit_depends_on_which_shipped_library_runs(shape: str, task: str) -> None:
    """On a processor without AVX-512, there is one library to run, and the digests below hold the other one."""
    step = step_of(shape, task)
    features = features_of(step, 0)
    levels = levels_here()
    assert levels[-1:] == (("x86-64-v3",) if platform.machine() == "x86_64" else ())
    answers = [
        Interpreter(file_of(step), threads, shipped(level)).run(features) for level in levels for threads in (1, 3)
    ]
    for answer in answers[1:]:
        for name, got in answer.items():
            assert got.tobytes() == answers[0][name].tobytes(), name


def test_the_shipped_libraries_come_from_this_source(tmp_path: Path) -> None:
    need_program(str(ROOT / ".venv-compiler" / "bin" / "python"), "ziglang, by `make compiler`")
    need_program("make", "make")
    subprocess.run(["make", "kernel", f"KERNEL={tmp_path}"], cwd=ROOT, check=True, timeout=300, capture_output=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made.keys() == {shipped_file(level).name for level in labelmint_kernel.SHIPPED}
    for name, data in made.items():
        assert (KERNEL / name).read_bytes() == data, f"{name} is not what `make kernel` compiles: run it and commit"
        assert len(data) < 200_000 and str(ROOT).encode() not in data


V3 = "fpu avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("machine", "flags", "levels"),
    [
        ("x86_64", V4, ("x86-64-v4", "x86-64-v3")),
        ("x86_64", V3, ("x86-64-v3",)),
        ("x86_64", V4.replace(" avx512vl", ""), ("x86-64-v3",)),
        ("x86_64", V3.replace(" fma", " fma4"), ()),
        ("aarch64", V4, ()),
    ],
)
def test_the_processor_chooses_the_library(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, levels: tuple[str, ...]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(labelmint_kernel, "_processor", lambda: ["vendor_id\t: X", f"flags\t\t: {flags}"])
    assert levels_here() == levels
    monkeypatch.setattr(labelmint_kernel, "shipped", lambda level: level)
    monkeypatch.setattr(labelmint_kernel, "compiled", lambda: "compiled here")
    assert library_here.__wrapped__() == (levels[0] if levels else "compiled here")


def test_neither_a_compiler_nor_a_cache_is_needed(tmp_path: Path) -> None:
    """Where a shipped library fits, as in the images, whose file system may be read-only."""
    assert levels_here(), "these tests run on such a processor"
    script = "from labelmint_kernel.interpreter import library_here as compiled, KernelUnavailable"
    assert in_a_process(tmp_path, script, CC="nonesuch-cc", XDG_CACHE_HOME=str(tmp_path / "cache")) == ""
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("task", TASKS)
def test_no_sample_leaves_a_trace_in_the_next(task: str) -> None:
    step = step_of("windows", task)
    kernel = Interpreter(file_of(step), 2)
    first = [kernel.run(features_of(step, seed)) for seed in range(3)]
    for seed in (2, 0, 1):
        for name, got in kernel.run(features_of(step, seed)).items():
            assert got.tobytes() == first[seed][name].tobytes(), name


def test_equal_votes_and_heats_go_to_the_first() -> None:
    """All heads agree on nothing: with weights of zero, all classes and all pixels are equal."""
    for task in TASKS:
        step = step_of("odd", task)
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.zero_()
        got = Interpreter(file_of(step)).run(features_of(step, 0))
        assert not got["label" if task == "segmentation" else "keypoints"].any()
        assert got["js_map"].max() < 1e-6


def test_logits_of_thousands_overflow_no_exponential() -> None:
    step = step_of("odd", "segmentation")
    with torch.no_grad():
        step.interpreter.weight3.mul_(1e4)
    got = Interpreter(file_of(step)).run(features_of(step, 0))
    assert np.isfinite(got["js_map"]).all() and got["js_map"].max() <= np.log(3) + 1e-5, "at most log of the heads"


@pytest.mark.parametrize("score_kind", SCORE_KINDS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", [0, 1, -1])
def test_one_feature_that_is_not_a_number_makes_the_score_none(level: int, task: str, score_kind: str) -> None:
    """As in torch, so that every gate rejects the sample; and nothing of it is left in the next one."""
    step = step_of("odd", task, score_kind)
    kernel = Interpreter(file_of(step), 2)
    features = features_of(step, 0)
    before = kernel.run(features)
    spoiled = [array.copy() for array in features]
    spoiled[level][0, 1, 2] = np.nan
    want, got = in_torch(step, spoiled), kernel.run(spoiled)
    assert np.isnan(got["js_score"]).all() and np.isnan(want["js_score"]).all()
    scale = kernel.resolution / features[level].shape[-1]
    position = (np.arange(kernel.resolution) + 0.5) / scale - 0.5
    touched = (abs(position - 1) < 1)[:, None] & (abs(position - 2) < 1)[None, :]  # what is interpolated from it
    assert np.isnan(got["js_map"])[touched].all()
    if level == -1:
        assert np.isnan(got["js_map"]).sum() == 1, "a pixel of the last level is of no other's concern"
    if task == "keypoints":
        assert np.isnan(got["confidence"]).all() and np.isnan(want["confidence"]).all()
    for name, after in kernel.run(features).items():
        assert after.tobytes() == before[name].tobytes(), name


@pytest.mark.parametrize("score_kind", SCORE_KINDS)
def test_an_infinite_output_of_a_head_gives_no_score(score_kind: str) -> None:
    """Of the class that is never chosen: its probability is 0, and 0 times infinity is no number."""
    step = step_of("odd", "segmentation", score_kind)
    with torch.no_grad():
        step.interpreter.bias3[1, 4] = -np.inf
    features = features_of(step, 0)
    want, got = in_torch(step, features), Interpreter(file_of(step)).run(features)
    assert np.isnan(want["js_score"]).all() and np.isnan(got["js_score"]).all()


@pytest.mark.parametrize("score_kind", ["sum", "mean_entropy"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_what_torch_has_no_number_for_the_kernel_has_none_for(value: float, task: str, score_kind: str) -> None:
    """Features that are no numbers, or so large that sums overflow: never a finite score where torch has NaN."""
    step = step_of("odd", task, score_kind)
    spoiled = [np.full_like(array, value) for array in features_of(step, 0)]
    want, got = in_torch(step, spoiled), Interpreter(file_of(step)).run(spoiled)
    assert np.isnan(want["js_score"]).all() and np.isnan(got["js_score"]).all()
    if task == "segmentation":
        assert got["label"].max() < 21


@pytest.mark.parametrize("task", TASKS)
def test_subnormal_numbers_count_as_zero(task: str) -> None:
    """They take a processor some 70 times as long. The caller's own arithmetic keeps them."""
    step = step_of("odd", task)
    with torch.no_grad():
        for name in ("bias1", "bias2", "bias3"):
            getattr(step.interpreter, name).zero_()
    kernel = Interpreter(file_of(step), 2)
    tiny = kernel.run([np.full_like(array, 1e-39) for array in features_of(step, 0)])
    zero = kernel.run([np.zeros_like(array) for array in features_of(step, 0)])
    assert {name: array.tobytes() for name, array in tiny.items()} == {n: array.tobytes() for n, array in zero.items()}
    assert np.float32(1e-39) * np.float32(0.5) > 0.0


def test_features_of_another_shape_are_refused() -> None:
    step = step_of("odd", "segmentation")
    kernel = Interpreter(file_of(step))
    features = features_of(step, 0)
    for wrong in (features[:-1], features[::-1], [array.astype(np.float64) for array in features]):
        with pytest.raises(ValueError, match="expected float32 features of the shapes"):
            kernel.run(wrong)
    strided = [np.asfortranarray(array) for array in features]
    assert kernel.run(strided)["js_map"].tobytes() == kernel.run(features)["js_map"].tobytes()


def arrays_of(shape: str = "odd") -> dict[str, Array]:
    return read_weights(file_of(step_of(shape, "segmentation")))


WRONG: Mapping[str, tuple[dict[str, Array | None], str]] = {
    "missing": ({"bias2": None}, "not those of an interpreter"),
    "unknown": ({"more": np.zeros(1)}, "not those of an interpreter"),
    "a level left out": ({"projection_16": None}, "not those of an interpreter"),
    "another type": ({"bias1": np.zeros((3, 13))}, r"has bias1 as float64 \[3, 13\], not float32 \[N, h1\]"),
    "another rank": ({"weight2": np.zeros((6, 13), np.float32)}, "has weight2 as float32"),
    "another size": ({"weight3": np.zeros((3, 21, 5), np.float32)}, r"has weight3 \[3, 21, 5\], which does not fit"),
    "empty": ({"projection_64": np.zeros((39, 0), np.float32)}, r"has projection_64 \[39, 0\]"),
    "one class": (
        {"weight3": np.zeros((3, 1, 6), np.float32), "bias3": np.zeros((3, 1), np.float32)},
        "has 1 classes; a label is one of 2 to 255",
    ),
    "task": ({"task": np.array("regression")}, "names the task 'regression'"),
    "score": ({"score_kind": np.array(["sum"])}, "names the score_kind"),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_refused(name: str) -> None:
    changes, message = WRONG[name]
    arrays = {**arrays_of(), **changes}
    with pytest.raises(UnusableWeights, match=message):
        check_weights({key: array for key, array in arrays.items() if array is not None})


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """Cut short anywhere, or with a byte changed anywhere: refused, or read as weights that fit."""
    data = file_of(step_of("smallest", "segmentation")).getvalue()
    rng = np.random.default_rng(0)
    damaged = [data[:length] for length in rng.integers(0, len(data), 200)]
    for position in rng.integers(0, len(data), 2000):
        damaged.append(data[:position] + bytes([data[position] ^ int(rng.integers(1, 256))]) + data[position + 1 :])
    refused = 0
    for each in damaged:
        try:
            check_weights(read_weights(io.BytesIO(each)))
        except UnusableWeights:
            refused += 1
    assert refused > 0.7 * len(damaged)
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, weight2=np.array([object()]))
    for other in (pickled, Path(__file__), tmp_path / "nonesuch.npz"):
        with pytest.raises(UnusableWeights, match="cannot be read as .npz"):
            read_weights(other)


def in_a_process(
    tmp_path: Path,
    imports: str = "from labelmint_kernel.interpreter import KernelUnavailable, compiled",
    **environment: str,
) -> str:
    """Compile or find the kernel in another process: what it says if it cannot, and else nothing."""
    script = f"{imports}\ntry:\n    compiled()\nexcept KernelUnavailable as error:\n    print(error)"
    # The name under which Triton's backend finds it, without the rest of the package.
    (tmp_path / "path").mkdir(exist_ok=True)
    if not (tmp_path / "path" / "labelmint_kernel").exists():
        (tmp_path / "path" / "labelmint_kernel").symlink_to(KERNEL)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / "path"), **environment}
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.stdout


def test_it_is_compiled_once_for_a_machine(tmp_path: Path) -> None:
    cache = tmp_path / "labelmint"
    assert in_a_process(tmp_path) == ""
    (kept,) = cache.iterdir()
    assert (cache.stat().st_mode & 0o777) == 0o700 and kept.suffix == ".so"
    before = kept.stat().st_mtime_ns
    assert in_a_process(tmp_path) == ""
    assert list(cache.iterdir()) == [kept] and kept.stat().st_mtime_ns == before
    assert in_a_process(tmp_path, CC="cc -DLANES=4") == ""
    assert len(list(cache.iterdir())) == 2, "another compiler or other flags: another kernel"


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    cache = tmp_path / "labelmint"
    cache.mkdir()
    cache.chmod(0o777)
    assert in_a_process(tmp_path) == ""
    assert not list(cache.iterdir())
    cache.rmdir()
    cache.write_text("a file")
    assert in_a_process(tmp_path) == ""


def test_without_a_compiler_it_says_what_to_do(tmp_path: Path) -> None:
    said = in_a_process(tmp_path, CC="nonesuch-cc")
    assert "no C compiler 'nonesuch-cc'" in said and said.endswith("run `apt install gcc libc6-dev`\n")
    said = in_a_process(tmp_path, CC="cc --nonesuch-option")
    assert "'cc' cannot compile the kernel: " in said and "nonesuch-option" in said
    assert not list((tmp_path / "labelmint").iterdir()), "nothing is left of a failure"
    assert issubclass(KernelUnavailable, OSError), "the command line prints it as one line"
