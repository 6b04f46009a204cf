"""Runs the steps of a fused ensemble without a server, in a separate process that other benchmarks control.

Rules of this file:
- ONNX Runtime runs the repository's ONNX files, with the session options that their config.pbtxt files give Triton.
- Callers wait in one queue. A batch takes the first of them, up to Triton's largest batch. A caller that has its answer
  joins the queue again at once.
- It computes the same outputs as the served ways.

Run by other benchmarks: `python benchmarks/in_process.py REPOSITORY MODEL` answers each line of JSON on stdin (callers,
seconds, answers, first_seed) with a line that has the start and end of each call in seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import step_runner
from direct import OUTPUTS, inputs_of

from labelmint.triton.model_config import ensembles, model_file, read_config, version_of

Arrays = dict[str, np.ndarray]


class Pipeline:
    """Both steps of a fused ensemble, loaded."""

    def __init__(self, repository: Path, model: str) -> None:
        config = ensembles(repository)[model]
        steps = [repository / step.model_name for step in config.ensemble_scheduling.step]
        for step in steps:
            parameters = {key: x.string_value for key, x in read_config(step / "config.pbtxt").parameters.items()}
            if parameters != {"enable_mem_pattern": "0"}:
                raise ValueError(
                    f"{step.name} is served with {parameters}, which step_runner.onnx_session does not support"
                )
        self._steps = [
            step_runner.onnx_session(step / str(version_of(step)) / model_file(read_config(step / "config.pbtxt")))
            for step in steps
        ]
        self._z_dim = config.input[0].dims[0]
        self._num_ws = int(config.parameters["num_ws"].string_value)
        self.max_batch: int = config.max_batch_size

    def infer(self, seeds: Sequence[int]) -> Arrays:
        """Return image uint8 [B,R,R,3], label uint8 [B,R,R] and js_score float32 [B,1]."""
        arrays: Arrays = inputs_of(seeds, self._z_dim, self._num_ws)
        found: Arrays = {}
        for session in self._steps:
            names = [tensor.name for tensor in session.get_outputs()]
            wanted = [name for name in names if name in OUTPUTS or name.startswith("features_")]
            feeds = {tensor.name: arrays[tensor.name] for tensor in session.get_inputs()}
            arrays |= dict(zip(wanted, session.run(wanted, feeds), strict=True))
            found |= {name: arrays[name] for name in wanted if name in OUTPUTS}
        return found


def closed(
    pipeline: Pipeline, callers: int, seconds: float, *, answers: int, first_seed: int
) -> list[tuple[float, float]]:
    """Run a closed loop until both `seconds` have passed and `answers` calls have ended.

    Callers that wait at that time are answered too. Returns the start and end of each call.
    """
    seeds = itertools.count(first_seed)
    origin = time.perf_counter()
    waiting = deque([0.0] * callers)  # when each began to wait
    calls: list[tuple[float, float]] = []
    while waiting:
        batch = [waiting.popleft() for _ in range(min(len(waiting), pipeline.max_batch))]
        pipeline.infer([next(seeds) for _ in batch])
        ended = time.perf_counter() - origin
        calls += [(begun, ended) for begun in batch]
        if len(calls) < answers or ended < seconds:
            waiting.extend([ended] * len(batch))
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", type=Path)
    parser.add_argument("model")
    arguments = parser.parse_args()
    pipeline = Pipeline(arguments.repository, arguments.model)
    pipeline.infer(range(pipeline.max_batch))  # warms up
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(closed(pipeline, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
