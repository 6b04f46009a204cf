"""Walks seeds through a served pipeline and writes what a gateway needs to choose among them: an index of seeds.

Rules of this file:
- The samples come from a real Triton (`pipeline.py`): from a child Triton, or from those at a URL.
- The model's own score is stored to the bit as the pipeline gives it. Another kind is stored if it can be computed from
  the JS map. The entropies cannot: only a model that was exported with one of them has it, as its own.
- Images are not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from labelmint.core.calibration import SCORE_KINDS
from labelmint.core.errors import DeadlineExceeded, InferenceFailed, InvalidRequest, Overloaded, TritonUnavailable
from labelmint.core.executor import KERNEL, Choice
from labelmint.core.policy import SEED_END, check_class
from labelmint.core.served_model import ServedModel
from labelmint.pipeline import serving, serving_at, walk
from labelmint.seed_index.layout import Described
from labelmint.seed_index.writing import IndexFile, writing
from labelmint.triton.client import TritonClient

Array: TypeAlias = npt.NDArray[Any]


def _sum(js_map: Array) -> np.float32:
    return np.float32(js_map.sum(dtype=np.float64))


def _top10_mean(js_map: Array) -> np.float32:
    count = js_map.size // 10
    return np.float32(np.partition(js_map.ravel(), -count)[-count:].mean(dtype=np.float64))


# The kinds of scores that a JS map, float32 [R,R] in nats, gives.
_OF_JS_MAP: Mapping[str, Callable[[Array], np.float32]] = {"sum": _sum, "top10_mean": _top10_mean}


def seeds_of(text: str) -> range:
    """Read a range of seeds in the form START:END, its end excluded; raises InvalidRequest."""
    match = re.fullmatch("([0-9]{1,10}):([0-9]{1,10})", text)
    start, end = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 <= start < end <= SEED_END:
        raise InvalidRequest(
            "seeds", f"{text!r} is not a range of seeds; give START:END, 0 <= START < END <= {SEED_END}, END excluded"
        )
    return range(start, end)


async def index_seeds(
    model: str,
    seeds: range,
    directory: Path,
    *,
    repository: Path,
    version: int = 1,
    executor: Choice = KERNEL,
    triton_url: str = "",
    truncation_psi: float | None = None,
    class_index: int | None = None,
) -> Path:
    """Write the index of these seeds to a file in `directory`, go on with an interrupted one, and return its path.

    The model is that of `repository`, run by a child Triton, or with `triton_url` the one that the Tritons there have.
    The default of `truncation_psi` is the calibrated one, or 1. Raises InvalidRequest for a class that the model does
    not have, UnusableFile for a directory that cannot take the file, and the errors of `serving` and `serving_at`.
    """
    if triton_url:
        connection = serving_at(triton_url, model, version)
    else:
        connection = serving(repository, model, version, executor=executor, calibrated=True)
    async with connection as (client, served):
        check_class(served, class_index)
        if truncation_psi is None:
            calibration = served.calibration_of(class_index)
            truncation_psi = 1.0 if calibration is None else calibration.truncation_psi
        described = Described.of(served, truncation_psi=float(truncation_psi), class_index=class_index)
        with writing(directory, described, seeds, _score_kinds(served)) as file:
            await _fill(file, client, served, described)
            file.finish()
            return file.path


def _score_kinds(model: ServedModel) -> tuple[str, ...]:
    return tuple(kind for kind in SCORE_KINDS if kind == model.score_kind or kind in _OF_JS_MAP)


async def _fill(file: IndexFile, client: TritonClient, model: ServedModel, described: Described) -> None:
    """Add the rows of all seeds that the file lacks."""
    labels = tuple(name for name in model.task.label_outputs if name != "keypoints")
    rows = walk(
        client,
        model,
        file.missing,
        truncation_psi=described.truncation_psi,
        class_index=described.class_index,
        outputs=(*labels, "js_map", "js_score"),
        reduce=lambda seed, arrays: (_scores(model, arrays), _content(model, seed, arrays)),
    )
    done = len(file.seeds) - len(file.missing)
    with tqdm(total=len(file.seeds), initial=done, desc="index", unit="seed") as bar:
        try:
            async with aclosing(rows):
                async for row in rows:
                    file.add(*row)
                    bar.update()
        except (DeadlineExceeded, InferenceFailed, Overloaded, TritonUnavailable) as error:
            error.message += f" (Triton at {client.url}); what was indexed is kept, so run the same command again"
            raise


def _scores(model: ServedModel, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
    """The scores of `_score_kinds`, float32 [S]."""
    return np.array(
        [
            arrays["js_score"][0] if kind == model.score_kind else _OF_JS_MAP[kind](arrays["js_map"])
            for kind in _score_kinds(model)
        ],
        np.float32,
    )


def _content(model: ServedModel, seed: int, arrays: Mapping[str, Array]) -> Array:
    """The pixels of each class, uint32 [K], or the confidence of each keypoint, float32 [K]."""
    if not model.task.has_label_image:
        return arrays["confidence"]
    pixels = np.bincount(arrays["label"].ravel(), minlength=len(model.label_names))
    if len(pixels) > len(model.label_names):
        raise InferenceFailed(
            f"the label of seed {seed} has the class id {len(pixels) - 1}, but model {model.name!r} has "
            f"{len(model.label_names)} classes"
        )
    return pixels.astype(np.uint32)
