"""A stack machine that reads a pickle into inert values, without imports, calls or attribute access.

Rules of this file:
- The caller's table of stand-ins defines the global names that a pickle may use. Any other name is refused, and nothing
  is looked up elsewhere, so a file cannot run code. The module `pickle` is not imported.
- Only the opcodes that writers of checkpoints emit (protocols 2 to 5) are supported. Any other opcode is refused, and
  the error names it.
- Every limit is a constant with its reason. Work and memory stay proportional to the size of the file: byte strings are
  views into it, and every declared size is compared with the data before anything is allocated.

Source: the opcodes as `pickletools` describes them.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from labelmint.untrusted.content import Malformed, escaped

# The largest files of these kinds (a training state at 1024x1024 with both optimizers) need about 60,000.
MAX_OPCODES = 1_000_000
# Text is the networks' source (100 kB), names and options. As UCS-4, each byte could take four bytes of memory.
MAX_TEXT_BYTES = 16 << 20
# Nesting of modules; the networks are about 20 levels deep.
MAX_DEPTH = 100
# Number of values if a shared value counts each time it is reached. It bounds the cost of a walk over the result.
MAX_VALUES = 4_000_000
MAX_NAME = 200
# Integers below 2^60 hash to themselves, so a file cannot choose keys that all collide and make a dictionary slow.
MAX_KEY = 1 << 60


@dataclass(frozen=True)
class StandIn:
    """The replacement for a global name. `make` builds an inert value from the arguments; None: it cannot be called."""

    name: str
    make: Callable[[tuple[object, ...]], object] | None = None


def nothing_to_dict(arguments: tuple[object, ...]) -> dict[str, object]:
    if arguments:
        raise Malformed("has a dictionary made from arguments; checkpoints fill dictionaries item by item")
    return {}


class Inert:
    """A stand-in's value: it stores data from the file and has no behaviour."""

    def parts(self) -> list[object]:
        """The values that this value contains."""
        return []

    def build(self, state: object) -> None:
        """Store the state that a pickle sets on this value after it was made."""
        raise Malformed("has a pickle that sets the state of a value without state")


@dataclass
class Budget:
    """The rest of the work that one file may cause, including its nested pickles."""

    opcodes: int = MAX_OPCODES
    text_bytes: int = MAX_TEXT_BYTES
    nested_bytes: int = 0  # starts as the size of the file, which has each nested file once

    def spend_opcode(self) -> None:
        self.opcodes -= 1
        if self.opcodes < 0:
            raise Malformed(f"has more than {MAX_OPCODES} pickle opcodes")

    def spend_text(self, size: int) -> None:
        self.text_bytes -= size
        if self.text_bytes < 0:
            raise Malformed(f"has more than {MAX_TEXT_BYTES} bytes of text")

    def spend_nested(self, size: int) -> None:
        self.nested_bytes -= size
        if self.nested_bytes < 0:
            raise Malformed("reads its nested tensors more than once")


class PickleReader:
    """Reads consecutive pickles from `data`, beginning at `position`."""

    def __init__(
        self,
        data: memoryview,
        stand_ins: Mapping[str, StandIn],
        budget: Budget,
        *,
        persistent: Callable[[object], object] | None = None,
        position: int = 0,
        opcodes: Collection[str] | None = None,
    ) -> None:
        """`opcodes` are the names of those that are allowed, None for all that checkpoints have."""
        self.data = data
        self.position = position
        self._stand_ins = stand_ins
        self._budget = budget
        self._persistent = persistent
        self._actions = _ACTIONS
        if opcodes is not None:
            self._actions = {code: action for code, action in _ACTIONS.items() if _NAMES[code] in opcodes}

    def read(self) -> object:
        """Return the next pickle's value and move `position` to the end of the pickle. Raises Malformed."""
        self._stack: list[object] = []
        self._marked: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._frame_end: int | None = None
        while True:
            self._budget.spend_opcode()
            if self._frame_end is not None and self.position >= self._frame_end:
                if self.position > self._frame_end:
                    raise Malformed("has a pickle frame that ends within an opcode")
                self._frame_end = None
            code = self.take(1)[0]
            if code == _STOP:
                return self._stop()
            action = self._actions.get(code)
            if action is None:
                name = f"the pickle opcode {_NAMES[code]}" if code in _NAMES else f"the byte {code:#04x} as an opcode"
                raise Malformed(f"uses {name}, which no file of a known format contains")
            action(self)

    def take(self, size: int) -> memoryview:
        """Return the next `size` bytes as a view."""
        end = self.position + size
        if end > len(self.data):
            raise Malformed(f"ends early: {size} bytes are declared at {self.position}, it ends at {len(self.data)}")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def _stop(self) -> object:
        if self._frame_end is not None and self.position != self._frame_end:
            raise Malformed("has a pickle frame that does not end where its pickle ends")
        value = self._pop()
        if self._stack or self._marked:
            raise Malformed("has a pickle that leaves values behind")
        return value

    def _frame(self) -> None:
        if self._frame_end is not None:
            raise Malformed("has a pickle frame within a frame")
        size = self.unsigned(8)
        if size > len(self.data) - self.position:
            raise Malformed(f"ends early: a pickle frame of {size} bytes begins at {self.position}")
        self._frame_end = self.position + size

    def _protocol(self) -> None:
        version = self.unsigned(1)
        if not 2 <= version <= 5:
            raise Malformed(f"is a pickle of protocol {version}; checkpoints have 2 to 5")

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if not self._stack:
            raise Malformed("has a pickle that takes a value which is not there")
        return self._stack.pop()

    def _top(self) -> object:
        if not self._stack:
            raise Malformed("has a pickle that takes a value which is not there")
        return self._stack[-1]

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[object]:
        if not self._marked:
            raise Malformed("has a pickle that takes a mark which is not there")
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _long(self) -> None:
        self._push(int.from_bytes(self.take(self.unsigned(1)), "little", signed=True))

    def _text(self, size: int) -> None:
        self._budget.spend_text(size)
        self._push(_decoded(self.take(size)))

    def _put(self, index: int) -> None:
        if index >= MAX_OPCODES:
            raise Malformed(f"has a pickle with the memo index {index}")
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise Malformed("has a pickle that takes a memo which is not there")
        self._push(self._memo[index])

    def _tuple(self, size: int) -> None:
        self._push(tuple([self._pop() for _ in range(size)][::-1]))

    def _append(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not list:
            raise Malformed("has a pickle that appends to a value that is not a list")
        target.extend(items)

    def _set_items(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise Malformed("has a pickle that sets items of a value that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _add_items(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not set:
            raise Malformed("has a pickle that adds to a value that is not a set")
        target.update(_key(item) for item in items)

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._find(module, name)

    def _line(self) -> str:
        excerpt = bytes(self.data[self.position : self.position + MAX_NAME])
        size = excerpt.find(b"\n")
        if size < 0:
            raise Malformed("has a pickle with an endless name")
        return _decoded(self.take(size + 1)[:-1])

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Malformed("has a pickle with a global name that is not text")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self._stand_ins:
            raise Malformed(f"asks for {escaped(full)}, which no checkpoint of a known format needs; no code was run")
        self._push(self._stand_ins[full])

    def _make(self) -> None:
        arguments, stand_in = self._pop(), self._pop()
        if not isinstance(stand_in, StandIn) or not isinstance(arguments, tuple):
            raise Malformed("has a pickle that calls a value that is not a known name")
        if stand_in.make is None:
            raise Malformed(f"has a pickle that calls {stand_in.name}")
        self._push(stand_in.make(arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Inert):
            target.build(state)
        elif not (type(target) is dict and isinstance(state, dict)):  # a dictionary's attributes are ignored
            raise Malformed("has a pickle that sets the state of a value without state")

    def _outside_buffer(self) -> None:
        raise Malformed("keeps its arrays outside of the pickle (out-of-band buffers); save it without buffer_callback")

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise Malformed("has a pickle with a persistent id outside of a torch file")
        self._push(self._persistent(self._pop()))


def check_tree(value: object) -> None:
    """Raise Malformed if a value contains itself, is nested too deeply, or is too large to be walked.

    Every value is visited once. Its size counts every value reachable from it, once for each path to it.
    """
    measured: dict[int, tuple[int, int]] = {}  # id to (size, depth)
    open_ids: set[int] = set()
    path: list[tuple[object, list[object]]] = []

    def enter(entered: object) -> None:
        if id(entered) in open_ids:
            raise Malformed("has a value that contains itself")
        if id(entered) not in measured:
            parts = [part for part in _parts(entered) if _is_container(part)]
            open_ids.add(id(entered))
            path.append((entered, parts))
            if len(path) > MAX_DEPTH:
                raise Malformed(f"is nested more than {MAX_DEPTH} levels deep")

    enter(value)
    while path:
        current, waiting = path[-1]
        if waiting:
            enter(waiting.pop())
            continue
        path.pop()
        open_ids.discard(id(current))
        parts = _parts(current)
        sizes = [measured.get(id(part), (1, 0)) if _is_container(part) else (1, 0) for part in parts]
        size = 1 + sum(size for size, _ in sizes)
        depth = 1 + max((depth for _, depth in sizes), default=0)
        if size > MAX_VALUES:
            raise Malformed(f"multiplies to more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise Malformed(f"is nested more than {MAX_DEPTH} levels deep")
        measured[id(current)] = (size, depth)


def _is_container(value: object) -> bool:
    return isinstance(value, (list, tuple, dict, Inert))


def _parts(value: object) -> list[object]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    return value.parts() if isinstance(value, Inert) else []


def _decoded(data: memoryview) -> str:
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("has text that is not UTF-8") from None


def _key(value: object) -> str | int:
    if type(value) is str or (type(value) is int and abs(value) < MAX_KEY):
        return value
    raise Malformed(f"has a key of type {type(value).__name__}; checkpoints use text and small integers")


_Action = Callable[[PickleReader], None]


def _number(format_: str) -> _Action:
    size = struct.calcsize(format_)
    return lambda reader: reader._push(struct.unpack(format_, reader.take(size))[0])


def _constant(value: object) -> _Action:
    return lambda reader: reader._push(value)


# The actions by the opcode names of `pickletools`; `reader` is the stack machine.
_BY_NAME: dict[str, _Action] = {
    "PROTO": PickleReader._protocol,
    "FRAME": PickleReader._frame,
    "MARK": PickleReader._mark,
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "BININT": _number("<i"),
    "BININT1": _number("<B"),
    "BININT2": _number("<H"),
    "LONG1": PickleReader._long,
    "BINFLOAT": _number(">d"),
    "SHORT_BINUNICODE": lambda reader: reader._text(reader.unsigned(1)),
    "BINUNICODE": lambda reader: reader._text(reader.unsigned(4)),
    "BINUNICODE8": lambda reader: reader._text(reader.unsigned(8)),
    "SHORT_BINBYTES": lambda reader: reader._push(reader.take(reader.unsigned(1))),
    "BINBYTES": lambda reader: reader._push(reader.take(reader.unsigned(4))),
    "BINBYTES8": lambda reader: reader._push(reader.take(reader.unsigned(8))),
    "BYTEARRAY8": lambda reader: reader._push(reader.take(reader.unsigned(8))),
    "NEXT_BUFFER": PickleReader._outside_buffer,
    "READONLY_BUFFER": PickleReader._outside_buffer,
    "EMPTY_LIST": lambda reader: reader._push([]),
    "EMPTY_DICT": lambda reader: reader._push({}),
    "EMPTY_SET": lambda reader: reader._push(set()),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE": lambda reader: reader._push(tuple(reader._since_mark())),
    "TUPLE1": lambda reader: reader._tuple(1),
    "TUPLE2": lambda reader: reader._tuple(2),
    "TUPLE3": lambda reader: reader._tuple(3),
    "APPEND": lambda reader: reader._append([reader._pop()]),
    "APPENDS": lambda reader: reader._append(reader._since_mark()),
    "SETITEM": lambda reader: reader._set_items([reader._pop(), reader._pop()][::-1]),
    "SETITEMS": lambda reader: reader._set_items(reader._since_mark()),
    "ADDITEMS": lambda reader: reader._add_items(reader._since_mark()),
    "BINPUT": lambda reader: reader._put(reader.unsigned(1)),
    "LONG_BINPUT": lambda reader: reader._put(reader.unsigned(4)),
    "MEMOIZE": lambda reader: reader._put(len(reader._memo)),
    "BINGET": lambda reader: reader._get(reader.unsigned(1)),
    "LONG_BINGET": lambda reader: reader._get(reader.unsigned(4)),
    "GLOBAL": PickleReader._global,
    "STACK_GLOBAL": PickleReader._stack_global,
    "REDUCE": PickleReader._make,
    "NEWOBJ": PickleReader._make,
    "BUILD": PickleReader._build,
    "BINPERSID": PickleReader._persistent_id,
}
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_ACTIONS = {code: _BY_NAME[name] for code, name in _NAMES.items() if name in _BY_NAME}
_STOP = ord(".")
