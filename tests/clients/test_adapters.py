"""The adapters for Hugging Face `datasets` and `tf.data`: the same samples in their libraries' own forms."""

import numpy as np
import pytest

from labelmint_client import Client, SampleOptions
from tests.conftest import Service

pytestmark = [pytest.mark.triton, pytest.mark.torch]


ALL = SampleOptions(max_quantile=1)


def test_hugging_face(gateway: Service, options: SampleOptions, accepted: list[int]) -> None:
    pytest.importorskip("datasets", reason="datasets of Hugging Face is not installed")
    from labelmint_client.huggingface import labeled_samples

    rows = list(labeled_samples(gateway.grpc, "tiny", end_seed=256, num_shards=3, options=options))
    assert sorted(row["seed"] for row in rows) == accepted
    with Client(gateway.grpc) as client:
        sample = client.get_sample("tiny", rows[0]["seed"], options)
    assert sample.image is not None and np.array_equal(np.asarray(rows[0]["image"]), sample.image)
    assert sample.label is not None and np.array_equal(np.asarray(rows[0]["label"]), sample.label)
    assert rows[0]["js_score"] == sample.js_score


def test_hugging_face_keypoints(service: Service) -> None:
    pytest.importorskip("datasets", reason="datasets of Hugging Face is not installed")
    from labelmint_client.huggingface import labeled_samples

    (row,) = labeled_samples(service.grpc, "faces_keypoints", end_seed=1, options=ALL)
    with Client(service.grpc) as client:
        assert np.array_equal(row["keypoints"], client.get_sample("faces_keypoints", 0, ALL).keypoints)


def test_tensorflow(gateway: Service, options: SampleOptions, accepted: list[int]) -> None:
    pytest.importorskip("tensorflow", reason="tensorflow (250 MB) is not part of the test environment")
    from labelmint_client.tensorflow import labeled_samples

    dataset = labeled_samples(gateway.grpc, "tiny", end_seed=256, options=options)
    images, labels = next(iter(dataset.batch(len(accepted))))
    with Client(gateway.grpc) as client:
        samples = list(client.stream_samples("tiny", end_seed=256, options=options))
    assert np.array_equal(images.numpy(), np.stack([sample.image for sample in samples]))
    assert np.array_equal(labels.numpy(), np.stack([sample.label for sample in samples]))


def test_tensorflow_keypoints(service: Service) -> None:
    pytest.importorskip("tensorflow", reason="tensorflow (250 MB) is not part of the test environment")
    from labelmint_client.tensorflow import labeled_samples

    ((_, keypoints),) = labeled_samples(service.grpc, "faces_keypoints", end_seed=1, options=ALL)
    with Client(service.grpc) as client:
        assert np.array_equal(keypoints.numpy(), client.get_sample("faces_keypoints", 0, ALL).keypoints)
