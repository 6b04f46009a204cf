"""A configuration that passes can be put into every answer; what cannot is refused where it is read, by its name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from labelmint.core.errors import UnusableFile
from labelmint.core.served_model import MalformedModel, read_served_model
from labelmint.gateway.process.own_triton import OwnTriton
from labelmint.gateway.process.settings import ServeSettings
from labelmint.triton.model_config import ensembles, read_config, write_config
from tests.conftest import REPOSITORY
from tests.support.repositories import accept

pytestmark = pytest.mark.torch


FACES = ensembles(REPOSITORY)["faces"]
NAMES = json.loads(FACES.parameters["class_names"].string_value)
PALETTE = json.loads(FACES.parameters["palette"].string_value)
CALIBRATION = json.loads(FACES.parameters["calibration"].string_value)
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def tiny_copy(tmp_path: Path, tiny_repository: Path) -> Path:
    return Path(shutil.copytree(tiny_repository, tmp_path / "repository"))


def calibration(**changed: object) -> tuple[str, str]:
    return "calibration", json.dumps({**CALIBRATION, **changed})


def names(first: object) -> tuple[str, str]:
    return "class_names", json.dumps([first, *NAMES[1:]])


def palette(first: object) -> tuple[str, str]:
    return "palette", json.dumps([first, *PALETTE[1:]])


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (palette([300, -1, 0]), "each must be within 0 and 255"),
        (palette([1.5, 0, 0]), "not three integers"),
        (palette([True, 0, 0]), "not three integers"),
        (palette([1, 2]), "not three integers"),
        (palette("abc"), "not three integers"),
        (("palette", "{}"), "palette is not a list"),
        (("palette", "[" * 50_000), "recursion"),
        (names(7), "has 7, which is not a printable name"),
        (names(None), "has None, which is not a printable name"),
        (names(""), "has '', which is not a printable name"),
        (names("a\nb"), "is not a printable name"),
        (names("\ud800"), "is not a printable name"),
        (names(NAMES[1]), "twice"),
        (("class_names", json.dumps("x" * len(NAMES))), "class_names is not a list"),
        (("num_ws", "0"), "num_ws is 0, not between 1"),
        (("num_ws", "99999999999"), "num_ws is 99999999999, not between 1"),
        (("num_heads", "-3"), "num_heads is -3, not between 1"),
        (("model_digest", 'a"b'), "model_digest is not a SHA-256"),
        (calibration(threshold=NAN), "threshold must be finite"),
        (calibration(truncation_psi=NAN), "truncation_psi must be within 0 and 2, not nan"),
        (calibration(threshold_quantile=7), "threshold_quantile must be within 0 and 1, not 7"),
        (calibration(seed_count="2000"), "seed_count must be an integer >= 1000, not '2000'"),
        (calibration(seed_count=3), "seed_count must be an integer >= 1000, not 3"),
        (calibration(first_seed=-1), "first_seed must be an integer >= 0"),
        (calibration(first_seed=1.5), "first_seed must be an integer >= 0"),
        (calibration(quantiles=CALIBRATION["quantiles"][::-1]), "finite and ascending"),
        (calibration(quantiles=[NAN] * 101), "finite and ascending"),
        (calibration(quantiles=["1"] * 101), ""),
        (calibration(quantiles=[10**400] * 101), ""),
        (calibration(nonesuch=1), "nonesuch"),
        (("calibration", "[]"), ""),
    ],
)
def test_a_parameter_that_no_answer_can_carry(entry: tuple[str, str], problem: str) -> None:
    config = ensembles(REPOSITORY)["faces"]
    name, text = entry
    config.parameters[name].string_value = text
    with pytest.raises(MalformedModel, match=f"model 'faces': .*{problem}.*export it again"):
        read_served_model(config, "1")


@pytest.mark.parametrize(("tensor", "size"), [("image", 0), ("image", 1 << 40), ("latent", 0), ("latent", 65)])
def test_a_size_that_no_model_has(tensor: str, size: int) -> None:
    config = ensembles(REPOSITORY)["faces"]
    (found,) = [each for each in (*config.input, *config.output) if each.name == tensor]
    found.dims[0] = size
    with pytest.raises(MalformedModel, match=f"{tensor}.*{size}"):
        read_served_model(config, "1")
    del found.dims[:]
    with pytest.raises(MalformedModel):
        read_served_model(config, "1")


def test_a_label_is_bytes() -> None:
    config = ensembles(REPOSITORY)["faces"]
    (found,) = [each for each in config.output if each.name == "label"]
    found.data_type = 11  # float32
    with pytest.raises(MalformedModel, match="output label is not TYPE_UINT8"):
        read_served_model(config, "1")


def test_our_own_triton_is_not_started_on_it(tiny_copy: Path) -> None:
    path = tiny_copy / "tiny" / "config.pbtxt"
    config = read_config(path)
    config.parameters["palette"].string_value = "[[300, -1, 0], [0, 0, 0]]"
    write_config(path, config)
    with pytest.raises(UnusableFile, match="config.pbtxt is malformed: .*each must be within 0 and 255"):
        OwnTriton(ServeSettings(model_repository=tiny_copy))
    done = calibrate(tiny_copy)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "within 0 and 255" in done.stderr


def calibrate(repository: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "labelmint.cli", "calibrate", "tiny", "--model-repository", str(repository)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_a_model_that_gives_no_numbers_is_not_calibrated(tiny_copy: Path) -> None:
    interpreter = tiny_copy / "tiny_style_interpreter" / "1" / "model.onnx"
    graph = onnx.load(interpreter)
    for tensor in graph.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.raw_data:
            tensor.raw_data = np.full(len(tensor.raw_data) // 4, NAN, np.float32).tobytes()
    onnx.save(graph, interpreter)
    accept(tiny_copy, "tiny")
    path = tiny_copy / "tiny" / "config.pbtxt"
    before = path.read_bytes()
    done = calibrate(tiny_copy, "--preview", "--count", "3")
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("labelmint: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tiny returns JS scores that are not finite, for 3 of 3 seeds, the first one 4100000000: its weights" in said
    assert path.read_bytes() == before


def test_a_try_out_is_no_calibration(tiny_copy: Path) -> None:
    path = tiny_copy / "tiny" / "config.pbtxt"
    before = path.read_bytes()
    few = calibrate(tiny_copy, "--count", "999")
    assert few.returncode == 2 and few.stderr == (
        "labelmint: count: a calibration needs at least 1000 seeds; --preview measures fewer and writes nothing\n"
    )
    done = calibrate(tiny_copy, "--count", "4", "--preview")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("preview of 4 seeds, JS in nats (score kind sum) by quantile: 0: ") and "0.9: " in first
    assert second == "no gate was set, nothing was written"
    assert path.read_bytes() == before
