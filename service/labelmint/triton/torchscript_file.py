"""Checks that a TorchScript archive is a traced graph as labelmint exports it: tensors and operators that only compute.

Rules of this file:
- TorchScript is a language. torch runs its code, not Python, but the language has operators that write and map files
  (`save`, `from_file`), classes that load libraries, and operators that do not check their arguments. So each token of
  the code must be known: only sequences of assignments that use the operators of OPERATORS are allowed.
- torch reads pickles with its own unpickler, which knows torch's classes and trusts declared sizes. So each instruction
  and each name of a pickle must be known, and each tensor must lie within the bytes of its storage.
- Only what `labelmint export` writes is accepted. Scripted modules are refused.
"""

from __future__ import annotations

import re

from labelmint.triton.stored_zip import entries_of
from labelmint.untrusted.content import Malformed, RegularFile, quoted
from labelmint.untrusted.pickle_machine import Budget, PickleReader, StandIn, nothing_to_dict
from labelmint.untrusted.torch_tensors import REBUILD_TENSOR, STORAGES, Storage, Tensor, rebuild_tensor, storages_by

# torch checks the arguments of these operators, and they only compute.
OPERATORS = frozenset(
    """
    _convolution abs adaptive_avg_pool2d add addmm amax amin arange argmax argmin avg_pool2d baddbmm batch_norm bmm cat
    ceil chunk clamp clamp_max clamp_min clone constant_pad_nd contiguous conv1d conv2d conv_transpose2d cos cumsum
    detach div dropout einsum elu eq erf exp expand expand_as flatten flip floor floor_divide full full_like gather ge
    gelu group_norm gt hardtanh index_select instance_norm interpolate layer_norm le leaky_relu lerp linear log log2
    log_softmax logical_and logical_not logical_or logsumexp lt masked_fill matmul max max_pool2d mean min mm movedim
    mul ne neg norm ones ones_like pad permute pixel_shuffle pow prelu prod reciprocal reflection_pad2d relu remainder
    repeat replication_pad2d reshape round rsqrt rsub scalar_tensor select sigmoid sign silu sin size slice softmax
    softplus split split_with_sizes sqrt square squeeze stack std sub sum t tanh tensor_split tile to topk transpose
    tril triu unbind unflatten unsqueeze upsample_bilinear2d upsample_nearest2d var view view_as where zeros zeros_like
    """.split()  # noqa: SIM905
)
_CALLABLE = frozenset(("annotate", "float", "forward", "int", "return"))
# Names with a special meaning in the language or in torch's parser; none of them is a variable.
_RESERVED = frozenset(
    """and as assert async await break class continue del elif else except finally for from global if import in is
    lambda nonlocal not or pass raise try while with yield CONSTANTS __torch__ ops torch getattr setattr hasattr fork
    awaitable print uninitialized unchecked_cast rpc_async rpc_sync rpc_remote""".split()  # noqa: SIM905
)
_TOKEN = re.compile(
    r"(?P<space>[ \n]+)|(?P<number>-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)|(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)"
    r'|(?P<text>"[a-z_]*")|(?P<mark>->|[()\[\],:=])',
    re.ASCII,
)
_HEAD = "class PlaceholderModule(Module):\n"
_MAX_NESTING = 50
_MODULE = "__torch__.PlaceholderModule"
# The module around a traced function, with one attribute, `training`.
_MODULE_PICKLE = b"\x80\x02c__torch__\nPlaceholderModule\nq\x00)\x81}(X\x08\x00\x00\x00trainingq\x01\x88ubq\x02."
# Ten times the size for a generator at 1024x1024. Both files are checked token by token.
_MAX_CODE_BYTES = 1 << 20
_MAX_PICKLE_BYTES = 1 << 18
# torch reads pickles with its own machine, which trusts declared sizes. So no other opcode or name may reach it.
_OPCODES = frozenset(
    """PROTO BININT BININT1 BININT2 LONG1 BINUNICODE NEWFALSE GLOBAL EMPTY_TUPLE MARK TUPLE BINPUT LONG_BINPUT BINGET
    LONG_BINGET BINPERSID REDUCE""".split()  # noqa: SIM905
)
_GLOBALS = {
    "collections.OrderedDict": StandIn("collections.OrderedDict", nothing_to_dict),
    REBUILD_TENSOR: StandIn(REBUILD_TENSOR, rebuild_tensor),
    **STORAGES,
}


def check_torchscript(file: RegularFile) -> None:
    """Raises Malformed unless torch can load and run the file and it only computes."""
    entries = entries_of(file)
    parts: dict[str, bytes] = {}
    for name, limit in (
        *(("data.pkl", len(_MODULE_PICKLE)), ("constants.pkl", _MAX_PICKLE_BYTES)),
        *(("code/__torch__.py", _MAX_CODE_BYTES), ("version", 4), ("byteorder", 8)),
    ):
        start, length = entries.pop(f"archive/{name}", (0, limit + 1))
        if length > limit:
            raise Malformed(f"has no {name}, or one that no export has")
        parts[name] = file.read(start, length)
    if parts["data.pkl"] != _MODULE_PICKLE:
        raise Malformed("is not a traced function as labelmint exports it: its data.pkl differs")
    if not re.fullmatch(rb"\d{1,3}\n", parts["version"]) or parts["byteorder"] != b"little":
        raise Malformed("has a version or a byte order that no export has")
    check_code(parts["code/__torch__.py"])
    used = _storages(parts["constants.pkl"])
    found = {name.removeprefix("archive/constants/"): length for name, (_, length) in entries.items()}
    if used != found:
        odd = min(used.items() ^ found.items())[0]
        raise Malformed(f"has or lacks bytes of the constant or file {quoted(odd)}")


def check_code(code: bytes) -> None:
    """Raises Malformed at the first token that no traced function has."""
    try:
        text = code.decode("ascii")
    except UnicodeDecodeError:
        raise Malformed("has code that is not plain text") from None
    if not text.startswith(_HEAD):
        raise Malformed("has code that is not a traced function")
    position, nesting, before, kind = len(_HEAD), 0, "", ""
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Malformed(f"has code that no trace has, at {quoted(text[position : position + 30])}")
        token = match[0]
        position = match.end()
        if match.lastgroup == "space":
            continue
        if match.lastgroup == "name":
            _check_name(token)
        elif token == "(":
            _check_call(before, kind)
        elif kind == match.lastgroup == "text":
            raise Malformed("has code that no trace has: strings with nothing between them")
        nesting += (token in ("(", "[")) - (token in (")", "]"))
        if nesting > _MAX_NESTING:
            raise Malformed(f"has code that nests deeper than {_MAX_NESTING}")
        before, kind = token, match.lastgroup or ""


def _check_name(name: str) -> None:
    root, _, rest = name.partition(".")
    known = {
        "torch": rest in OPERATORS,
        "ops": rest == "prim.NumToTensor",
        "CONSTANTS": re.fullmatch(r"c\d+", rest, re.ASCII) is not None,
        "__torch__": name == _MODULE,
    }
    if not (known.get(root, False) if rest else root not in _RESERVED):
        raise Malformed(f"uses {quoted(name)}, which no trace may use; if the generator needs it, export it to ONNX")


def _check_call(before: str, kind: str) -> None:
    """Check the token before an opening parenthesis: an allowed operator, or a token that cannot be called."""
    if before in (")", "]") or kind in ("text", "number"):
        raise Malformed(f"has code that no trace has: a call of what comes before {quoted(before)}")
    if kind == "name" and before not in _CALLABLE and not before.startswith(("torch.", "ops.")):
        raise Malformed(
            f"calls {quoted(before)}, which no trace may call; if the generator needs it, export it to ONNX"
        )


def _storages(pickle: bytes) -> dict[str, int]:
    """The storages that the tensors of constants.pkl need: the number of bytes by key."""
    sizes: dict[str, int] = {}

    def found(key: str, storage: Storage) -> Storage:
        sizes[key] = storage.size_bytes
        return storages.setdefault(key, storage)

    def persistent(identity: object) -> object:
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[3] != "cpu":
            raise Malformed("has a storage of a kind or device that no export has")
        return storage_of(identity)

    storages: dict[str, Storage] = {}
    storage_of = storages_by(found)
    reader = PickleReader(memoryview(pickle), _GLOBALS, Budget(), persistent=persistent, opcodes=_OPCODES)
    try:
        value = reader.read()
    except Malformed as problem:
        raise Malformed(f"has a constants.pkl that no export has: it {problem}") from None
    if reader.position != len(pickle):
        raise Malformed("has a constants.pkl with bytes after its pickle")
    if not isinstance(value, tuple) or not all(isinstance(item, Tensor) for item in value):
        raise Malformed("has constants that are not tensors")
    return sizes
