"""Tests of the benchmark of the index: its model says what its index says, and a summary compares within a round."""

from pathlib import Path

import content_model
import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import seed_index

from labelmint.seed_index.layout import Described
from tests.conftest import ROOT

pytestmark = pytest.mark.torch


def test_the_index_says_what_the_model_computes(tmp_path: Path) -> None:
    model = content_model.export(tmp_path / "repository", ROOT / "model_repository")
    described = Described.of(model, truncation_psi=1.0, class_index=None)
    content_model.write_index(tmp_path / "index", described, true_seeds=3_000, seeds=5_000)
    table = pq.read_table(tmp_path / "index")
    session = onnxruntime.InferenceSession(tmp_path / "repository" / "content_step" / "1" / "model.onnx")
    latents = content_model.latents(range(3_000))
    latent = {"latent": latents, "style_latent": latents}
    same = {"crossover": np.full((3_000, 1), model.num_ws, np.int32), "truncation_psi": np.ones((3_000, 1), np.float32)}
    label, score = session.run(["label", "js_score"], latent | same)
    assert np.array_equal(table[described.score_column].to_numpy()[:3_000], score[:, 0])
    for index, name in enumerate(content_model.CLASSES):
        pixels = table[described.label_column(name)].to_numpy()
        assert np.array_equal(pixels[:3_000], (label == index).sum(axis=(1, 2))), name
        share = content_model.SHARES.get(name, 1.0)
        assert abs((pixels > 0).mean() - share) < 4 * (share / 3_000) ** 0.5, name
    assert np.array_equal(table["seed"].to_numpy(), np.arange(5_000))


def test_a_summary_compares_within_a_round() -> None:
    def gateway(start: float, memory: float, scarce: float, rate: float) -> seed_index.Figures:
        first = {"any": 0.01, "scarce": scarce}
        rates = {"any": 100.0, "common": rate}
        return {"start": start, "resident_megabytes": memory, "first": first, "rate": rates}

    listed = {"list": [0.05, 0.04], "list_all": 0.5, "executions": 2_016.0}
    rounds = [
        {"without": gateway(1.0, 100.0, 1.0, 2.0), "with": gateway(1.5, 150.0, 0.011, 99.0) | listed},
        {"without": gateway(3.0, 110.0, 1.0, 2.0), "with": gateway(3.7, 180.0, 0.012, 97.0) | listed},
    ]
    found = seed_index.summary(rounds, 10_000)
    assert found["start_seconds"]["median"] == pytest.approx(0.6)
    assert found["memory_megabytes"]["median"] == pytest.approx(60.0)
    assert found["first_scarce"]["median"] == pytest.approx(1.15)
    assert found["rate_common"]["median"] == pytest.approx(0.98)
    assert found["rate_common_without"]["median"] == pytest.approx(0.02)
