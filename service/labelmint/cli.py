"""The command-line program `labelmint`: one subcommand a verb, each importing only what it needs.

Rules of this file:
- `serve` and `calibrate` must work where torch is not installed; the others say so when it is missing.
- Every option is a field with its help; every failure that a user can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, CliSubCommand, SettingsConfigDict

from labelmint.errors import LabelmintError
from labelmint.settings import ServeSettings

_TORCH_HINT = "this command needs torch and onnx; run `pip install 'labelmint[export]'`"

# High seeds are kept for annotation and calibration, so that the samples that people ask for first are unseen ones.
ANNOTATION_SEED = 4_000_000_000
CALIBRATION_SEED = 4_100_000_000


class Serve(ServeSettings):
    """Start Triton on a model repository, and the gateway before it, until Ctrl-C."""

    async def cli_cmd(self) -> None:
        from labelmint.gateway.server import serve

        await serve(self, lambda text: print(text, flush=True))


class Synth(BaseModel):
    """Write generated images for a person to annotate."""

    generator: Annotated[Path, Field(description="generator weights (safetensors)")]
    out: Annotated[CliPositionalArg[Path], Field(description="directory to create")]
    count: Annotated[int, Field(ge=1, description="number of images")] = 16
    first_seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of the first image")] = ANNOTATION_SEED
    truncation_psi: Annotated[float, Field(ge=0, le=2, description="truncation of the latents")] = 1.0

    def cli_cmd(self) -> None:
        from labelmint.models.draw import synthesize

        synthesize(self.generator, self.out, range(self.first_seed, self.first_seed + self.count), self.truncation_psi)


class Fit(BaseModel):
    """Train the Style Interpreter on annotated images."""

    generator: Annotated[Path, Field(description="generator weights (safetensors)")]
    annotations: Annotated[Path, Field(description="directory of `synth` with a mask beside every image")]
    out: Annotated[CliPositionalArg[Path], Field(description="file for the interpreter weights (safetensors)")]
    layout: Annotated[Literal["paper", "editgan-stylegan2"], Field(description="feature layout")] = "paper"
    heads: Annotated[int, Field(ge=2, description="number of classifiers in the ensemble")] = 10

    def cli_cmd(self) -> None:
        from labelmint.models.fit import fit_files

        fit_files(self.generator, self.annotations, self.out, self.layout, self.heads)


class Export(BaseModel):
    """Export a generator and its interpreter to a model repository that Triton serves."""

    generator: Annotated[Path, Field(description="generator weights (safetensors)")]
    interpreter: Annotated[Path, Field(description="interpreter weights (safetensors)")]
    model: Annotated[CliPositionalArg[str], Field(description="name to serve it by", pattern=r"^[a-z][a-z0-9_]*$")]
    model_repository: Annotated[Path, Field(description="directory of the repository")] = Path("model_repository")
    score_kind: Annotated[Literal["sum", "top10_mean"], Field(description="image score")] = "sum"

    def cli_cmd(self) -> None:
        from labelmint.export.repository import export_files

        export_files(self.generator, self.interpreter, self.model_repository, self.model, self.score_kind)


class Calibrate(BaseModel):
    """Measure the JS scores of a served pipeline and write the gate into its configuration."""

    model: Annotated[CliPositionalArg[str], Field(description="name of the model")]
    model_repository: Annotated[Path, Field(description="directory of the repository")] = Path("model_repository")
    count: Annotated[int, Field(ge=1000, description="number of seeds to measure")] = 2000
    first_seed: Annotated[int, Field(ge=0, lt=2**32, description="first of the consecutive seeds")] = CALIBRATION_SEED
    truncation_psi: Annotated[float, Field(ge=0, le=2, description="truncation to calibrate for")] = 1.0

    async def cli_cmd(self) -> None:
        from labelmint.gateway.calibrate import calibrate_repository

        calibration = await calibrate_repository(
            self.model_repository, self.model, self.first_seed, self.count, self.truncation_psi
        )
        print(f"calibration {calibration.id}: gate at JS {calibration.threshold:.6g} nats")


class Labelmint(BaseSettings):
    """Training data that a model makes for itself: image-label pairs from a frozen StyleGAN, on demand."""

    model_config = SettingsConfigDict(
        cli_prog_name="labelmint",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_enforce_required=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    serve: Annotated[CliSubCommand[Serve], Field(description="start Triton and the gateway, until Ctrl-C")]
    synth: Annotated[CliSubCommand[Synth], Field(description="write generated images for a person to annotate")]
    fit: Annotated[CliSubCommand[Fit], Field(description="train the Style Interpreter on annotated images")]
    export: Annotated[CliSubCommand[Export], Field(description="write a model repository that Triton serves")]
    calibrate: Annotated[CliSubCommand[Calibrate], Field(description="measure JS scores and set the gate")]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="labelmint: %(message)s", stream=sys.stderr)
    try:
        CliApp.run(Labelmint)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("torch", "onnx", "onnxruntime", "onnxscript", "safetensors"):
            raise
        _fail(_TORCH_HINT)
    except LabelmintError as error:
        _fail(error.message)
    except ValidationError as error:
        _fail("; ".join(f"{'.'.join(map(str, entry['loc'][1:]))}: {entry['msg']}" for entry in error.errors()))
    except OSError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("labelmint: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _fail(message: str) -> None:
    print(f"labelmint: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
