"""Queries and bodies of the REST API as pydantic models, and the conversion of samples and models to them.

Rules of this file:
- The OpenAPI document at /docs is generated from these models. Names are the proto's names.
- Query parameters are declared once, and the text below one describes it. Unknown parameters are refused, because a
  misspelt gate must not be ignored.
"""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from labelmint.core.content import MAX_CONDITIONS, condition_of
from labelmint.core.errors import SampleRejected
from labelmint.core.policy import DEFAULT_PAGE, MAX_BATCH, MAX_PAGE, MAX_TRUNCATION_PSI, SEED_END, SampleOptions
from labelmint.core.served_model import ServedModel
from labelmint.gateway.encoding.fields import (
    filtered_fields,
    label_name_fields,
    model_fields,
    page_fields,
    rejection_fields,
    sample_fields,
)
from labelmint.gateway.encoding.pixels import IMAGE_ENCODERS, LABEL_ENCODERS, Encoder
from labelmint.gateway.rest.caching import revision
from labelmint.gateway.sampling.indexed import SeedPage
from labelmint.gateway.sampling.sample import Sample

MAX_TAR_COUNT = 100_000


class VersionModel(BaseModel):
    """The model version of a request."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model_version: str = ""
    """Version, as /v1/models lists it. Empty: the highest."""


# The pattern is for readers of the OpenAPI document; `condition_of` checks the text, with an error that says more.
ConditionText = Annotated[str, WithJsonSchema({"type": "string", "pattern": r"^.+:[0-9.eE-]*\.\.[0-9.eE-]*$"})]


class OptionsModel(VersionModel):
    """Gate, truncation and mixing of a request."""

    truncation_psi: Annotated[float | None, Field(ge=0, le=MAX_TRUNCATION_PSI)] = None
    """Truncation. Unset: the calibrated value. Any other value needs max_js."""
    style_seed: Annotated[int | None, Field(ge=0, lt=SEED_END)] = None
    """Style seed: the layers from crossover on take its style. Needs crossover and max_js."""
    crossover: int | None = None
    """First layer that takes the style of style_seed: 1 to the model's num_ws - 1."""
    max_js: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    """Accept JS scores up to this value, in nats."""
    max_quantile: Annotated[float | None, Field(gt=0, le=1)] = None
    """Accept JS scores up to this quantile of the calibration."""
    include_rejected: bool = False
    """Return rejected samples too."""
    where: Annotated[list[ConditionText], Field(max_length=MAX_CONDITIONS, examples=[["hair:0.01.."]])] = []
    """Conditions that a sample must satisfy, each NAME:MIN..MAX with one bound or both. NAME is a class, and the bounds
    are shares of the image's pixels; or a keypoint, and the bounds are confidences. All are 0 to 1 and inclusive."""
    ignore_js_quantile: Annotated[float | None, Field(ge=0, le=1)] = None
    """Write 255, the ignore label, where the JS divergence of a pixel is above this quantile of its own image."""

    def to_sample_options(self, include_js_map: bool = False) -> SampleOptions:
        return SampleOptions(
            truncation_psi=self.truncation_psi,
            style_seed=self.style_seed,
            crossover=self.crossover,
            max_js=self.max_js,
            max_quantile=self.max_quantile,
            include_rejected=self.include_rejected,
            include_js_map=include_js_map,
            where=tuple(condition_of(text) for text in self.where),
            ignore_js_quantile=self.ignore_js_quantile,
        )


class PinnedQuery(OptionsModel):
    revision: Annotated[
        str | None,
        Field(
            description="Revision of the model, as /v1/models lists it. The gateway refuses any other revision. "
            "Caches may therefore keep the response for ever."
        ),
    ] = None


Encoding = Annotated[
    Literal["png", "raw"], Field(description="Encoding of the base64 data in the JSON: png, or raw rows of bytes.")
]
IncludeJsMap = Annotated[bool, Field(description="Also return the JS divergence of every pixel.")]


class SampleQuery(PinnedQuery):
    encoding: Encoding = "png"
    include_js_map: IncludeJsMap = False


def _whole(value: object) -> object:
    """Convert a whole float to int, because JSON has only one number type: 7.0 is the integer 7."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Seed = Annotated[int, Field(ge=0, lt=SEED_END, strict=True), BeforeValidator(_whole)]


class TarQuery(PinnedQuery):
    start_seed: Annotated[int, Field(ge=0, le=SEED_END)] = 0
    """First seed of the walk."""
    count: Annotated[int, Field(ge=1, le=MAX_TAR_COUNT)] = 100
    """Number of samples; fewer only if the seeds run out."""
    shard_index: Annotated[int, Field(ge=0)] = 0
    """This archive takes the seeds congruent to shard_index modulo shard_count."""
    shard_count: Annotated[int, Field(ge=1, le=SEED_END)] = 1
    """Number of disjoint archives."""


class SeedsQuery(PinnedQuery):
    start_seed: Annotated[int, Field(ge=0, le=SEED_END)] = 0
    """First seed of the range."""
    end_seed: Annotated[int, Field(ge=0, le=SEED_END)] = 0
    """First seed after the range. 0: the end of the run of indexed seeds that start_seed is in."""
    page_size: Annotated[
        int, Field(ge=0, le=MAX_PAGE, description=f"Most seeds of a page, 1 to {MAX_PAGE}; 0: {DEFAULT_PAGE}.")
    ] = 0


class BatchBody(OptionsModel):
    encoding: Encoding = "png"
    include_js_map: IncludeJsMap = False
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MAX_BATCH, description=f"1 to {MAX_BATCH} seeds.")]
    style_seeds: list[Seed] = []
    """Empty, or one style seed per seed in place of style_seed. Needs crossover and max_js."""


class PixelsModel(BaseModel):
    encoding: Literal["png", "raw"]
    height: int
    width: int
    channels: int
    data: Annotated[str, Field(description="base64")]


class KeypointModel(BaseModel):
    name: str
    x: Annotated[float, Field(description="Pixels from the left; the centre of the first pixel is 0.")]
    y: Annotated[float, Field(description="Pixels from the top; the centre of the first pixel is 0.")]
    confidence: Annotated[float, Field(description="Mean heat of the ensemble at the keypoint, nominally 0 to 1.")]


class EvidenceModel(BaseModel):
    """A sample without its pixels."""

    model: str
    model_version: str
    seed: int
    accepted: bool
    js_score: float
    threshold: float
    calibration_id: str
    truncation_psi: float
    style_seed: int | None
    crossover: int | None
    group_id: Annotated[str, Field(description="Equal in all mixed samples of one shape. Empty in unmixed samples.")]
    model_digest: str
    keypoints: Annotated[list[KeypointModel], Field(description="empty for a model of another task")]


Content = Annotated[
    dict[str, float],
    Field(
        description="What `where` asked about, by name: the class's share of the pixels, or the keypoint's confidence."
    ),
]


class SampleModel(EvidenceModel):
    # Absent unless the request has the option, so that the bytes of other responses stay what they were.
    content: Content = {}
    ignore_js_quantile: Annotated[
        float | None, Field(description="The quantile above which pixels of the label are ignored.")
    ] = None
    image: PixelsModel
    label: Annotated[PixelsModel | None, Field(description="null for a model without a label image")]
    js_map: Annotated[
        str,
        Field(description="base64 of each pixel's JS divergence in nats: float32, little endian, row by row; or empty"),
    ]


class RejectionModel(BaseModel):
    seed: int
    accepted: Literal[False]
    js_score: float
    threshold: float
    calibration_id: str


class FilteredModel(BaseModel):
    """A seed whose sample only `where` keeps from being delivered."""

    seed: int
    filtered: Literal[True]
    content: Content


class BatchModel(BaseModel):
    outcomes: list[SampleModel | RejectionModel | FilteredModel]


class SeedPageModel(BaseModel):
    """Which seeds of a page a walk delivers."""

    first_seed: Annotated[int, Field(description="First seed of the page.")]
    seed_count: Annotated[int, Field(description="Number of seeds of the page, delivered or not.")]
    delivered: Annotated[
        str,
        Field(
            description="base64 of one bit for each seed of the page, set if a walk delivers its sample. Seed "
            "first_seed + i is bit i % 8 of byte i / 8, counted from the least significant bit."
        ),
    ]
    delivered_count: Annotated[int, Field(description="How many bits are set.")]
    next_seed: Annotated[int, Field(description="First seed after the page: the start_seed of the next page.")]
    end_seed: Annotated[int, Field(description="End of the range. The page is the last one if next_seed is equal.")]
    model_digest: str


class LabelClassModel(BaseModel):
    id: int
    name: str
    rgb: Annotated[str, Field(description="colour in palette images and overlays, #RRGGBB")]


class CalibrationModel(BaseModel):
    id: str
    truncation_psi: float
    threshold: float
    threshold_quantile: float
    quantiles: list[float]
    first_seed: int
    seed_count: int


class ModelModel(BaseModel):
    name: str
    version: str
    revision: Annotated[
        str,
        Field(
            description="Changes with all that determines a response: artifacts, executor, calibration, names, colours."
        ),
    ]
    pipeline: str
    task: str
    digest: str
    resolution: int
    z_dim: int
    num_ws: int
    layout: str
    num_heads: int
    score_kind: str
    executor: Annotated[
        str,
        Field(
            description="What runs the interpreter: kernel (labelmint's own), or the Triton backend, such as "
            "onnxruntime. Samples of one digest may differ between executors."
        ),
    ]
    classes: Annotated[list[LabelClassModel], Field(description="empty for a model of another task")]
    keypoint_classes: Annotated[list[LabelClassModel], Field(description="empty for a model of another task")]
    calibration: CalibrationModel | None


class ModelsModel(BaseModel):
    models: list[ModelModel]


class Problem(BaseModel):
    """RFC 9457 problem details; `reason` is the stable name of the error."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: str
    reason: str
    metadata: dict[str, str]


def sample_model(sample: Sample, encoding: Literal["png", "raw"]) -> SampleModel:
    def pixels(encoder: Encoder, channels: int) -> PixelsModel:
        text = base64.b64encode(encoder(sample)).decode()
        side = sample.model.resolution
        return PixelsModel(encoding=encoding, height=side, width=side, channels=channels, data=text)

    image = pixels(IMAGE_ENCODERS[encoding], 3)
    label = None if sample.label is None else pixels(LABEL_ENCODERS[encoding], 1)
    js_map = "" if sample.js_map is None else base64.b64encode(sample.js_map.astype("<f4").tobytes()).decode()
    return SampleModel(**sample_fields(sample), image=image, label=label, js_map=js_map)


def batch_model(samples: list[Sample], body: BatchBody) -> BatchModel:
    return BatchModel(outcomes=[_outcome_model(sample, body) for sample in samples])


def _outcome_model(sample: Sample, body: BatchBody) -> SampleModel | RejectionModel | FilteredModel:
    refusal = sample.refusal()
    if refusal is None:
        return sample_model(sample, body.encoding)
    if isinstance(refusal, SampleRejected):
        return RejectionModel(accepted=False, **rejection_fields(sample))
    return FilteredModel(filtered=True, **filtered_fields(sample))


def seed_page_model(page: SeedPage) -> SeedPageModel:
    fields = page_fields(page)
    return SeedPageModel(**{**fields, "delivered": base64.b64encode(page.delivered).decode()})


def model_model(model: ServedModel) -> ModelModel:
    labels = [
        LabelClassModel(id=index, name=name, rgb="#{:02x}{:02x}{:02x}".format(*colour))
        for index, (name, colour) in enumerate(zip(model.label_names, model.palette, strict=True))
    ]
    return ModelModel(
        **model_fields(model),
        **label_name_fields(model, labels),
        revision=revision(model),
        calibration=None if model.calibration is None else CalibrationModel(**model.calibration.described()),
    )
