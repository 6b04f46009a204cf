from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_RAW: _ClassVar[Encoding]
    ENCODING_PNG: _ClassVar[Encoding]
    ENCODING_JPEG: _ClassVar[Encoding]
ENCODING_UNSPECIFIED: Encoding
ENCODING_RAW: Encoding
ENCODING_PNG: Encoding
ENCODING_JPEG: Encoding

class Condition(_message.Message):
    __slots__ = ("name", "min_area", "max_area", "min_confidence", "max_confidence")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MIN_AREA_FIELD_NUMBER: _ClassVar[int]
    MAX_AREA_FIELD_NUMBER: _ClassVar[int]
    MIN_CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    min_area: float
    max_area: float
    min_confidence: float
    max_confidence: float
    def __init__(self, name: _Optional[str] = ..., min_area: _Optional[float] = ..., max_area: _Optional[float] = ..., min_confidence: _Optional[float] = ..., max_confidence: _Optional[float] = ...) -> None: ...

class SampleOptions(_message.Message):
    __slots__ = ("truncation_psi", "max_js", "max_quantile", "include_rejected", "image_encoding", "label_encoding", "include_js_map", "style_seed", "crossover", "omit_image", "omit_label", "where", "ignore_js_quantile", "class_index")
    TRUNCATION_PSI_FIELD_NUMBER: _ClassVar[int]
    MAX_JS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUANTILE_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_REJECTED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ENCODING_FIELD_NUMBER: _ClassVar[int]
    LABEL_ENCODING_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_JS_MAP_FIELD_NUMBER: _ClassVar[int]
    STYLE_SEED_FIELD_NUMBER: _ClassVar[int]
    CROSSOVER_FIELD_NUMBER: _ClassVar[int]
    OMIT_IMAGE_FIELD_NUMBER: _ClassVar[int]
    OMIT_LABEL_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    IGNORE_JS_QUANTILE_FIELD_NUMBER: _ClassVar[int]
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    truncation_psi: float
    max_js: float
    max_quantile: float
    include_rejected: bool
    image_encoding: Encoding
    label_encoding: Encoding
    include_js_map: bool
    style_seed: int
    crossover: int
    omit_image: bool
    omit_label: bool
    where: _containers.RepeatedCompositeFieldContainer[Condition]
    ignore_js_quantile: float
    class_index: int
    def __init__(self, truncation_psi: _Optional[float] = ..., max_js: _Optional[float] = ..., max_quantile: _Optional[float] = ..., include_rejected: bool = ..., image_encoding: _Optional[_Union[Encoding, str]] = ..., label_encoding: _Optional[_Union[Encoding, str]] = ..., include_js_map: bool = ..., style_seed: _Optional[int] = ..., crossover: _Optional[int] = ..., omit_image: bool = ..., omit_label: bool = ..., where: _Optional[_Iterable[_Union[Condition, _Mapping]]] = ..., ignore_js_quantile: _Optional[float] = ..., class_index: _Optional[int] = ...) -> None: ...

class Content(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Keypoint(_message.Message):
    __slots__ = ("name", "x", "y", "confidence")
    NAME_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    x: float
    y: float
    confidence: float
    def __init__(self, name: _Optional[str] = ..., x: _Optional[float] = ..., y: _Optional[float] = ..., confidence: _Optional[float] = ...) -> None: ...

class Pixels(_message.Message):
    __slots__ = ("encoding", "height", "width", "channels", "data")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    encoding: Encoding
    height: int
    width: int
    channels: int
    data: bytes
    def __init__(self, encoding: _Optional[_Union[Encoding, str]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., channels: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("model", "seed", "image", "label", "js_map", "js_score", "threshold", "accepted", "model_digest", "calibration_id", "truncation_psi", "style_seed", "crossover", "group_id", "keypoints", "model_version", "content", "ignore_js_quantile", "class_index")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    JS_MAP_FIELD_NUMBER: _ClassVar[int]
    JS_SCORE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_ID_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_PSI_FIELD_NUMBER: _ClassVar[int]
    STYLE_SEED_FIELD_NUMBER: _ClassVar[int]
    CROSSOVER_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    KEYPOINTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    IGNORE_JS_QUANTILE_FIELD_NUMBER: _ClassVar[int]
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    model: str
    seed: int
    image: Pixels
    label: Pixels
    js_map: bytes
    js_score: float
    threshold: float
    accepted: bool
    model_digest: str
    calibration_id: str
    truncation_psi: float
    style_seed: int
    crossover: int
    group_id: str
    keypoints: _containers.RepeatedCompositeFieldContainer[Keypoint]
    model_version: str
    content: _containers.RepeatedCompositeFieldContainer[Content]
    ignore_js_quantile: float
    class_index: int
    def __init__(self, model: _Optional[str] = ..., seed: _Optional[int] = ..., image: _Optional[_Union[Pixels, _Mapping]] = ..., label: _Optional[_Union[Pixels, _Mapping]] = ..., js_map: _Optional[bytes] = ..., js_score: _Optional[float] = ..., threshold: _Optional[float] = ..., accepted: bool = ..., model_digest: _Optional[str] = ..., calibration_id: _Optional[str] = ..., truncation_psi: _Optional[float] = ..., style_seed: _Optional[int] = ..., crossover: _Optional[int] = ..., group_id: _Optional[str] = ..., keypoints: _Optional[_Iterable[_Union[Keypoint, _Mapping]]] = ..., model_version: _Optional[str] = ..., content: _Optional[_Iterable[_Union[Content, _Mapping]]] = ..., ignore_js_quantile: _Optional[float] = ..., class_index: _Optional[int] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("seed", "js_score", "threshold", "calibration_id")
    SEED_FIELD_NUMBER: _ClassVar[int]
    JS_SCORE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_ID_FIELD_NUMBER: _ClassVar[int]
    seed: int
    js_score: float
    threshold: float
    calibration_id: str
    def __init__(self, seed: _Optional[int] = ..., js_score: _Optional[float] = ..., threshold: _Optional[float] = ..., calibration_id: _Optional[str] = ...) -> None: ...

class Filtered(_message.Message):
    __slots__ = ("seed", "content")
    SEED_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    seed: int
    content: _containers.RepeatedCompositeFieldContainer[Content]
    def __init__(self, seed: _Optional[int] = ..., content: _Optional[_Iterable[_Union[Content, _Mapping]]] = ...) -> None: ...

class GetSampleRequest(_message.Message):
    __slots__ = ("model", "seed", "options", "model_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    seed: int
    options: SampleOptions
    model_version: str
    def __init__(self, model: _Optional[str] = ..., seed: _Optional[int] = ..., options: _Optional[_Union[SampleOptions, _Mapping]] = ..., model_version: _Optional[str] = ...) -> None: ...

class GetSampleResponse(_message.Message):
    __slots__ = ("sample",)
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    sample: Sample
    def __init__(self, sample: _Optional[_Union[Sample, _Mapping]] = ...) -> None: ...

class BatchGetSamplesRequest(_message.Message):
    __slots__ = ("model", "seeds", "options", "style_seeds", "model_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    STYLE_SEEDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    seeds: _containers.RepeatedScalarFieldContainer[int]
    options: SampleOptions
    style_seeds: _containers.RepeatedScalarFieldContainer[int]
    model_version: str
    def __init__(self, model: _Optional[str] = ..., seeds: _Optional[_Iterable[int]] = ..., options: _Optional[_Union[SampleOptions, _Mapping]] = ..., style_seeds: _Optional[_Iterable[int]] = ..., model_version: _Optional[str] = ...) -> None: ...

class SampleOutcome(_message.Message):
    __slots__ = ("sample", "rejection", "filtered")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    REJECTION_FIELD_NUMBER: _ClassVar[int]
    FILTERED_FIELD_NUMBER: _ClassVar[int]
    sample: Sample
    rejection: Rejection
    filtered: Filtered
    def __init__(self, sample: _Optional[_Union[Sample, _Mapping]] = ..., rejection: _Optional[_Union[Rejection, _Mapping]] = ..., filtered: _Optional[_Union[Filtered, _Mapping]] = ...) -> None: ...

class BatchGetSamplesResponse(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[SampleOutcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[SampleOutcome, _Mapping]]] = ...) -> None: ...

class StreamSamplesRequest(_message.Message):
    __slots__ = ("model", "start_seed", "count", "shard_index", "shard_count", "options", "window", "model_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    START_SEED_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SHARD_INDEX_FIELD_NUMBER: _ClassVar[int]
    SHARD_COUNT_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    start_seed: int
    count: int
    shard_index: int
    shard_count: int
    options: SampleOptions
    window: int
    model_version: str
    def __init__(self, model: _Optional[str] = ..., start_seed: _Optional[int] = ..., count: _Optional[int] = ..., shard_index: _Optional[int] = ..., shard_count: _Optional[int] = ..., options: _Optional[_Union[SampleOptions, _Mapping]] = ..., window: _Optional[int] = ..., model_version: _Optional[str] = ...) -> None: ...

class StreamSamplesResponse(_message.Message):
    __slots__ = ("sample", "next_seed", "rejected_count", "filtered_count")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    FILTERED_COUNT_FIELD_NUMBER: _ClassVar[int]
    sample: Sample
    next_seed: int
    rejected_count: int
    filtered_count: int
    def __init__(self, sample: _Optional[_Union[Sample, _Mapping]] = ..., next_seed: _Optional[int] = ..., rejected_count: _Optional[int] = ..., filtered_count: _Optional[int] = ...) -> None: ...

class ListSeedsRequest(_message.Message):
    __slots__ = ("model", "start_seed", "end_seed", "options", "page_size", "model_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    START_SEED_FIELD_NUMBER: _ClassVar[int]
    END_SEED_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    start_seed: int
    end_seed: int
    options: SampleOptions
    page_size: int
    model_version: str
    def __init__(self, model: _Optional[str] = ..., start_seed: _Optional[int] = ..., end_seed: _Optional[int] = ..., options: _Optional[_Union[SampleOptions, _Mapping]] = ..., page_size: _Optional[int] = ..., model_version: _Optional[str] = ...) -> None: ...

class ListSeedsResponse(_message.Message):
    __slots__ = ("first_seed", "seed_count", "delivered", "delivered_count", "next_seed", "end_seed", "model_digest")
    FIRST_SEED_FIELD_NUMBER: _ClassVar[int]
    SEED_COUNT_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_COUNT_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEED_FIELD_NUMBER: _ClassVar[int]
    END_SEED_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    first_seed: int
    seed_count: int
    delivered: bytes
    delivered_count: int
    next_seed: int
    end_seed: int
    model_digest: str
    def __init__(self, first_seed: _Optional[int] = ..., seed_count: _Optional[int] = ..., delivered: _Optional[bytes] = ..., delivered_count: _Optional[int] = ..., next_seed: _Optional[int] = ..., end_seed: _Optional[int] = ..., model_digest: _Optional[str] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model", "model_version", "class_index")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_version: str
    class_index: int
    def __init__(self, model: _Optional[str] = ..., model_version: _Optional[str] = ..., class_index: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "pipeline", "task", "digest", "resolution", "z_dim", "classes", "layout", "num_heads", "score_kind", "calibration", "num_ws", "keypoint_classes", "executor", "generator_classes", "calibrated_classes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RESOLUTION_FIELD_NUMBER: _ClassVar[int]
    Z_DIM_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    SCORE_KIND_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    NUM_WS_FIELD_NUMBER: _ClassVar[int]
    KEYPOINT_CLASSES_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_CLASSES_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_CLASSES_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    pipeline: str
    task: str
    digest: str
    resolution: int
    z_dim: int
    classes: _containers.RepeatedCompositeFieldContainer[LabelClass]
    layout: str
    num_heads: int
    score_kind: str
    calibration: Calibration
    num_ws: int
    keypoint_classes: _containers.RepeatedCompositeFieldContainer[LabelClass]
    executor: str
    generator_classes: _containers.RepeatedScalarFieldContainer[str]
    calibrated_classes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., pipeline: _Optional[str] = ..., task: _Optional[str] = ..., digest: _Optional[str] = ..., resolution: _Optional[int] = ..., z_dim: _Optional[int] = ..., classes: _Optional[_Iterable[_Union[LabelClass, _Mapping]]] = ..., layout: _Optional[str] = ..., num_heads: _Optional[int] = ..., score_kind: _Optional[str] = ..., calibration: _Optional[_Union[Calibration, _Mapping]] = ..., num_ws: _Optional[int] = ..., keypoint_classes: _Optional[_Iterable[_Union[LabelClass, _Mapping]]] = ..., executor: _Optional[str] = ..., generator_classes: _Optional[_Iterable[str]] = ..., calibrated_classes: _Optional[_Iterable[int]] = ...) -> None: ...

class LabelClass(_message.Message):
    __slots__ = ("name", "rgb")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RGB_FIELD_NUMBER: _ClassVar[int]
    name: str
    rgb: int
    def __init__(self, name: _Optional[str] = ..., rgb: _Optional[int] = ...) -> None: ...

class Calibration(_message.Message):
    __slots__ = ("id", "truncation_psi", "threshold", "threshold_quantile", "quantiles", "first_seed", "seed_count")
    ID_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_PSI_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_QUANTILE_FIELD_NUMBER: _ClassVar[int]
    QUANTILES_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEED_FIELD_NUMBER: _ClassVar[int]
    SEED_COUNT_FIELD_NUMBER: _ClassVar[int]
    id: str
    truncation_psi: float
    threshold: float
    threshold_quantile: float
    quantiles: _containers.RepeatedScalarFieldContainer[float]
    first_seed: int
    seed_count: int
    def __init__(self, id: _Optional[str] = ..., truncation_psi: _Optional[float] = ..., threshold: _Optional[float] = ..., threshold_quantile: _Optional[float] = ..., quantiles: _Optional[_Iterable[float]] = ..., first_seed: _Optional[int] = ..., seed_count: _Optional[int] = ...) -> None: ...
