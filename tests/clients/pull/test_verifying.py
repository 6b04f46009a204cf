"""`verify` finds what was changed, however little, on the disk and in the manifest."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from labelmint_client import Client, Model, ModelNotFound, SampleOptions
from labelmint_client.pull import PullError, PullOptions, pull, verify
from tests.support.files import forge, rewrite

pytestmark = [pytest.mark.triton, pytest.mark.torch]


COUNT = 6


@pytest.fixture
def out(client: Client, options: SampleOptions, tmp_path: Path) -> Path:
    wanted = PullOptions("tiny", COUNT, "folder", samples_per_shard=4, ignore_js_quantile=0.9, sample=options)
    pull(client, wanted, tmp_path / "out")
    return tmp_path / "out"


def test_what_was_pulled_is_found_unchanged(client: Client, out: Path) -> None:
    report = verify(out)
    assert (report.files, report.samples, report.problems) == (2 * COUNT + 3, 0, [])
    assert verify(out, client).samples == COUNT
    for count in (1, 4, COUNT, 100):
        report = verify(out, client, count)
        assert report.samples == min(count, COUNT) and not report.problems


def test_changes_on_the_disk_are_found(out: Path) -> None:
    images = sorted(out.glob("images/*"))
    flipped = bytearray(images[0].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    images[0].write_bytes(flipped)
    images[1].unlink()
    images[2].write_bytes(images[2].read_bytes()[:-1])
    one, two, three = verify(out).problems
    assert one.startswith(f"images/{images[0].name}: SHA-256 ")
    assert two == f"images/{images[1].name}: No such file or directory"
    assert three.startswith(f"images/{images[2].name}: ") and "bytes, not" in three
    rewrite(out / "samples.jsonl", lambda text: text.replace('"js_score": ', '"js_score": 1', 1))
    assert verify(out).problems[0].startswith("samples.jsonl: ")
    (out / "samples.jsonl").unlink()
    assert verify(out).problems == ["samples.jsonl: No such file or directory"]


def test_a_manifest_that_was_made_to_agree_is_found_out_by_the_service(client: Client, out: Path) -> None:
    seed = json.loads((out / "samples.jsonl").read_text().splitlines()[0])["seed"]
    forge(out, lambda text: text.replace('"js_score": ', '"js_score": 1', 1))
    assert verify(out).problems == []
    (problem,) = verify(out, client).problems
    assert problem.startswith(f"seed {seed}: js_score 1") and ", served " in problem
    line = (out / "samples.jsonl").read_text().splitlines()[1]
    forge(out, lambda text: text.replace(json.loads(line)["label_sha256"], "0" * 64))
    assert len(verify(out, client).problems) == 2 and "label_sha256 000" in verify(out, client).problems[1]


def test_a_pull_by_a_version_with_fewer_tasks_is_the_same(client: Client, out: Path) -> None:
    """Such a version wrote no fields for the tasks that it did not know."""
    forge(out, lambda text: text.replace('"keypoints": [], ', ""))
    assert "keypoints" not in json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert verify(out, client).problems == []


def test_other_weights_are_named(client: Client, out: Path) -> None:
    rewrite(out / "manifest.json", lambda text: text.replace('"digest": "', '"digest": "0', 1))
    report = verify(out, client)
    assert report.samples == 0 and len(report.problems) == 1 and report.problems[0].endswith("other weights")
    rewrite(out / "manifest.json", lambda text: text.replace('"name": "tiny"', '"name": "gone"', 1))
    with pytest.raises(ModelNotFound):
        verify(out, client)


def test_other_weights_behind_one_of_several_gateways(client: Client, out: Path) -> None:
    """The model is described by one that has the pulled weights, the samples come from another: one line for all."""
    rewrite(out / "manifest.json", lambda text: text.replace('"digest": "', '"digest": "0', 1))
    pulled = json.loads((out / "manifest.json").read_text())["model"]["digest"]

    class Described(Client):
        def get_model(self, model: str, model_version: str = "", *, class_index: int | None = None) -> Model:
            return replace(super().get_model(model, model_version, class_index=class_index), digest=pulled)

    with Described(client._connection.endpoints) as gateways:
        report = verify(out, gateways)
    assert report.samples == 0 and len(report.problems) == 1 and report.problems[0].endswith("other weights")


def test_what_is_not_complete_is_refused(client: Client, options: SampleOptions, out: Path, tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"no manifest\.json"):
        verify(tmp_path / "nothing")
    (out / "manifest.json").write_text("{")
    with pytest.raises(PullError, match="is damaged"):
        verify(out)
    shutil.rmtree(out)
    rejected = PullOptions("tiny", COUNT, "webdataset", sample=replace(options, include_rejected=True))
    manifest = pull(client, rejected, out)
    assert manifest["accepted_count"] + manifest["rejected_count"] == COUNT and manifest["rejected_count"] > 0
    assert verify(out, client).problems == []
