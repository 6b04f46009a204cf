"""Checks that an ONNX file is complete, self-contained and uses only standard operators, without the onnx package.

Rules of this file:
- The check walks protobuf's wire format field by field and allows only fields that `labelmint export` writes. Unknown
  fields are refused, not skipped, because another reader might know them and act on them.
- Every length must fit into the message around it, and every tensor's declared size must match its bytes. A message
  that protobuf would merge from several parts may appear only once.
- Weights are skipped, not read, and the number of fields is limited. The time is therefore bounded for any file.
  `read_onnx` returns where the weights of the graph lie, and the file's metadata, which ONNX Runtime ignores.

Source: onnx.proto (IR version 8) and protobuf's description of its encoding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from labelmint.untrusted.content import Malformed, RegularFile, quoted

MAX_ONNX_BYTES = (2 << 30) - 1  # protobuf's limit
# An interpreter of 512 strips, the most that are exported, has 750,000 fields: 3 seconds.
MAX_FIELDS = 1_000_000
DOMAINS = (b"", b"ai.onnx")
# What a file may say of itself. ONNX Runtime ignores these keys; under others it can find options for itself.
METADATA = tuple(f"labelmint.{key}" for key in ("step", "task", "score_kind", "heads", "classes"))
_MAX_DEPTH = 4  # of graphs within the attributes of nodes
_MAX_NAME_BYTES = 1 << 16  # also the limit of an attribute's text
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 1 << 40
# TensorProto.DataType: bytes per element, for the types whose elements are whole bytes.
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}

_SMALL_BYTES = 4096  # messages up to this size are read at once
_HEAD_BYTES = 15  # a tag and the longest number
# Fields that the format allows and this check refuses, with their names for the error.
_NOT_IN_MODEL = {20: "training_info", 25: "functions of its own"}
_NOT_IN_GRAPH = {13: "value_info", 14: "quantization_annotation", 15: "sparse initializers", 16: "metadata_props"}
_NOT_IN_NODE = {8: "overload", 9: "metadata_props"}
_NOT_IN_ATTRIBUTE = {
    **{10: "lists of tensors", 11: "lists of graphs", 21: "a reference to an attribute of a function"},
    **dict.fromkeys((22, 23), "sparse tensors"),
}
_NOT_IN_TENSOR = {
    **dict.fromkeys((4, 5, 6, 7, 10, 11), "a tensor whose values are not raw bytes"),
    **dict.fromkeys((13, 14), "a tensor whose values lie in another file"),
    **{3: "a tensor in parts", 16: "metadata_props"},
}
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class OnnxTensor(NamedTuple):
    """A tensor of the graph: TensorProto.DataType, sizes, and where its bytes begin in the file."""

    data_type: int
    dims: tuple[int, ...]
    start: int


@dataclasses.dataclass
class OnnxFile:
    """What a file says of itself (`metadata_props`), and its initializers. A name that occurs twice is in `twice`."""

    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    initializers: dict[str, OnnxTensor] = dataclasses.field(default_factory=dict)
    twice: set[str] = dataclasses.field(default_factory=set)


class _Field(NamedTuple):
    """A field: a number (`value`), or the bytes from `start` to `end`."""

    number: int
    kind: int
    value: int
    start: int
    end: int


_Take: TypeAlias = "Callable[[_Field], object]"


def check_onnx(file: RegularFile) -> None:
    """Raises Malformed unless ONNX Runtime can load the file without reading any other file."""
    read_onnx(file)


def read_onnx(file: RegularFile) -> OnnxFile:
    """Check a file as `check_onnx` does, and return its metadata and where its weights lie. Raises Malformed."""
    walk = _Walk(file)
    walk.model()
    return walk.found


class _Walk:
    def __init__(self, file: RegularFile) -> None:
        self.found = OnnxFile()
        self._file = file
        self._left = MAX_FIELDS

    def model(self) -> None:
        graphs: list[_Field] = []
        domains: list[bytes] = []
        known: Mapping[int, tuple[int, _Take]] = {
            1: (_VARINT, _nothing),  # ir_version
            2: (_LENGTH, _nothing),  # producer_name
            3: (_LENGTH, _nothing),  # producer_version
            6: (_LENGTH, _nothing),  # doc_string
            7: (_LENGTH, graphs.append),
            8: (_LENGTH, lambda field: domains.append(self._operator_set(field))),
            14: (_LENGTH, self._metadata),
        }
        self._message("the model", 0, self._file.size, known=known, others=_NOT_IN_MODEL)
        if len(graphs) != 1:
            raise Malformed(f"has {len(graphs)} graphs, not one: it is cut off or not an ONNX file")
        if not domains:
            raise Malformed("names no operator set: it is cut off or not an ONNX file")
        self._graph(graphs[0], 0)

    def _metadata(self, outer: _Field) -> None:
        texts = {1: "", 2: ""}  # key, value

        def take(field: _Field) -> None:
            texts[field.number] = self._text(field).decode("utf-8", "replace")

        self._message("metadata", outer.start, outer.end, known={1: (_LENGTH, take), 2: (_LENGTH, take)})
        if texts[1] not in METADATA:
            raise Malformed(f"has the metadata {quoted(texts[1])}, which no export has")
        if texts[1] in self.found.metadata:
            self.found.twice.add(texts[1])
        self.found.metadata[texts[1]] = texts[2]

    def _operator_set(self, outer: _Field) -> bytes:
        domain = b""

        def take(field: _Field) -> None:
            nonlocal domain
            domain = self._domain(field)

        self._message("an operator set", outer.start, outer.end, known={1: (_LENGTH, take), 2: (_VARINT, _nothing)})
        return domain

    def _domain(self, field: _Field) -> bytes:
        domain = self._text(field)
        if domain not in DOMAINS:
            raise Malformed(f"uses operators of the domain {quoted(domain)}, which are not standard operators")
        return domain

    def _graph(self, outer: _Field, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise Malformed(f"nests its graphs deeper than {_MAX_DEPTH}")
        known: Mapping[int, tuple[int, _Take]] = {
            1: (_LENGTH, lambda field: self._node(field, depth)),
            2: (_LENGTH, _nothing),  # name
            5: (_LENGTH, self._tensor if depth else self._initializer),
            10: (_LENGTH, _nothing),  # doc_string
            11: (_LENGTH, self._value),
            12: (_LENGTH, self._value),
        }
        self._message("the graph", outer.start, outer.end, known=known, others=_NOT_IN_GRAPH)

    def _node(self, outer: _Field, depth: int) -> None:
        text = (_LENGTH, _nothing)
        known: Mapping[int, tuple[int, _Take]] = {
            **{1: text, 2: text, 3: text, 4: text, 6: text},  # input, output, name, op_type, doc_string
            5: (_LENGTH, lambda field: self._attribute(field, depth)),
            7: (_LENGTH, self._domain),
        }
        self._message("a node", outer.start, outer.end, known=known, others=_NOT_IN_NODE)

    def _attribute(self, outer: _Field, depth: int) -> None:
        tensors: list[_Field] = []
        graphs: list[_Field] = []
        known: Mapping[int, tuple[int, _Take]] = {
            1: (_LENGTH, _nothing),  # name
            2: (_FIXED32, _nothing),
            3: (_VARINT, _nothing),
            4: (_LENGTH, self._text),
            5: (_LENGTH, tensors.append),
            6: (_LENGTH, graphs.append),
            7: (_FIXED32, _nothing),
            8: (_VARINT, _nothing),
            9: (_LENGTH, self._text),
            13: (_LENGTH, _nothing),  # doc_string
            20: (_VARINT, _nothing),  # type
        }
        self._message("an attribute", outer.start, outer.end, known=known, others=_NOT_IN_ATTRIBUTE, packed=(7, 8))
        if len(tensors) > 1 or len(graphs) > 1:
            raise Malformed("has an attribute with several values")
        for field in tensors:
            self._tensor(field)
        for field in graphs:
            self._graph(field, depth + 1)

    def _initializer(self, outer: _Field) -> None:
        name, tensor = self._tensor(outer)
        if name in self.found.initializers:
            self.found.twice.add(name)
        self.found.initializers[name] = tensor

    def _tensor(self, outer: _Field) -> tuple[str, OnnxTensor]:
        dims: list[int] = []
        types: list[int] = []
        raw: list[_Field] = []
        name = b""

        def take_name(field: _Field) -> None:
            nonlocal name
            name = self._text(field)

        known: Mapping[int, tuple[int, _Take]] = {
            1: (_VARINT, lambda field: dims.append(field.value)),
            2: (_VARINT, lambda field: types.append(field.value)),
            8: (_LENGTH, take_name),
            9: (_LENGTH, raw.append),
            12: (_LENGTH, _nothing),  # doc_string
        }
        self._message("a tensor", outer.start, outer.end, known=known, others=_NOT_IN_TENSOR, packed=(1,))
        if len(types) != 1 or types[0] not in _ITEM_BYTES:
            raise Malformed(f"has the tensor {quoted(name)} with the types {types[:3]}, not with one supported type")
        declared = _ITEM_BYTES[types[0]] * _elements(name, dims)
        held = sum(field.end - field.start for field in raw)
        if len(raw) > 1 or held != declared:
            raise Malformed(f"declares {declared} bytes for the tensor {quoted(name)} and holds {held}")
        start = raw[0].start if raw else outer.end
        return name.decode("utf-8", "replace"), OnnxTensor(types[0], tuple(dims), start)

    def _value(self, outer: _Field) -> None:
        """Check an input or output of the graph: it must be a tensor whose sizes are in range."""
        dims: list[int] = []

        def dimension(field: _Field) -> None:
            known: Mapping[int, tuple[int, _Take]] = {
                1: (_VARINT, lambda field: dims.append(field.value)),
                2: (_LENGTH, _nothing),
            }
            self._message("a dimension", field.start, field.end, known=known)

        def within(number: int, take: _Take, *plain: int) -> _Take:
            known: Mapping[int, tuple[int, _Take]] = {
                number: (_LENGTH, take),
                **dict.fromkeys(plain, (_VARINT, _nothing)),
            }
            return lambda field: self._message("a type", field.start, field.end, known=known)

        tensor = within(2, within(1, dimension), 1)
        known: Mapping[int, tuple[int, _Take]] = {
            1: (_LENGTH, _nothing),  # name
            2: (_LENGTH, within(1, tensor)),
            3: (_LENGTH, _nothing),  # doc_string
        }
        self._message("an input or output", outer.start, outer.end, known=known, others={4: "metadata_props"})
        _elements(b"", dims)

    def _text(self, field: _Field) -> bytes:
        if field.end - field.start > _MAX_NAME_BYTES:
            raise Malformed(f"has a name or text of {field.end - field.start} bytes")
        return self._file.read(field.start, field.end - field.start)

    def _message(
        self,
        what: str,
        start: int,
        end: int,
        *,
        known: Mapping[int, tuple[int, _Take]],
        others: Mapping[int, str] | None = None,
        packed: tuple[int, ...] = (),
    ) -> None:
        """Walk a message. `known` maps each allowed field to its kind and handler; `others` names some refused fields.

        The numbers of a `packed` field may also come as one block.
        """
        for field in self._fields(start, end):
            if others and field.number in others:
                raise Malformed(f"has {others[field.number]}, which no export has")
            kind, take = known.get(field.number, (None, _nothing))
            if kind == field.kind:
                take(field)
            elif field.kind == _LENGTH and field.number in packed:
                for number in self._numbers(field, kind):
                    take(_Field(field.number, _VARINT, number, 0, 0))
            else:
                raise Malformed(f"has a field {field.number} of kind {field.kind} in {what}, which no export has")

    def _fields(self, start: int, end: int) -> Iterator[_Field]:
        read, first = self._file.read, start
        small = read(start, end - start) if end - start <= _SMALL_BYTES else b""
        while start < end:
            self._count()
            at = start - first
            head = small[at : at + _HEAD_BYTES] if small else read(start, min(_HEAD_BYTES, end - start))
            if len(head) > 1 and head[0] < 0x80 and head[1] < 0x80:  # the usual case
                tag, value, used = head[0], head[1], 2
            else:
                tag, used = _varint(head, 0, 5)
                value = -1
            number, kind = tag >> 3, tag & 7
            if kind in (_VARINT, _LENGTH):
                if value < 0:
                    value, used = _varint(head, used, 10 if kind == _VARINT else 5)
                length = value if kind == _LENGTH else 0
            else:
                length = {_FIXED32: 4, _FIXED64: 8}.get(kind, -1)
                used = 1 if value >= 0 else used
            if number == 0 or length < 0:
                raise Malformed(f"has no valid ONNX field at byte {start}")
            start += used
            if start + length > end:
                raise Malformed(
                    f"is cut off or damaged: a field needs {length} bytes at {start}, but only {end - start} are there"
                )
            yield _Field(number, kind, value, start, start + length)
            start += length

    def _numbers(self, field: _Field, kind: int | None) -> Iterator[int]:
        """Yield the numbers of a packed list. For floats, only check the length of the list."""
        if kind == _FIXED32:
            if (field.end - field.start) % 4:
                raise Malformed("has a list of floats whose length is not a multiple of 4 bytes")
            return
        start = field.start
        while start < field.end:
            self._count()
            value, used = _varint(self._file.read(start, min(10, field.end - start)), 0, 10)
            start += used
            yield value

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Malformed(f"has more than {MAX_FIELDS} fields")


def _nothing(_: _Field) -> None:
    """The handler of fields that may have any content."""


def _varint(data: bytes, start: int, longest: int) -> tuple[int, int]:
    """Return a number of at most `longest` bytes, and the position after it."""
    value = 0
    for index, byte in enumerate(data[start : start + longest]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, start + index + 1
    raise Malformed("is cut off or damaged within a number")


def _elements(name: bytes, dims: list[int]) -> int:
    """Return a tensor's number of elements. Raises Malformed for a size too large or negative (here above 2^63)."""
    count = math.prod(dims) if len(dims) <= _MAX_DIMENSIONS else _MAX_ELEMENTS + 1
    if max(count, *dims, 0) > _MAX_ELEMENTS:
        raise Malformed(f"declares the sizes {dims[:_MAX_DIMENSIONS]} for the tensor {quoted(name)}")
    return count
