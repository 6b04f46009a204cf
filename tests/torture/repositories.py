"""Model repositories that try to run code, reach other files or exhaust memory when labelmint's Triton loads them.

ATTACKS has for each attack its name, the format of the valid repository that it starts from, the change to it, and the
text of the refusal. Code that is run writes a canary file: a library when it is loaded, Python when it is run. The
ordinary tests call the checker. `run` here starts `labelmint serve`, and first proves that unchecked attacks do write
their canary.
"""

from __future__ import annotations

import asyncio
import functools
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper
from tritonclient.grpc import model_config_pb2 as pb

from labelmint.core.errors import LabelmintError
from labelmint.export.repository import FORMATS, export_repository
from labelmint.gateway.process.own_triton import OwnTriton
from labelmint.gateway.process.settings import ServeSettings
from labelmint.triton.model_config import read_config, write_config
from labelmint.triton.server import TritonServer, wait_until_ready
from tests.conftest import need_program
from tests.support.models import tiny_weights
from tests.torture.outcome import Outcome

Change = Callable[[Path, Path], object]  # changes a repository; the second path is that of the canary
STEP = "tiny_generator"
ONNX, SCRIPT, NATIVE = f"{STEP}/1/model.onnx", f"{STEP}/1/model.pt", "tiny_style_interpreter/1/interpreter.npz"
MAX_SECONDS = 2.0  # for a refusal by the checker
SERVE_SECONDS = 120
LIBRARY = """
#include <stdio.h>
__attribute__((constructor)) static void sing(void) {{ FILE *file = fopen("{canary}", "w"); if (file) fclose(file); }}
"""


@functools.cache
def library(canary: Path) -> bytes:
    """Return a shared library that writes the canary when it is loaded."""
    target = canary.with_suffix(".so")
    command = [need_program("cc", "gcc"), "-shared", "-fPIC", "-x", "c", "-", "-o", str(target)]
    subprocess.run(command, input=LIBRARY.format(canary=canary), text=True, check=True)
    return target.read_bytes()


def python(canary: Path) -> bytes:
    return f"open({str(canary)!r}, 'w').close()\n".encode()


def put(name: str, content: Callable[[Path], bytes] | bytes) -> Change:
    def change(repository: Path, canary: Path) -> None:
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content(canary))

    return change


def add(text: str, model: str = STEP) -> Change:
    """Add text to a model's configuration."""

    def change(repository: Path, canary: Path) -> None:
        path = repository / model / "config.pbtxt"
        path.write_text(path.read_text() + text)

    return change


def parameter(key: str, value: str, model: str = STEP) -> Change:
    return add(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n', model)


def configured(edit: Callable[[pb.ModelConfig], object], model: str = STEP) -> Change:
    def change(repository: Path, canary: Path) -> None:
        path = repository / model / "config.pbtxt"
        config = read_config(path)
        edit(config)
        write_config(path, config)

    return change


def also(*changes: Change) -> Change:
    def change(repository: Path, canary: Path) -> None:
        for each in changes:
            each(repository, canary)

    return change


def linked(name: str, target: str) -> Change:
    """Replace a file or directory by a link. The original is moved to {outside}."""

    def change(repository: Path, canary: Path) -> None:
        path = repository / name
        outside = canary.parent / f"outside-{repository.name}"
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, outside)
            shutil.rmtree(path)
        elif path.exists():
            outside.mkdir()
            shutil.move(path, outside / path.name)
        path.symlink_to(target.format(outside=outside, name=path.name))

    return change


def replaced(name: str, make: Callable[[Path], object]) -> Change:
    def change(repository: Path, canary: Path) -> None:
        (repository / name).unlink()
        make(repository / name)

    return change


def sparse(size: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def graph(edit: Callable[[onnx.ModelProto], object]) -> Change:
    def change(repository: Path, canary: Path) -> None:
        model = onnx.load(repository / ONNX)
        edit(model)
        (repository / ONNX).write_bytes(model.SerializeToString())

    return change


def content(name: str, edit: Callable[[bytes], bytes]) -> Change:
    return lambda repository, canary: (repository / name).write_bytes(edit((repository / name).read_bytes()))


def elsewhere(tensor: onnx.TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def external(location: str) -> Change:
    return graph(lambda model: elsewhere(model.graph.initializer[0], location))


def initializer(**fields: object) -> Change:
    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        for name, value in fields.items():
            tensor.ClearField(name)
            getattr(tensor, name).extend(value) if isinstance(value, list) else setattr(tensor, name, value)

    return graph(edit)


def foreign_tensor(location: str) -> onnx.TensorProto:
    tensor = helper.make_tensor("x", onnx.TensorProto.FLOAT, [1], [0.0])
    tensor.ClearField("float_data")
    elsewhere(tensor, location)
    return tensor


def nested(depth: int) -> onnx.GraphProto:
    inner = onnx.GraphProto()
    for _ in range(depth):
        outer = onnx.GraphProto()
        outer.node.add(op_type="If").attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(inner)
        inner = outer
    return inner


def node(**fields: object) -> Change:
    return graph(lambda model: model.graph.node.add(op_type="Relu", input=["latent"], output=["odd"], **fields))


def rewritten(name: str, edit: Callable[[dict[str, bytes]], object], method: int = zipfile.ZIP_STORED) -> Change:
    """Rewrite an archive with edited entries."""

    def change(repository: Path, canary: Path) -> None:
        with zipfile.ZipFile(repository / name) as old:
            entries = {entry: old.read(entry) for entry in old.namelist()}
        edit(entries)
        with zipfile.ZipFile(repository / name, "w", method) as new:
            for entry, data in entries.items():
                new.writestr(zipfile.ZipInfo(entry, (1980, 1, 1, 0, 0, 0)), data, method)

    return change


CODE, CONSTANTS, DATA = "archive/code/__torch__.py", "archive/constants.pkl", "archive/data.pkl"


def script(line: str) -> Change:
    """Put another first line into the traced function."""

    def edit(entries: dict[str, bytes]) -> None:
        head, arrow, body = entries[CODE].partition(b"]:\n")
        entries[CODE] = head + arrow + f"    {line}\n".encode() + body

    return rewritten(SCRIPT, edit)


def entry(name: str, new: bytes) -> Change:
    return rewritten(SCRIPT, lambda entries: entries.update({name: new}))


def constants(old: bytes, new: bytes) -> Change:
    def edit(entries: dict[str, bytes]) -> None:
        assert old in entries[CONSTANTS]
        entries[CONSTANTS] = entries[CONSTANTS].replace(old, new, 1)

    return rewritten(SCRIPT, edit)


def twice(data: bytes) -> bytes:
    """Return an archive whose directory lists its first entry twice."""
    count, size, offset = struct.unpack("<HII", data[-12:-2])
    directory = data[offset : offset + size]
    first = directory[: 46 + struct.unpack("<H", directory[28:30])[0]]
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count + 1, count + 1, size + len(first), offset, 0)
    return data[:offset] + directory + first + end


def array(name: str, value: np.ndarray, header: bytes = b"") -> Change:  # type: ignore[type-arg]
    stream = io.BytesIO()
    np.save(stream, value)
    return rewritten(NATIVE, lambda entries: entries.update({f"{name}.npy": header or stream.getvalue()}))


def npy(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


class Gadget:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def varint(number: int) -> bytes:
    data = b""
    while number >= 0x80:
        data, number = data + bytes([number & 0x7F | 0x80]), number >> 7
    return data + bytes([number])


RUNS = "is not part of an export, and Triton may run it; remove it"
FIELD = "which the gateway's own Triton does not support; remove it"
LINK = "is a link out of the repository; replace it with a copy of its target"
DIMS = 'model_warmup { name: "w" batch_size: 1 inputs { key: "latent" value { data_type: TYPE_FP32 dims: 8 %s } } }\n'
ENVIRONMENT = parameter("EXECUTION_ENV_PATH", "$$TRITON_MODEL_DIRECTORY/env.tar.gz")
TERABYTES = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}\n", bytes(64))
FUNCTION = onnx.FunctionProto(name="f", domain="", opset_import=[helper.make_opsetid("", 18)])

ATTACKS: dict[str, tuple[str, Change, str]] = {
    # Libraries.
    "library of the backend in the version": ("onnx", put(f"{STEP}/1/libtriton_onnxruntime.so", library), RUNS),
    "library of the backend in the model": ("onnx", put(f"{STEP}/libtriton_onnxruntime.so", library), RUNS),
    "library of the backend in the ensemble": ("onnx", put("tiny/1/libtriton_ensemble.so", library), RUNS),
    "library of our backend": ("native", put("tiny_style_interpreter/libtriton_labelmint.so", library), RUNS),
    "library of the pytorch backend": ("torchscript", put(f"{STEP}/1/libtriton_pytorch.so", library), RUNS),
    "library of the Python backend": ("onnx", put(f"{STEP}/libtriton_python.so", library), RUNS),
    "library of a backend of its own": (
        "onnx",
        also(put(f"{STEP}/libtriton_mine.so", library), configured(lambda c: setattr(c, "backend", "mine"))),
        "names the backend 'mine'; supported backends: onnxruntime",
    ),
    "library that a runtime names": (
        "onnx",
        also(put(f"{STEP}/libmine.so", library), add('runtime: "libmine.so"\n')),
        f"has the field runtime, {FIELD}",
    ),
    "library that a runtime names from afar": ("onnx", add('runtime: "../../tmp/x.so"\n'), "has the field runtime"),
    "backend with a path": (
        "onnx",
        configured(lambda c: setattr(c, "backend", "../../../tmp/mine")),
        "names the backend '../../../tmp/mine'",
    ),
    "backend of the platform": (
        "onnx",
        configured(lambda c: (c.ClearField("backend"), setattr(c, "platform", "pytorch_libtorch"))),
        "names the backend ''",
    ),
    "library for custom operators": (
        "onnx",
        also(put(f"{STEP}/1/ops.so", library), add('model_operations { op_library_filename: "ops.so" }\n')),
        f"has the field model_operations.op_library_filename, {FIELD}",
    ),
    "agent of the repository": (
        "onnx",
        add('model_repository_agents { agents { name: "../../tmp/mine" } }\n'),
        "has the field model_repository_agents.agents.name",
    ),
    # Python.
    "backend python with a model.py": (
        "onnx",
        also(put(f"{STEP}/1/model.py", python), configured(lambda c: setattr(c, "backend", "python"))),
        "names the backend 'python'",
    ),
    "model.py in the version": ("onnx", put(f"{STEP}/1/model.py", python), RUNS),
    "model.py in the model": ("onnx", put(f"{STEP}/model.py", python), RUNS),
    "model.py as runtime": (
        "onnx",
        also(put(f"{STEP}/model.py", python), add('runtime: "model.py"\n')),
        "has the field runtime",
    ),
    "environment of its own": (
        "onnx",
        also(put(f"{STEP}/env.tar.gz", b"\x1f\x8b"), ENVIRONMENT),
        f"has the parameter 'EXECUTION_ENV_PATH', {FIELD}",
    ),
    "environment of its own, for torch": ("torchscript", ENVIRONMENT, "has the parameter 'EXECUTION_ENV_PATH'"),
    "environment of the ensemble": (
        "onnx",
        parameter("EXECUTION_ENV_PATH", "/tmp/x", "tiny"),
        "has the parameter 'EXECUTION_ENV_PATH'",
    ),
    "stub of its own": ("onnx", put(f"{STEP}/triton_python_backend_stub", python), RUNS),
    "module that shadows another": ("onnx", put(f"{STEP}/1/onnxruntime.py", python), RUNS),
    "module that shadows the backend's": ("onnx", put(f"{STEP}/1/labelmint_backend.py", python), RUNS),
    "sitecustomize": ("onnx", put(f"{STEP}/1/sitecustomize.py", python), RUNS),
    "compiled module": ("onnx", put(f"{STEP}/1/__pycache__/model.cpython-311.pyc", python), RUNS),
    # Configuration: other files.
    "file name that is absolute": (
        "onnx",
        add('default_model_filename: "/etc/passwd"\n'),
        "has default_model_filename '/etc/passwd', which is not the name of a .onnx file",
    ),
    "file name that leads out": (
        "onnx",
        add('default_model_filename: "../../../x.onnx"\n'),
        "has default_model_filename '../../../x.onnx'",
    ),
    "file name that leads in": (
        "onnx",
        add('default_model_filename: "../1/model.onnx"\n'),
        "has default_model_filename '../1/model.onnx'",
    ),
    "file of another format": (
        "onnx",
        also(put(f"{STEP}/1/model.ort", b"\0\0\0\0ORTM"), add('default_model_filename: "model.ort"\n')),
        "has default_model_filename 'model.ort'",
    ),
    "file by compute capability": (
        "onnx",
        add('cc_model_filenames { key: "7.5" value: "../../x" }\n'),
        "has the field cc_model_filenames",
    ),
    "warm-up from a file": (
        "onnx",
        add(DIMS % 'input_data_file: "../../../../etc/passwd"'),
        "has the field model_warmup.inputs.input_data_file",
    ),
    "state from a file": (
        "onnx",
        configured(lambda c: c.sequence_batching.state.add().initial_state.add(data_file="/etc/passwd")),
        "has the field sequence_batching.state.initial_state.data_file",
    ),
    "sequences": (
        "onnx",
        configured(lambda c: c.sequence_batching.SetInParent()),
        "has the field sequence_batching, ",
    ),
    "cache of responses": ("onnx", add("response_cache { enable: true }\n"), "has the field response_cache.enable"),
    "decoupled answers": (
        "onnx",
        add("model_transaction_policy { decoupled: true }\n"),
        "has the field model_transaction_policy.decoupled",
    ),
    "engine cache of TensorRT": (
        "onnx",
        add('optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }\n'),
        "has the field optimization.execution_accelerators.gpu_execution_accelerator.name",
    ),
    "profile of ONNX Runtime": ("onnx", parameter("profiling_enable", "1"), "has the parameter 'profiling_enable'"),
    "optimized model of ONNX Runtime": (
        "onnx",
        parameter("optimized_model_filepath", "/tmp/x"),
        "has the parameter 'optimized_model_filepath'",
    ),
    "session option of ONNX Runtime": (
        "onnx",
        parameter("session.load_model_format", "ORT"),
        "has the parameter 'session.load_model_format'",
    ),
    "parameter of a wrong value": (
        "onnx",
        configured(lambda c: c.parameters["enable_mem_pattern"].MergeFrom(pb.ModelParameter(string_value="2 or so"))),
        "has the parameter enable_mem_pattern '2 or so', which is not one of its values",
    ),
    "a billion threads": (
        "onnx",
        parameter("intra_op_thread_count", "1000000000"),
        "has the parameter intra_op_thread_count '1000000000'",
    ),
    # Configuration: sizes and names.
    "input of 2^60": (
        "onnx",
        configured(lambda c: c.input[0].dims.append(1 << 60)),
        "has input.dims 1152921504606846976",
    ),
    "input of many large sizes": (
        "onnx",
        configured(lambda c: c.input[0].dims.extend([1 << 30] * 3)),
        "declares the tensor 'latent' of a type or size that no export has",
    ),
    "input of negative size": ("onnx", configured(lambda c: c.input[0].dims.append(-1)), "has input.dims -1"),
    "input of texts": (
        "onnx",
        configured(lambda c: setattr(c.input[0], "data_type", pb.TYPE_STRING)),
        "declares the tensor 'latent' of a type",
    ),
    "input that is reshaped": (
        "onnx",
        configured(lambda c: c.input[0].reshape.shape.append(8)),
        "has the field input.resh",
    ),
    "batch of 2^31": (
        "onnx",
        configured(lambda c: setattr(c, "max_batch_size", 2**31 - 1)),
        "has max_batch_size 214748",
    ),
    "a million instances": (
        "onnx",
        configured(lambda c: setattr(c.instance_group[0], "count", 10**6)),
        "has instance_group.count 1000000",
    ),
    "a thousand groups of instances": (
        "onnx",
        configured(lambda c: [c.instance_group.add(count=64) for _ in range(1000)]),
        "has more than 64 inputs, outputs, steps or instance groups",
    ),
    "queue of 2^31": (
        "onnx",
        configured(lambda c: setattr(c.dynamic_batching.default_queue_policy, "max_queue_size", 2**31)),
        "has dynamic_batching.default_queue_policy.max_queue_size",
    ),
    "delay of an age": (
        "onnx",
        configured(lambda c: setattr(c.dynamic_batching, "max_queue_delay_microseconds", 1 << 50)),
        "has dynamic_batching.max_queue_delay_microseconds",
    ),
    "warm-up of another size": (
        "onnx",
        configured(lambda c: c.model_warmup[0].inputs["latent"].dims.append(1 << 29)),
        "has a model_warmup that does not match the model's inputs",
    ),
    "warm-up of a large batch": (
        "onnx",
        configured(lambda c: setattr(c.model_warmup[0], "batch_size", 1000)),
        "has a model_warmup that does not match the model's inputs",
    ),
    "all versions": (
        "onnx",
        configured(lambda c: c.version_policy.all.SetInParent()),
        "has the field version_policy.all",
    ),
    "name of another model": ("onnx", configured(lambda c: setattr(c, "name", "x")), "names the model 'x'"),
    "step that leads out": (
        "onnx",
        configured(lambda c: setattr(c.ensemble_scheduling.step[0], "model_name", "../../etc"), "tiny"),
        "holds or names a model '../../etc', which is not a name that an export gives",
    ),
    "step that is an ensemble": (
        "onnx",
        configured(lambda c: setattr(c.ensemble_scheduling.step[0], "model_name", "tiny"), "tiny"),
        "names the backend ''",
    ),
    "step of another repository": (
        "onnx",
        configured(lambda c: setattr(c.ensemble_scheduling.step[0], "model_namespace", "x"), "tiny"),
        "has the field ensemble_scheduling.step.model_namespace",
    ),
    "ensemble with a backend": (
        "onnx",
        configured(lambda c: setattr(c, "backend", "python"), "tiny"),
        "has the field backend",
    ),
    "model that means all models": (
        "onnx",
        also(
            lambda repository, canary: (repository / "tiny").rename(repository / "*"),
            configured(lambda c: setattr(c, "name", "*"), "*"),
        ),
        "holds or names a model '*'",
    ),
    # The configuration itself.
    "configuration that is no text": (
        "onnx",
        content(f"{STEP}/config.pbtxt", lambda data: data + b"# \xff\n"),
        "is not a Triton model configuration: 'utf-8' codec can't decode",
    ),
    "configuration of bytes": (
        "onnx",
        put(f"{STEP}/config.pbtxt", b"\xff\xfe\x00"),
        "is not a Triton model configuration",
    ),
    "configuration with a control character": ("onnx", add("# \0 \n"), "it has the control character"),
    "configuration of a gigabyte": (
        "onnx",
        replaced(f"{STEP}/config.pbtxt", sparse(1 << 30)),
        "has 1073741824 bytes; at most 16777216 are read",
    ),
    "configuration of a long word": ("onnx", add("x" * 200_000), "is not a Triton model configuration"),
    "configuration of braces": ("onnx", add("input { " * 20_000), "is not a Triton model configuration"),
    "configuration that is a pipe": (
        "onnx",
        replaced(f"{STEP}/config.pbtxt", os.mkfifo),
        "is not a regular file; remove it",
    ),
    "configuration that is a directory": (
        "onnx",
        replaced(f"{STEP}/config.pbtxt", Path.mkdir),
        "is not a regular file",
    ),
    "configuration that is a device": (
        "onnx",
        replaced(f"{STEP}/config.pbtxt", lambda path: path.symlink_to("/dev/zero")),
        "is not a regular file",
    ),
    "configuration that links out": ("onnx", linked("tiny/config.pbtxt", "{outside}/{name}"), LINK),
    "configuration that links to itself": ("onnx", linked(f"{STEP}/config.pbtxt", "config.pbtxt"), "cannot be opened"),
    # Files and directories.
    "version that links out": ("onnx", linked(f"{STEP}/1", "{outside}"), LINK),
    "model that links out": ("onnx", linked(STEP, "{outside}"), LINK),
    "file that links out": ("onnx", linked(ONNX, "{outside}/{name}"), LINK),
    "file that is a secret": ("onnx", linked(ONNX, "/etc/passwd"), LINK),
    "file that links to itself": ("onnx", linked(ONNX, "model.onnx"), "cannot be read: Too many levels"),
    "file that is a device": ("onnx", linked(ONNX, "/dev/zero"), LINK),
    "file that is a pipe": ("onnx", replaced(ONNX, os.mkfifo), RUNS),
    "file that is a directory": ("onnx", replaced(ONNX, Path.mkdir), RUNS),
    "file that is not there": ("onnx", replaced(ONNX, lambda path: None), "is missing; the model needs it"),
    "file beside the file": ("onnx", put(f"{STEP}/1/weights.bin", b""), RUNS),
    "file that is hidden": ("onnx", put(f"{STEP}/.x", b""), RUNS),
    "file of an odd name": (
        "onnx",
        put(f"{STEP}/1/a\nb", b""),
        "holds 'a\\nb', which is not part of an export",
    ),
    "version that is no number": ("onnx", put(f"{STEP}/v2/model.onnx", b""), RUNS),
    "version of odd digits": ("onnx", put(f"{STEP}/\uff12/model.onnx", b""), RUNS),
    "version with a zero before it": ("onnx", put(f"{STEP}/02/model.onnx", b""), RUNS),
    "two versions": ("onnx", put(f"{STEP}/2/model.onnx", b""), "holds several version directories"),
    "repository in a model": ("onnx", put(f"{STEP}/tiny/config.pbtxt", b'name: "tiny"'), RUNS),
    "other configurations": ("onnx", put(f"{STEP}/configs/x.pbtxt", b'backend: "python"'), RUNS),
    # ONNX.
    "tensor of a file above": ("onnx", external("../../../secret"), "whose values lie in another file"),
    "tensor of an absolute file": ("onnx", external("/etc/passwd"), "whose values lie in another file"),
    "tensor of a file beside": (
        "onnx",
        also(put(f"{STEP}/1/weights", bytes(64)), external("weights")),
        "is not part of an export|whose values lie in another file",
    ),
    "tensor that lies elsewhere by a large number": (
        "onnx",
        graph(
            lambda m: m.graph.initializer[0].MergeFromString(b"\x70" + varint((1 << 32) + 1))  # 14: data_location
        ),
        "whose values lie in another file",
    ),
    "attribute of another file": (
        "onnx",
        graph(
            lambda m: m.graph.node.add(op_type="Constant", output=["odd"]).attribute.append(
                helper.make_attribute("value", foreign_tensor("/etc/passwd"))
            )
        ),
        "whose values lie in another file",
    ),
    "inner graph of another file": (
        "onnx",
        graph(
            lambda m: m.graph.node.add(op_type="If", output=["odd"]).attribute.append(
                helper.make_attribute("then_branch", onnx.GraphProto(initializer=[foreign_tensor("../x")]))
            )
        ),
        "whose values lie in another file",
    ),
    "graphs without end": (
        "onnx",
        graph(
            lambda m: m.graph.node.add(op_type="If", output=["odd"]).attribute.append(
                helper.make_attribute("then_branch", nested(20))
            )
        ),
        "nests its graphs deeper than 4",
    ),
    "operator of another domain": ("onnx", node(domain="mine"), "uses operators of the domain 'mine'"),
    "operator of ONNX Runtime's own": ("onnx", node(domain="com.microsoft"), "uses operators of the domain 'com.micro"),
    "set of operators of another domain": (
        "onnx",
        graph(lambda m: m.opset_import.add(domain="ai.onnx.ml", version=3)),
        "uses operators of the domain 'ai.onnx.ml'",
    ),
    "function of its own": ("onnx", graph(lambda m: m.functions.append(FUNCTION)), "has functions of its own"),
    "training": (
        "onnx",
        graph(lambda m: m.training_info.add(algorithm=onnx.GraphProto(name="x"))),
        "has training_info, which no export has",
    ),
    "options in the file": (
        "onnx",
        graph(lambda m: m.metadata_props.add(key="ort_config", value="{}")),
        "has the metadata",
    ),
    "sparse tensor": (
        "onnx",
        graph(lambda m: m.graph.sparse_initializer.add(dims=[1 << 40])),
        "has sparse initializers, which no export has",
    ),
    "tensor of terabytes": ("onnx", initializer(dims=[1 << 20, 1 << 20]), "declares the sizes|declares .* bytes for"),
    "tensor of 2^62": ("onnx", initializer(dims=[1 << 62]), "declares the sizes [4611686018427387904] for the tensor"),
    "tensor of negative size": ("onnx", initializer(dims=[-1]), "declares the sizes"),
    "tensor of few bytes": ("onnx", initializer(raw_data=b"\0"), "declares .* bytes for the tensor .* and holds 1"),
    "tensor of texts": ("onnx", initializer(data_type=8), "with the types [8], not with one supported type"),
    "tensor of numbers": ("onnx", initializer(float_data=[1.0]), "has a tensor whose values are not raw bytes"),
    "output of 2^62": (
        "onnx",
        graph(lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 1 << 62)),
        "declares the sizes",
    ),
    "no ONNX at all": ("onnx", put(ONNX, b"#!/bin/sh\ntouch canary\n"), "no valid ONNX field|no export has|cut off"),
    "file of nothing": ("onnx", put(ONNX, b""), "has 0 graphs, not one: it is cut off or not an ONNX file"),
    "file of zeros": ("onnx", replaced(ONNX, sparse((1 << 31) - 1)), "has no valid ONNX field at byte 0"),
    "file of four gigabytes": ("onnx", replaced(ONNX, sparse(4 << 30)), "has 4294967296 bytes; at most 2147483647"),
    "file cut in half": ("onnx", content(ONNX, lambda data: data[: len(data) // 2]), "is cut off"),
    "file cut by a byte": ("onnx", content(ONNX, lambda data: data[:-1]), "is cut off"),
    "file with a tail": (
        "onnx",
        content(ONNX, lambda data: data + b"\x7fELF"),
        "no export has|cut off|no valid ONNX field",
    ),
    "file of two graphs": ("onnx", content(ONNX, lambda data: data + b"\x3a\x00"), "has 2 graphs, not one"),
    "file of millions of fields": ("onnx", put(ONNX, b"\x08\x00" * (50 << 20)), "has more than 1000000 fields"),
    "number without end": ("onnx", put(ONNX, b"\x08" + b"\xff" * 100), "within a number"),
    "group": ("onnx", content(ONNX, lambda data: b"\x0b\x0c" + data), "has no valid ONNX field at byte"),
    "pickle in place of ONNX": (
        "onnx",
        put(ONNX, b"\x80\x02cos\nsystem\nX\x04\0\0\0trueR."),
        "no export has|cut off|no",
    ),
    # TorchScript.
    "script that writes a file": (
        "torchscript",
        script('torch.save(latent, "x")'),
        "uses 'torch.save', which no trace",
    ),
    "script that maps a file": ("torchscript", script('x = torch.from_file("x", True, 9)'), "uses 'torch.from_file'"),
    "script that writes by a method": ("torchscript", script('latent.save("x")'), "uses 'latent.save'"),
    "script that writes by a text's method": (
        "torchscript",
        script('x = "x".from_file(True)'),
        "code that no trace has, at",
    ),
    "script with a space in a name": ("torchscript", script('torch .save(latent, "x")'), "uses 'torch'"),
    "script that loads a library": (
        "torchscript",
        script("x = __torch__.torch.classes.aoti.AOTIModelRunnerCpu()"),
        "uses '__torch__.torch.classes.aoti.AOTIModelRunnerCpu'",
    ),
    "script of another library's operators": ("torchscript", script("x = ops.mine.run(latent)"), "uses 'ops.mine.run'"),
    "script that asks by name": ("torchscript", script('x = getattr(latent, "save")'), "uses 'getattr'"),
    "script that calls a variable": ("torchscript", script('x = (latent)("x")'), "a call of what comes before"),
    "script that forks": ("torchscript", script("x = fork(latent)"), "uses 'fork'"),
    "script with a loop": ("torchscript", script("while True: latent = latent"), "uses 'while'"),
    "script that imports": ("torchscript", script("import os"), "uses 'import'"),
    "script of parentheses": ("torchscript", script("x = " + "(" * 300_000), "nests deeper than 50"),
    "script of unsafe strides": (
        "torchscript",
        script("x = torch.as_strided(latent, [9], [9], 9)"),
        "'torch.as_strided'",
    ),
    "script with a second file": ("torchscript", entry("archive/code/__torch__/x.py", b"x = 1\n"), "constant or file"),
    "script of a gigabyte": ("torchscript", entry(CODE, b" " * (1 << 26)), "has no code/__torch__.py, or one that"),
    "script that is not text": ("torchscript", entry(CODE, b"\xff"), "has code that is not plain text"),
    "gadget in data.pkl": (
        "torchscript",
        entry(DATA, b"\x80\x02cos\nsystem\nX\x04\0\0\0trueR."),
        "its data.pkl differs",
    ),
    "gadget in constants.pkl": (
        "torchscript",
        entry(CONSTANTS, b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R."),
        "asks for os.system, which no checkpoint",
    ),
    "class of torch in constants.pkl": (
        "torchscript",
        entry(CONSTANTS, b"\x80\x02c__torch__.torch.classes.aoti AOTIModelRunnerCpu\nq\0)\x81."),
        "constants.pkl",
    ),
    "call in constants.pkl": (
        "torchscript",
        constants(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_qtensor\n"),
        "asks for torch._utils._rebuild_qtensor",
    ),
    "storage that is too small": (
        "torchscript",
        constants(b"K\x08K\x08t", b"K\xffK\xfft"),
        "has a tensor of 65025 elements",
    ),
    "storage of other bytes": ("torchscript", entry("archive/constants/0", b""), "has or lacks bytes of the constant"),
    "constants that laugh": (
        "torchscript",
        entry(CONSTANTS, b"\x80\x02((tq\0" + b"".join(b"(" + b"h\0" * 9 + b"tq\0" for _ in range(200)) + b"t."),
        "has constants that are not tensors",
    ),
    "constants that end early": (
        "torchscript",
        entry(CONSTANTS, b"\x80\x02("),
        "has a constants.pkl that no export has: it ends early",
    ),
    "archive that is compressed": (
        "torchscript",
        rewritten(SCRIPT, lambda entries: None, zipfile.ZIP_DEFLATED),
        "compressed or encrypted",
    ),
    "archive with a name twice": (
        "torchscript",
        content(SCRIPT, twice),
        "twice",
    ),
    "archive behind another file": (
        "torchscript",
        content(SCRIPT, lambda data: b"\x7fELF" + data),
        "is not a zip archive",
    ),
    "archive with a comment": ("torchscript", content(SCRIPT, lambda data: data + b"x"), "is cut off or damaged"),
    "archive that is cut off": ("torchscript", content(SCRIPT, lambda data: data[:-1]), "is cut off or damaged"),
    "archive with other headers": (
        "torchscript",
        content(SCRIPT, lambda data: data.replace(b"data.pkl", b"evil.pkl", 1)),
        "has two different headers for the entry",
    ),
    # Weights of labelmint's CPU kernel.
    "weights with an object": ("native", array("bias1", np.array([Gadget()], object)), "of a type that no export has"),
    "weights of terabytes": (
        "native",
        array(
            "bias1",
            np.zeros(1),
            TERABYTES,
        ),
        "declares 4398046511104 bytes for the array",
    ),
    "weights with a header of code": (
        "native",
        array("bias1", np.zeros(1), npy("__import__('os')\n")),
        "cannot be read",
    ),
    "weights of another name": ("native", array("../../x", np.zeros(1, np.float32)), "with the path '../../x.npy'"),
    "weights that are compressed": (
        "native",
        rewritten(NATIVE, lambda entries: entries.update({"bias1.npy": bytes(1 << 25)}), zipfile.ZIP_DEFLATED),
        "compressed or encrypted",
    ),
}
# Without the check, each of these writes its canary.
SINGING = ("library of the backend in the version", "backend python with a model.py")


def good(directory: Path) -> dict[str, Path]:
    """Return a valid repository of each format that the gateway's own Triton serves, with one model."""
    found = {}
    for file_format in FORMATS.keys() - {"gpu"}:
        found[file_format] = directory / f"good-{file_format}"
        export_repository(found[file_format], "tiny", tiny_weights(), file_format=file_format)
    return found


def build(name: str, sources: dict[str, Path], directory: Path, canary: Path) -> Path:
    """Build the repository of an attack, in a separate directory below `directory`."""
    file_format, change, _ = ATTACKS[name]
    repository = directory / re.sub(r"\W+", "-", name)
    shutil.copytree(sources[file_format], repository)
    change(repository, canary)
    return repository


def judged(name: str, repository: Path) -> str:
    """Return the gateway's refusal before it would start Triton, or "" if it accepts the repository."""
    try:
        OwnTriton(ServeSettings(model_repository=repository))
    except LabelmintError as error:
        return error.message
    return ""


def problems(name: str, said: str) -> str:
    """Return what is wrong with a refusal, or ""."""
    if not said:
        return "was taken"
    wanted = ATTACKS[name][2]
    if wanted not in said and not re.search(wanted, said):
        return f"was refused for something else than {wanted!r}: {said[:300]}"
    if "\n" in said or len(said) > 1000 or "root:" in said:
        return f"the refusal says too much: {said[:300]!r}"
    return ""


def serve(repository: Path) -> tuple[int, str]:
    """Run `labelmint serve` on it until it ends or is ready. Returns the exit code and the output."""
    command = [sys.executable, "-m", "labelmint.cli", "serve", "--model-repository", str(repository)]
    command += ["--http-port", "0", "--grpc-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said, deadline = "", time.monotonic() + SERVE_SECONDS
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if "ready after" in line or time.monotonic() > deadline:
                process.terminate()
        return process.wait(60), said


async def load_unchecked(repository: Path) -> None:
    """Let Triton load the repository without the check."""
    server = TritonServer(repository, ["tiny"])
    try:
        await server.start()
        await wait_until_ready(server)
    except LabelmintError:
        pass
    finally:
        await server.stop()


def run(directory: Path) -> Outcome:
    """Run all attacks, through the program itself."""
    outcome, sources = Outcome("model repositories", len(ATTACKS)), good(directory)
    canary = directory / "canary"
    for name in SINGING:
        asyncio.run(load_unchecked(build(name, sources, directory / "unchecked", canary)))
        if not canary.exists():
            outcome.found(f"{name}: the unchecked attack wrote no canary, so it proves nothing")
        canary.unlink(missing_ok=True)
    slowest, taken = 0.0, 0
    for name in ATTACKS:
        repository = build(name, sources, directory, canary)
        started = time.perf_counter()
        judged(name, repository)
        slowest = max(slowest, time.perf_counter() - started)
        code, said = serve(repository)
        lines = said.splitlines()
        if "ready after" in said:
            taken += 1
        elif code != 2 or len(lines) != 1:
            outcome.found(f"{name}: ended with {code}, {len(lines)} lines: {said[-500:]}")
        if problem := problems(name, said.strip()):
            outcome.found(f"{name}: {problem}")
        if canary.exists():
            outcome.found(f"{name}: code was run")
            canary.unlink()
        shutil.rmtree(repository)
    if slowest > MAX_SECONDS:
        outcome.found(f"a refusal took {slowest:.1f} s")
    outcome.note = f"{len(ATTACKS) - taken} refused, none took longer than {slowest:.2f} s"
    return outcome
