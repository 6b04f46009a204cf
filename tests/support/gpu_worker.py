"""A worker of benchmarks/gpu with fewer arms, and with faults that no machine here can provoke.

Rules of this file:
- `measure.run` starts it in place of `gpu.worker`; the faults stand where an arm is prepared, and nowhere else.
"""

import os
import signal
import sys
import time

import torch
from gpu import arms, worker


def raises(_):
    raise RuntimeError("planted")


def out_of_memory(_):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def crashes(_):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(_):
    time.sleep(1000)


def wrong(bench):
    """An interpreter with the labels of other features."""
    run = arms.eager("interpreter", "float32")(bench)
    return lambda inputs: run([x.flip(-1) for x in inputs])


FAULTS = {
    "kernel_float32": raises,
    "kernel_tf32": out_of_memory,
    "kernel_float16": crashes,
    "kernel_bfloat16": hangs,
    "eager_whole_tf32": wrong,
}
FEW = ("float32", "kernel_float16", "torchscript", "onnxruntime", "reference")

if __name__ == "__main__":
    mode = sys.argv.pop(1)
    if mode == "faults":
        arms.INTERPRETER = {
            "float32": arms.INTERPRETER["float32"],
            **FAULTS,
            "eager_tf32": arms.INTERPRETER["eager_tf32"],
        }
        arms.GENERATOR = {"float32": arms.GENERATOR["float32"]}
    else:
        arms.INTERPRETER = {name: arms.INTERPRETER[name] for name in FEW}
        arms.GENERATOR = {name: arms.GENERATOR[name] for name in FEW if name in arms.GENERATOR}
    arms.PAIRS = tuple(pair for pair in arms.PAIRS if pair[0] in arms.GENERATOR and pair[1] in arms.INTERPRETER)
    worker.main()
