"""DatasetGAN classifiers: the released ensemble end to end from features, and directories that are not one."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from labelmint.checkpoints.classifiers import numbered_classes
from labelmint.checkpoints.importing import ImportOptions, import_file
from labelmint.core.errors import IncompatibleWeights, InvalidRequest, UnusableFile
from labelmint.export.native_export import weights_file
from labelmint.kernel.interpreter import read_weights
from labelmint.models.annotations import write_json
from labelmint.models.generator import Generator
from labelmint.models.interpreter import StyleInterpreter, interleave
from labelmint.models.store import load_interpreter, read_notes, save_generator
from labelmint.models.stylegan1 import StyleGAN1Spec
from labelmint.models.stylegan2 import StyleGAN2Spec
from tests.support.interpreted import label
from tests.support.vectors import Vectors, vectors

pytestmark = pytest.mark.torch


LEVELS = (4, 8, 16, 32, 64, 128)
STYLEGAN1 = StyleGAN1Spec(8, 8, 1, 128, {4: 32, 8: 32, 16: 32, 32: 32, 64: 32, 128: 16})


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    save_generator(tmp_path / "generator.safetensors", Generator(STYLEGAN1), {})
    return tmp_path / "generator.safetensors"


@pytest.fixture(scope="module")
def features() -> dict[int, torch.Tensor]:
    held = vectors("stylegan1_128")
    pairs = {r: [held[f"feat/{2 * index + part:02d}"] for part in (0, 1)] for index, r in enumerate(LEVELS)}
    return {r: torch.from_numpy(np.concatenate(pair, axis=1)) for r, pair in pairs.items()}


def heads(held: Vectors, strip: str = "") -> list[dict[str, torch.Tensor]]:
    result = []
    for number in range(int(held["model_num"])):
        names = [name for name in held if name.startswith(f"model_{number}/")]
        state = {name.split("/")[1].removeprefix(strip): torch.from_numpy(held[name].copy()) for name in names}
        result.append(state)
    return result


def write(directory: Path, states: list[dict[str, torch.Tensor]]) -> Path:
    directory.mkdir(exist_ok=True)
    for number, state in enumerate(states):
        torch.save({"model_state_dict": state}, directory / f"model_{number}.pth")
    return directory


@pytest.mark.parametrize(("name", "strip", "hidden"), [("12", "", (128, 32)), ("34", "module.", (256, 128))])
@torch.no_grad()
def test_released_ensemble_from_features(
    tmp_path: Path, generator: Path, features: dict[int, torch.Tensor], name: str, strip: str, hidden: tuple[int, int]
) -> None:
    held = vectors(f"interpreter_{name}")
    directory = write(tmp_path / "model_dir", heads(held, strip))
    out = tmp_path / "interpreter.safetensors"
    options = ImportOptions(generator=generator, layout="release-stylegan1")
    assert "layout release-stylegan1, D 352" in import_file(directory, out, None, options=options)
    interpreter = load_interpreter(out)
    assert interpreter.spec.hidden == hidden and interpreter.spec.num_classes == int(name)
    assert interpreter.spec.feature_dim == int(held["dim"][2])
    labels, js_map, js_sum = interpreter(features)
    votes = votes_of(interpreter, features)  # [H,W,K]
    want = (held["votes"][..., None] == np.arange(int(name))).sum(axis=2)  # [H,W,K]
    assert (votes == want).all(axis=2).mean() >= 0.9999
    assert (labels[0].numpy() == held["label"]).mean() >= 0.9999
    assert np.abs(js_map[0].numpy() - held["js"]).max() <= 1e-5
    assert float(js_sum) == pytest.approx(float(held["score_sum"]), rel=1e-4)
    _, _, js_top10 = load_interpreter(out, "top10_mean")(features)
    assert float(js_top10) == pytest.approx(float(held["score_top10_mean"]), rel=1e-4)
    weights = read_weights(io.BytesIO(weights_file(interpreter)))
    (on_a_gpu,) = label(weights, [[x[0].numpy() for x in features.values()]])
    assert (on_a_gpu["label"] == held["label"]).mean() >= 0.9999
    assert np.abs(on_a_gpu["js_map"] - held["js"]).max() <= 1e-5
    assert float(on_a_gpu["js_score"]) == pytest.approx(float(held["score_sum"]), rel=1e-4)


def votes_of(interpreter: StyleInterpreter, features: dict[int, torch.Tensor]) -> np.ndarray:
    weights = interpreter.weights()
    outputs = [interpreter.outputs(parts, weights) for parts in interpreter.parts_of_strips(features, weights)]
    strips = [interleave(interpreter.statistics(each)[2]) for each in outputs]
    return torch.cat(strips, dim=1)[0].transpose(1, 2).numpy()  # [R,R,K]


def small_heads(count: int = 3, feature_dim: int = 352) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    states = []
    for _ in range(count):
        layers = [torch.nn.Linear(feature_dim, 8), torch.nn.ReLU(), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 6)]
        layers += [torch.nn.ReLU(), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 4)]
        states.append(torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers)}).state_dict())
    return states


def run(directory: Path, generator: Path, tmp_path: Path, **options: object) -> StyleInterpreter:
    out = tmp_path / "interpreter.safetensors"
    chosen = ImportOptions(generator=generator, **{"layout": "release-stylegan1"} | options)
    import_file(directory, out, "datasetgan-classifiers", options=chosen)
    return load_interpreter(out)


def test_names_and_digests_travel_along(tmp_path: Path, generator: Path) -> None:
    directory = write(tmp_path / "model_dir", small_heads())
    torch.save({}, directory / "model_20parts_iter5000_number_0.pth")  # as the training leaves it
    entries = [{"name": name, "rgb": [index, 0, 0]} for index, name in enumerate("abcd")]
    write_json(tmp_path / "classes.json", entries)
    interpreter = run(directory, generator, tmp_path, classes=tmp_path / "classes.json")
    assert interpreter.spec.class_names == ("a", "b", "c", "d") and interpreter.spec.palette[3] == (3, 0, 0)
    notes = read_notes(tmp_path / "interpreter.safetensors")
    assert notes["source"] == "model_dir" and set(notes["source_sha256"]) == {f"model_{n}.pth" for n in range(3)}
    assert interpreter.spec.num_heads == 3 and interpreter.spec.hidden == (8, 6)


def test_classes_without_names_are_numbered() -> None:
    classes = numbered_classes(255)
    assert classes.names[:2] == ("class_0", "class_1")
    assert classes.palette[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert len(set(classes.palette)) == 255


def test_both_feature_counts_are_named(tmp_path: Path, generator: Path) -> None:
    directory = write(tmp_path / "model_dir", small_heads(feature_dim=351))
    with pytest.raises(IncompatibleWeights, match=r"D = 351 features, but layout 'release-stylegan1' .* D = 352"):
        run(directory, generator, tmp_path)
    with pytest.raises(IncompatibleWeights, match="'editgan-stylegan2' reads the layers const"):
        run(directory, generator, tmp_path, layout="editgan-stylegan2")


def test_editgan_layout_of_a_stylegan2(tmp_path: Path) -> None:
    channels = {4: 8, 8: 6}
    save_generator(tmp_path / "g.safetensors", Generator(StyleGAN2Spec(4, 4, 1, 8, channels)), {})
    directory = write(tmp_path / "model_dir", small_heads(feature_dim=8 + 8 + 6 + 6))
    interpreter = run(directory, tmp_path / "g.safetensors", tmp_path, layout="editgan-stylegan2")
    assert interpreter.spec.channels == {4: 16, 8: 12} and interpreter.spec.resolution == 8


def test_what_is_needed_is_asked_for(tmp_path: Path, generator: Path) -> None:
    directory, out = write(tmp_path / "model_dir", small_heads()), tmp_path / "out.safetensors"
    with pytest.raises(InvalidRequest, match="generator: classifiers need the generator"):
        import_file(directory, out, None, options=ImportOptions())
    with pytest.raises(InvalidRequest, match="layout: classifiers need the generator"):
        import_file(directory, out, None, options=ImportOptions(generator=generator))
    write_json(tmp_path / "classes.json", [{"name": "one", "rgb": [0, 0, 0]}, {"name": "two", "rgb": [1, 0, 0]}])
    with pytest.raises(InvalidRequest, match="classes: the classifiers have 4 classes, the file lists 2"):
        run(directory, generator, tmp_path, classes=tmp_path / "classes.json")
    with pytest.raises(UnusableFile, match="is one classifier of an ensemble; name the directory"):
        import_file(directory / "model_0.pth", out, None, options=ImportOptions())


def _another_width(states: list[dict[str, torch.Tensor]]) -> None:
    states[2] = small_heads(1, 353)[0]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda s: s[1].pop("layers.2.running_var"), "model_1.pth lacks the tensor layers.2.running_var"),
        (lambda s: s[1].pop("layers.0.weight"), "model_1.pth lacks the tensor layers.0.weight"),
        (lambda s: s[1].update(extra=torch.ones(1)), "model_1.pth has an unexpected tensor extra"),
        (lambda s: s[1].update({"layers.3.bias": torch.ones(5)}), "layers.3.bias of shape (5,), expected (6,)"),
        (lambda s: s[1]["layers.2.running_var"].fill_(-1.0), "negative variance in layers.2.running_var"),
        (lambda s: s[1]["layers.0.weight"].fill_(torch.nan), "NaN or infinity in layers.0.weight"),
        (
            lambda s: [s[1][name].fill_(1e38) for name in ("layers.2.weight", "layers.3.weight")],
            "model_1.pth leads to NaN or infinity when layers.2 is folded",
        ),
        (_another_width, "model_2.pth has D, h1, h2, K = (353, 8, 6, 4); model_0.pth has (352, 8, 6, 4)"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, generator: Path, damage: Callable[[list[dict[str, torch.Tensor]]], object], problem: str
) -> None:
    states = small_heads()
    damage(states)
    with pytest.raises(UnusableFile, match=re.escape(problem)):
        run(write(tmp_path / "model_dir", states), generator, tmp_path)
    assert not (tmp_path / "interpreter.safetensors").exists()


def test_gaps_and_strangers_are_named(tmp_path: Path, generator: Path) -> None:
    directory = write(tmp_path / "model_dir", small_heads())
    (directory / "model_1.pth").rename(directory / "model_7.pth")
    with pytest.raises(UnusableFile, match=r"lacks model_1.pth, but has model_7.pth"):
        run(directory, generator, tmp_path)
    torch.save({"state_dict": {}}, directory / "model_1.pth")
    for number in range(3, 7):
        torch.save({}, directory / f"model_{number}.pth")
    with pytest.raises(UnusableFile, match="model_1.pth is not a DatasetGAN classifier"):
        run(directory, generator, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnusableFile, match="holds no model_0.pth"):
        run(tmp_path / "empty", generator, tmp_path)
