"""PyTriton over eager torch: an inference function bound to Triton, with Triton's dynamic batcher.

Rules of this file:
- It follows PyTriton's documentation: `@batch` on the function, `DynamicBatcher` in the model's configuration. Several
  workers are several functions bound to one model.

Run by benchmarks/alternatives.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from rivals.model import Painter
from rivals.settings import WAIT_SECONDS, Settings


class Model:
    def __init__(self, settings: Settings) -> None:
        self.painter = Painter(settings)

    @batch
    def __call__(
        self,
        seed: npt.NDArray[np.int64],
        truncation_psi: npt.NDArray[np.float32],
        crossover: npt.NDArray[np.int32],
    ) -> dict[str, npt.NDArray[np.generic]]:
        arrays = self.painter.arrays(seed[:, 0].tolist(), truncation_psi, crossover)
        return dict(zip(("image", "label", "js_score"), arrays, strict=True))


if __name__ == "__main__":
    settings = Settings.of_environment()
    config = TritonConfig(grpc_address="127.0.0.1", grpc_port=settings.port, allow_http=False, allow_metrics=False)
    with Triton(config=config) as triton:
        size = 128
        triton.bind(
            model_name="samples",
            infer_func=[Model(settings) for _ in range(settings.workers)],
            inputs=[
                Tensor(name="seed", dtype=np.int64, shape=(1,)),
                Tensor(name="truncation_psi", dtype=np.float32, shape=(1,)),
                Tensor(name="crossover", dtype=np.int32, shape=(1,)),
            ],
            outputs=[
                Tensor(name="image", dtype=np.uint8, shape=(size, size, 3)),
                Tensor(name="label", dtype=np.uint8, shape=(size, size)),
                Tensor(name="js_score", dtype=np.float32, shape=(1,)),
            ],
            config=ModelConfig(
                max_batch_size=settings.batch,
                batcher=DynamicBatcher(max_queue_delay_microseconds=round(WAIT_SECONDS * 1e6)),
            ),
        )
        triton.serve()
