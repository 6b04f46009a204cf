"""The Triton steps as torch modules: the tensor contract of the model repository, one class per step.

Rules of this file:
- The names and the order of inputs and outputs are the contract; `repository.py` writes them into config.pbtxt.
- The steps only rearrange tensors; all mathematics is in `labelmint.models`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labelmint.core.generator_classes import CLASS_INDEX
from labelmint.core.task import UNCERTAINTY, DType, task_of
from labelmint.models.generator import Generator, to_uint8
from labelmint.models.interpreter import StyleInterpreter

MAX_BATCH_SIZE = 16
# Triton copies the tensors between steps several times, so this bounds the size of one copy of a step's batch.
MAX_BATCH_BYTES = 384 << 20
_DTYPES: Mapping[DType, torch.dtype] = {"uint8": torch.uint8, "float32": torch.float32}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the contract; `shape` is that of one sample, without the batch dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Step(nn.Module):
    """A Triton model: `inputs` and `outputs` in the order of `forward`'s arguments and results."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def max_batch(self) -> int:
        """The largest batch that the step is served with."""
        heaviest = max(sum(spec.bytes for spec in side) for side in (self.inputs, self.outputs))
        return max(1, min(MAX_BATCH_SIZE, MAX_BATCH_BYTES // heaviest))


def latent_inputs(z_dim: int, *, conditional: bool = False) -> tuple[TensorSpec, ...]:
    """The inputs of the generator step and of the ensembles; those of a conditional generator end with the class."""
    inputs = (
        TensorSpec("latent", torch.float32, (z_dim,)),
        TensorSpec("style_latent", torch.float32, (z_dim,)),
        TensorSpec("crossover", torch.int32, (1,)),
        TensorSpec("truncation_psi", torch.float32, (1,)),
    )
    return (*inputs, TensorSpec(CLASS_INDEX, torch.int32, (1,))) if conditional else inputs


def feature_tensors(interpreter: StyleInterpreter) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(f"features_{r}", torch.float32, (c, r, r)) for r, c in interpreter.spec.channels.items())


def label_outputs(interpreter: StyleInterpreter) -> tuple[TensorSpec, ...]:
    """The outputs of the pipeline other than the image: the label of the task, and its uncertainty."""
    spec = interpreter.spec
    return tuple(
        TensorSpec(output.name, _DTYPES[output.dtype], output.dims(spec.resolution, spec.num_classes))
        for output in (*task_of(spec.task).labels, *UNCERTAINTY)
    )


def statistics_tensors(interpreter: StyleInterpreter) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, *shape) for name, shape in interpreter.statistics_shapes().items())


def hidden_tensor(interpreter: StyleInterpreter) -> TensorSpec:
    spec = interpreter.spec
    return TensorSpec("hidden", torch.float32, (spec.num_heads * spec.hidden[0], spec.resolution, spec.resolution))


class GeneratorStep(Step):
    def __init__(self, generator: Generator, interpreter: StyleInterpreter) -> None:
        super().__init__()
        self.generator = generator
        self.layout = interpreter.spec.layout
        r = generator.spec.resolution
        self.inputs = latent_inputs(generator.spec.z_dim, conditional=bool(generator.spec.generator_classes))
        self.outputs = (TensorSpec("image", torch.uint8, (r, r, 3)), *feature_tensors(interpreter))

    def forward(
        self,
        latent: Tensor,
        style_latent: Tensor,
        crossover: Tensor,
        truncation_psi: Tensor,
        class_index: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        image, features = self.generator(latent, style_latent, crossover, truncation_psi, self.layout, class_index)
        return (to_uint8(image), *features.values())


class InterpreterStep(Step):
    """The whole Style Interpreter, or a part of it."""

    def __init__(
        self, interpreter: StyleInterpreter, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        super().__init__()
        self.interpreter = interpreter
        self.inputs = inputs
        self.outputs = outputs


class StyleInterpreterStep(InterpreterStep):
    def __init__(self, interpreter: StyleInterpreter) -> None:
        super().__init__(interpreter, feature_tensors(interpreter), label_outputs(interpreter))

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        return self.interpreter(dict(zip(self.interpreter.spec.channels, features, strict=True)))


class FeatureAggregationStep(InterpreterStep):
    def __init__(self, interpreter: StyleInterpreter) -> None:
        super().__init__(interpreter, feature_tensors(interpreter), (hidden_tensor(interpreter),))

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        by_level = dict(zip(self.interpreter.spec.channels, features, strict=True))
        return (self.interpreter.aggregate(by_level, range(self.interpreter.spec.resolution)),)  # [B,N*h1,R,R]


class MlpHeadsStep(InterpreterStep):
    def __init__(self, interpreter: StyleInterpreter) -> None:
        super().__init__(interpreter, (hidden_tensor(interpreter),), statistics_tensors(interpreter))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(_rows_and_channels(statistic) for statistic in self.interpreter.heads(hidden))


class UncertaintyStep(InterpreterStep):
    def __init__(self, interpreter: StyleInterpreter) -> None:
        super().__init__(interpreter, statistics_tensors(interpreter), label_outputs(interpreter))

    def forward(self, *statistics: Tensor) -> tuple[Tensor, ...]:
        results = self.interpreter.uncertainty(*(_rows_and_channels(statistic) for statistic in statistics))
        labels = len(self.outputs) - 2  # the outputs before js_map and js_score
        return *results[: labels + 1], self.interpreter.score(*results[labels:])


def _rows_and_channels(statistic: Tensor) -> Tensor:
    """Exchange rows and channels: the contract has [B,K,R,R], the interpreter [B,R,K,R].

    A statistic without channels, [B,R,R], stays as it is.
    """
    return statistic.transpose(1, 2) if statistic.dim() == 4 else statistic


def example_inputs(step: Step, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random but plausible inputs of a step, for tracing and comparison."""
    rng = torch.Generator().manual_seed(seed)
    tensors = []
    for spec in step.inputs:
        if spec.name == "crossover":
            tensors.append(torch.arange(batch, dtype=torch.int32)[:, None] % 5 + 3)
        elif spec.name == "truncation_psi":
            tensors.append(torch.linspace(0.5, 1.0, batch)[:, None])
        elif spec.name == CLASS_INDEX:
            assert isinstance(step, GeneratorStep)
            classes = len(step.generator.spec.generator_classes)
            tensors.append(torch.randint(classes, (batch, 1), generator=rng, dtype=torch.int32))
        elif spec.name == "mean_probability":
            tensors.append(torch.randn(batch, *spec.shape, generator=rng).softmax(dim=1))
        elif spec.name == "mean_heat":
            tensors.append(torch.rand(batch, *spec.shape, generator=rng))
        elif spec.name == "mean_entropy":
            tensors.append(torch.rand(batch, *spec.shape, generator=rng) * 0.1)
        elif spec.dtype == torch.uint8:
            tensors.append(torch.randint(0, 11, (batch, *spec.shape), generator=rng, dtype=torch.uint8))
        else:
            tensors.append(torch.randn(batch, *spec.shape, generator=rng))
    return tuple(tensors)
