"""A served model as a plain value, for tests of decisions about models."""

from dataclasses import replace

import numpy as np

from labelmint.core.calibration import calibrate
from labelmint.core.executor import Executor
from labelmint.core.served_model import ServedModel
from labelmint.core.task import SEGMENTATION

CALIBRATION = calibrate(
    np.arange(2000) / 10.0, model_digest="d" * 64, score_kind="sum", truncation_psi=1.0, first_seed=0
)
MODEL = ServedModel(
    name="faces",
    triton_name="faces",
    version="1",
    pipeline="fused",
    task=SEGMENTATION,
    digest="d" * 64,
    resolution=8,
    z_dim=64,
    num_ws=12,
    layout="paper",
    num_heads=10,
    score_kind="sum",
    label_names=("background", "hair"),
    palette=((0, 0, 0), (120, 73, 32)),
    executor=Executor(),
    calibration=CALIBRATION,
    calibrated_for=("onnxruntime",),
)
# Of three classes, cat and dog have calibrations, and fox has none.
CATS, DOGS = (
    replace(CALIBRATION, class_index=index, threshold=CALIBRATION.threshold - index, truncation_psi=1.0 - index / 4)
    for index in (0, 1)
)
CONDITIONAL = replace(
    MODEL,
    name="kinds",
    triton_name="kinds",
    calibration=None,
    generator_classes=("cat", "dog", "fox"),
    class_calibrations=(CATS, DOGS, None),
)
