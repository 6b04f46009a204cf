"""Trains the Style Interpreter on annotated images: N classifiers (or heat regressors) at once, in bounded memory.

Rules of this file:
- The generator is frozen, and only the features of sampled pixels (`pixels`) are kept.
- Generating an image serves both to check that the annotation was made on it and to get its features.
- An interrupted run resumes from its checkpoint, which lies next to the output file. It samples its pixels again and
  takes weights, optimizer, schedule and random state from the checkpoint. With the same number of threads, the result
  has the same bytes as that of an uninterrupted run.
- The heads differ in their initial weights and in the pixels of their batches (DatasetGAN, section 3.2).
- A head is Linear -> ReLU -> BatchNorm -> Linear -> ReLU -> BatchNorm -> Linear, as in the released `pixel_classifier`.
  At the end, the BatchNorms and the standardisation of the features are folded into the linear layers, exactly.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from labelmint.core.errors import InvalidRequest, UnusableFile
from labelmint.core.task import TaskName
from labelmint.models.annotations import AnnotatedDataset, Unlabelled, image_path, sha256_of
from labelmint.models.annotations.files import Bytes
from labelmint.models.draw import Check, check_class_index, unchecked
from labelmint.models.extension import extended
from labelmint.models.generator import Generator
from labelmint.models.interpreter import (
    InterpreterSpec,
    StyleInterpreter,
    fold_batch_norm,
    hidden_widths,
)
from labelmint.models.pixels import FitSettings, Pool, draw_pool
from labelmint.models.resuming import Checkpoint
from labelmint.models.store import load_generator, save_interpreter
from labelmint.models.tasks import build_interpreter, learning_of


def fit_files(
    generator_path: Path,
    annotations: Path,
    out: Path,
    *,
    layout: str,
    heads: int,
    task: TaskName = "segmentation",
    annotation_format: str = "png",
    unlabelled: Unlabelled = "background",
    steps: int = FitSettings.steps,
) -> None:
    """`labelmint fit`: read, check that this generator made the images, train, and write the interpreter.

    After an interruption, the same call resumes from `OUT.checkpoint`.
    """
    generator = load_generator(generator_path)
    learning = learning_of(task)
    dataset = learning.read(annotations, annotation_format, unlabelled)
    _check_classes(generator, dataset, annotations / "dataset.json")
    settings = FitSettings(**learning.settings(generator.spec.resolution), steps=steps)
    generator_sha256 = sha256_of(generator_path)
    # Noted only where it changes something, so that the files of other fits keep their bytes.
    extends = {"unlabelled": unlabelled} if unlabelled == "extend" else {}
    options = {"task": task, "layout": layout, "heads": heads, **asdict(settings), **extends}
    inputs = {"weights": generator_sha256, "annotations": _digest_of(dataset), "options": json.dumps(options)}
    checkpoint = Checkpoint(out.with_name(out.name + ".checkpoint"), inputs)
    check = same_images(dataset, annotations, generator_path)
    if extends:
        dataset = extended(generator, dataset, layout=layout, check=check)
    interpreter, error = fit(
        generator,
        dataset,
        settings,
        layout=layout,
        heads=heads,
        check=check,
        checkpoint=checkpoint,
    )
    notes: dict[str, Any] = {
        "generator_sha256": generator_sha256,
        "seeds": list(dataset.images),
        "truncation_psi": dataset.truncation_psi,
        "training_error": error,
        **extends,
    }
    if dataset.class_indices:
        notes["class_indices"] = list(dataset.class_indices.values())
    save_interpreter(out, interpreter, notes)
    checkpoint.remove()
    outputs = interpreter.spec.num_classes
    where = "drawn pixels and those that extend them" if extends else "drawn pixels"
    print(f"{out}: {heads} heads, {outputs} outputs, {learning.describe(error)} on the {where}")


def _check_classes(generator: Generator, dataset: AnnotatedDataset, path: Path) -> None:
    """Refuse images without a class for a conditional generator, and of classes that the generator lacks."""
    drawn: list[int | None] = [*dataset.class_indices.values()]
    for class_index in drawn or [None]:
        try:
            check_class_index(class_index, len(generator.spec.generator_classes))
        except InvalidRequest as error:
            raise UnusableFile(
                path, f"does not fit the generator ({error.message}); write it with `labelmint synth` of this generator"
            ) from error


def same_images(dataset: AnnotatedDataset, annotations: Path, generator_path: Path) -> Check:
    """Return a function that refuses annotations which were made on other images than those of the generator."""

    def check(seed: int, drawn: Bytes) -> None:
        image = dataset.images[seed]
        if drawn.shape != image.shape or int(np.abs(drawn.astype(int) - image).max()) > 1:
            of_class = f" and class {dataset.class_indices[seed]}" if dataset.class_indices else ""
            raise UnusableFile(
                image_path(annotations, seed),
                f"is not the image that {generator_path} makes for seed {seed}{of_class}; annotate images of this "
                "generator",
            )

    return check


def _digest_of(dataset: AnnotatedDataset) -> str:
    """SHA-256 of the whole content of an annotated dataset."""
    about: tuple[object, ...] = (
        dataset.task,
        dataset.truncation_psi,
        dataset.names,
        dataset.palette,
        list(dataset.labels),
    )
    if dataset.class_indices:
        about = (*about, dataset.class_indices)
    digest = hashlib.sha256(repr(about).encode())
    for seed, label in dataset.labels.items():
        digest.update(dataset.images[seed].tobytes())
        digest.update(label.tobytes())
    return digest.hexdigest()


def fit(
    generator: Generator,
    dataset: AnnotatedDataset,
    settings: FitSettings,
    *,
    layout: str,
    heads: int,
    check: Check = unchecked,
    checkpoint: Checkpoint | None = None,
) -> tuple[StyleInterpreter, float]:
    """Return the trained, folded interpreter and its error on the sampled pixels, as a mean over the heads.

    The error is the fraction of wrongly labelled pixels, or the mean squared error of the heat. `check` is called with
    each seed and its generated image uint8 [R,R,3].
    """
    rng = torch.Generator().manual_seed(settings.seed)
    pool, channels = draw_pool(generator, dataset, settings, layout=layout, rng=rng, check=check)
    spec = InterpreterSpec(
        layout=layout,
        resolution=generator.spec.resolution,
        channels=channels,
        num_heads=heads,
        hidden=hidden_widths(len(dataset.names)),
        class_names=dataset.names,
        palette=dataset.palette,
        task=dataset.task,
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


class _Heads(nn.Module):
    """N classifiers side by side: weights [N,out,in], activations [N,P,width]."""

    def __init__(self, spec: InterpreterSpec, rng: torch.Generator) -> None:
        super().__init__()
        self.spec = spec
        n, (h1, h2), k = spec.num_heads, spec.hidden, spec.num_classes
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for width_in, width_out in ((spec.feature_dim, h1), (h1, h2), (h2, k)):
            # Normal distribution with Glorot's variance.
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
        """Return the interpreter for raw features; standardisation and BatchNorms are folded in float64."""
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
            layers.append(
                fold_batch_norm(weight, bias, average, variance=variance, gamma=gamma, beta=beta, epsilon=norm.eps)
            )
        interpreter = build_interpreter(self.spec)
        interpreter.take_layers(layers)
        return interpreter.eval()


class _Run:
    """The state of a training run: everything that the next step depends on, except the pool."""

    def __init__(self, network: _Heads, settings: FitSettings, rng: torch.Generator) -> None:
        self.network, self.settings, self.rng = network, settings, rng
        self.learning = learning_of(network.spec.task)
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
        """Run one training step. Returns the mean loss over the heads."""
        n = self.network.spec.num_heads
        # Every head samples its own pixels.
        draw = torch.randint(len(pool.targets), (n, self.settings.batch), generator=self.rng)  # [N,P]
        outputs = self.network(pool.features[draw])  # [N,P,K]
        # The sum over the heads: their parameters are disjoint, so each head is trained by its own mean loss.
        loss = self.learning.loss(outputs, pool.targets[draw]) * n
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
        return float(run.learning.error(network(pool.features[draw]), pool.targets[draw]))
