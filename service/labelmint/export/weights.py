"""The weights of an interpreter as the plain arrays that its kernels read, on CPUs and on GPUs.

Rules of this file:
- The names and shapes are those of `labelmint.kernel.interpreter.check_weights`.
"""

from __future__ import annotations

import numpy as np

from labelmint.export.comparison import Array
from labelmint.models.interpreter import StyleInterpreter


def arrays_of(interpreter: StyleInterpreter) -> dict[str, Array]:
    spec = interpreter.spec
    levels = {f"projection_{r}": interpreter.projection[str(r)] for r in spec.channels}
    others = {name: getattr(interpreter, name) for name in ("bias1", "weight2", "bias2", "weight3", "bias3")}
    others["bias1"] = others["bias1"].unflatten(0, (spec.num_heads, spec.hidden[0]))  # [N,h1]
    return {
        "task": np.array(spec.task),
        "score_kind": np.array(interpreter.score_kind),
        **{name: x.detach().contiguous().cpu().numpy() for name, x in (levels | others).items()},
    }
