"""Writes a model repository whose labels follow from the latent alone, and an index of its seeds, to measure the index.

Rules of this file:
- The ensemble is named `content` and computes almost nothing, so that a measurement shows what the gateway costs.
- Class k covers a block of its own in the label if value k of the latent is above a limit; the rest is background. The
  score is the absolute value of the latent's value 0. NumPy and the exported step compare the same float32 values, so
  the index is exact without having asked the model.
- The class `common` is in one seed of 50, `scarce` in one of 1,000; the other classes are in 5 to 80 % of the seeds.
- Only the first seeds of the index are the model's (`true_seeds`). The others repeat their rows in a random order: they
  have the same distribution, and nothing asks for their samples.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from labelmint.core.calibration import calibrate
from labelmint.core.executor import CALIBRATIONS
from labelmint.core.policy import latent_of
from labelmint.core.served_model import ServedModel, read_served_model
from labelmint.export.modules import Step, TensorSpec, latent_inputs
from labelmint.export.onnx_export import export_onnx
from labelmint.export.repository import step_config, write_model
from labelmint.seed_index import layout
from labelmint.triton.model_config import digest_of_steps, ensembles, model_file, read_config

MODEL = "content"
RESOLUTION = 32
COMMON, SCARCE = "common", "scarce"
SHARES = {COMMON: 1 / 50, SCARCE: 1 / 1000, **{f"class {k}": k / 20 for k in range(1, 16)}}  # of the seeds
CLASSES = ("background", *SHARES)
BLOCK = RESOLUTION * RESOLUTION // 32  # pixels
LIMITS = np.array([np.inf, *(NormalDist().inv_cdf(1 - share) for share in SHARES.values())], np.float32)  # [K]
Z_DIM = len(CLASSES)
FILE_SEEDS = 1_000_000


class ContentStep(Step):
    """The whole ensemble in one step: a grey image, and the label and score that follow from the latent."""

    def __init__(self) -> None:
        super().__init__()
        r = RESOLUTION
        owners = torch.arange(r * r) // BLOCK  # [R*R], the class that may cover a pixel
        self.register_buffer("owners", owners.where(owners < len(CLASSES), 0))
        self.register_buffer("limits", torch.from_numpy(LIMITS))
        self.register_buffer("every_image", torch.full((r, r, 3), 128, dtype=torch.uint8))
        self.register_buffer("every_js_map", torch.zeros(r, r))
        self.inputs = latent_inputs(Z_DIM)
        self.outputs = (
            TensorSpec("image", torch.uint8, (r, r, 3)),
            TensorSpec("label", torch.uint8, (r, r)),
            TensorSpec("js_map", torch.float32, (r, r)),
            TensorSpec("js_score", torch.float32, (1,)),
        )

    def forward(
        self, latent: Tensor, style_latent: Tensor, crossover: Tensor, truncation_psi: Tensor
    ) -> tuple[Tensor, ...]:
        count, r = latent.shape[0], RESOLUTION
        present = (latent > self.limits).to(torch.int32)  # [B,K]
        label = present[:, self.owners] * self.owners.to(torch.int32)  # [B,R*R]
        image, js_map = (x.expand(count, *x.shape) for x in (self.every_image, self.every_js_map))
        return image, label.reshape(count, r, r).to(torch.uint8), js_map, latent[:, :1].abs()


def latents(seeds: range) -> npt.NDArray[np.float32]:
    """The latents of seeds, float32 [N,z]."""
    return np.concatenate([latent_of(seed, Z_DIM) for seed in seeds])


def export(repository: Path, demo: Path) -> ServedModel:
    """Write the repository with a calibration of 1,000 seeds; `demo` has the configuration that it resembles."""
    config, step = read_config(demo / "faces" / "config.pbtxt"), ContentStep()
    served = step_config(f"{MODEL}_step", step, "onnx")
    data = export_onnx(step).data
    digest = digest_of_steps([("content", hashlib.sha256(data).hexdigest())])
    scores = [float(score) for score in np.abs(latents(range(1_000))[:, 0])]
    kind = config.parameters["score_kind"].string_value
    calibration = calibrate(scores, model_digest=digest, score_kind=kind, truncation_psi=1.0, first_seed=0)
    for name, text in {
        "model": MODEL,
        "model_digest": digest,
        "class_names": json.dumps(CLASSES),
        "palette": json.dumps([[8 * index, 0, 0] for index in range(len(CLASSES))]),
        **dict.fromkeys(CALIBRATIONS, calibration.to_json()),
    }.items():
        config.parameters[name].string_value = text
    config.name = MODEL
    del config.input[:], config.output[:], config.ensemble_scheduling.step[:]
    config.input.extend(served.input)
    config.output.extend(served.output)
    entry = config.ensemble_scheduling.step.add(model_name=served.name, model_version=-1)
    for tensor in config.input:
        entry.input_map[tensor.name] = tensor.name
    for tensor in config.output:
        entry.output_map[tensor.name] = tensor.name
    repository.mkdir(parents=True, exist_ok=True)
    write_model(repository, served, 1, files={model_file(served): data})
    write_model(repository, config, 1, files={".gitkeep": b""})
    return read_served_model(ensembles(repository)[MODEL], "1")


def write_index(directory: Path, described: layout.Described, *, true_seeds: int, seeds: int) -> None:
    """Write an index of `seeds` seeds in files of FILE_SEEDS."""
    found = latents(range(true_seeds))  # float32 [T,z]
    present = found > LIMITS  # bool [T,K]
    scores = np.abs(found[:, 0])
    order = np.random.default_rng(0)
    directory.mkdir(parents=True)
    for start in range(0, seeds, FILE_SEEDS):
        numbers = np.arange(start, min(start + FILE_SEEDS, seeds))
        rows = np.where(numbers < true_seeds, numbers, order.integers(0, true_seeds, len(numbers)))
        pixels = present[rows].astype(np.uint32) * np.uint32(BLOCK)  # [N,K]
        pixels[:, 0] = RESOLUTION * RESOLUTION - pixels.sum(axis=1)
        columns = {layout.SEED: numbers.astype(np.uint32), described.score_column: scores[rows]}
        columns |= {described.label_column(name): pixels[:, index] for index, name in enumerate(CLASSES)}
        table = pa.table(columns).replace_schema_metadata(layout.metadata_of(described))
        path = directory / f"{MODEL}-{start:010}.parquet"
        written = {"row_group_size": layout.ROW_GROUP_SEEDS, "compression": "zstd", "write_page_checksum": True}
        pq.write_table(table, path, **written)
