"""The cache of samples: what it keeps within its bytes, what it returns, and what a disabled one leaves alone."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from labelmint.gateway.sampling.cache import SampleCache
from labelmint.gateway.sampling.metrics import Metrics
from labelmint.triton.client import Array

pytestmark = pytest.mark.unit


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def cache_of(max_bytes: int, registry: CollectorRegistry) -> SampleCache:
    return SampleCache(max_bytes, Metrics(registry))


def array_of(size: int) -> Array:
    return np.zeros(size, np.uint8)


def test_a_full_cache_drops_what_was_not_read_for_the_longest_time(registry: CollectorRegistry) -> None:
    cache = cache_of(10, registry)
    for key in ("old", "read"):
        cache.keep(key, {"image": array_of(4)})
    cache.get("old", ["image"])
    cache.keep("new", {"image": array_of(4)})
    assert [cache.get(key, ["image"]) is not None for key in ("old", "read", "new")] == [True, False, True]


def test_a_sample_fits_to_the_last_byte_and_a_larger_one_evicts_nothing(registry: CollectorRegistry) -> None:
    cache = cache_of(10, registry)
    cache.keep("fits", {"image": array_of(6), "label": array_of(4)})
    cache.keep("large", {"image": array_of(11)})
    assert cache.get("fits", ["image", "label"]) is not None and cache.get("large", ["image"]) is None


def test_the_metric_counts_the_bytes_of_all_entries(registry: CollectorRegistry) -> None:
    cache = cache_of(10, registry)
    counted = []
    for key, name, size in (("1", "image", 3), ("1", "label", 2), ("2", "image", 4), ("3", "image", 6)):
        cache.keep(key, {name: array_of(size)})
        counted.append(registry.get_sample_value("labelmint_cache_bytes"))
    assert counted == [3, 5, 9, 10], "the last entry evicts the first"


def test_the_cache_returns_the_outputs_that_were_asked_for(registry: CollectorRegistry) -> None:
    cache, image, label = cache_of(10, registry), array_of(1), array_of(2)
    cache.keep("1", {"image": image})
    cache.keep("1", {"label": label})
    assert cache.get("1", ["label"]) == {"label": label}
    assert cache.get("1", ["image", "js_map"]) is None and cache.get("2", ["image"]) is None


def test_kept_arrays_are_read_only_because_requests_share_them(registry: CollectorRegistry) -> None:
    cache, image = cache_of(10, registry), array_of(4)
    assert cache.keep("1", {"image": image}) == {"image": image}
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 1


def test_a_cache_of_no_bytes_is_disabled_and_passes_arrays_through(registry: CollectorRegistry) -> None:
    cache, image = cache_of(0, registry), array_of(4)
    assert cache.enabled is False and cache_of(1, CollectorRegistry()).enabled is True
    assert cache.keep("1", {"image": image}) == {"image": image}
    image[0] = 1
    assert cache.get("1", ["image"]) is None and registry.get_sample_value("labelmint_cache_bytes") == 0
