"""The command-line program `labelmint`: one subcommand per task, each importing only the modules that it needs.

Rules of this file:
- `serve`, `calibrate` and `index` must work without torch. The other commands report it if torch is missing.
- `pull`, `verify` and `upload` belong to the Python client, which has its own command line.
- Every option is a field with its help. Every failure that a user can fix is one line on stderr and exit code 2.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSubCommand,
    CliToggleFlag,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    get_subcommand,
)

from labelmint.core.calibration import ScoreKind
from labelmint.core.errors import LabelmintError
from labelmint.core.executor import KERNEL, Choice
from labelmint.core.policy import ANNOTATION_SEED
from labelmint.core.task import TASKS, TaskName
from labelmint.gateway.process.settings import ServeSettings

_EXPORT_MODULES = ("torch", "onnx", "onnxruntime", "onnxscript", "pycocotools", "safetensors")
# A missing module, the extra that installs it, and its purpose.
_EXTRAS = dict.fromkeys(_EXPORT_MODULES, ("export", "this command needs torch and onnx"))
_EXTRAS["triton"] = ("gpu", "`--format gpu` needs the compiler of the Triton language")
_EXTRAS["tqdm"] = ("calibrate", "this command needs tqdm")
_EXTRAS["pyarrow"] = ("index", "an index of seeds needs pyarrow")
_EXTRAS["opentelemetry"] = ("tracing", "traces need OpenTelemetry")
_CLIENT_COMMANDS = ("pull", "verify", "upload")

# High, as ANNOTATION_SEED is, and for its reason.
CALIBRATION_SEED = 4_100_000_000


class Serve(ServeSettings):
    """Start Triton on a model repository, and the gateway in front of it, until Ctrl-C."""

    async def cli_cmd(self) -> None:
        from labelmint.gateway.process.server import serve

        await serve(self)


class Synth(BaseModel):
    """Write generated images for a person to annotate."""

    generator: Annotated[Path, Field(description="generator weights (safetensors)")]
    out: Annotated[CliPositionalArg[Path], Field(description="directory to create")]
    count: Annotated[int, Field(ge=1, description="number of images")] = 16
    first_seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of the first image")] = ANNOTATION_SEED
    seeds: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**32)]] | None,
        Field(min_length=1, description="the seeds of all images, instead of --count and --first-seed: 7,19,23"),
    ] = None
    truncation_psi: Annotated[float, Field(ge=0, le=2, description="truncation of the latents")] = 1.0
    class_index: Annotated[
        list[Annotated[int, Field(ge=0)]] | None,
        Field(min_length=1, description="for a conditional generator: the classes that the images have in turn: 0,3,5"),
    ] = None

    @model_validator(mode="after")
    def _seeds_once(self) -> Synth:
        if self.seeds is not None:
            if self.model_fields_set & {"count", "first_seed"}:
                raise ValueError("--seeds names all images, so --count and --first-seed do not apply")
            if twice := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
                raise ValueError(f"--seeds has {twice[0]} twice")
        return self

    def cli_cmd(self) -> None:
        from labelmint.models.draw import synthesize

        seeds = self.seeds or range(self.first_seed, self.first_seed + self.count)
        synthesize(self.generator, self.out, seeds, truncation_psi=self.truncation_psi, class_indices=self.class_index)


class Annotate(BaseModel):
    """Draw on generated images, see what they teach, fit and serve: a page on this machine, until Ctrl-C."""

    generator: Annotated[Path, Field(description="generator weights (safetensors)")]
    directory: Annotated[CliPositionalArg[Path], Field(description="directory of the drawings, created if missing")]
    task: Annotated[TaskName, Field(description="what to learn")] = "segmentation"
    layout: Annotated[
        Literal["paper", "editgan-stylegan2", "release-stylegan1"], Field(description="feature layout")
    ] = "paper"
    truncation_psi: Annotated[float, Field(ge=0, le=2, description="truncation of the latents")] = 1.0
    take_over: Annotated[
        Literal["png", "labelme", "coco", "csv"] | None,
        Field(description="the format in which another tool annotated this directory of `synth`"),
    ] = None
    unlabelled: Annotated[
        Literal["ignore", "background"],
        Field(description="with --take-over labelme or coco: what a pixel is that no shape covers, as for `fit`"),
    ] = "background"
    port: Annotated[int, Field(ge=0, le=65535, description="port of the page; 0: any free port")] = 0
    open: Annotated[bool, Field(description="open the page in a browser")] = False

    @model_validator(mode="after")
    def _take_over_fits_the_task(self) -> Annotate:
        formats = ("png", "labelme", "coco") if self.task == "segmentation" else ("csv", "coco")
        if self.take_over is not None and self.take_over not in formats:
            raise ValueError(f"--take-over {self.take_over} does not apply to --task {self.task}")
        return self

    async def cli_cmd(self) -> None:
        from labelmint.annotate.command import annotate

        await annotate(
            self.generator,
            self.directory,
            task=self.task,
            layout=self.layout,
            truncation_psi=self.truncation_psi,
            annotation_format=self.take_over,
            unlabelled=self.unlabelled,
            port=self.port,
            open_browser=self.open,
        )


class _Annotations(BaseModel):
    """The options with which a command reads annotations."""

    layout: Annotated[
        Literal["paper", "editgan-stylegan2", "release-stylegan1"], Field(description="feature layout")
    ] = "paper"
    task: Annotated[TaskName, Field(description="what is annotated, and to be learned")] = "segmentation"
    mask_format: Annotated[Literal["png", "labelme", "coco"], Field(description="format of the masks")] = "png"
    unlabelled: Annotated[
        Literal["background", "ignore", "extend"],
        Field(
            description="what a pixel is that no shape of labelme or CVAT covers: of the first class, or not drawn "
            "(ignore, extend; in a PNG, id 255 is not drawn). extend: `fit` learns it as a quick interpreter labels it"
        ),
    ] = "background"
    keypoint_format: Annotated[Literal["csv", "coco"], Field(description="format of the keypoints")] = "csv"

    @model_validator(mode="after")
    def _no_format_of_another_task(self) -> _Annotations:
        """Refuse the options that only other tasks have; tasks may share one."""
        own = TASKS[self.task].annotation_option
        for option in (task.annotation_option for task in TASKS.values()):
            if option != own and option in self.model_fields_set:
                raise ValueError(f"{option} does not apply to --task {self.task}")
        if "unlabelled" in self.model_fields_set and not TASKS[self.task].has_label_image:
            raise ValueError(f"unlabelled does not apply to --task {self.task}")
        if "unlabelled" in self.model_fields_set and self.unlabelled == "background" and self.mask_format == "png":
            raise ValueError("unlabelled=background does not apply to --mask-format png; there, id 255 is not drawn")
        return self

    def reading(self) -> dict[str, Any]:
        """How annotations are read, as the functions behind the commands take it."""
        formats = {"mask_format": self.mask_format, "keypoint_format": self.keypoint_format}
        annotation_format = formats[TASKS[self.task].annotation_option]
        return {
            "layout": self.layout,
            "task": self.task,
            "annotation_format": annotation_format,
            "unlabelled": self.unlabelled,
        }


class Fit(_Annotations):
    """Train the Style Interpreter on annotated images. After an interruption, the same command resumes."""

    generator: Annotated[Path, Field(description="generator weights (safetensors)")]
    annotations: Annotated[Path, Field(description="annotated directory from `synth` (docs/annotating.md)")]
    out: Annotated[CliPositionalArg[Path], Field(description="file for the interpreter weights (safetensors)")]
    heads: Annotated[int, Field(ge=2, description="number of classifiers in the ensemble")] = 10
    steps: Annotated[int, Field(ge=1, description="training steps; a few hundred are enough for a trial")] = 4000
    report: Annotated[
        Path | None, Field(description="HTML file to write first: whether the annotations are enough")
    ] = None

    def cli_cmd(self) -> None:
        from labelmint.models.fit import fit_files

        if self.report is not None:
            from labelmint.annotate.report import write_report

            write_report(self.generator, self.annotations, self.report, **self.reading())
        fit_files(self.generator, self.annotations, self.out, heads=self.heads, steps=self.steps, **self.reading())


class Suggest(_Annotations):
    """Print the seeds whose images would teach most when they are annotated next, with the reason."""

    generator: Annotated[Path, Field(description="generator weights (safetensors)")]
    directory: Annotated[CliPositionalArg[Path], Field(description="directory from `synth`, annotated or not")]
    count: Annotated[int, Field(ge=1, description="number of seeds to print")] = 4
    candidates: Annotated[int, Field(ge=1, description="number of seeds to choose from")] = 100
    first_seed: Annotated[int, Field(ge=0, lt=2**32, description="first of these seeds")] = ANNOTATION_SEED

    @model_validator(mode="after")
    def _every_candidate_is_a_seed(self) -> Suggest:
        if self.first_seed + self.candidates > 2**32:
            raise ValueError("--first-seed and --candidates go beyond the last seed, 4294967295")
        return self

    def cli_cmd(self) -> None:
        from labelmint.annotate.suggest import suggest_files

        candidates = range(self.first_seed, self.first_seed + self.candidates)
        for found in suggest_files(self.generator, self.directory, candidates, count=self.count, **self.reading()):
            print(found)


class Export(BaseModel):
    """Export a generator and its interpreter to a model repository for Triton."""

    generator: Annotated[Path, Field(description="generator weights (safetensors)")]
    interpreter: Annotated[Path, Field(description="interpreter weights (safetensors)")]
    model: Annotated[CliPositionalArg[str], Field(description="name of the served model", pattern=r"^[a-z][a-z0-9_]*$")]
    model_repository: Annotated[Path, Field(description="directory of the repository")] = Path("model_repository")
    score_kind: Annotated[ScoreKind, Field(description="image score (docs/your-generator.md)")] = "sum"
    format: Annotated[
        Literal["onnx", "torchscript", "native", "gpu"],
        Field(
            description="format of the steps; native: the interpreter for labelmint's C kernel, on CPUs only; "
            "gpu: for its kernel on GPUs"
        ),
    ] = "onnx"
    precision: Annotated[
        Literal["float16", "bfloat16", "tf32", "float32"],
        Field(description="what the kernel of --format gpu multiplies; it sums in float32"),
    ] = "float16"
    strip_rows: Annotated[
        int | None,
        Field(
            ge=2,
            le=1024,
            description="rows that the interpreter of --format onnx or torchscript labels at a time; fewer need less "
            "memory; default: 32, above 256x256 pixels 16",
        ),
    ] = None
    version: Annotated[
        int, Field(ge=1, lt=2**31, description="version to write; an existing one is replaced, the others stay")
    ] = 1
    staged: Annotated[
        bool, Field(description="write the staged pipeline too; without it, Triton needs less memory")
    ] = True

    @field_validator("strip_rows")
    @classmethod
    def _strips_fill_the_image(cls, rows: int | None) -> int | None:
        if rows is not None and rows & (rows - 1):
            raise ValueError(f"a strip has 2, 4, 8, ... rows, not {rows}")
        return rows

    @model_validator(mode="after")
    def _no_option_of_another_format(self) -> Export:
        for option, formats in (("precision", ("gpu",)), ("strip_rows", ("onnx", "torchscript"))):
            if self.format not in formats and option in self.model_fields_set:
                raise ValueError(f"{option} does not apply to --format {self.format}")
        return self

    def cli_cmd(self) -> None:
        from labelmint.export.repository import export_files

        export_files(
            self.generator,
            self.interpreter,
            self.model_repository,
            model=self.model,
            score_kind=self.score_kind,
            file_format=self.format,
            version=self.version,
            staged=self.staged,
            precision=self.precision,
            strip_rows=self.strip_rows,
        )


class Import(BaseModel):
    """Convert another project's weights to labelmint's format. No code in them is run."""

    source: Annotated[CliPositionalArg[Path], Field(description="file to import; for classifiers, their directory")]
    out: Annotated[CliPositionalArg[Path], Field(description="file to write (safetensors)")]
    format: Annotated[
        Literal["auto", "nvlabs-stylegan2", "rosinality-stylegan2", "stylegan1", "datasetgan-classifiers"],
        Field(description="format of the source; auto: detected from the content"),
    ] = "auto"
    class_index: Annotated[
        int | None, Field(description="of a conditional generator, import only this class; default: all classes")
    ] = None
    class_names: Annotated[
        Path | None,
        Field(description="names of all classes of a conditional generator (JSON); default: class 0, class 1, ..."),
    ] = None
    average_latent: Annotated[Path | None, Field(description="average latent of a StyleGAN1 (npy)")] = None
    generator: Annotated[Path | None, Field(description="imported generator whose features the classifiers read")] = (
        None
    )
    layout: Annotated[
        Literal["paper", "release-stylegan1", "editgan-stylegan2"] | None,
        Field(description="feature layout of the classifiers"),
    ] = None
    classes: Annotated[Path | None, Field(description="names and colours of the classes (classes.json)")] = None

    def cli_cmd(self) -> None:
        from labelmint.checkpoints.importing import ImportOptions, import_file

        options = ImportOptions(
            class_index=self.class_index,
            class_names=self.class_names,
            average_latent=self.average_latent,
            generator=self.generator,
            layout=self.layout,
            classes=self.classes,
        )
        print(import_file(self.source, self.out, None if self.format == "auto" else self.format, options=options))


class Calibrate(BaseModel):
    """Measure the JS scores of a served pipeline and write the gate into its configuration."""

    model: Annotated[CliPositionalArg[str], Field(description="name of the model")]
    model_repository: Annotated[Path, Field(description="directory of the repository")] = Path("model_repository")
    version: Annotated[int, Field(ge=1, lt=2**31, description="version of the model")] = 1
    count: Annotated[int, Field(ge=1, description="number of seeds to measure, at least 1000 for a gate")] = 2000
    preview: Annotated[bool, Field(description="only print quantiles of the scores, for any number of seeds")] = False
    first_seed: Annotated[int, Field(ge=0, lt=2**32, description="first of the consecutive seeds")] = CALIBRATION_SEED
    truncation_psi: Annotated[float, Field(ge=0, le=2, description="truncation to calibrate for")] = 1.0
    score_kind: Annotated[
        ScoreKind | None,
        Field(description="image score to calibrate; refused unless the model was exported with it. Default: its own"),
    ] = None
    executor: Annotated[
        Choice, Field(description="what runs the interpreter of an ONNX model; each has a calibration of its own")
    ] = KERNEL
    triton_url: Annotated[
        str, Field(description="gRPC target (HOST:PORT) of the Tritons that serve the model; empty: start one")
    ] = ""
    class_index: Annotated[
        list[Annotated[int, Field(ge=0)]] | None,
        Field(min_length=1, description="for a conditional generator: the classes to calibrate: 0,3,5"),
    ] = None
    all_classes: Annotated[bool, Field(description="for a conditional generator: calibrate all classes")] = False

    @model_validator(mode="after")
    def _classes_once(self) -> Calibrate:
        if self.all_classes and self.class_index is not None:
            raise ValueError("--all-classes calibrates every class, so --class-index does not apply")
        return self

    async def cli_cmd(self) -> None:
        from labelmint.calibrate import ALL_CLASSES, calibrate_repository, calibrated, check_score_kind, preview

        if self.score_kind is not None:
            check_score_kind(self.model_repository, self.model, self.version, self.score_kind)
        measure = preview if self.preview else calibrate_repository
        found = await measure(
            self.model_repository,
            self.model,
            self.first_seed,
            count=self.count,
            truncation_psi=self.truncation_psi,
            version=self.version,
            executor=self.executor,
            triton_url=self.triton_url,
            class_indices=ALL_CLASSES if self.all_classes else self.class_index or (),
        )
        if isinstance(found, str):
            print(found)
            return
        for each in found:
            of_class = "" if each.class_index is None else f" of class {each.class_index}"
            gate = f"gate at JS {each.threshold:.6g} nats (score kind {each.score_kind})"
            print(f"calibration {each.id}{of_class}: {gate}")
        if self.triton_url:
            files = " and ".join(map(str, calibrated(self.model_repository, self.model, self.version)))
            print(f"copy {files} to the repository of the Triton at {self.triton_url} and reload the model there")


class Index(BaseModel):
    """Walk seeds through a served pipeline and write an index of them. The same command resumes an interrupted one."""

    model: Annotated[CliPositionalArg[str], Field(description="name of the model")]
    seeds: Annotated[str, Field(description="range of seeds, START:END, its end excluded")]
    model_repository: Annotated[Path, Field(description="directory of the repository")] = Path("model_repository")
    version: Annotated[int, Field(ge=1, lt=2**31, description="version of the model")] = 1
    executor: Annotated[Choice, Field(description="what runs the interpreter of an ONNX model")] = KERNEL
    triton_url: Annotated[
        str,
        Field(
            description="gRPC target (HOST:PORT) of the Tritons that serve the model, instead of --model-repository "
            "and --executor; empty: start one"
        ),
    ] = ""
    truncation_psi: Annotated[
        float | None, Field(ge=0, le=2, description="truncation of the samples; default: the calibrated one, or 1")
    ] = None
    class_index: Annotated[int | None, Field(ge=0, description="class that a conditional generator draws")] = None
    out: Annotated[Path, Field(description="directory of the index")] = Path("index")
    shard_index: Annotated[int, Field(ge=0, description="which shard of the seeds to walk")] = 0
    shard_count: Annotated[int, Field(ge=1, description="number of shards; each is a file of the same index")] = 1

    @model_validator(mode="after")
    def _options_that_fit(self) -> Index:
        if self.triton_url and self.model_fields_set & {"model_repository", "executor"}:
            raise ValueError(
                "--triton-url names Tritons with models, so --model-repository and --executor do not apply"
            )
        if self.shard_index >= self.shard_count:
            raise ValueError(f"shard_index: {self.shard_index} is out of range; give 0 to {self.shard_count - 1}")
        return self

    async def cli_cmd(self) -> None:
        from labelmint.indexing import index_seeds, seeds_of
        from labelmint.seed_index.writing import shard_of

        shard = shard_of(seeds_of(self.seeds), self.shard_index, self.shard_count)
        if not shard:
            print(
                f"shard {self.shard_index} of {self.shard_count} has no seeds: {self.seeds} is shared out in row groups"
            )
            return
        path = await index_seeds(
            self.model,
            shard,
            self.out,
            repository=self.model_repository,
            version=self.version,
            executor=self.executor,
            triton_url=self.triton_url,
            truncation_psi=self.truncation_psi,
            class_index=self.class_index,
        )
        print(f"{path} has the seeds {shard.start}:{shard.stop}")


class Pull(BaseModel):
    """Write accepted samples to a directory as a data set."""


class Verify(BaseModel):
    """Check a pulled directory, optionally against a live service."""


class Upload(BaseModel):
    """Send a pulled directory to S3."""


class Labelmint(BaseSettings):
    """Serves training data on demand: image-label pairs that a frozen StyleGAN generates."""

    model_config = SettingsConfigDict(
        cli_prog_name="labelmint",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_enforce_required=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    version: Annotated[CliToggleFlag[bool], Field(description="print the version and exit")] = False
    serve: Annotated[CliSubCommand[Serve], Field(description="start Triton and the gateway, until Ctrl-C")]
    import_: Annotated[CliSubCommand[Import], Field(alias="import", description="convert another project's weights")]
    synth: Annotated[CliSubCommand[Synth], Field(description="write generated images for a person to annotate")]
    annotate: Annotated[CliSubCommand[Annotate], Field(description="draw on generated images, see, fit and serve")]
    fit: Annotated[CliSubCommand[Fit], Field(description="train the Style Interpreter on annotated images")]
    suggest: Annotated[CliSubCommand[Suggest], Field(description="print the seeds that are worth annotating next")]
    export: Annotated[CliSubCommand[Export], Field(description="write a model repository that Triton serves")]
    calibrate: Annotated[CliSubCommand[Calibrate], Field(description="measure JS scores and set the gate")]
    index: Annotated[CliSubCommand[Index], Field(description="write an index of seeds, to find rare samples")]
    # Listed for the help only; `main` hands their arguments to the client.
    pull: Annotated[CliSubCommand[Pull], Field(description="write accepted samples to a directory as a data set")]
    verify: Annotated[CliSubCommand[Verify], Field(description="check such a directory, optionally against a service")]
    upload: Annotated[CliSubCommand[Upload], Field(description="send such a directory to S3, the manifest last")]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only the command line: a container often has a variable VERSION, and an index job INDEX."""
        return (init_settings,)

    def cli_cmd(self) -> None:
        if self.version:
            print(f"labelmint {version('labelmint')}")
        elif get_subcommand(self, is_required=False) is None:
            names = (field.alias or name for name, field in type(self).model_fields.items() if name != "version")
            _fail(f"no command; give one of {', '.join(names)}, and --help for its options")
        else:
            CliApp.run_subcommand(self)


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in _CLIENT_COMMANDS:
        _hand_over(sys.argv[1:])
    logging.basicConfig(level=logging.WARNING, format="labelmint: %(message)s", stream=sys.stderr)
    try:
        CliApp.run(Labelmint)
    except ModuleNotFoundError as error:
        extra, need = _EXTRAS.get((error.name or "").split(".")[0], ("", ""))
        if not extra:
            raise
        _fail(f"{need}; run `pip install '.[{extra}]'` in a clone of labelmint")
    except LabelmintError as error:
        _fail(error.message)
    except ValidationError as error:
        _fail("; ".join(map(_said, error.errors())))
    except OSError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("labelmint: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _hand_over(arguments: list[str]) -> NoReturn:
    """Let the client run its command. The client itself reports other missing packages."""
    try:
        from labelmint_client import cli
    except ModuleNotFoundError as error:
        if error.name != "labelmint_client":
            raise
        _fail(
            f"`{arguments[0]}` is a client command; run `pip install './clients/python[pull]'` in a clone of labelmint"
        )
    cli.main(arguments)


def _said(entry: ErrorDetails) -> str:
    """The message for an invalid option. A rule about several options names them in its own message."""
    where = ".".join(map(str, entry["loc"][1:]))
    return f"{where}: {entry['msg']}" if where else entry["msg"].removeprefix("Value error, ")


def _fail(message: str) -> NoReturn:
    print(f"labelmint: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
