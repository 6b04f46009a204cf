"""Files that mean harm, or that harm has come to: name to bytes and a part of the message that refuses them.

Each calls `touch` on a canary, or asks for memory, time or another file; a reader that falls for one shows it.
"""

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

LEGACY_HEADER = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    + pickle.dumps(1001, 2)
    + pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
)
COMMAND = "touch canary"


def enc(value: object) -> bytes:
    """The opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def plain(opcodes: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + opcodes + b"."


def call(module: str, name: str, *arguments: object) -> bytes:
    """GLOBAL, arguments, REDUCE."""
    return f"c{module}\n{name}\n(".encode() + b"".join(enc(value) for value in arguments) + b"tR"


def stack_call(module: str, name: str, *arguments: object) -> bytes:
    return enc(module) + enc(name) + b"\x93(" + b"".join(enc(value) for value in arguments) + b"tR"


def storage(size: int = 4, key: str = "0", kind: str = "FloatStorage", tail: bytes = b"") -> bytes:
    return b"(" + enc("storage") + f"ctorch\n{kind}\n".encode() + enc(key) + enc("cpu") + enc(size) + tail + b"tQ"


def tensor(
    shape: object = (4,), stride: object = (1,), offset: object = 0, where: bytes | None = None, more: bytes = b""
) -> bytes:
    arguments = (
        (where or storage()) + enc(offset) + enc(shape) + enc(stride) + b"\x89" + call("collections", "OrderedDict")
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + more + b"tR"


def state(opcodes: bytes) -> bytes:
    """{"g_ema": {"input.input": opcodes}}, as a pickle."""
    return plain(b"}" + enc("g_ema") + b"}" + enc("input.input") + opcodes + b"ss", 2)


def zipped(
    data_pkl: bytes, *more: tuple[str, bytes], root: str = "archive", compress: int = zipfile.ZIP_STORED, **patch: Any
) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compress) as archive:
        archive.writestr(f"{root}/data.pkl", data_pkl)
        archive.writestr(f"{root}/byteorder", patch.get("byteorder", b"little"))
        for name, content in more or ((f"{root}/data/0", bytes(16)),):
            archive.writestr(name, content)
    return stream.getvalue()


def legacy(data_pkl: bytes, keys: object = ("0",), storages: bytes | None = None) -> bytes:
    floats = struct.pack("<q4f", 4, 1, 2, 3, 4)
    listed = list(keys) if isinstance(keys, tuple) else keys
    return LEGACY_HEADER + data_pkl + pickle.dumps(listed, 2) + (floats if storages is None else storages)


def blob(value: bytes) -> bytes:
    """A nested legacy file as BINBYTES8."""
    return b"\x8e" + struct.pack("<Q", len(value)) + value


def directory_patched(change: Callable[[bytearray, int], None]) -> bytes:
    """A good zip file whose directory (found at the given position) is changed afterwards."""
    data = bytearray(zipped(state(tensor())))
    change(data, data.index(b"PK\x01\x02"))
    return bytes(data)


def _set(data: bytearray, position: int, format_: str, value: int) -> None:
    struct.pack_into(format_, data, position, value)


def zip64(size: int, offset: int) -> bytes:
    """A zip file whose 64-bit end record declares a directory of `size` at `offset`."""
    good = zipped(state(tensor()))
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, size, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(good) - 22, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return good[:-22] + record + locator + end


def tar(content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("network.pkl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


NAMESPACE = b"cargparse\nNamespace\n)\x81"
NDARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + enc((0,)) + b"C\x01btR"
MILLION = 1_000_000
TERABYTE = 1 << 40

CASES: dict[str, tuple[bytes, str]] = {
    # Code to run.
    "os.system by GLOBAL": (plain(call("os", "system", COMMAND)), "asks for os.system"),
    "posix.system by GLOBAL": (plain(call("posix", "system", COMMAND), 2), "asks for posix.system"),
    "eval": (plain(call("builtins", "eval", "open('canary', 'w')")), "asks for builtins.eval"),
    "exec of Python 2": (plain(call("__builtin__", "exec", "open('canary', 'w')"), 2), "asks for __builtin__.exec"),
    "getattr": (plain(call("builtins", "getattr", "x", "__class__")), "asks for builtins.getattr"),
    "attrgetter by STACK_GLOBAL": (plain(stack_call("operator", "attrgetter", "a.b")), "asks for operator.attrgetter"),
    "partial by STACK_GLOBAL": (plain(stack_call("functools", "partial", 1)), "asks for functools.partial"),
    "dotted STACK_GLOBAL": (plain(stack_call("collections", "OrderedDict.fromkeys", [1])), "OrderedDict.fromkeys"),
    "name of an allowed module": (plain(call("torch.storage", "load", "x")), "asks for torch.storage.load"),
    "torch.load": (plain(call("torch", "load", "canary")), "asks for torch.load"),
    "numpy.load": (plain(call("numpy", "load", "canary")), "asks for numpy.load"),
    "copyreg": (plain(call("copyreg", "_reconstructor", 1, 2, 3)), "asks for copyreg._reconstructor"),
    "INST": (b"(S'touch canary'\nios\nsystem\n.", "neither a pickle"),
    "INST behind PROTO": (plain(b"(" + enc(COMMAND) + b"ios\nsystem\n"), "opcode INST"),
    "OBJ": (plain(b"(cos\nsystem\n" + enc(COMMAND) + b"o"), "asks for os.system"),
    "OBJ of an allowed name": (plain(b"(ccollections\nOrderedDict\no"), "opcode OBJ"),
    "NEWOBJ": (plain(b"csubprocess\nPopen\n" + enc((COMMAND,)) + b"\x81"), "asks for subprocess.Popen"),
    "NEWOBJ_EX": (plain(b"ccollections\nOrderedDict\n)}\x92"), "opcode NEWOBJ_EX"),
    "REDUCE of text": (plain(enc("os.system") + enc((COMMAND,)) + b"R"), "a value that is not a known name"),
    "REDUCE of a storage type": (plain(b"ctorch\nFloatStorage\n" + enc((9,)) + b"R"), "calls FloatStorage"),
    "REDUCE without a tuple": (plain(b"ccollections\nOrderedDict\n" + enc([1]) + b"R"), "is not a known name"),
    "BUILD with __setstate__": (plain(NAMESPACE + enc({"__setstate__": 1, "__reduce__": 2}) + b"b"), "no network"),
    "BUILD with slots": (plain(NAMESPACE + enc((None, {"__class__": "os"})) + b"b"), "no network"),
    "BUILD of a global": (plain(b"ccollections\nOrderedDict\n}b"), "the state of a value without state"),
    "BUILD of text": (plain(enc("text") + b"}b"), "the state of a value without state"),
    "EXT1": (plain(b"\x82\x01"), "opcode EXT1"),
    "EXT2": (plain(b"\x83\x01\x00"), "opcode EXT2"),
    "EXT4": (plain(b"\x84\x01\x00\x00\x00"), "opcode EXT4"),
    "PERSID": (plain(b"Pcanary\n"), "opcode PERSID"),
    "persistent id in a plain pickle": (plain(enc("canary") + b"Q"), "outside of a torch file"),
    "out-of-band buffer": (plain(b"\x97"), "out-of-band buffers"),
    "source of a module": (
        plain(
            call(
                "torch_utils.persistence",
                "_reconstruct_persistent_obj",
                {"type": "class", "module_src": "open('canary','w')", "class_name": "x", "state": {}},
            )
        ),
        "no network",
    ),
    "persistent object without state": (
        plain(call("torch_utils.persistence", "_reconstruct_persistent_obj", {"type": "class"})),
        "without class name or state",
    ),
    "StyleGAN2 of TensorFlow": (
        plain(b"cdnnlib.tflib.network\nNetwork\n)\x81" + enc({"version": 4}) + b"b", 3),
        "StyleGAN2 of NVlabs' TensorFlow code; convert it with legacy.py",
    ),
    "StyleGAN1 of TensorFlow": (
        plain(b"cdnnlib.tflib.network\nNetwork\n)\x81" + enc({"version": 3}) + b"b", 3),
        "StyleGAN1 of NVlabs' TensorFlow code, which NVlabs' own converter refuses; convert it to the PyTorch port",
    ),
    "ProGAN": (plain(b"ctfutil\nNetwork\n)\x81", 2), "is a ProGAN"),
    "StyleGAN-XL": (plain(b"ctorch.nn.modules.sparse\nEmbedding\n)\x81", 4), "StyleGAN-XL"),
    # Sizes that are not there.
    "memo index 2^31": (plain(enc(1) + b"r\x00\x00\x00\x80"), "memo index 2147483648"),
    "LONG4 of 2^31 bytes": (plain(b"\x8b\xff\xff\xff\x7f"), "opcode LONG4"),
    "BINBYTES8 of terabytes": (plain(b"\x8e" + struct.pack("<Q", TERABYTE)), "ends early"),
    "BINUNICODE8 of terabytes": (plain(b"\x8d" + struct.pack("<Q", TERABYTE)), "bytes of text"),
    "BYTEARRAY8 of terabytes": (plain(b"\x96" + struct.pack("<Q", TERABYTE)), "ends early"),
    "text beyond the limit": (plain(b"X" + struct.pack("<I", 20 << 20) + b"a" * (20 << 20)), "bytes of text"),
    "frame beyond the file": (plain(b"\x95" + struct.pack("<Q", TERABYTE) + b"N"), "ends early"),
    "frame that is too short": (plain(b"\x95" + struct.pack("<Q", 2) + enc(70000)), "ends within an opcode"),
    "frame that is too long": (plain(b"\x95" + struct.pack("<Q", 4) + b"N") + b"NN", "does not end where"),
    "frame in a frame": (plain(b"\x95" + struct.pack("<Q", 11) + b"\x95" + struct.pack("<Q", 2) + b"N"), "within a"),
    # Shapes that grow.
    "deep lists": (plain(b"]" * 100_000 + b"a" * 99_999), "nested more than"),
    "deep tuples": (plain(b")" + b"\x85" * 900_000), "nested more than"),
    "deep persistent ids": (plain(b"N" + b"Q" * 1000), "outside of a torch file"),
    "list in itself": (plain(b"]q\x00h\x00a"), "contains itself"),
    "dictionary in itself": (plain(b"}q\x05" + enc("a") + b"h\x05s"), "contains itself"),
    "list in a tuple in itself": (plain(b"]q\x00h\x00\x85a"), "contains itself"),
    "namespace in itself": (plain(NAMESPACE + b"q\x00h\x00b"), "contains itself"),
    "doubling lists": (plain(b"](" + b"]q\x00" + b"]h\x00ah\x00aq\x00" * 60 + b"e"), "multiplies to more than"),
    "doubling tuples": (plain(b")" + b"q\x00h\x00\x86" * 60), "multiplies to more than"),
    "too many opcodes": (plain(b"N" * 3 * MILLION), "more than 1000000 pickle opcodes"),
    "a million marks": (plain(b"(" * 900_000), "takes a value which is not there"),
    "a million sets": (plain(b"\x8f" * 900_000), "leaves values behind"),
    "sets from one long list": (
        plain(b"](" + b"N" * 1000 + b"eq\x00" + b"cbuiltins\nset\nh\x00\x85R" * 10_000),
        "at most 16 names",
    ),
    "bytes from one long text": (
        plain(enc("a" * MILLION) + b"q\x00" + b"c_codecs\nencode\nh\x00" + enc("latin1") + b"\x86R" * 10_000),
        "written as text",
    ),
    "other encoding": (plain(call("_codecs", "encode", "a", "rot13")), "not latin1"),
    "bytes beyond latin1": (plain(call("_codecs", "encode", "\u20ac", "latin1")), "not latin1"),
    "wrappers without end": (plain(b"}" + enc("module." * MILLION + "x") + b"Ns"), "no network of a known format"),
    "states behind wrappers": (
        plain(
            b"}(M\x00\x00}"
            + enc("module." * MILLION)
            + b"Nsq\x00"
            + b"".join(b"M" + struct.pack("<H", number) + b"h\x00" for number in range(1, 1 << 16))
            + b"u"
        ),
        "no network of a known format",
    ),
    # Values of the wrong kind.
    "empty stack": (plain(b"R"), "takes a value which is not there"),
    "no mark": (plain(b"t"), "takes a mark which is not there"),
    "no memo": (plain(b"h\x07"), "takes a memo which is not there"),
    "append to a dictionary": (plain(b"}Na"), "appends to a value that is not a list"),
    "items of a list": (plain(b"]NNs"), "not a dictionary"),
    "odd items": (plain(b"}(" + enc("a") + b"u"), "not a dictionary"),
    "key that is a list": (plain(b"}]Ns"), "key of type list"),
    "keys of one hash": (plain(b"}" + enc(3 * (2**61 - 1)) + b"Ns"), "key of type int"),
    "unknown opcode": (plain(b"\xff"), "byte 0xff"),
    "protocol 6": (plain(b"N", 6), "protocol 6"),
    "text that is not UTF-8": (plain(b"X\x02\x00\x00\x00\xff\xfe"), "not UTF-8"),
    "endless name": (plain(b"c" + b"a" * 10_000 + b"\n"), "endless name"),
    "name that is no text": (plain(enc(1) + enc(2) + b"\x93"), "not text"),
    "bytes behind the pickle": (plain(b"}") + b"PK", "bytes after"),
    "object array": (plain(NDARRAY + enc(("x",)) + b"b"), "unknown state"),
    "object dtype": (plain(call("numpy", "dtype", "O8", False, True)), "type O8"),
    "dtype that is no text": (plain(call("numpy", "dtype", ["f4"], False, True)), "type list"),
    "big-endian dtype": (
        plain(call("numpy", "dtype", "f4", False, True) + enc((3, ">", None)) + b"b"),
        "little-endian",
    ),
    "array of terabytes": (
        plain(NDARRAY + b"(" + enc(1) + enc((TERABYTE - 1,)) + call("numpy", "dtype", "f4") + b"\x89C\x04aaaatb"),
        "does not fit its 4 bytes",
    ),
    "number of the wrong size": (
        plain(b"cnumpy.core.multiarray\nscalar\n" + call("numpy", "dtype", "f8") + b"C\x02aa\x86R"),
        "of the wrong size",
    ),
    # Not what it should be.
    "nothing": (b"", "has 0 bytes"),
    "something else": (b"hello", "neither a pickle"),
    "a page": (b"<!DOCTYPE html><html>Quota exceeded</html>", "is a web page, not the checkpoint"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
    "gzip": (gzip.compress(b"N."), "compressed with gzip; unpack it first"),
    "bzip2": (bz2.compress(b"N."), "compressed with bzip2; unpack it first"),
    "xz": (lzma.compress(b"N."), "compressed with xz; unpack it first"),
    "tar": (tar(b"N."), "is a tar archive; unpack it first"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "is a safetensors file"),
    "only the legacy magic": (LEGACY_HEADER[:15], "ends early"),
    # The zip format.
    "path out of the archive": (zipped(state(tensor()), ("archive/../../canary", b"x")), "path 'archive/../../canary"),
    "absolute path": (zipped(state(tensor()), ("/tmp/canary", b"x")), "path '/tmp/canary'"),
    "backslash path": (zipped(state(tensor()), ("archive\\canary", b"x")), "path 'archive"),
    "compressed bomb": (
        zipped(state(tensor()), ("archive/data/0", bytes(200 << 20)), compress=zipfile.ZIP_DEFLATED),
        "compressed or encrypted",
    ),
    "entry twice": (
        zipped(state(tensor()), ("archive/data/0", bytes(16)), ("archive/data/1", bytes(16))).replace(
            b"archive/data/1", b"archive/data/0"
        ),
        "'archive/data/0' twice",
    ),
    "big endian zip": (zipped(state(tensor()), byteorder=b"big"), "big-endian"),
    "zip of something else": (zipped(state(tensor()), root="a/b"), "no data.pkl"),
    "two archives": (zipped(state(tensor()), ("other/data.pkl", b"N.")), "no data.pkl"),
    "missing storage": (zipped(state(tensor()), ("archive/data/1", bytes(16))), "lacks the zip entry archive/data/0"),
    "storage out of the archive": (
        zipped(state(tensor(where=storage(key="../byteorder")))),
        "lacks the zip entry archive/data/../byteorder",
    ),
    "wrong checksum": (zipped(state(tensor())).replace(bytes(16), b"x" * 16, 1), "checksum"),
    "entry of terabytes": (directory_patched(lambda data, at: _set(data, at + 24, "<L", 0xFFFFFFF0)), "compressed or"),
    "entries that overlap": (
        directory_patched(lambda data, at: (_set(data, at + 20, "<L", 1 << 30), _set(data, at + 24, "<L", 1 << 30))),
        "overlap",
    ),
    "directory beyond the file": (
        directory_patched(lambda data, at: _set(data, len(data) - 6, "<L", 10**9)),
        "cut off",
    ),
    "directory of gigabytes": (
        directory_patched(lambda data, at: _set(data, len(data) - 10, "<L", 10**9)),
        "directory of",
    ),
    "directory of terabytes": (zip64(TERABYTE, 0), "directory of"),
    "directory at terabytes": (zip64(100, TERABYTE), "cut off"),
    "entries that are not there": (directory_patched(lambda data, at: _set(data, len(data) - 12, "<H", 77)), "damaged"),
    "encrypted entry": (directory_patched(lambda data, at: _set(data, at + 8, "<H", 1)), "compressed or encrypted"),
    "header elsewhere": (directory_patched(lambda data, at: _set(data, at + 42, "<L", 3)), "damaged zip entry"),
    "header beyond the file": (directory_patched(lambda data, at: _set(data, at + 42, "<L", 10**9)), "cut off"),
    "zip that continues": (zipped(state(tensor())) + b"more", "does not end with"),
    # Tensors.
    "tensor of terabytes": (zipped(state(tensor((TERABYTE - 1,)))), "in a storage of 4"),
    "expanded to terabytes": (zipped(state(tensor((1 << 20, 1 << 20), (0, 0)))), "in a storage of 4"),
    "negative stride": (zipped(state(tensor((4,), (-1,), 3))), "not a list of sizes"),
    "negative offset": (zipped(state(tensor(offset=-1))), "tensor of 4 elements at -1"),
    "offset beyond the storage": (zipped(state(tensor(offset=1))), "at 1 in a storage of 4"),
    "stride beyond the storage": (zipped(state(tensor((2, 2), (3, 1)))), "in a storage of 4"),
    "shape of truths": (zipped(state(tensor((True,)))), "not a list of sizes"),
    "hundred dimensions": (zipped(state(tensor((1,) * 100, (1,) * 100))), "not a list of sizes"),
    "strides of another length": (zipped(state(tensor((2, 2), (1,)))), "not a list of sizes"),
    "shape that is a list": (zipped(state(tensor([4]))), "unknown arguments"),
    "tensor with metadata": (zipped(state(tensor(more=enc({"conj": True})))), "with metadata"),
    "tensor without storage": (zipped(state(tensor(where=enc("storage")))), "unknown arguments"),
    "storage of unknown type": (zipped(state(tensor(where=storage(kind="Size")))), "not a storage of a known type"),
    "unknown storage": (zipped(state(tensor(where=storage(kind="ComplexFloatStorage")))), "torch.ComplexFloatStorage"),
    "storage longer than its entry": (zipped(state(tensor(where=storage(5)))), "storage of 16 bytes where 20"),
    "storage of terabytes": (zipped(state(tensor(where=storage(TERABYTE)))), "storage of 16 bytes where"),
    "storage twice": (zipped(state(b"(" + storage() + storage(2, kind="DoubleStorage") + b"t")), "twice, differently"),
    "persistent id that is text": (zipped(state(enc("0") + b"Q")), "not a storage of a known type"),
    "persistent id that is short": (zipped(state(enc(("storage",)) + b"Q")), "not a storage of a known type"),
    "storage that is a view": (
        zipped(state(tensor(where=storage(tail=enc(("0", 0, 4)))))),
        "not a storage of a known type",
    ),
    "parameter of nothing": (zipped(state(call("torch._utils", "_rebuild_parameter", 1, True, {}))), "not a tensor"),
    "os.system in a zip": (zipped(plain(call("os", "system", COMMAND))), "asks for os.system"),
    "nested tensors in a torch file": (
        zipped(state(call("torch.storage", "_load_from_bytes", 1))),
        "asks for torch.storage._load_from_bytes",
    ),
    # The legacy format.
    "legacy of another protocol": (
        LEGACY_HEADER.replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2)),
        "protocol 1001",
    ),
    "big endian legacy": (
        legacy(state(tensor())).replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        "big-endian",
    ),
    "endless legacy header": (LEGACY_HEADER[:-1] + b"N" * 2 * MILLION, "more than 1000000"),
    "os.system in a legacy file": (legacy(plain(call("os", "system", COMMAND), 2)), "asks for os.system"),
    "keys that are numbers": (legacy(state(tensor()), (0,)), "other storages"),
    "key that is missing": (legacy(state(tensor()), ()), "other storages"),
    "key twice": (legacy(state(tensor()), ("0", "0")), "other storages"),
    "keys that are no list": (legacy(state(tensor()), {"0": 1}), "other storages"),
    "legacy storage of terabytes": (
        legacy(state(tensor(where=storage(TERABYTE))), storages=struct.pack("<q", TERABYTE)),
        "ends early",
    ),
    "legacy storage of another size": (legacy(state(tensor()), storages=struct.pack("<q", 5)), "storage of 5 elements"),
    "legacy file that continues": (legacy(state(tensor())) + b"more", "bytes after its storages"),
    "nested file in a nested file": (
        plain(
            b"ctorch.storage\n_load_from_bytes\n"
            + blob(legacy(state(call("torch.storage", "_load_from_bytes", 1))))
            + b"\x85R"
        ),
        "asks for torch.storage._load_from_bytes",
    ),
    "nested file that is no storage": (
        plain(b"ctorch.storage\n_load_from_bytes\n" + blob(legacy(state(tensor()))) + b"\x85R"),
        "nested tensor that is not a storage",
    ),
    "nested file without end": (
        plain(
            blob(legacy(plain(storage(tail=b"N"), 2)))
            + b"q\x00"
            + b"ctorch.storage\n_load_from_bytes\nh\x00\x85R" * 10_000
        ),
        "more than once",
    ),
    "nested file that is text": (plain(call("torch.storage", "_load_from_bytes", "x")), "not bytes"),
}
