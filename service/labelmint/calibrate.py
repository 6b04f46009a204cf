"""Measures the JS scores of a served pipeline and writes the calibration into the repository.

Rules of this file:
- The scores come from a real Triton (`pipeline.py`): from a child Triton, or from those at `triton_url`, which must
  have the model with the digest that the repository has.
- Only the fused ensemble is measured, and the staged one gets the same calibration. Both compute the same function of
  the same weights; a test compares them.
- A calibration is that of the executor that has run the interpreter, as Triton says it, and is written under its name.
- It has the score kind of the export, because the exported step computes the score. Another one needs another export.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig

from labelmint.core.calibration import MIN_SEEDS, Calibration, calibrate
from labelmint.core.errors import InvalidRequest, LabelmintError, UnusableFile
from labelmint.core.executor import KERNEL, Choice
from labelmint.core.policy import check_seed
from labelmint.core.served_model import ServedModel
from labelmint.pipeline import measure, serving
from labelmint.triton.model_config import ensembles, version_of, write_config


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
) -> Calibration:
    """Measure `count` seeds from `first_seed` on with a version of `model`, write and return the calibration.

    Raises InvalidRequest for fewer than `MIN_SEEDS` seeds, UnusableFile for a model whose scores are not finite, and
    the errors of `serving`.
    """
    if count < MIN_SEEDS:
        raise InvalidRequest(
            "count", f"a calibration needs at least {MIN_SEEDS} seeds; --preview measures fewer and writes nothing"
        )
    seeds = _seeds(first_seed, count)
    served, scores = await measure_scores(
        repository,
        model,
        seeds,
        truncation_psi=truncation_psi,
        version=version,
        executor=executor,
        triton_url=triton_url,
    )
    calibration = calibrate(
        scores,
        model_digest=served.digest,
        score_kind=served.score_kind,
        truncation_psi=truncation_psi,
        first_seed=first_seed,
    )
    for path, config in calibrated(repository, model, version).items():
        config.parameters[served.executor.calibration].string_value = calibration.to_json()
        write_config(path, config)
    return calibration


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
) -> str:
    """Measure scores and return their quantiles as two lines of text; set no gate and write nothing."""
    seeds = _seeds(first_seed, count)
    served, scores = await measure_scores(
        repository,
        model,
        seeds,
        truncation_psi=truncation_psi,
        version=version,
        executor=executor,
        triton_url=triton_url,
    )
    levels = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    found = zip(levels, np.quantile(scores, levels), strict=True)
    quantiles = ", ".join(f"{level:g}: {score:.6g}" for level, score in found)
    said = f"preview of {count} seeds, JS in nats (score kind {served.score_kind}) by quantile: {quantiles}"
    return f"{said}\nno gate was set, nothing was written"


def _seeds(first: int, count: int) -> range:
    check_seed(first)
    check_seed(first + count - 1, "count")
    return range(first, first + count)


async def measure_scores(
    repository: Path,
    model: str,
    seeds: range,
    *,
    truncation_psi: float,
    version: int,
    executor: Choice = KERNEL,
    triton_url: str = "",
) -> tuple[ServedModel, list[float]]:
    """Return a version of `model` and its scores, in nats, in the order of the seeds; write nothing."""
    async with serving(repository, model, version, executor=executor, triton_url=triton_url) as (client, served):
        try:
            scores = await measure(
                client,
                served,
                seeds,
                truncation_psi=truncation_psi,
                outputs=("js_score",),
                reduce=lambda seed, arrays: float(arrays["js_score"][0]),
                title="calibrate",
            )
        except LabelmintError as error:
            error.message += f" (Triton at {client.url}); nothing was written"
            raise
    if wrong := [seed for seed, score in zip(seeds, scores, strict=True) if not math.isfinite(score)]:
        raise UnusableFile(
            repository / served.triton_name,
            f"returns JS scores that are not finite, for {len(wrong)} of {len(seeds)} seeds, the first one {wrong[0]}: "
            "its weights are damaged or too large, or overflow in the precision of this Triton; nothing was written",
        )
    return served, scores
