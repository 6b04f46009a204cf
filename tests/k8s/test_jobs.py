"""Tests of the pull job: its containers run one after the other as in a cluster, with the programs of their images."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Service
from tests.k8s.conftest import Rendered
from tests.support.kubernetes import Object, containers

pytestmark = pytest.mark.triton


# The entry point of the client's image, with its Python.
ENTRYPOINT = ["/opt/labelmint/bin/python", "-m", "labelmint_client"]


def job_of(manifests: Rendered) -> Object:
    (job,) = manifests.of_kind("Job")
    return job


def run(container: Object, environment: dict[str, str], places: dict[str, str]) -> str:
    """Run a container's program, with the paths of its volumes and its Python replaced by local ones."""
    words = container.get("command", ENTRYPOINT) + container.get("args", [])
    words = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in words]
    for theirs, ours in places.items():
        words = [re.sub(rf"^{theirs}(?=/|$)", ours, word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_entry_point_is_that_of_the_image() -> None:
    assert f"ENTRYPOINT {json.dumps(ENTRYPOINT)}" in (ROOT / "k8s" / "images" / "client.Dockerfile").read_text()


def test_shards_are_the_completions(render: Any) -> None:
    manifests: Rendered = render("jobs/pull")
    spec = job_of(manifests)["spec"]
    assert spec["completionMode"] == "Indexed" and spec["backoffLimitPerIndex"] > 0
    assert spec["parallelism"] <= spec["completions"] and spec["maxFailedIndexes"] <= spec["completions"]
    for container in containers(spec["template"]):
        environment = manifests.environment(spec["template"], container)
        assert environment.get("SHARD_COUNT", str(spec["completions"])) == str(spec["completions"])
        (index,) = [each for each in container["env"] if each["name"] == "SHARD_INDEX"]
        assert index["valueFrom"]["fieldRef"]["fieldPath"].endswith("['batch.kubernetes.io/job-completion-index']")


def test_the_job_ends_with_one_manifest_of_what_was_verified(render: Any, service: Service, tmp_path: Path) -> None:
    manifests: Rendered = render("jobs/pull")
    spec = job_of(manifests)["spec"]
    data, scripts = tmp_path / "data", tmp_path / "job"
    data.mkdir()
    scripts.mkdir()
    (script,) = [each for each in manifests.of_kind("ConfigMap") if "finish.py" in each["data"]]
    (scripts / "finish.py").write_text(script["data"]["finish.py"])
    places = {"/data": str(data), "/job": str(scripts), "/opt/labelmint/bin/python": sys.executable}
    steps = containers(spec["template"])
    shards = range(spec["completions"])
    for index in (*shards, 0):  # the last is a restarted pod, which must do nothing twice
        assert (data / "manifest.json").exists() is (index == 0 and (data / "part-1").exists())
        for container in steps:
            environment = manifests.environment(spec["template"], container)
            environment |= {"SHARD_INDEX": str(index), "COUNT": "3", "ENDPOINT": service.grpc}
            said = run(container, environment, places)
    assert "the data set is complete: 12 samples in 4 parts" in said
    whole = json.loads((data / "manifest.json").read_text())
    assert whole["sample_count"] == whole["accepted_count"] == 12 and len(whole["parts"]) == len(shards)
    seeds = set()
    for index, part in zip(shards, whole["parts"], strict=True):
        content = (data / part["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (part["bytes"], part["sha256"])
        lines = (data / f"part-{index}" / "samples.jsonl").read_text().splitlines()
        found = {json.loads(line)["seed"] for line in lines}
        assert {seed % len(shards) for seed in found} == {index}
        seeds |= found
    assert len(seeds) == 12
    assert not list(data.glob("manifest.json.*"))


def test_parts_that_do_not_belong_together_are_refused(render: Any, tmp_path: Path) -> None:
    (script,) = [each for each in render("jobs/pull").of_kind("ConfigMap") if "finish.py" in each["data"]]
    namespace: dict[str, Any] = {"__name__": "finish"}
    exec(compile(script["data"]["finish.py"], "finish.py", "exec"), namespace)
    counts = {"sample_count": 1, "accepted_count": 1, "rejected_count": 0}
    for index, digest in enumerate(("a", "b")):
        (tmp_path / f"part-{index}").mkdir()
        request = {"shard_index": index, "shard_count": 2}
        content = {"model": {"digest": digest}, "request": request, **counts}
        (tmp_path / f"part-{index}" / "manifest.json").write_text(json.dumps(content))
    assert "1 of 2 are not" in namespace["finish"](tmp_path, 0, 2)
    with pytest.raises(SystemExit, match="part-1/manifest.json was pulled from another model"):
        namespace["finish"](tmp_path, 1, 2)
    assert not (tmp_path / "manifest.json").exists()
