"""Tests of the floor's counts, against torch's counts when it runs the same mathematics."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
import floor  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from labelmint.models.generator import Generator  # noqa: E402
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter  # noqa: E402
from labelmint.models.layout import channels_of  # noqa: E402
from labelmint.models.stylegan2 import ARCHITECTURES, StyleGAN2Spec  # noqa: E402

pytestmark = pytest.mark.torch


GENERATOR = StyleGAN2Spec(24, 16, 3, 32, {4: 24, 8: 20, 16: 12, 32: 8}, mapping_width=20)
INTERPRETER = InterpreterSpec(
    layout="paper",
    resolution=32,
    channels=channels_of("paper", GENERATOR.taps),
    num_heads=3,
    hidden=(32, 16),
    class_names=tuple(f"class_{i}" for i in range(16)),
    palette=tuple((i, i, i) for i in range(16)),
)


def counted(run: object, *arguments: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(*arguments)  # type: ignore[operator]
    return counter.get_total_flops()


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    latent = torch.randn(batch, GENERATOR.z_dim)
    return latent, latent, torch.full((batch, 1), GENERATOR.num_ws, dtype=torch.int32), torch.ones(batch, 1)


def weight_bytes(module: torch.nn.Module, *left_out: str) -> int:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return sum(4 * x.numel() for name, x in named.items() if not name.endswith(left_out))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_generator_counts_what_torch_counts(architecture: str) -> None:
    spec = replace(GENERATOR, architecture=architecture)
    generator = Generator(spec).eval().requires_grad_(False)
    run = counted(generator, *inputs(1), "paper")
    assert run == floor.generator_flops(spec) + floor.mapping_flops(spec), "with the second latent's mapping"
    image, features = generator(*inputs(2), "paper")
    moved = sum(4 * x.numel() for x in features.values()) + image.numel()
    channels = {r: x.shape[1] for r, x in features.items()}
    # Left out: a noise strength is one number per convolution, and the average w is read only with truncation.
    weights = weight_bytes(generator, "noise_strength", "w_avg")
    assert floor.generator_bytes(spec, channels, batch=2) == moved + weights


def test_an_interpreter_counts_the_first_layer_once_a_level_and_the_small_layers_once_a_pixel() -> None:
    interpreter = StyleInterpreter(INTERPRETER).eval()
    features = {r: torch.randn(1, c, r, r) for r, c in INTERPRETER.channels.items()}
    maps = interpreter.weights()

    def must() -> None:
        for r, x in features.items():
            interpreter.project(x, r, maps)
        interpreter.layers(torch.zeros(1, 3 * 32, 32, 32), maps)

    assert counted(must) == floor.interpreter_flops(INTERPRETER)
    assert counted(interpreter, features) > floor.interpreter_flops(INTERPRETER), "interpolation is not counted"
    label, js_map, score = interpreter(features)
    moved = sum(4 * x.numel() for x in features.values()) + label.numel() + 4 * (js_map.numel() + score.numel())
    weights = sum(4 * x.numel() for x in interpreter.parameters())
    assert floor.interpreter_bytes(INTERPRETER) == moved + weights
    assert floor.interpreter_bytes(INTERPRETER, batch=5) == 5 * moved + weights


def test_the_floor_is_the_longer_of_computing_and_moving() -> None:
    assert floor.floor_seconds(6e9, 1e9, 3e9, bytes_per_second=1e9) == 2.0
    assert floor.floor_seconds(6e9, 9e9, 3e9, bytes_per_second=1e9) == 9.0


@pytest.mark.parametrize("library", ["numpy", "torch", "onnxruntime"])
def test_a_library_s_rate_is_measured(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "SHAPES", ((64, 64, 64),))
    assert floor._gemm(library, 1) > 0
