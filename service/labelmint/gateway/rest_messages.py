"""The bodies of the REST wire, as pydantic models, and how samples and models become them.

Rules of this file:
- A model here is what the document at /docs shows; names are those of the proto.
- Query parameters are declared once and unknown ones are refused: a misspelt gate must not be ignored.
"""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from labelmint.gateway import encode
from labelmint.gateway.policy import MAX_BATCH, MAX_TRUNCATION_PSI, SEED_END, SampleOptions
from labelmint.gateway.sampling import Sample
from labelmint.gateway.served_model import ServedModel


class OptionsModel(BaseModel):
    """Gate and truncation of a request."""

    model_config = ConfigDict(extra="forbid")

    truncation_psi: Annotated[
        float | None,
        Field(ge=0, le=MAX_TRUNCATION_PSI, description="Truncation; unset: as calibrated. Another needs max_js."),
    ] = None
    max_js: Annotated[
        float | None, Field(ge=0, allow_inf_nan=False, description="Accept JS scores up to this, in nats.")
    ] = None
    max_quantile: Annotated[
        float | None, Field(gt=0, le=1, description="Accept JS scores up to this quantile of the calibration.")
    ] = None
    include_rejected: Annotated[bool, Field(description="Answer with a rejected sample too.")] = False

    def to_sample_options(self, include_js_map: bool = False) -> SampleOptions:
        return SampleOptions(
            truncation_psi=self.truncation_psi,
            max_js=self.max_js,
            max_quantile=self.max_quantile,
            include_rejected=self.include_rejected,
            include_js_map=include_js_map,
        )


class SampleQuery(OptionsModel):
    encoding: Annotated[
        Literal["png", "raw"], Field(description="Encoding of the base64 data in the JSON: png, or raw rows of bytes.")
    ] = "png"


class BatchBody(SampleQuery):
    seeds: Annotated[
        list[Annotated[int, Field(ge=0, lt=SEED_END, strict=True)]],
        Field(min_length=1, max_length=MAX_BATCH, description=f"1 to {MAX_BATCH} seeds."),
    ]


class PixelsModel(BaseModel):
    encoding: Literal["png", "raw"]
    height: int
    width: int
    channels: int
    data: Annotated[str, Field(description="base64")]


class SampleModel(BaseModel):
    model: str
    seed: int
    accepted: bool
    js_score: float
    threshold: float
    calibration_id: str
    truncation_psi: float
    model_digest: str
    image: PixelsModel
    label: PixelsModel


class RejectionModel(BaseModel):
    seed: int
    accepted: Literal[False]
    js_score: float
    threshold: float
    calibration_id: str


class BatchModel(BaseModel):
    outcomes: list[SampleModel | RejectionModel]


class LabelClassModel(BaseModel):
    id: int
    name: str
    rgb: Annotated[str, Field(description="#RRGGBB in palette images")]


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
    pipeline: str
    task: str
    digest: str
    resolution: int
    z_dim: int
    layout: str
    num_heads: int
    score_kind: str
    classes: list[LabelClassModel]
    calibration: CalibrationModel | None


class ModelsModel(BaseModel):
    models: list[ModelModel]


class Problem(BaseModel):
    """RFC 9457 problem details; `reason` is the stable name of the error."""

    type: str
    title: str
    status: int
    detail: str
    reason: str
    metadata: dict[str, str]


def sample_model(sample: Sample, encoding: Literal["png", "raw"]) -> SampleModel:
    raw = encoding == "raw"
    image = sample.image.tobytes() if raw else encode.image_png(sample)
    label = sample.label.tobytes() if raw else encode.label_png(sample)
    height, width, channels = sample.image.shape

    def pixels(data: bytes, count: int) -> PixelsModel:
        text = base64.b64encode(data).decode()
        return PixelsModel(encoding=encoding, height=height, width=width, channels=count, data=text)

    return SampleModel(
        model=sample.model.name,
        seed=sample.seed,
        accepted=sample.accepted,
        js_score=sample.js_score,
        threshold=sample.gate.threshold,
        calibration_id=sample.gate.calibration_id,
        truncation_psi=sample.gate.truncation_psi,
        model_digest=sample.model.digest,
        image=pixels(image, channels),
        label=pixels(label, 1),
    )


def batch_model(samples: list[Sample], body: BatchBody) -> BatchModel:
    return BatchModel(
        outcomes=[
            sample_model(sample, body.encoding)
            if sample.accepted or body.include_rejected
            else RejectionModel(
                seed=sample.seed,
                accepted=False,
                js_score=sample.js_score,
                threshold=sample.gate.threshold,
                calibration_id=sample.gate.calibration_id,
            )
            for sample in samples
        ]
    )


def model_model(model: ServedModel) -> ModelModel:
    return ModelModel(
        name=model.name,
        version=model.version,
        pipeline=model.pipeline,
        task=model.task,
        digest=model.digest,
        resolution=model.resolution,
        z_dim=model.z_dim,
        layout=model.layout,
        num_heads=model.num_heads,
        score_kind=model.score_kind,
        classes=[
            LabelClassModel(id=index, name=name, rgb="#{:02x}{:02x}{:02x}".format(*colour))
            for index, (name, colour) in enumerate(zip(model.class_names, model.palette, strict=True))
        ],
        calibration=None if model.calibration is None else CalibrationModel(**model.calibration.described()),
    )
