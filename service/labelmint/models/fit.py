"""Trains the Style Interpreter on annotated images: N classifiers at once, in bounded memory.

Rules of this file:
- The generator is frozen. Pixels are drawn at random from each image, rare classes more often than their area says
  and at least one from every class that the image has; only their features are ever held.
- The heads differ by their initial weights and by the pixels they draw (DatasetGAN, section 3.2).
- Linear -> ReLU -> BatchNorm -> Linear -> ReLU -> BatchNorm -> Linear, as the released `pixel_classifier`; the
  BatchNorms and the standardisation of the features are folded into the linear layers at the end, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from labelmint.errors import UnusableFile
from labelmint.models.annotations import AnnotatedDataset, image_path, read_dataset, sha256_of
from labelmint.models.draw import draw
from labelmint.models.interpreter import (
    InterpreterSpec,
    StyleInterpreter,
    fold_batch_norm,
    hidden_widths,
    sample_features,
)
from labelmint.models.layout import channels_of
from labelmint.models.store import load_generator, save_interpreter
from labelmint.models.stylegan2 import Generator, to_uint8

# The features of all drawn pixels together; with many images each gives fewer pixels.
POOL_BYTES = 3 << 30


@dataclass(frozen=True)
class FitSettings:
    pixels_per_image: int = 8192
    class_power: float = 0.5  # a class's pixels are drawn in proportion to its area to this power
    steps: int = 4000
    batch: int = 256  # pixels a head and step
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Pool:
    """The drawn pixels of all images: features float32 [P,D], class ids int64 [P]."""

    features: Tensor
    labels: Tensor


def fit_files(generator_path: Path, annotations: Path, out: Path, layout: str, heads: int) -> None:
    """`labelmint fit`: read, check that the images are this generator's, train, write the interpreter."""
    generator = load_generator(generator_path)
    dataset = read_dataset(annotations)
    _check_origin(generator, generator_path, dataset, annotations)
    settings = FitSettings()
    interpreter, accuracy = fit(generator, dataset, layout, heads, settings)
    notes: dict[str, Any] = {
        "generator_sha256": sha256_of(generator_path),
        "seeds": list(dataset.masks),
        "truncation_psi": dataset.truncation_psi,
        "training_accuracy": accuracy,
    }
    save_interpreter(out, interpreter, notes)
    print(f"{out}: {heads} heads, {len(dataset.classes.names)} classes, {accuracy:.1%} of the drawn pixels right")


def fit(
    generator: Generator, dataset: AnnotatedDataset, layout: str, heads: int, settings: FitSettings
) -> tuple[StyleInterpreter, float]:
    """The trained, folded interpreter and its accuracy on the drawn pixels (mean over heads)."""
    rng = torch.Generator().manual_seed(settings.seed)
    pool, channels = draw_pool(generator, dataset, layout, settings, rng)
    spec = InterpreterSpec(
        layout=layout,
        resolution=generator.spec.resolution,
        channels=channels,
        num_heads=heads,
        hidden=hidden_widths(len(dataset.classes.names)),
        class_names=dataset.classes.names,
        palette=dataset.classes.palette,
    )
    mean = pool.features.mean(dim=0)  # [D]
    deviation = pool.features.std(dim=0).clamp(min=1e-4)  # [D]
    pool.features.sub_(mean).div_(deviation)
    network = _Heads(spec, rng)
    accuracy = _train(network, pool, settings, rng)
    return network.folded(mean, deviation), accuracy


@torch.no_grad()
def draw_pool(
    generator: Generator, dataset: AnnotatedDataset, layout: str, settings: FitSettings, rng: torch.Generator
) -> tuple[Pool, dict[int, int]]:
    """Draw pixels from every image; returns the pool and the channels of each feature level."""
    resolution = generator.spec.resolution
    channels = channels_of(layout, generator.spec.channels)
    affordable = POOL_BYTES // (4 * sum(channels.values()) * len(dataset.masks))
    per_image = min(settings.pixels_per_image, affordable, resolution**2)
    features = torch.empty(per_image * len(dataset.masks), sum(channels.values()))  # [P,D]
    labels = torch.empty(len(features), dtype=torch.long)  # [P]
    rows_used = 0
    for seed, mask in tqdm(dataset.masks.items(), desc="draw pixels", unit="img"):
        _, maps = draw(generator, seed, dataset.truncation_psi, layout)
        label = torch.from_numpy(mask.astype(np.int64)).flatten()  # [R*R]
        chosen = choose_pixels(label, per_image, settings.class_power, rng)  # [P]
        rows, columns = chosen // resolution, chosen % resolution
        here = slice(rows_used, rows_used + per_image)
        features[here] = sample_features({r: x[0] for r, x in maps.items()}, rows, columns, resolution)
        labels[here] = label[chosen]
        rows_used += per_image
    return Pool(features, labels), channels


def choose_pixels(label: Tensor, count: int, class_power: float, rng: torch.Generator) -> Tensor:
    """`count` pixels of one image, without repetition: class ids int64 [R*R] to indices int64 [P]."""
    area = torch.bincount(label).double()  # [K]
    weight = area.clamp(min=1).pow(class_power - 1.0)[label]  # [R*R]
    # One pixel of every class first: the largest key of an exponential race wins.
    key = torch.rand(label.shape, generator=rng, dtype=torch.float64).clamp(min=1e-300).log() / weight
    for present in area.nonzero().flatten().tolist():
        members = (label == present).nonzero().flatten()
        key[members[key[members].argmax()]] = 1.0
    return key.topk(count).indices.sort().values


class _Heads(nn.Module):
    """N classifiers side by side: weights [N,out,in], activations [N,P,width]."""

    def __init__(self, spec: InterpreterSpec, rng: torch.Generator) -> None:
        super().__init__()
        self.spec = spec
        n, (h1, h2), k = spec.num_heads, spec.hidden, spec.num_classes
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for width_in, width_out in ((spec.feature_dim, h1), (h1, h2), (h2, k)):
            # Normal with Glorot's variance.
            scale = (2.0 / (width_in + width_out)) ** 0.5
            self.weights.append(torch.randn(n, width_out, width_in, generator=rng) * scale)
            self.biases.append(torch.zeros(n, width_out))
        self.norms = nn.ModuleList(nn.BatchNorm1d(n * width) for width in (h1, h2))

    def forward(self, x: Tensor) -> Tensor:
        """x [N,P,D] to logits [N,P,K]."""
        for layer in range(3):
            x = torch.baddbmm(self.biases[layer][:, None], x, self.weights[layer].transpose(1, 2))  # [N,P,width]
            if layer < 2:
                n, p, width = x.shape
                flat = F.relu(x).transpose(0, 1).reshape(p, n * width)  # [P,N*width]
                x = self.norms[layer](flat).view(p, n, width).transpose(0, 1)  # [N,P,width]
        return x

    @torch.no_grad()
    def folded(self, mean: Tensor, deviation: Tensor) -> StyleInterpreter:
        """The interpreter that takes raw features: standardisation and BatchNorms folded, in float64."""
        spec, n = self.spec, self.spec.num_heads
        interpreter = StyleInterpreter(spec)
        weight1 = self.weights[0].double() / deviation.double()  # [N,h1,D]
        bias1 = self.biases[0].double() - weight1 @ mean.double()  # [N,h1]
        flat = weight1.flatten(0, 1)  # [N*h1,D]
        for r, part in zip(spec.channels, flat.split(list(spec.channels.values()), dim=1), strict=True):
            interpreter.projection[str(r)].copy_(part)
        interpreter.bias1.copy_(bias1.flatten())
        for layer, (weight, bias) in ((1, ("weight2", "bias2")), (2, ("weight3", "bias3"))):
            norm = self.norms[layer - 1]
            assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
            average, variance, gamma, beta = (
                value.detach().double().view(n, -1)
                for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            )
            folded = fold_batch_norm(
                self.weights[layer].double(), self.biases[layer].double(), average, variance, gamma, beta, norm.eps
            )
            getattr(interpreter, weight).copy_(folded[0])
            getattr(interpreter, bias).copy_(folded[1])
        return interpreter.eval()


def _train(network: _Heads, pool: Pool, settings: FitSettings, rng: torch.Generator) -> float:
    n, k = network.spec.num_heads, network.spec.num_classes
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    network.train()
    bar = tqdm(range(settings.steps), desc="fit", unit="step")
    for step in bar:
        # Every head draws its own pixels.
        draw = torch.randint(pool.labels.numel(), (n, settings.batch), generator=rng)  # [N,P]
        logits = network(pool.features[draw])  # [N,P,K]
        # The sum over heads: their parameters are disjoint, so each is trained by its own mean loss.
        loss = F.cross_entropy(logits.reshape(-1, k), pool.labels[draw].flatten()) * n
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()) / n:.4f}")
    network.eval()
    draw = torch.randint(pool.labels.numel(), (n, 4096), generator=rng)
    with torch.no_grad():
        return float((network(pool.features[draw]).argmax(dim=2) == pool.labels[draw]).float().mean())


def _check_origin(generator: Generator, path: Path, dataset: AnnotatedDataset, directory: Path) -> None:
    """Masks belong to the images they were drawn on: draw each image again and compare."""
    for seed, image in dataset.images.items():
        again = to_uint8(draw(generator, seed, dataset.truncation_psi, "paper")[0])[0].numpy()
        if again.shape != image.shape or int(np.abs(again.astype(int) - image).max()) > 1:
            raise UnusableFile(
                image_path(directory, seed),
                f"is not what {path} draws for seed {seed}; annotate images of the generator that you fit",
            )
