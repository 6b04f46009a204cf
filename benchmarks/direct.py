"""Requests to Triton without the gateway: one or many samples of a fused ensemble, and the statistics of its steps.

Rules of this file:
- It uses tritonclient's asyncio client and none of labelmint's client code. Answers are not decoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton

from labelmint.core.policy import latent_of
from labelmint.core.served_model import ServedModel

STEPS = ("generator", "style_interpreter")
PHASES = ("queue", "compute_input", "compute_infer", "compute_output")  # of a step, as Triton's statistics name them
OUTPUTS = ("image", "label", "js_score")


def inputs_of(seeds: Sequence[int], z_dim: int, num_ws: int) -> dict[str, np.ndarray]:
    """Return an ensemble's inputs for these seeds, without mixing or truncation: [B,z_dim] twice, [B,1] twice."""
    latents = np.concatenate([latent_of(seed, z_dim) for seed in seeds])
    return {
        "latent": latents,
        "style_latent": latents,
        "crossover": np.full((len(seeds), 1), num_ws, np.int32),
        "truncation_psi": np.ones((len(seeds), 1), np.float32),
    }


class Direct:
    """A connection to a Triton that has this model; its steps are named `NAME_STEP`."""

    def __init__(self, url: str, model: ServedModel) -> None:
        self._client = triton.InferenceServerClient(url, channel_args=[("grpc.max_receive_message_length", -1)])
        self._model = model
        self._steps = [f"{model.triton_name}_{step}" for step in STEPS]

    async def close(self) -> None:
        await self._client.close()

    async def infer(self, seeds: Sequence[int]) -> None:
        """Send one request for the samples of these seeds."""
        inputs = []
        for name, array in inputs_of(seeds, self._model.z_dim, self._model.num_ws).items():
            tensor = triton.InferInput(name, list(array.shape), "INT32" if array.dtype == np.int32 else "FP32")
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        outputs = [triton.InferRequestedOutput(name) for name in OUTPUTS]
        await self._client.infer(self._model.triton_name, inputs, outputs=outputs)

    async def statistics(self) -> list[dict[str, float]]:
        """Return the seconds of each step in each of PHASES since Triton started. Call it when Triton is idle."""
        entries = await self._entries()
        while len({entry.inference_count for entry in entries}) > 1:  # Triton answers before it counts the last step
            await asyncio.sleep(0.001)
            entries = await self._entries()
        return [{phase: getattr(entry.inference_stats, phase).ns / 1e9 for phase in PHASES} for entry in entries]

    async def step_seconds(self) -> list[float]:
        """Return the seconds that each step has computed since Triton started: all phases but the queue."""
        return [sum(step.values()) - step["queue"] for step in await self.statistics()]

    async def _entries(self) -> list[Any]:
        """Return Triton's ModelStatistics of each step."""
        return [
            entry for step in self._steps for entry in (await self._client.get_inference_statistics(step)).model_stats
        ]
