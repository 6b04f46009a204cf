"""The tasks by name, and the shapes of their outputs."""

import pytest

from labelmint.core.task import IMAGE, KEYPOINTS, SEGMENTATION, TASKS, UNCERTAINTY, task_of
from labelmint.v1 import sample_service_pb2 as pb

pytestmark = pytest.mark.unit


def test_a_task_is_found_by_its_name() -> None:
    assert list(TASKS) == ["segmentation", "keypoints"]
    assert task_of("segmentation") is SEGMENTATION and task_of("keypoints") is KEYPOINTS
    with pytest.raises(ValueError) as caught:
        task_of("depth")
    assert str(caught.value) == "unknown task 'depth'; known: segmentation, keypoints"


def test_outputs_have_the_resolution_and_the_number_of_names_in_their_shape() -> None:
    outputs = (IMAGE, *UNCERTAINTY, *SEGMENTATION.labels, *KEYPOINTS.labels)
    assert {output.name: (output.dtype, output.dims(128, 5)) for output in outputs} == {
        "image": ("uint8", (128, 128, 3)),
        "js_map": ("float32", (128, 128)),
        "js_score": ("float32", (1,)),
        "label": ("uint8", (128, 128)),
        "keypoints": ("float32", (5, 2)),
        "confidence": ("float32", (5,)),
    }


def test_the_label_outputs_are_what_a_task_adds() -> None:
    assert SEGMENTATION.label_outputs == ("label",) and SEGMENTATION.has_label_image
    assert KEYPOINTS.label_outputs == ("keypoints", "confidence") and not KEYPOINTS.has_label_image


def test_a_model_message_has_a_field_for_the_names_of_each_task() -> None:
    fields = [pb.Model.DESCRIPTOR.fields_by_name[task.names_field] for task in TASKS.values()]
    assert len({field.name for field in fields}) == len(TASKS)
    assert all(field.message_type is pb.LabelClass.DESCRIPTOR for field in fields)


def test_a_segmentation_needs_two_classes_and_a_keypoint_model_one_keypoint() -> None:
    assert [(task.names, task.min_names) for task in TASKS.values()] == [("classes", 2), ("keypoints", 1)]
