"""Tests every object against the schema of its kind; unknown fields are errors."""

from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.conftest import ROOT
from tests.k8s.conftest import Rendered
from tests.support.kubernetes import Object

pytestmark = pytest.mark.unit


CRDS = ROOT / "tests" / "data" / "crds"
# The oldest Kubernetes that supports all that the manifests use (preStop sleep without a feature gate), and a new one.
VERSIONS = ("1.30", kubernetes_validate.latest_version())


def strict(schema: Any) -> Any:
    """Return an OpenAPI schema that refuses unknown fields, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    copied = {key: strict(value) for key, value in schema.items()}
    named = isinstance(copied.get("properties"), dict) and copied.get("type") == "object"
    if named and not copied.get("x-kubernetes-preserve-unknown-fields"):
        copied.setdefault("additionalProperties", False)
    return copied


def custom_schemas() -> dict[tuple[str, str], Object]:
    """Return the schemas of custom resources by API version and kind."""
    found = {}
    for path in sorted(CRDS.glob("*.yaml")):
        for definition in yaml.safe_load_all(path.read_text()):
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


CUSTOM = custom_schemas()


def test_objects_are_what_their_schemas_say(manifests: Rendered) -> None:
    assert manifests.objects
    for each in manifests.objects:
        where = f"{manifests.name}: {each['kind']} {each['metadata']['name']}"
        custom = CUSTOM.get((each["apiVersion"], each["kind"]))
        if custom is not None:
            problems = [
                f"{error.json_path}: {error.message}" for error in Draft202012Validator(custom).iter_errors(each)
            ]
            assert not problems, f"{where}: {problems}"
            continue
        for version in VERSIONS:  # a kind without a schema is an error here, not a warning
            try:
                kubernetes_validate.validate(each, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{where}, Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}")
            except kubernetes_validate.SchemaNotFoundError as error:
                pytest.fail(f"{where}: {error.message}")


def test_a_wrong_field_is_found(render: Any) -> None:
    """The validators are strict: they find an unknown field in each kind."""
    gpu = render("gpu-scale-to-zero")
    for kind in ("ScaledObject", "PodMonitor", "PrometheusRule", "NodePool"):
        wrong = {**gpu.of_kind(kind)[0]}
        wrong["spec"] = {**wrong["spec"], "nonesuch": 1}
        validator = Draft202012Validator(CUSTOM[wrong["apiVersion"], kind])
        assert list(validator.iter_errors(wrong)), kind
    wrong = {**gpu.of_kind("Deployment")[0]}
    wrong["spec"] = {**wrong["spec"], "nonesuch": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)
