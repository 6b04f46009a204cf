"""Measures the JS scores of a served pipeline and writes the calibration into the repository.

Rules of this file:
- The scores come from a real Triton (`pipeline.py`): from a child Triton, or from those at `triton_url`, which must
  have the model with the digest that the repository has.
- Only the fused ensemble is measured, and the staged one gets the same calibration. Both compute the same function of
  the same weights; a test compares them.
- A calibration is that of the executor that has run the interpreter, as Triton says it, and is written under its name.
- It has the score kind of the export, because the exported step computes the score. Another one needs another export.
- Each class of a conditional generator is calibrated alone, and its calibration is written before the next class is
  measured. So an interruption loses the measurement of one class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig

from labelmint.core.calibration import MIN_SEEDS, Calibration, calibrate
from labelmint.core.errors import InvalidRequest, LabelmintError, UnusableFile
from labelmint.core.executor import KERNEL, Choice, calibration_of_class
from labelmint.core.policy import check_class, check_seed
from labelmint.core.served_model import ServedModel
from labelmint.pipeline import measure, serving
from labelmint.triton.client import TritonClient
from labelmint.triton.model_config import ensembles, version_of, write_config

T = TypeVar("T")
ALL_CLASSES: Literal["all"] = "all"
# The generator classes to calibrate; empty for a model without any.
ClassIndices: TypeAlias = Sequence[int] | Literal["all"]


async def calibrate_repository(
    repository: Path,
    model: str,
    first_seed: int,
    *,
    count: int,
    truncation_psi: float,
    version: int = 1,
    executor: Choice = KERNEL,
    triton_url: str = "",
    class_indices: ClassIndices = (),
) -> list[Calibration]:
    """Measure `count` seeds from `first_seed` on with a version of `model`, write and return the calibration.

    Those of several generator classes are in the order of `class_indices`.

    Raises InvalidRequest for fewer than `MIN_SEEDS` seeds and for classes that the model does not have, UnusableFile
    for a model whose scores are not finite, and the errors of `serving`.
    """
    if count < MIN_SEEDS:
        raise InvalidRequest(
            "count", f"a calibration needs at least {MIN_SEEDS} seeds; --preview measures fewer and writes nothing"
        )
    seeds = _seeds(first_seed, count)

    def write(served: ServedModel, class_index: int | None, scores: list[float]) -> Calibration:
        calibration = calibrate(
            scores,
            model_digest=served.digest,
            score_kind=served.score_kind,
            truncation_psi=truncation_psi,
            first_seed=first_seed,
            class_index=class_index,
        )
        parameter = calibration_of_class(served.executor.calibration, class_index)
        for path, config in calibrated(repository, model, version).items():
            config.parameters[parameter].string_value = calibration.to_json()
            write_config(path, config)
        return calibration

    return await measure_scores(
        repository,
        model,
        seeds,
        write,
        truncation_psi=truncation_psi,
        version=version,
        executor=executor,
        triton_url=triton_url,
        class_indices=class_indices,
    )


def calibrated(repository: Path, model: str, version: int) -> dict[Path, ModelConfig]:
    """Return the configurations that hold the calibration of a version of `model`, by their path."""
    return {
        repository / name / "config.pbtxt": config
        for name, config in ensembles(repository).items()
        if config.parameters["model"].string_value == model and version_of(repository / name) == version
    }


def check_score_kind(repository: Path, model: str, version: int, score_kind: str) -> None:
    """Raise InvalidRequest unless a version of `model`, if there is one, was exported with this score kind."""
    for config in calibrated(repository, model, version).values():
        exported = config.parameters["score_kind"].string_value
        if exported != score_kind:
            number = f" --version {version}" if version != 1 else ""
            raise InvalidRequest(
                "score_kind",
                f"the model {model!r} computes {exported!r}, not {score_kind!r}; its files compute the score, so export"
                " it again: `labelmint export --generator FILE --interpreter FILE --model-repository "
                f"{repository}{number} --score-kind {score_kind} {model}`; nothing was written",
            )


async def preview(
    repository: Path,
    model: str,
    first_seed: int,
    *,
    count: int,
    truncation_psi: float,
    version: int,
    executor: Choice = KERNEL,
    triton_url: str = "",
    class_indices: ClassIndices = (),
) -> str:
    """Measure scores and return their quantiles as lines of text; set no gate and write nothing."""
    levels = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

    def say(served: ServedModel, class_index: int | None, scores: list[float]) -> str:
        found = zip(levels, np.quantile(scores, levels), strict=True)
        quantiles = ", ".join(f"{level:g}: {score:.6g}" for level, score in found)
        of_class = "" if class_index is None else f" of class {class_index}"
        return (
            f"preview of {count} seeds{of_class}, JS in nats (score kind {served.score_kind}) by quantile: {quantiles}"
        )

    lines = await measure_scores(
        repository,
        model,
        _seeds(first_seed, count),
        say,
        truncation_psi=truncation_psi,
        version=version,
        executor=executor,
        triton_url=triton_url,
        class_indices=class_indices,
    )
    return "\n".join([*lines, "no gate was set, nothing was written"])


def _seeds(first: int, count: int) -> range:
    check_seed(first)
    check_seed(first + count - 1, "count")
    return range(first, first + count)


async def measure_scores(
    repository: Path,
    model: str,
    seeds: range,
    use: Callable[[ServedModel, int | None, list[float]], T],
    *,
    truncation_psi: float,
    version: int,
    executor: Choice,
    triton_url: str,
    class_indices: ClassIndices,
) -> list[T]:
    """Measure a version of `model`, class by class if it has generator classes; return the results of `use`.

    `use` gets the model, the class and its scores, in nats, in the order of the seeds, before the next class begins.
    """
    used: list[T] = []
    async with serving(
        repository,
        model,
        version,
        executor=executor,
        triton_url=triton_url,
        check=lambda served: _chosen(served, class_indices),
    ) as (client, served):
        for class_index in _chosen(served, class_indices):
            try:
                scores = await _scores(client, served, seeds, truncation_psi=truncation_psi, class_index=class_index)
            except LabelmintError as error:
                error.message += f" (Triton at {client.url}); {_unwritten(class_index, len(used))}"
                raise
            if wrong := [seed for seed, score in zip(seeds, scores, strict=True) if not math.isfinite(score)]:
                raise UnusableFile(
                    repository / served.triton_name,
                    f"returns JS scores that are not finite, for {len(wrong)} of {len(seeds)} seeds, the first one "
                    f"{wrong[0]}: its weights are damaged or too large, or overflow in the precision of this Triton; "
                    f"{_unwritten(class_index, len(used))}",
                )
            used.append(use(served, class_index, scores))
    return used


def _chosen(served: ServedModel, class_indices: ClassIndices) -> Sequence[int | None]:
    """Return the classes to measure; (None,) for a model without generator classes. Raises InvalidRequest."""
    count = len(served.generator_classes)
    if class_indices == ALL_CLASSES:
        if not count:
            raise InvalidRequest("all_classes", f"model {served.name!r} has no generator classes; omit the option")
        return range(count)
    if count and not class_indices:
        raise InvalidRequest(
            "class_index",
            f"each of the {count} generator classes of model {served.name!r} has a gate of its own; name those to "
            f"calibrate (0 to {count - 1}), or give --all-classes",
        )
    for class_index in class_indices:
        check_class(served, int(class_index))
    return [int(class_index) for class_index in class_indices] or [None]


async def _scores(
    client: TritonClient, served: ServedModel, seeds: range, *, truncation_psi: float, class_index: int | None
) -> list[float]:
    return await measure(
        client,
        served,
        seeds,
        truncation_psi=truncation_psi,
        outputs=("js_score",),
        reduce=lambda seed, arrays: float(arrays["js_score"][0]),
        title="calibrate" if class_index is None else f"calibrate class {class_index}",
        class_index=class_index,
    )


def _unwritten(class_index: int | None, written: int) -> str:
    """What a failure left unwritten."""
    if class_index is None or not written:
        return "nothing was written"
    return f"nothing was written of class {class_index}, only of the classes before it"
