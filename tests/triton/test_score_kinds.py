"""Every score kind in a real Triton: with both executors, in both pipelines, for both tasks, and calibrated."""

import asyncio
import itertools
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from labelmint.core.calibration import SCORE_KINDS, Calibration
from labelmint.core.executor import Choice
from labelmint.core.task import TASKS, TaskName
from labelmint.export.repository import export_repository
from labelmint.triton.client import Array
from labelmint.triton.model_config import read_config
from tests.support.commands import run
from tests.support.inference import connected, latents, running
from tests.support.models import files, random_interpreter, small

pytestmark = [pytest.mark.triton, pytest.mark.torch, pytest.mark.minutes]

SEEDS = range(3)


@pytest.fixture(scope="module", params=get_args(TaskName))
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def repository(task: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One interpreter as the models `sum`, `top10_mean`, ..., each exported with the kind of its name."""
    directory = tmp_path_factory.mktemp("kinds") / "repository"
    generator, _ = small()
    torch.manual_seed(3)
    interpreter = random_interpreter(generator, task)
    for interpreter.score_kind in SCORE_KINDS:
        export_repository(directory, interpreter.score_kind, (generator, interpreter))
    return directory


def test_each_kind_is_another_model(repository: Path) -> None:
    configs = [read_config(repository / kind / "config.pbtxt") for kind in SCORE_KINDS]
    assert [config.parameters["score_kind"].string_value for config in configs] == list(SCORE_KINDS)
    assert len({config.parameters["model_digest"].string_value for config in configs}) == len(SCORE_KINDS)


@pytest.mark.parametrize("executor", get_args(Choice))
async def test_only_the_scores_differ_and_they_relate(repository: Path, task: str, executor: Choice) -> None:
    names = [f"{kind}{pipeline}" for kind in SCORE_KINDS for pipeline in ("", "_staged")]
    outputs = ("image", *TASKS[task].label_outputs, "js_map", "js_score")
    async with running(repository, *names, executor=executor) as server, connected(server) as client:
        for seed, pipeline in itertools.product(SEEDS, ("", "_staged")):
            asked = [client.infer(f"{kind}{pipeline}", "1", latents(seed), outputs=outputs) for kind in SCORE_KINDS]
            check(dict(zip(SCORE_KINDS, await asyncio.gather(*asked), strict=True)))


def check(answers: dict[str, dict[str, Array]]) -> None:
    score = {kind: float(arrays.pop("js_score")[0]) for kind, arrays in answers.items()}
    for arrays in answers.values():
        assert {name: x.tobytes() for name, x in arrays.items()} == {n: x.tobytes() for n, x in answers["sum"].items()}
    js = np.sort(answers["sum"]["js_map"], axis=None).astype(np.float64)
    assert score["sum"] == pytest.approx(js.sum(), rel=1e-5) and js.sum() > 1.0
    assert score["top10_mean"] == pytest.approx(js[-(js.size // 10) :].mean(), rel=1e-5)
    assert score["mean_entropy"] > 1.0
    assert score["mixture_entropy"] == pytest.approx(score["mean_entropy"] + score["sum"], rel=1e-5)


@pytest.mark.parametrize("score_kind", SCORE_KINDS)
def test_each_kind_is_calibrated(repository: Path, tmp_path: Path, score_kind: str) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    before = files(copy)
    arguments = ("calibrate", score_kind, "--model-repository", str(copy), "--count", "1000", "--score-kind")
    other = next(kind for kind in SCORE_KINDS if kind != score_kind)
    refused = run(*arguments, other)
    assert refused.returncode == 2 and files(copy) == before
    assert refused.stderr == (
        f"labelmint: score_kind: the model {score_kind!r} computes {score_kind!r}, not {other!r}; its files compute "
        "the score, so export it again: `labelmint export --generator FILE --interpreter FILE --model-repository "
        f"{copy} --score-kind {other} {score_kind}`; nothing was written\n"
    )
    done = run(*arguments, score_kind)
    assert done.returncode == 0, done.stderr
    for name in (score_kind, f"{score_kind}_staged"):
        (text,) = (
            value.string_value
            for key, value in read_config(copy / name / "config.pbtxt").parameters.items()
            if key.startswith("calibration")
        )
        calibration = Calibration.from_json(text)
        assert calibration.score_kind == score_kind and 0 < calibration.quantiles[0] < calibration.threshold
    assert {name for name, digest in files(copy).items() if before[name] != digest} == {
        f"{score_kind}/config.pbtxt",
        f"{score_kind}_staged/config.pbtxt",
    }
