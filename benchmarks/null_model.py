"""Writes a model repository like the demo's whose only step computes almost nothing, to measure the cost of serving.

Rules of this file:
- The ensemble is named `faces` and has the demo's inputs, outputs, shapes, batch size and parameters; only its digest
  differs. `labelmint serve` serves it unchanged.
- All seeds have one exact render as image and label, so that these compress as samples do. The JS map is zero, and the
  score is the sum of the latent's squares.
- The step is exported, configured and served like any other.

Run it as `python benchmarks/null_model.py DIRECTORY`; other benchmarks call `export`.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from demo.annotate import render_seed
from resuming import ROOT
from torch import Tensor

from labelmint.core.calibration import Calibration
from labelmint.core.executor import CALIBRATIONS
from labelmint.export.modules import MAX_BATCH_SIZE, Step, TensorSpec, latent_inputs
from labelmint.export.onnx_export import export_onnx
from labelmint.export.repository import step_config, write_model
from labelmint.models.generator import to_uint8
from labelmint.triton.model_config import digest_of_steps, model_file, read_config

MODEL = "faces"
SEED = 7  # of the render


class NullStep(Step):
    """The whole ensemble in one step: image uint8 [R,R,3] and label uint8 [R,R], the same for all latents."""

    def __init__(self, image: Tensor, label: Tensor, z_dim: int) -> None:
        super().__init__()
        # The exported file names constants after the buffers, so their names must differ from those of the outputs.
        self.register_buffer("every_image", image)
        self.register_buffer("every_label", label)
        self.register_buffer("every_js_map", torch.zeros(label.shape))
        r = label.shape[0]
        self.inputs = latent_inputs(z_dim)
        self.outputs = (
            TensorSpec("image", torch.uint8, (r, r, 3)),
            TensorSpec("label", torch.uint8, (r, r)),
            TensorSpec("js_map", torch.float32, (r, r)),
            TensorSpec("js_score", torch.float32, (1,)),
        )

    def forward(
        self, latent: Tensor, style_latent: Tensor, crossover: Tensor, truncation_psi: Tensor
    ) -> tuple[Tensor, ...]:
        count = latent.shape[0]
        constant = (
            x.expand(count, *x.shape) for x in (self.every_image, self.every_label, self.every_js_map)
        )  # [B,...]
        score = (latent * latent).sum(dim=1, keepdim=True)  # [B,1]
        return (*constant, score)


def export(repository: Path, demo: Path = ROOT / "model_repository") -> None:
    """Write the repository. `demo` is the repository whose `faces` it resembles."""
    config = read_config(demo / MODEL / "config.pbtxt")
    face = render_seed(SEED)
    step = NullStep(to_uint8(face.image)[0], face.label[0], config.input[0].dims[0])
    served = step_config(f"{MODEL}_null", step, "onnx")
    if (step.max_batch, list(served.input), list(served.output)) != (
        MAX_BATCH_SIZE,
        list(config.input),
        list(config.output),
    ):
        raise ValueError(f"the null model has other tensors than {demo / MODEL}")
    data = export_onnx(step).data
    digest = digest_of_steps([("null", hashlib.sha256(data).hexdigest())])
    config.parameters["model_digest"].string_value = digest
    for name in CALIBRATIONS:
        calibration = Calibration.from_json(config.parameters[name].string_value)
        config.parameters[name].string_value = replace(calibration, model_digest=digest).to_json()
    del config.ensemble_scheduling.step[:]
    entry = config.ensemble_scheduling.step.add(model_name=served.name, model_version=-1)
    for tensor in config.input:
        entry.input_map[tensor.name] = tensor.name
    for tensor in config.output:
        entry.output_map[tensor.name] = tensor.name
    repository.mkdir(parents=True, exist_ok=True)
    write_model(repository, served, 1, files={model_file(served): data})
    write_model(repository, config, 1, files={".gitkeep": b""})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    export(parser.parse_args().directory)


if __name__ == "__main__":
    main()
