"""Conversion of gRPC messages: request options to policy options, samples and models to response messages.

Rules of this file:
- Samples are returned as dicts of fields, and the caller builds the outermost message in one step. A nested message
  that is built first has its pixels copied once more for each message around it.
- Nothing here waits, and nothing here decides whether a sample is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from labelmint.core.content import Condition
from labelmint.core.errors import InvalidRequest, SampleRejected, shortened
from labelmint.core.policy import SampleOptions, check_has_label
from labelmint.core.served_model import ServedModel
from labelmint.gateway.encoding.fields import (
    filtered_fields,
    label_name_fields,
    model_fields,
    rejection_fields,
    sample_fields,
)
from labelmint.gateway.encoding.pixels import IMAGE_ENCODERS, LABEL_ENCODERS, Encoder, Encoding
from labelmint.gateway.sampling.sample import Sample
from labelmint.v1 import sample_service_pb2 as pb

Fields: TypeAlias = dict[str, Any]

_ENCODINGS: Mapping[pb.Encoding, Encoding] = {
    pb.ENCODING_UNSPECIFIED: "png",
    pb.ENCODING_RAW: "raw",
    pb.ENCODING_PNG: "png",
    pb.ENCODING_JPEG: "jpeg",
}
_VALUES: Mapping[Encoding, pb.Encoding] = {name: value for value, name in _ENCODINGS.items()}


def options_of(model: ServedModel, options: pb.SampleOptions) -> SampleOptions:
    """Raises InvalidRequest for encodings that do not fit the model or the omitted parts."""
    for field in ("image_encoding", "label_encoding"):
        if getattr(options, field) not in _ENCODINGS:
            known = ", ".join(pb.Encoding.keys())
            raise InvalidRequest(f"options.{field}", f"{getattr(options, field)} is not an encoding; known: {known}")
    if options.label_encoding != pb.ENCODING_UNSPECIFIED:
        check_has_label(model, "options.label_encoding", "leave it unset")
        if _ENCODINGS[options.label_encoding] not in LABEL_ENCODERS:
            raise InvalidRequest("options.label_encoding", "a label has class ids, which JPEG would change; use PNG")
    for part in ("image", "label"):
        if getattr(options, f"omit_{part}") and getattr(options, f"{part}_encoding") != pb.ENCODING_UNSPECIFIED:
            raise InvalidRequest(f"options.{part}_encoding", f"omit_{part} leaves nothing to encode; leave it unset")
    gate = options.WhichOneof("gate")
    return SampleOptions(
        truncation_psi=options.truncation_psi if options.HasField("truncation_psi") else None,
        style_seed=options.style_seed if options.HasField("style_seed") else None,
        crossover=options.crossover if options.HasField("crossover") else None,
        max_js=options.max_js if gate == "max_js" else None,
        max_quantile=options.max_quantile if gate == "max_quantile" else None,
        include_rejected=options.include_rejected,
        include_js_map=options.include_js_map,
        omit_image=options.omit_image,
        omit_label=options.omit_label,
        where=tuple(_condition(model, condition) for condition in options.where),
        ignore_js_quantile=options.ignore_js_quantile if options.HasField("ignore_js_quantile") else None,
        class_index=options.class_index if options.HasField("class_index") else None,
    )


def _condition(model: ServedModel, message: pb.Condition) -> Condition:
    """Raises InvalidRequest for a bound on what the model's task does not have."""
    measure = model.task.measure
    given = {field.name: value for field, value in message.ListFields() if field.name != "name"}
    for field in given:
        if not field.endswith(measure):
            raise InvalidRequest(
                "where",
                f"{shortened(message.name)!r} has {field}, and model {model.name!r} has task {model.task.name!r}; give "
                f"min_{measure} or max_{measure}",
            )
    return Condition(message.name, given.get(f"min_{measure}"), given.get(f"max_{measure}"))


def copies_only(options: pb.SampleOptions) -> bool:
    """Whether pixels are only copied into the message, which is fast, and neither compressed nor compared."""
    parts = ((options.omit_image, options.image_encoding), (options.omit_label, options.label_encoding))
    copied = all(omitted or encoding == pb.ENCODING_RAW for omitted, encoding in parts)
    return copied and not options.HasField("ignore_js_quantile")


def sample_message(sample: Sample, options: pb.SampleOptions) -> Fields:
    return {
        **sample_fields(sample),
        "content": _content(sample),
        "image": _pixels(sample, sample.image, _ENCODINGS[options.image_encoding], encoders=IMAGE_ENCODERS),
        "label": _pixels(sample, sample.label, _ENCODINGS[options.label_encoding], encoders=LABEL_ENCODERS),
        "js_map": b"" if sample.js_map is None else sample.js_map.astype("<f4").tobytes(),
    }


def outcome_messages(samples: list[Sample], options: pb.SampleOptions) -> list[Fields]:
    return [_outcome_message(sample, options) for sample in samples]


def _outcome_message(sample: Sample, options: pb.SampleOptions) -> Fields:
    refusal = sample.refusal()
    if refusal is None:
        return {"sample": sample_message(sample, options)}
    if isinstance(refusal, SampleRejected):
        return {"rejection": rejection_fields(sample)}
    return {"filtered": {**filtered_fields(sample), "content": _content(sample)}}


def _content(sample: Sample) -> list[Fields]:
    return [{"name": name, "value": value} for name, value in sample.content.items()]


def model_message(model: ServedModel, class_index: int | None = None) -> pb.Model:
    """The description of a model, with the calibration of a generator class if `class_index` is given."""
    labels = [
        pb.LabelClass(name=name, rgb=red << 16 | green << 8 | blue)
        for name, (red, green, blue) in zip(model.label_names, model.palette, strict=True)
    ]
    message = pb.Model(**model_fields(model), **label_name_fields(model, labels))
    calibration = model.calibration_of(class_index)
    if calibration is not None:
        message.calibration.CopyFrom(pb.Calibration(**calibration.described()))
    return message


def _pixels(
    sample: Sample, array: npt.NDArray[np.uint8] | None, encoding: Encoding, *, encoders: Mapping[Encoding, Encoder]
) -> Fields | None:
    if array is None:
        return None
    return {
        "encoding": _VALUES[encoding],
        "height": array.shape[0],
        "width": array.shape[1],
        "channels": 1 if array.ndim == 2 else array.shape[2],
        "data": encoders[encoding](sample),
    }
