"""Each task has all that a task must have, in the service and in the client."""

import inspect
from importlib import import_module
from typing import Any

import pytest

from labelmint.core.task import TASKS
from labelmint.gateway.encoding.labels import LabelEncoding
from labelmint.models.tasks import Learning
from labelmint_client import tasks as client_tasks
from labelmint_client.pull.labels import Labels

pytestmark = pytest.mark.torch


def test_the_client_knows_the_tasks_of_the_service() -> None:
    assert list(client_tasks.TASKS) == list(TASKS)
    assert {task.names_field for task in client_tasks.TASKS.values()} == {task.names_field for task in TASKS.values()}
    assert all(task.names_field.endswith("classes") for task in TASKS.values())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("package", "protocol"),
    [
        ("labelmint.gateway.encoding", LabelEncoding),
        ("labelmint.models", Learning),
        ("labelmint_client.pull", Labels),
    ],
)
def test_a_tasks_module_has_all_that_is_asked_of_it(name: str, package: str, protocol: Any) -> None:
    module = import_module(f"{package}.{name}")
    for attribute in protocol.__annotations__:
        assert hasattr(module, attribute), attribute
    for attribute, method in vars(protocol).items():
        if inspect.isfunction(method) and not attribute.startswith("_"):
            wanted = list(inspect.signature(method).parameters)[1:]  # without self
            assert list(inspect.signature(getattr(module, attribute)).parameters) == wanted, attribute
