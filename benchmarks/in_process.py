"""The steps of a fused ensemble in one process without any server, as a process of its own that is told what to run.

Rules of this file:
- The ONNX files of the repository under ONNX Runtime, with the session options that their config.pbtxt give Triton.
- Batches are formed the simple way: callers queue, and a batch is the first of them, at most as many as Triton would
  take. Who has an answer queues again at once.
- It asks for the outputs that the served ways ask for.

Run by other benchmarks: `python benchmarks/in_process.py REPOSITORY MODEL` answers each line of JSON on stdin (callers,
seconds, answers, first_seed) with a line that has the begin and end of each call in seconds.
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
                    f"{step.name} is served with {parameters}, which step_runner.onnx_session does not know"
                )
        self._steps = [
            step_runner.onnx_session(step / str(version_of(step)) / model_file(read_config(step / "config.pbtxt")))
            for step in steps
        ]
        self._z_dim = config.input[0].dims[0]
        self._num_ws = int(config.parameters["num_ws"].string_value)
        self.max_batch: int = config.max_batch_size

    def infer(self, seeds: Sequence[int]) -> Arrays:
        """image uint8 [B,R,R,3], label uint8 [B,R,R], js_score float32 [B,1]."""
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
    pipeline: Pipeline, callers: int, seconds: float, answers: int, first_seed: int
) -> list[tuple[float, float]]:
    """Begin and end of each call of callers who ask again until the seconds have passed and so many answers are there.

    Those who wait then are answered, too.
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
