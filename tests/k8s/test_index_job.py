"""Tests of the index job: its pods run one after the other as in a cluster, with the program of their image."""

import asyncio
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from tests.k8s.conftest import Rendered, together
from tests.support.indexing import GROUP, SMALL_PARTS
from tests.support.inference import running
from tests.support.kubernetes import Object

pytestmark = [pytest.mark.triton, pytest.mark.torch]

# The entry point of the gateway's image.
ENTRYPOINT = ["/opt/labelmint/bin/labelmint"]


def container_of(manifests: Rendered) -> Object:
    (job,) = manifests.of_kind("Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def start(manifests: Rendered, index: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a pod's program, with the path of its volume replaced by a local one."""
    container = container_of(manifests)
    assert container["image"].split("@")[0].endswith("/gateway") and "command" not in container
    environment = {**manifests.environment({}, container), **environment}
    words = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in container["args"]]
    words = [re.sub(r"=/index(?=/|$)", f"={index}", word) for word in words]
    return subprocess.run(
        [*SMALL_PARTS, *words], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_the_image_has_the_command_and_what_it_needs() -> None:
    image = (ROOT / "k8s" / "images" / "gateway.Dockerfile").read_text()
    assert f"ENTRYPOINT {json.dumps(ENTRYPOINT)}" in image
    (extras,) = re.findall(r"'\.\[(.*)\]'", image)
    assert "index" in extras.split(",")


def test_the_settings_arrive_where_they_work(render: Any) -> None:
    manifests: Rendered = render("jobs/index")
    (job,) = manifests.of_kind("Job")
    settings = manifests.environment({}, container_of(manifests))
    assert job["metadata"]["name"] == f"labelmint-index-{settings['INDEX']}"
    assert str(job["spec"]["completions"]) == str(job["spec"]["parallelism"]) == settings["SHARD_COUNT"]
    (claim,) = manifests.of_kind("PersistentVolumeClaim")
    (mount,) = [each for each in container_of(manifests)["volumeMounts"] if each["mountPath"] == "/index"]
    (volume,) = [each for each in job["spec"]["template"]["spec"]["volumes"] if each["name"] == mount["name"]]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"] == "labelmint-index"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_documented_commands_are_about_the_job(render: Any) -> None:
    text = (ROOT / "docs" / "indexing.md").read_text()
    assert "\nkubectl apply -k k8s/jobs/index\n" in text
    named = re.findall(r"\b(deployment|job)/(labelmint-[\w-]+)", text)
    kinds = {"deployment": "Deployment", "job": "Job"}
    there = {(each["kind"], each["metadata"]["name"]) for each in together(render("jobs/index"))}
    assert {(kinds[kind], name) for kind, name in named} == there & {
        ("Deployment", "labelmint-triton"),
        ("Job", "labelmint-index-faces"),
    }


async def test_the_pods_write_the_index_together(render: Any, tiny_repository: Path, tmp_path: Path) -> None:
    manifests: Rendered = render("jobs/index")
    shards = int(manifests.environment({}, container_of(manifests))["SHARD_COUNT"])
    first, end = 10, 10 + 5 * GROUP
    settings = {"MODEL": "tiny", "START_SEED": str(first), "END_SEED": str(end)}
    async with running(tiny_repository, "tiny") as server:
        for shard in (*range(shards), 0):  # the last is a restarted pod, which must do nothing twice
            pod = {**settings, "TRITON_URL": server.grpc_url, "SHARD_INDEX": str(shard)}
            done = await asyncio.to_thread(start, manifests, tmp_path, **pod)
            assert done.returncode == 0, done.stderr
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == shards and all(path.suffix == ".parquet" for path in paths)
    assert pq.read_table(tmp_path).column("seed").to_pylist() == list(range(first, end))


async def test_a_pod_that_finds_no_triton_fails_with_one_line(render: Any, tmp_path: Path) -> None:
    pod = {"TRITON_URL": "nowhere.invalid:8001", "SHARD_INDEX": "0"}
    done = await asyncio.to_thread(start, render("jobs/index"), tmp_path, **pod)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be resolved" in done.stderr
