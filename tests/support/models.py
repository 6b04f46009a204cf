"""Small models with random weights."""

import hashlib
from pathlib import Path

import torch

from labelmint.export.repository import export_repository
from labelmint.models.generator import Generator
from labelmint.models.interpreter import InterpreterSpec, StyleInterpreter
from labelmint.models.layout import channels_of
from labelmint.models.stylegan2 import StyleGAN2Spec
from labelmint.models.tasks import build_interpreter


def files(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def small() -> tuple[Generator, StyleInterpreter]:
    torch.manual_seed(0)
    channels = {4: 4, 8: 4, 16: 4}
    generator = Generator(StyleGAN2Spec(z_dim=8, w_dim=8, mapping_layers=2, resolution=16, channels=channels)).eval()
    spec = InterpreterSpec("paper", 16, {4: 4, 8: 8, 16: 8}, 2, (4, 4), ("a", "b"), ((0, 0, 0), (1, 1, 1)))
    interpreter = StyleInterpreter(spec)
    with torch.no_grad():
        for parameter in interpreter.parameters():
            parameter.normal_()
    return generator, interpreter


def random_interpreter(generator: Generator, task: str) -> StyleInterpreter:
    channels = channels_of("paper", generator.spec.taps)
    spec = InterpreterSpec("paper", 16, channels, 2, (4, 4), ("a", "b"), ((0, 0, 0), (1, 1, 1)), task)
    interpreter = build_interpreter(spec)
    with torch.no_grad():
        for parameter in interpreter.parameters():
            parameter.normal_()
    return interpreter


@torch.no_grad()
def export_small(repository: Path, model: str) -> None:
    torch.manual_seed(0)
    levels = (4, 8, 16, 32, 64)
    spec = StyleGAN2Spec(z_dim=8, w_dim=8, mapping_layers=2, resolution=64, channels=dict.fromkeys(levels, 4))
    taps = {level: 4 if level == 4 else 8 for level in levels}
    interpreter = StyleInterpreter(InterpreterSpec("paper", 64, taps, 2, (4, 4), ("a", "b"), ((0, 0, 0), (1, 1, 1))))
    for parameter in interpreter.parameters():
        parameter.normal_()
    export_repository(repository, model, (Generator(spec).eval(), interpreter))


@torch.no_grad()
def tiny_weights(version: int = 1) -> tuple[Generator, StyleInterpreter]:
    """Versions differ by the first of the interpreter's parameters."""
    generator, interpreter = small()
    next(iter(interpreter.parameters())).add_(0.25 * (version - 1))
    return generator, interpreter


@torch.no_grad()
def conditional_weights(names: tuple[str, ...] = ("cat", "dog", "fox")) -> tuple[Generator, StyleInterpreter]:
    """A generator of classes at 16x16, and the interpreter of `small`."""
    _, interpreter = small()
    spec = StyleGAN2Spec(
        z_dim=16,
        w_dim=8,
        mapping_layers=2,
        resolution=16,
        channels={4: 4, 8: 4, 16: 4},
        generator_classes=names,
        embedding_width=8,
    )
    torch.manual_seed(1)
    generator = Generator(spec).eval()
    generator.mapping.w_avg.normal_()
    return generator, interpreter


def export_conditional(repository: Path, model: str = "kinds", file_format: str = "onnx") -> None:
    """Write a model of `conditional_weights`, not calibrated, into a repository."""
    export_repository(repository, model, conditional_weights(), file_format=file_format)
