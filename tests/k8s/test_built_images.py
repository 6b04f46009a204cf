"""The images as `make images` builds them, each run as its manifest, compose.yaml, the README or the unit says.

Rules of this file:
- buildah builds them on a base of Debian's packages (tests/support/images.py), and runc runs their root file systems
  (tests/support/containers.py): the user, the read-only root, the volumes and the environment are the manifest's.
- One chain shows that the parts fit: the models image fills a volume, a real Triton loads it, the gateway's image
  serves it, and the client's image pulls from that.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from labelmint.triton.model_config import ensembles, is_fused
from tests.conftest import REPOSITORY, ROOT, need_program
from tests.k8s.conftest import Rendered
from tests.support.building import IMAGES
from tests.support.containers import Container, Mount, Network, Spec, command_of, network, run, running
from tests.support.images import Store, new_store
from tests.support.kubernetes import Object, containers

pytestmark = [pytest.mark.triton, pytest.mark.minutes, pytest.mark.timeout(1800)]

NAME = "localhost/labelmint"
VERSION = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
MEGABYTE = 1_000_000
MOST_OF_THE_GATEWAY = 400 * MEGABYTE  # beside the base; pyarrow alone has 150
SAMPLE = "/v1/models/faces/samples/7/image.png"

# Serves the models of a directory with a real Triton until its input ends.
_TRITON = """
import asyncio, sys
from pathlib import Path
from labelmint.triton.model_config import ensembles, is_fused
from labelmint.triton.server import TritonServer, wait_until_ready

async def main(repository):
    server = TritonServer(repository, [name for name, config in ensembles(repository).items() if is_fused(config)])
    await server.start()
    try:
        await wait_until_ready(server)
        print(server.grpc_url.rpartition(":")[2], flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await server.stop()

asyncio.run(main(Path(sys.argv[1])))
"""


def image(name: str) -> str:
    return f"{NAME}{IMAGES[name].suffix}:{VERSION}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    yield from new_store(tmp_path_factory.mktemp("images"))


def name_of(container: Object) -> str:
    """Return the last part of the image's name, without tag and digest."""
    reference: str = container["image"]
    return reference.partition("@")[0].rpartition("/")[2].partition(":")[0]


def volume(directory: Path, mode: int = 0o777) -> Path:
    directory.mkdir()
    directory.chmod(mode)
    return directory


def expand(text: str, environment: dict[str, str]) -> str:
    """Replace $(NAME), as the kubelet does."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], text)


def of_manifest(
    rendered: Rendered, template: Object, container: Object, volumes: dict[str, Path], **changed: str
) -> Spec:
    """Return a container of a pod template as what runc shall run. `changed` replaces variables of its environment.

    `volumes` has a directory for each volume of the pod that this container mounts.
    """
    restricted, pod = container["securityContext"], template["spec"]["securityContext"]
    assert restricted == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["runAsNonRoot"] and pod["runAsUser"] > 0
    environment = rendered.environment(template, container) | changed
    return Spec(
        image(name_of(container)),
        container.get("command") and [expand(word, environment) for word in container["command"]],
        [expand(word, environment) for word in container["args"]] if "args" in container else None,
        environment,
        user=f"{pod['runAsUser']}:{pod['runAsGroup']}",
        read_only=True,
        mounts=[
            Mount(each["mountPath"], volumes[each["name"]], each.get("readOnly", False))
            for each in container["volumeMounts"]
        ],
    )


def container_of(template: Object, name: str) -> Object:
    (found,) = [each for each in containers(template) if each["name"] == name]
    return found


@pytest.fixture(scope="module")
def pod_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    names = ("labelmint-triton", "labelmint-gateway", "labelmint-gateway-headless")
    with network(tmp_path_factory.mktemp("network"), *names) as net:
        yield net


@pytest.fixture(scope="module")
def copied(store: Store, pod_network: Network, render: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The volume that Triton's init container filled from the models image."""
    rendered: Rendered = render("base")
    template = rendered.named("Deployment", "labelmint-triton")["spec"]["template"]
    directory = tmp_path_factory.mktemp("models")
    models = volume(directory / "models")
    container = container_of(template, "model-repository")
    run(store, pod_network, of_manifest(rendered, template, container, {"models": models}), directory / "bundle")
    return models


@pytest.fixture(scope="module")
def triton_port(pod_network: Network, copied: Path) -> Iterator[str]:
    command = pod_network.words(sys.executable, "-c", _TRITON, copied)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port, "Triton did not load the models of the image"
        yield port
    finally:
        process.stdin.close()
        process.wait(60)


@pytest.fixture(scope="module")
def gateway(
    store: Store, pod_network: Network, triton_port: str, render: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    rendered: Rendered = render("base")
    template = rendered.named("Deployment", "labelmint-gateway")["spec"]["template"]
    directory = tmp_path_factory.mktemp("gateway")
    # The Service leads to port 8001. Here, it is the port that the wheel's Triton took.
    changed = {"LABELMINT_TRITON_URL": f"labelmint-triton:{triton_port}", "LABELMINT_DRAIN_SECONDS": "0"}
    container = container_of(template, "gateway")
    spec = of_manifest(rendered, template, container, {"tmp": volume(directory / "tmp")}, **changed)
    with running(store, pod_network, spec, directory / "bundle") as started:
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            started.until_answers(pod_network, f"http://localhost:{ports[asked['port']]}{asked['path']}")
        yield started
        assert started.stop() == 0, started.log


def test_tags_labels_and_annotations_name_the_commit(store: Store) -> None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    revision = git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    for name in IMAGES:
        found = store.inspect(image(name))
        for said in (found["OCIv1"]["config"]["Labels"], found["ImageAnnotations"]):
            assert said["org.opencontainers.image.revision"] == revision
            assert said["org.opencontainers.image.version"] == VERSION
            assert said["org.opencontainers.image.title"] and said["org.opencontainers.image.created"]
        assert found["ImageAnnotations"]["org.opencontainers.image.base.name"].endswith("/debian:bookworm-slim")
        by_revision = store.inspect(image(name).replace(f":{VERSION}", f":{revision}"))
        assert by_revision["FromImageDigest"] == found["FromImageDigest"]
        assert f"{found['FromImageDigest']}\n" in store.printed


def test_the_printed_sizes_are_what_a_node_stores(store: Store) -> None:
    print(store.printed)
    for name in IMAGES:
        (row,) = re.findall(rf"^{image(name)} +(\d+) MB +(\d+) MB without", store.printed, re.MULTILINE)
        whole, added = (int(number) * MEGABYTE for number in row)
        root = store.root(image(name))
        files = {(stat.st_dev, stat.st_ino): stat.st_size for stat in map(Path.lstat, root.rglob("*"))}
        # A layer also stores headers, and files that a later layer replaced.
        assert 0.95 * whole < sum(files.values()) + 512 * len(files) < 1.05 * whole, name
        assert added < whole
        if name == "gateway":
            assert added <= MOST_OF_THE_GATEWAY


def packages_of(store: Store, name: str) -> dict[str, str]:
    """Return the Python packages of the image's environment, as its own Python finds them."""
    return {
        re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower(): path.name.removesuffix(".dist-info").split("-")[1]
        for path in store.root(image(name)).glob("opt/labelmint/lib/python3*/site-packages/*.dist-info")
    }


def test_an_image_has_nothing_that_only_others_need(store: Store) -> None:
    inference = {"onnxruntime", "nvidia-pytriton"}
    building = {"pip", "setuptools", "torch", "onnx", "onnxscript", "pytest"}
    found = {name: packages_of(store, name).keys() for name in IMAGES}
    assert found["gateway"] >= {"labelmint", "fastapi-swagger", "opentelemetry-sdk"}
    assert found["client"] >= {"boto3", "labelmint-client", "pyarrow"} and "labelmint" not in found["client"]
    assert found["labelmint"] >= {"labelmint"} | inference
    assert not found["models"]
    for name, packages in found.items():
        assert not packages & building, name
        assert name == "labelmint" or not packages & inference, name
        root = store.root(image(name))
        heavy = [path for path in root.glob("opt/*") if path.name != "labelmint"]
        left = [*root.glob("source"), *root.glob("var/lib/apt/lists/*_*"), *root.glob("root/.cache"), *heavy]
        assert not [path for path in left if "labelmint" not in path.parts[-1:]], name


def test_bills_list_what_the_image_itself_says_is_installed(store: Store, pod_network: Network, tmp_path: Path) -> None:
    ask = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"
    for name in IMAGES:
        text = (store.bills / f"{name}.cdx.json").read_text()
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
        listed: dict[str, set[tuple[str, str]]] = {"deb": set(), "pypi": set(), "model": set()}
        for each in json.loads(text)["components"]:
            listed[re.split("[:/]", each["bom-ref"].removeprefix("pkg:"))[0]].add((each["name"], each["version"]))
        dpkg = ["dpkg-query", "--show", "--showformat", "${Package} ${Version}\\n"]
        said = run(store, pod_network, Spec(image(name), dpkg, []), tmp_path / f"dpkg-{name}")
        assert listed["deb"] == {tuple(line.split()) for line in said.splitlines()}
        assert {"libc6", "tar"} <= {package for package, _ in listed["deb"]}
        if name != "models":
            python = ["/opt/labelmint/bin/python", "-c", ask]
            said = run(store, pod_network, Spec(image(name), python, []), tmp_path / f"python-{name}")
            assert listed["pypi"] == {tuple(line.split("==")) for line in said.splitlines()}
            assert "numpy" in dict(listed["pypi"]) and "libssl3" in dict(listed["deb"])
        fonts = {package for package, _ in listed["deb"] if package.startswith("fonts-")}
        assert fonts == ({"fonts-dejavu-core", "fonts-unifont"} if name in ("gateway", "labelmint") else set())
        models = {path.parts[-3] for path in store.root(image(name)).glob("model_repository/*/*/*")}
        assert {model for model, _ in listed["model"]} == models
        assert bool(models) is (name in ("models", "labelmint"))


def served_models() -> set[str]:
    """Return what the fused pipelines of the committed repository consist of."""
    fused = {name: config for name, config in ensembles(REPOSITORY).items() if is_fused(config)}
    return set(fused) | {step.model_name for config in fused.values() for step in config.ensemble_scheduling.step}


def contents(repository: Path) -> dict[str, bytes]:
    found = (path for path in repository.rglob("*") if path.is_file())
    return {path.relative_to(repository).as_posix(): path.read_bytes() for path in found}


def test_the_models_image_copies_what_is_served_and_nothing_else(copied: Path, store: Store) -> None:
    expected = {key: data for key, data in contents(REPOSITORY).items() if key.split("/")[0] in served_models()}
    assert contents(copied) == expected
    assert contents(store.root(image("labelmint")) / "model_repository") == expected


def test_the_gateways_image_serves_what_triton_loaded_from_the_models_image(
    gateway: Container, pod_network: Network, tmp_path: Path
) -> None:
    assert pod_network.curl(f"http://labelmint-gateway:8080{SAMPLE}").startswith(b"\x89PNG")
    listed = json.loads(pod_network.curl("http://labelmint-gateway:8080/v1/models"))
    fused = {config.parameters["model"].string_value for config in ensembles(REPOSITORY).values() if is_fused(config)}
    assert {each["name"] for each in listed["models"]} == fused
    # The overlay needs the fonts, /docs the extra `docs`.
    assert pod_network.curl("http://labelmint-gateway:8080/v1/models/faces_keypoints/samples/7/overlay.png")
    assert b"swagger" in pod_network.curl("http://labelmint-gateway:8080/docs")
    assert "Traceback" not in gateway.log


def test_the_clients_image_pulls_verifies_and_completes_a_data_set(
    gateway: Container, store: Store, pod_network: Network, render: Any, tmp_path: Path
) -> None:
    rendered: Rendered = render("jobs/pull")
    (job,) = rendered.of_kind("Job")
    template = job["spec"]["template"]
    volumes = {}
    for each in template["spec"]["volumes"]:
        volumes[each["name"]] = volume(tmp_path / each["name"])
        if "configMap" in each:
            for name, text in rendered.named("ConfigMap", each["configMap"]["name"])["data"].items():
                (volumes[each["name"]] / name).write_text(text)
    small = {"SHARD_INDEX": "0", "SHARD_COUNT": "1", "COUNT": "8"}
    for container in containers(template):
        spec = of_manifest(rendered, template, container, volumes, **small)
        run(store, pod_network, spec, tmp_path / f"bundle-{container['name']}")
    (written,) = [json.loads(path.read_text()) for path in volumes["data"].glob("*/manifest.json")]
    assert written["sample_count"] == 8
    owners = {path.stat().st_uid for path in volumes["data"].rglob("*")}
    assert owners == {template["spec"]["securityContext"]["runAsUser"]}


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[Network]:
    """A network for one service that is called labelmint."""
    with network(tmp_path, "labelmint") as net:
        yield net


def test_the_readmes_docker_run_serves_the_same_samples(
    gateway: Container, pod_network: Network, store: Store, lonely: Network, tmp_path: Path
) -> None:
    """What docker does with the options of the command is done here: ports are reached, shared memory has its size."""
    (line,) = re.findall(r"^docker run (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    words = shlex.split(line)
    assert words.pop() == "labelmint" and words.pop(0) == "--rm"
    options = list(zip(words[::2], words[1::2], strict=True))
    assert {name for name, _ in options} == {"-p", "--shm-size"}
    spec = Spec(image("labelmint"), shared_memory=dict(options)["--shm-size"])
    published = [value.split(":")[-1] for name, value in options if name == "-p"]
    exposed = store.inspect(image("labelmint"))["OCIv1"]["config"]["ExposedPorts"]
    assert {f"{port}/tcp" for port in published} <= exposed.keys()
    with running(store, lonely, spec, tmp_path / "bundle") as container:
        container.until_answers(lonely, f"http://localhost:{published[0]}/readyz")
        sample = lonely.curl(f"http://localhost:{published[0]}{SAMPLE}")
        assert sample == pod_network.curl(f"http://labelmint-gateway:8080{SAMPLE}")
        assert container.stop() == 0, container.log


def of_compose(name: str, service: Object, directory: Path) -> Spec:
    """Return a service of compose.yaml as what runc shall run. Fails on a key that is not honoured here."""
    here = {"image", "command", "read_only", "tmpfs", "volumes", "shm_size", "cap_drop", "security_opt"}
    around = {"build", "depends_on", "ports", "profiles", "restart", "stop_grace_period"}
    assert not service.keys() - here - around, name
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    mounts = [Mount(target) for target in service["tmpfs"]]
    for each in service.get("volumes", []):
        source, target = each.split(":")
        mounts.append(Mount(target, volume(directory / source)))
    dockerfile = service["build"]["dockerfile"] if isinstance(service["build"], dict) else "Dockerfile"
    (built,) = [key for key, value in IMAGES.items() if value.dockerfile == dockerfile]
    memory = service.get("shm_size", "64m")
    return Spec(image(built), None, service.get("command"), {}, None, service["read_only"], mounts, memory)


def test_the_services_of_compose(store: Store, lonely: Network, tmp_path: Path) -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for service in services.values():
        context = service["build"]["context"] if isinstance(service["build"], dict) else service["build"]
        assert (ROOT / context).resolve() == ROOT.resolve()
    command = services["pull"]["command"]
    services["pull"]["command"] = [re.sub(r"^--count=\d+$", "--count=8", word) for word in command]
    (server, client) = (of_compose(name, services[name], tmp_path) for name in ("labelmint", "pull"))
    assert services.keys() == {"labelmint", "pull"} and services["pull"]["depends_on"] == ["labelmint"]
    with running(store, lonely, server, tmp_path / "server") as container:
        container.until_answers(lonely, "http://labelmint:8080/readyz")
        assert all(each.startswith("127.0.0.1:") for each in services["labelmint"]["ports"]), "it asks for no token"
        run(store, lonely, client, tmp_path / "client")
        written = json.loads((tmp_path / "data" / "faces" / "manifest.json").read_text())
        assert written["sample_count"] == 8
        assert container.stop() == 0, container.log


class Unit(RawConfigParser):
    """A systemd unit: names keep their case, and the last of several values counts."""

    def __init__(self) -> None:
        super().__init__(strict=False, interpolation=None)
        self.read(ROOT / "labelmint.service")

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def test_the_systemd_unit_starts_reloads_and_stops(store: Store, lonely: Network, tmp_path: Path) -> None:
    """systemd checks the unit; its command runs where that exists, in the image, with a copy of the models."""
    program = need_program("systemd-analyze", "systemd")
    service = Unit()["Service"]
    (command, *arguments) = shlex.split(service["ExecStart"])
    checked = tmp_path / "labelmint.service"
    real = store.root(image("labelmint")) / command.lstrip("/")
    assert real.exists()
    checked.write_text((ROOT / "labelmint.service").read_text().replace(command, "/bin/true"))
    done = subprocess.run([program, "verify", "--man=no", str(checked)], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "labelmint" in line]
    assert done.returncode == 0 and not said, done.stderr

    key, _, where = service["Environment"].partition("=")
    assert where.startswith(f"/var/lib/{service['StateDirectory']}/")
    state = volume(tmp_path / "state")
    models = store.root(image("models")) / "model_repository"
    subprocess.run(["cp", "-R", models, state / Path(where).name], check=True)
    spec = Spec(
        image("labelmint"),
        [command],
        arguments,
        {key: where},
        user="64000:64000",  # DynamicUser
        read_only=True,  # ProtectSystem
        mounts=[Mount("/tmp"), Mount(f"/var/lib/{service['StateDirectory']}", state)],
        shared_memory="512m",
    )
    with running(store, lonely, spec, tmp_path / "bundle") as container:
        container.until_answers(lonely, "http://localhost:8080/readyz")
        (name,) = re.findall(r"kill -(\w+) \$MAINPID", service["ExecReload"])
        container.signal({"HUP": 1}[name])
        assert lonely.curl(f"http://localhost:8080{SAMPLE}").startswith(b"\x89PNG")
        assert container.stop() == 0, container.log


def test_every_image_names_the_user_of_its_manifest(store: Store, manifests: Rendered) -> None:
    """So that `docker run` without options is as restricted as the pod."""
    for _, template in manifests.workloads():
        user = template["spec"]["securityContext"]
        for container in containers(template):
            name = name_of(container)
            if name in IMAGES:
                config = store.inspect(image(name))["OCIv1"]["config"]
                assert config["User"] == f"{user['runAsUser']}:{user['runAsGroup']}", name
                assert command_of(config, Spec(name)) or container.get("command"), name
