"""Tests of the startup benchmark's reading of logs."""

import json

import pytest
import startup

pytestmark = pytest.mark.torch


COMMAND = 1767225600.0  # 2026-01-01 00:00:00 UTC


def gateway_lines() -> list[str]:
    told = {
        "00:00:01.500": "starting Triton on model_repository (faces)",
        "00:00:04.500": "faces, 128x128, 16 classes, gate at JS 102.3",
        "00:00:04.501": "ready after 3.0 s. REST http://127.0.0.1:1234 (docs at /docs), gRPC 127.0.0.1:1. Ctrl-C stops",
    }
    lines = [json.dumps({"time": f"2026-01-01T{at}+00:00", "message": message}) for at, message in told.items()]
    return ["WARNING: a library's own line", *lines]


def test_the_phases_of_a_start_add_up() -> None:
    triton = [
        'I0101 00:00:01.900000 17 pinned_memory_manager.cc:277] "Pinned memory pool is disabled"',
        'I0101 00:00:02.000000 17 model_lifecycle.cc:472] "loading: faces_generator:1"',
        'I0101 00:00:02.100000 17 model_lifecycle.cc:472] "loading: faces_style_interpreter:1"',
        "I0101 00:00:03.000000 17 model_lifecycle.cc:839] \"successfully loaded 'faces_generator'\"",
        "I0101 00:00:04.000000 17 model_lifecycle.cc:839] \"successfully loaded 'faces'\"",
        'I0101 00:00:04.250000 17 grpc_server.cc:2558] "Started GRPCInferenceService at 127.0.0.1:8001"',
        "+---------+",
    ]
    moments, url = startup.gateway_moments(gateway_lines())
    assert url == "http://127.0.0.1:1234"
    moments |= startup.triton_moments(triton, 2026) | {"first_sample": COMMAND + 5.0}
    found = startup.phases(COMMAND, moments)
    assert list(found["phases"].values()) == pytest.approx([1.5, 0.5, 2.0, 0.25, 0.251, 0.499], abs=1e-4)
    assert found["ready"] == pytest.approx(4.501, abs=1e-4)
    summed = startup.summary([found, found], [0.9, 1.1])
    assert summed["starts"] == 2 and summed["imports"]["median"] == 1.0
    assert summed["ready"]["median"] == pytest.approx(4.501, abs=1e-4)


def test_a_log_that_lacks_a_moment_is_no_measurement() -> None:
    moments, _ = startup.gateway_moments(gateway_lines())
    with pytest.raises(ValueError, match="models_begin"):
        startup.phases(COMMAND, moments)
