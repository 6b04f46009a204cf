"""Trains the Style Interpreter on annotated images: N classifiers (or regressors of heat) at once, in bounded memory.

Rules of this file:
- The generator is frozen. Pixels are drawn at random from each image, rare classes more often than their area says
  and at least one from every class that the image has; only their features are ever held.
- Each image is drawn once: to check that the annotation was made on it, and for its features.
- A run that was interrupted goes on from its checkpoint, beside the file to write: it draws its pixels anew and takes
  weights, optimizer, schedule and random numbers from the checkpoint. With the same number of threads it ends in the
  same bytes; another number adds in another order.
- The heads differ by their initial weights and by the pixels they draw (DatasetGAN, section 3.2).
- Linear -> ReLU -> BatchNorm -> Linear -> ReLU -> BatchNorm -> Linear, as the released `pixel_classifier`; the
  BatchNorms and the standardisation of the features are folded into the linear layers at the end, exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from labelmint.errors import UnusableFile
from labelmint.models.annotations import (
    AnnotatedDataset,
    KeypointDataset,
    KeypointFormat,
    MaskFormat,
    image_path,
    read_dataset,
    read_keypoints,
    sha256_of,
)
from labelmint.models.draw import draw
from labelmint.models.generator import Generator, to_uint8
from labelmint.models.interpreter import (
    InterpreterSpec,
    StyleInterpreter,
    Task,
    fold_batch_norm,
    hidden_widths,
    sample_features,
)
from labelmint.models.keypoints import build_interpreter, heat_targets
from labelmint.models.layout import channels_of
from labelmint.models.resuming import Checkpoint
from labelmint.models.store import load_generator, save_interpreter

Dataset: TypeAlias = "AnnotatedDataset | KeypointDataset"
Bytes = npt.NDArray[np.uint8]

# A pixel with at least this heat belongs to a keypoint's surroundings: three standard deviations.
NEAR = 0.01
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
    """The drawn pixels of all images: features float32 [P,D]; targets are class ids int64 [P] or heat float32 [P,K]."""

    features: Tensor
    targets: Tensor


def fit_files(
    generator_path: Path,
    annotations: Path,
    out: Path,
    layout: str,
    heads: int,
    task: Task = "segmentation",
    mask_format: MaskFormat = "png",
    keypoint_format: KeypointFormat = "csv",
    *,
    steps: int = FitSettings.steps,
) -> None:
    """`labelmint fit`: read, check that the images are this generator's, train, write the interpreter. The same call
    after an interruption goes on from `OUT.checkpoint`."""
    generator = load_generator(generator_path)
    dataset: Dataset
    if task == "keypoints":
        dataset = read_keypoints(annotations, keypoint_format)
        # Few pixels are near a keypoint; all of them are drawn, and the others fill up.
        settings = FitSettings(pixels_per_image=generator.spec.resolution**2 // 8, class_power=0.0, steps=steps)
    else:
        dataset = read_dataset(annotations, mask_format)
        settings = FitSettings(steps=steps)

    def check(seed: int, drawn: Bytes) -> None:
        """Annotations belong to the images they were made on."""
        image = dataset.images[seed]
        if drawn.shape != image.shape or int(np.abs(drawn.astype(int) - image).max()) > 1:
            raise UnusableFile(
                image_path(annotations, seed),
                f"is not what {generator_path} draws for seed {seed}; annotate images of the generator that you fit",
            )

    generator_sha256 = sha256_of(generator_path)
    options = {"task": task, "layout": layout, "heads": heads, **asdict(settings)}
    inputs = {"weights": generator_sha256, "annotations": _digest_of(dataset), "options": json.dumps(options)}
    checkpoint = Checkpoint(out.with_name(out.name + ".checkpoint"), inputs)
    interpreter, error = fit(generator, dataset, layout, heads, settings, check, checkpoint=checkpoint)
    notes: dict[str, Any] = {
        "generator_sha256": generator_sha256,
        "seeds": list(dataset.images),
        "truncation_psi": dataset.truncation_psi,
        "training_error": error,
    }
    save_interpreter(out, interpreter, notes)
    checkpoint.remove()
    told = f"mean squared error {error:.2e}" if task == "keypoints" else f"{error:.1%} wrong"
    print(f"{out}: {heads} heads, {interpreter.spec.num_classes} outputs, {told} on the drawn pixels")


def _digest_of(dataset: Dataset) -> str:
    """SHA-256 of all that an annotated dataset says."""
    keypoints = isinstance(dataset, KeypointDataset)
    classes = dataset if isinstance(dataset, KeypointDataset) else dataset.classes
    labels = dataset.keypoints if isinstance(dataset, KeypointDataset) else dataset.masks
    about = (keypoints, dataset.truncation_psi, classes.names, classes.palette, list(labels))
    digest = hashlib.sha256(repr(about).encode())
    for seed, label in labels.items():
        digest.update(dataset.images[seed].tobytes())
        digest.update(label.tobytes())
    return digest.hexdigest()


def fit(
    generator: Generator,
    dataset: Dataset,
    layout: str,
    heads: int,
    settings: FitSettings,
    check: Callable[[int, Bytes], None] = lambda seed, image: None,
    *,
    checkpoint: Checkpoint | None = None,
) -> tuple[StyleInterpreter, float]:
    """The trained, folded interpreter and its error on the drawn pixels, mean over heads: the part of the pixels
    labelled wrongly, or the mean squared error of the heat. `check` is called with each drawn image uint8 [R,R,3]."""
    rng = torch.Generator().manual_seed(settings.seed)
    pool, channels = draw_pool(generator, dataset, layout, settings, rng, check)
    keypoints = isinstance(dataset, KeypointDataset)
    classes = dataset if isinstance(dataset, KeypointDataset) else dataset.classes
    spec = InterpreterSpec(
        layout=layout,
        resolution=generator.spec.resolution,
        channels=channels,
        num_heads=heads,
        hidden=hidden_widths(len(classes.names)),
        class_names=classes.names,
        palette=classes.palette,
        task="keypoints" if keypoints else "segmentation",
    )
    mean = pool.features.mean(dim=0)  # [D]
    deviation = pool.features.std(dim=0).clamp(min=1e-4)  # [D]
    pool.features.sub_(mean).div_(deviation)
    network = _Heads(spec, rng)
    run = _Run(network, settings, rng)
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        run.take(state)
    error = _train(run, pool, checkpoint)
    return network.folded(mean, deviation), error


@torch.no_grad()
def draw_pool(
    generator: Generator,
    dataset: Dataset,
    layout: str,
    settings: FitSettings,
    rng: torch.Generator,
    check: Callable[[int, Bytes], None] = lambda seed, image: None,
) -> tuple[Pool, dict[int, int]]:
    """Draw pixels from every image; returns the pool and the channels of each feature level."""
    resolution = generator.spec.resolution
    channels = channels_of(layout, generator.spec.taps)
    seeds = list(dataset.keypoints if isinstance(dataset, KeypointDataset) else dataset.masks)
    affordable = POOL_BYTES // (4 * sum(channels.values()) * len(seeds))
    per_image = min(settings.pixels_per_image, affordable, resolution**2)
    features = torch.empty(per_image * len(seeds), sum(channels.values()))  # [P,D]
    targets = []
    for index, seed in enumerate(tqdm(seeds, desc="draw pixels", unit="img")):
        image, maps = draw(generator, seed, dataset.truncation_psi, layout)
        check(seed, to_uint8(image)[0].numpy())
        region = regions_of(dataset, seed, resolution)  # [R*R]
        chosen = choose_pixels(region, per_image, settings.class_power, rng)  # [P]
        rows, columns = chosen // resolution, chosen % resolution
        sampled = sample_features({r: x[0] for r, x in maps.items()}, rows, columns, resolution)
        features[index * per_image : (index + 1) * per_image] = sampled
        targets.append(
            heat_targets(torch.from_numpy(dataset.keypoints[seed]), rows, columns, resolution)  # [P,K]
            if isinstance(dataset, KeypointDataset)
            else region[chosen]  # [P]
        )
    return Pool(features, torch.cat(targets)), channels


def regions_of(dataset: Dataset, seed: int, resolution: int) -> Tensor:
    """What pixels are drawn from evenly, int64 [R*R]: the classes of a mask, or 0 and around keypoint k k + 1."""
    if not isinstance(dataset, KeypointDataset):
        return torch.from_numpy(dataset.masks[seed].astype(np.int64)).flatten()
    pixels = torch.arange(resolution**2)
    keypoints = torch.from_numpy(dataset.keypoints[seed])  # [K,3]
    heat, nearest = heat_targets(keypoints, pixels // resolution, pixels % resolution, resolution).max(dim=1)
    return torch.where(heat > NEAR, nearest + 1, 0)


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
        n = self.spec.num_heads
        weight1 = self.weights[0].double() / deviation.double()  # [N,h1,D]
        layers = [(weight1, self.biases[0].double() - weight1 @ mean.double())]
        for layer in (1, 2):
            norm = self.norms[layer - 1]
            assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
            average, variance, gamma, beta = (
                value.detach().double().view(n, -1)
                for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            )
            weight, bias = self.weights[layer].double(), self.biases[layer].double()
            layers.append(fold_batch_norm(weight, bias, average, variance, gamma, beta, norm.eps))
        interpreter = build_interpreter(self.spec)
        interpreter.take_layers(layers)
        return interpreter.eval()


class _Run:
    """The state of a training run: all that the next step depends on, apart from the pool."""

    def __init__(self, network: _Heads, settings: FitSettings, rng: torch.Generator) -> None:
        self.network, self.settings, self.rng = network, settings, rng
        self.optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, settings.steps)
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": self.rng.get_state(),
            "step": self.step,
        }

    def take(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.rng.set_state(state["rng"])
        self.step = state["step"]

    def advance(self, pool: Pool) -> Tensor:
        """One step; the mean loss over the heads."""
        n = self.network.spec.num_heads
        # Every head draws its own pixels.
        draw = torch.randint(len(pool.targets), (n, self.settings.batch), generator=self.rng)  # [N,P]
        outputs = self.network(pool.features[draw])  # [N,P,K]
        # The sum over heads: their parameters are disjoint, so each is trained by its own mean loss.
        loss = _loss(outputs, pool.targets[draw]) * n
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.detach() / n


def _train(run: _Run, pool: Pool, checkpoint: Checkpoint | None) -> float:
    network, steps = run.network, run.settings.steps
    network.train()
    with (
        nullcontext() if checkpoint is None else checkpoint.interruptible(),
        tqdm(total=steps, initial=run.step, desc="fit", unit="step") as bar,
    ):
        while run.step < steps:
            loss = run.advance(pool)
            bar.update()
            if run.step % 100 == 1:
                bar.set_postfix(loss=f"{float(loss):.4g}")
            if checkpoint is not None:
                checkpoint.keep(run.state)
    network.eval()
    draw = torch.randint(len(pool.targets), (network.spec.num_heads, 4096), generator=run.rng)
    with torch.no_grad():
        return float(_error(network(pool.features[draw]), pool.targets[draw]))


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against class ids [N,P], squared error against heat [N,P,K]; outputs [N,P,K]."""
    if targets.dtype == torch.long:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    return F.mse_loss(outputs, targets)


def _error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The part of the pixels labelled wrongly, or the mean squared error."""
    if targets.dtype == torch.long:
        return (outputs.argmax(dim=2) != targets).float().mean()
    return F.mse_loss(outputs, targets)
