"""The data classes of the client (options, samples and models with NumPy arrays), and their conversion from protobuf.

Rules of this file:
- The fields have the names of the protocol. `sample_service.proto` documents each one.
- The client requests raw pixels by default. Arrays are read-only views of the received bytes: copy one to change it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import grpc
import numpy as np
import numpy.typing as npt

from labelmint_client.errors import LabelmintError
from labelmint_client.v1 import sample_service_pb2 as pb

SEED_END = 2**32

# The tasks whose label is an image. Only these accept a label encoding.
_LABEL_IMAGE_TASKS = ("segmentation",)
# A bound of a condition; it is the gateway's, so that REST and this client read the same text alike.
_NUMBER = re.compile(r"(?:[0-9]{1,20}(?:\.[0-9]{1,20})?|\.[0-9]{1,20})(?:[eE]-?[0-9]{1,3})?")
_ENCODINGS = {"raw": pb.ENCODING_RAW, "png": pb.ENCODING_PNG, "jpeg": pb.ENCODING_JPEG}


@dataclass(frozen=True)
class SampleOptions:
    """The options of a sample: its generation and its gate. None means the model's own value.

    truncation_psi: 0 to 2. A value other than the calibrated one needs max_js.
    max_js, max_quantile: the gate, in nats or as a quantile of the calibration, above 0 and at most 1; at most one of
    the two.
    include_rejected: also deliver rejected samples, with `accepted` false.
    image_encoding: the encoding of images on the network. png and jpeg (lossy) save bandwidth and need Pillow.
    include_js_map: also deliver the JS divergence of every pixel.
    omit_image, omit_label: leave out the image; leave out the label or the keypoints.
    style_seed, crossover: layers from crossover on take the style of style_seed; this needs max_js.
    where: conditions that a sample must satisfy, each NAME:MIN..MAX with one bound or both. NAME is a class, and the
    bounds are shares of the image's pixels; or a keypoint, and the bounds are confidences. All are 0 to 1, inclusive.
    ignore_js_quantile: 0 to 1; pixels whose JS divergence is above this quantile of their own image become 255 in the
    label.
    class_index: the class that a conditional generator draws, an index of Model.generator_classes. Required for a model
    that has them, refused for any other.
    """

    truncation_psi: float | None = None
    max_js: float | None = None
    max_quantile: float | None = None
    include_rejected: bool = False
    image_encoding: Literal["raw", "png", "jpeg"] = "raw"
    include_js_map: bool = False
    omit_image: bool = False
    omit_label: bool = False
    style_seed: int | None = None
    crossover: int | None = None
    where: tuple[str, ...] = ()
    ignore_js_quantile: float | None = None
    class_index: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.where, str):
            raise ValueError(f"where: give a sequence of conditions, such as ({self.where!r},)")
        object.__setattr__(self, "where", tuple(self.where))
        for text in self.where:
            _bounds(text)
        if self.max_js is not None and self.max_quantile is not None:
            raise ValueError("give max_js or max_quantile, not both")
        if self.image_encoding not in _ENCODINGS:
            raise ValueError(f"image_encoding: {self.image_encoding!r} is not one of {', '.join(_ENCODINGS)}")

    def message(self, task: str) -> pb.SampleOptions:
        """Return the message for a model of that task. A task without a label image allows no label encoding."""
        has_label = task in _LABEL_IMAGE_TASKS and not self.omit_label
        return pb.SampleOptions(
            truncation_psi=self.truncation_psi,
            max_js=self.max_js,
            max_quantile=self.max_quantile,
            include_rejected=self.include_rejected,
            image_encoding=pb.ENCODING_UNSPECIFIED if self.omit_image else _ENCODINGS[self.image_encoding],
            label_encoding=pb.ENCODING_RAW if has_label else pb.ENCODING_UNSPECIFIED,
            include_js_map=self.include_js_map,
            style_seed=self.style_seed,
            crossover=self.crossover,
            omit_image=self.omit_image,
            omit_label=self.omit_label,
            where=[_condition(text, task) for text in self.where],
            ignore_js_quantile=self.ignore_js_quantile,
            class_index=self.class_index,
        )


@dataclass(frozen=True, eq=False)
class Sample:
    """The image and label of one seed, and the scores that decided whether it was accepted.

    image: uint8 [H,W,3], RGB; None with omit_image.
    label: uint8 [H,W], class ids, and 255 where pixels are ignored (ignore_js_quantile); None for a model of task
    "keypoints" and with omit_label.
    js_map: float32 [H,W], nats; None unless the request set include_js_map.
    keypoints: float32 [K,3], x and y in pixels (centre of the first pixel 0) and confidence (nominally 0 to 1), in the
    order of Model.keypoint_names; None for a model of task "segmentation" and with omit_label.
    js_score, threshold: nats; `accepted` says whether the score is at most the threshold.
    calibration_id: the calibration that gave the threshold; empty if the request set max_js.
    content: what the conditions of the request (`where`) asked about, by name: the class's share of the image's pixels,
    or the keypoint's confidence.
    style_seed, crossover, group_id: None, None and empty without style mixing. Mixed samples with the same shape share
    a group_id.
    class_index: the class that a conditional generator drew; None for a model without generator classes.
    """

    seed: int
    image: npt.NDArray[np.uint8] | None
    label: npt.NDArray[np.uint8] | None
    js_map: npt.NDArray[np.float32] | None
    keypoints: npt.NDArray[np.float32] | None
    js_score: float
    threshold: float
    accepted: bool
    model: str
    model_version: str
    model_digest: str
    calibration_id: str
    truncation_psi: float
    style_seed: int | None
    crossover: int | None
    group_id: str
    content: Mapping[str, float] = field(default_factory=dict)
    class_index: int | None = None


@dataclass(frozen=True)
class Filtered:
    """A seed of a batch whose sample only `where` keeps from being delivered; `content` as in `Sample`."""

    seed: int
    content: Mapping[str, float]


@dataclass(frozen=True)
class Rejection:
    """A seed of a batch whose JS score is above the gate; js_score and threshold in nats."""

    seed: int
    js_score: float
    threshold: float
    calibration_id: str


@dataclass(frozen=True, eq=False)
class ListedSeeds:
    """The seeds of a range whose samples a walk delivers.

    start_seed, end_seed: the range, without its end.
    seeds: uint32 [N], ascending.
    model_digest: SHA-256 over the model's artifacts, hexadecimal.
    """

    start_seed: int
    end_seed: int
    seeds: npt.NDArray[np.uint32]
    model_digest: str

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True, eq=False)
class SeedPage:
    """A page of ListSeeds: its delivered seeds, uint32 [n] ascending, where the next one begins, and the whole end."""

    seeds: npt.NDArray[np.uint32]
    next_seed: int
    end_seed: int
    model_digest: str


@dataclass(frozen=True)
class Calibration:
    """The measured distribution of JS scores, in nats. `quantiles` has 101 values: quantiles 0, 0.01, ... 1."""

    id: str
    truncation_psi: float
    threshold: float
    threshold_quantile: float
    quantiles: tuple[float, ...]
    first_seed: int
    seed_count: int


@dataclass(frozen=True, eq=False)
class Model:
    """A served model.

    task: "segmentation" (labels) or "keypoints".
    digest: SHA-256 over the model's artifacts, hexadecimal.
    resolution: height and width of images and labels, in pixels.
    class_names: the index is the class id; empty for task "keypoints". keypoint_names is empty for "segmentation".
    palette: uint8 [K,3], the RGB colour of each class or keypoint.
    executor: what runs the interpreter, such as "kernel" or "onnxruntime"; empty with an older gateway. Samples of one
    digest may differ between executors.
    calibration: None if none was measured. Requests for samples then need max_js. A model with generator classes has
    one for each class; this is that of the class that the caller named.
    generator_classes: the names of the classes that a conditional generator draws; the index is class_index. Empty for
    a model whose generator has no classes.
    calibrated_classes: the class_index of each class that was calibrated, ascending.
    """

    name: str
    version: str
    digest: str
    task: str
    pipeline: str
    resolution: int
    class_names: tuple[str, ...]
    keypoint_names: tuple[str, ...]
    palette: npt.NDArray[np.uint8]
    layout: str
    num_heads: int
    z_dim: int
    num_ws: int
    score_kind: str
    executor: str
    calibration: Calibration | None
    generator_classes: tuple[str, ...] = ()
    calibrated_classes: tuple[int, ...] = ()


def sample_of(message: pb.Sample) -> Sample:
    return Sample(
        seed=message.seed,
        image=_pixels(message.image) if message.HasField("image") else None,
        label=_pixels(message.label) if message.HasField("label") else None,
        js_map=_js_map(message),
        keypoints=_keypoints(message.keypoints),
        js_score=message.js_score,
        threshold=message.threshold,
        accepted=message.accepted,
        model=message.model,
        model_version=message.model_version,
        model_digest=message.model_digest,
        calibration_id=message.calibration_id,
        truncation_psi=message.truncation_psi,
        style_seed=message.style_seed if message.HasField("style_seed") else None,
        crossover=message.crossover if message.HasField("crossover") else None,
        group_id=message.group_id,
        content=_content(message),
        class_index=message.class_index if message.HasField("class_index") else None,
    )


def checked(message: pb.Sample, options: pb.SampleOptions) -> pb.Sample:
    """Return the message. Raises LabelmintError if it shows that the gateway does not know one of the options.

    A gateway of an earlier version ignores options that it does not know, and would deliver samples that the caller
    did not ask for.
    """
    wanted = {condition.name for condition in options.where}
    for name, ignored in (
        ("where", not wanted <= _content(message).keys()),
        (
            "ignore_js_quantile",
            options.HasField("ignore_js_quantile") and not message.HasField("ignore_js_quantile"),
        ),
        ("class_index", options.HasField("class_index") and not message.HasField("class_index")),
    ):
        if ignored:
            raise _older_gateway(name)
    return message


def _older_gateway(option: str) -> LabelmintError:
    return LabelmintError(
        f"the gateway is older than this client and does not know the option {option}: update the gateway",
        grpc.StatusCode.UNIMPLEMENTED,
    )


def seed_page_of(message: pb.ListSeedsResponse) -> SeedPage:
    bits = np.unpackbits(np.frombuffer(message.delivered, np.uint8), bitorder="little")  # uint8 [8*ceil(seeds/8)]
    seeds = np.flatnonzero(bits[: message.seed_count]) + message.first_seed
    return SeedPage(seeds.astype(np.uint32), message.next_seed, message.end_seed, message.model_digest)


def listed(start_seed: int, pages: Sequence[SeedPage]) -> ListedSeeds:
    """Join all pages of a range. Raises LabelmintError if the model was replaced between two of them."""
    digests = sorted({page.model_digest for page in pages})
    if len(digests) > 1:
        raise LabelmintError(f"the model was replaced while its seeds were listed: {' and '.join(digests)}; list again")
    return ListedSeeds(start_seed, pages[-1].end_seed, np.concatenate([page.seeds for page in pages]), digests[0])


def outcomes_of(message: pb.BatchGetSamplesResponse, options: pb.SampleOptions) -> list[Sample | Rejection | Filtered]:
    return [_outcome(outcome, options) for outcome in message.outcomes]


def model_of(message: pb.Model) -> Model:
    labels = message.classes or message.keypoint_classes
    colours = [label.rgb.to_bytes(3, "big") for label in labels]
    measured = message.calibration
    return Model(
        name=message.name,
        version=message.version,
        digest=message.digest,
        task=message.task,
        pipeline=message.pipeline,
        resolution=message.resolution,
        class_names=tuple(label.name for label in message.classes),
        keypoint_names=tuple(label.name for label in message.keypoint_classes),
        palette=np.frombuffer(b"".join(colours), np.uint8).reshape(-1, 3),
        layout=message.layout,
        num_heads=message.num_heads,
        z_dim=message.z_dim,
        num_ws=message.num_ws,
        score_kind=message.score_kind,
        executor=message.executor,
        calibration=Calibration(
            id=measured.id,
            truncation_psi=measured.truncation_psi,
            threshold=measured.threshold,
            threshold_quantile=measured.threshold_quantile,
            quantiles=tuple(measured.quantiles),
            first_seed=measured.first_seed,
            seed_count=measured.seed_count,
        )
        if message.HasField("calibration")
        else None,
        generator_classes=tuple(message.generator_classes),
        calibrated_classes=tuple(message.calibrated_classes),
    )


def model_of_class(message: pb.Model, class_index: int | None) -> Model:
    """Return a model that was asked for with a class. Raises LabelmintError if the gateway knows no classes."""
    if class_index is not None and not message.generator_classes:
        raise _older_gateway("class_index")
    return model_of(message)


def _outcome(message: pb.SampleOutcome, options: pb.SampleOptions) -> Sample | Rejection | Filtered:
    if message.HasField("sample"):
        return sample_of(checked(message.sample, options))
    if message.HasField("filtered"):
        return Filtered(message.filtered.seed, _content(message.filtered))
    return _rejection(message.rejection)


def _content(message: pb.Sample | pb.Filtered) -> dict[str, float]:
    return {each.name: each.value for each in message.content}


def _condition(text: str, task: str) -> pb.Condition:
    """Return the message for a condition. Its bounds are areas or confidences, as the task's labels have them."""
    name, low, high = _bounds(text)
    measure = "area" if task in _LABEL_IMAGE_TASKS else "confidence"
    return pb.Condition(**{"name": name, f"min_{measure}": low, f"max_{measure}": high})  # type: ignore[arg-type]


def _bounds(text: str) -> tuple[str, float | None, float | None]:
    """Return name, minimum and maximum of a condition NAME:MIN..MAX, as the gateway's REST API reads it."""
    name, _, bounds = text.rpartition(":")
    low, dots, high = bounds.partition("..")
    if not (name and dots and (low or high) and all(_NUMBER.fullmatch(bound) for bound in (low, high) if bound)):
        raise ValueError(
            f"where: {text!r} is not a condition; write NAME:MIN..MAX, for example hair:0.01.. for at least 1 % of the "
            "pixels, hair:..0 for none, hair:0.01..0.5 for both bounds"
        )
    return name, float(low) if low else None, float(high) if high else None


def _rejection(message: pb.Rejection) -> Rejection:
    return Rejection(message.seed, message.js_score, message.threshold, message.calibration_id)


def _pixels(message: pb.Pixels) -> npt.NDArray[np.uint8]:
    shape = (message.height, message.width, message.channels)[: 3 if message.channels > 1 else 2]
    if message.encoding == pb.ENCODING_RAW:
        return np.frombuffer(message.data, np.uint8).reshape(shape)
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the images are PNG or JPEG and Pillow is not installed: run `pip install './clients/python[images]'` in a "
            "clone of labelmint, or set image_encoding to raw",
            name="PIL",
        ) from error
    with Image.open(io.BytesIO(message.data)) as picture:
        return np.asarray(picture, np.uint8).reshape(shape)


def _js_map(message: pb.Sample) -> npt.NDArray[np.float32] | None:
    """The map is square, like all images of a model: Model.resolution is one number."""
    if not message.js_map:
        return None
    values = np.frombuffer(message.js_map, "<f4")
    side = round(values.size**0.5)
    return values.reshape(side, side)


def _keypoints(messages: Sequence[pb.Keypoint]) -> npt.NDArray[np.float32] | None:
    if not messages:
        return None
    return np.array([(point.x, point.y, point.confidence) for point in messages], np.float32)
