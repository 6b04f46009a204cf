"""Reading an index: what its files have to be, and that one which changes later is refused then."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labelmint.core.errors import UnusableFile
from labelmint.seed_index import reading
from labelmint.seed_index.layout import SEED, Described, metadata_of
from labelmint.seed_index.reading import SeedIndex
from tests.support.seed_index import rows, some_columns, write
from tests.support.served import MODEL

pytestmark = pytest.mark.unit

HAIR = Described.of(MODEL, truncation_psi=1.0, class_index=None)
COLUMNS = some_columns(HAIR, range(0, 1000))
NAMES = (HAIR.score_column, "pixels_hair")


def test_an_index_is_its_files_together(tmp_path: Path) -> None:
    write(tmp_path / "b" / "late.parquet", HAIR, rows(COLUMNS, range(500, 700)), group=64)
    write(tmp_path / "a.parquet", HAIR, rows(COLUMNS, range(20, 300)), group=100)
    write(tmp_path / "c.parquet", HAIR, rows(COLUMNS, range(300, 400)))
    write(tmp_path / ".unfinished" / "part.parquet", HAIR, rows(COLUMNS, range(0, 900)))
    truncated = replace(HAIR, truncation_psi=0.5)
    write(tmp_path / "other.parquet", truncated, rows(COLUMNS, range(0, 50)))
    index = SeedIndex(tmp_path)
    assert set(index.described) == {HAIR, truncated}
    assert index.runs(HAIR) == [(20, 400), (500, 700)] and index.runs(truncated) == [(0, 50)]
    for seed in range(1000):
        part = index.part_at(HAIR, seed)
        assert (part is not None) == (20 <= seed < 400 or 500 <= seed < 700)
        if part is None:
            assert index.next_first(HAIR, seed) == (20 if seed < 20 else 500 if seed < 500 else 2**32)
            continue
        assert part.first <= seed < part.end
        for name, column in index.columns(part, NAMES).items():
            assert column[seed - part.first] == COLUMNS[name][seed]
    assert index.part_at(replace(HAIR, class_index=1), 30) is None


def test_names_of_classes_may_look_like_paths(tmp_path: Path) -> None:
    dotted = replace(HAIR, label_names=("a", "a.b"))
    columns = some_columns(dotted, range(0, 10))
    index = SeedIndex(write(tmp_path / "x.parquet", dotted, columns).parent)
    part = index.part_at(dotted, 0)
    assert part is not None
    assert np.array_equal(index.columns(part, ["pixels_a"])["pixels_a"], columns["pixels_a"])
    assert np.array_equal(index.columns(part, ["pixels_a.b"])["pixels_a.b"], columns["pixels_a.b"])


def without(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path, HAIR, {each: column for each, column in COLUMNS.items() if each != name})

    return make


def with_(name: str, column: object, metadata: dict[bytes, bytes] | None = None) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        table = pa.table({**COLUMNS, name: column}).replace_schema_metadata(metadata or metadata_of(HAIR))
        pq.write_table(table, path, row_group_size=100)

    return make


def no_statistics(path: Path) -> None:
    pq.write_table(pa.table(COLUMNS).replace_schema_metadata(metadata_of(HAIR)), path, write_statistics=False)


def cut(path: Path) -> None:
    content = write(path, HAIR, COLUMNS).read_bytes()
    path.write_bytes(content[:-40])


def too_large(path: Path) -> None:
    write(path, HAIR, COLUMNS, group=1000)


SEEDS = COLUMNS[SEED]
REFUSED = {
    "is not an index of seeds": with_("x", SEEDS, {b"other": b"x"}),
    "damaged metadata": with_("x", SEEDS, {b"labelmint_index": b'{"format": 1}'}),
    "0 columns 'pixels_hair'": without("pixels_hair"),
    "0 columns 'score_sum'": without("score_sum"),
    "0 columns 'seed'": without(SEED),
    "has string in column 'score_sum'": with_("score_sum", [str(seed) for seed in SEEDS]),
    "has double in column 'pixels_hair', not whole": with_("pixels_hair", SEEDS / 2),
    "has no statistics": no_statistics,
    "one for each seed": with_(SEED, SEEDS * 2),
    "has seed 50 after seed 99": with_(SEED, np.concatenate([SEEDS[:100], SEEDS[50:950]])),
    "cannot be read as a file of an index": cut,
    "at most 500": too_large,
}


@pytest.mark.parametrize("problem", REFUSED)
def test_a_file_that_is_none_is_refused_at_once(tmp_path: Path, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_GROUP_SEEDS", 500)
    write(tmp_path / "fine.parquet", HAIR, rows(COLUMNS, range(0, 10)))
    REFUSED[problem](tmp_path / "wrong.parquet")
    with pytest.raises(UnusableFile, match=re.escape(problem)) as refused:
        SeedIndex(tmp_path)
    assert refused.value.message.startswith(f"{tmp_path / 'wrong.parquet'} ") and "\n" not in refused.value.message


def test_overlapping_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", HAIR, rows(COLUMNS, range(0, 200)), group=64)
    write(tmp_path / "b.parquet", HAIR, rows(COLUMNS, range(199, 300)))
    write(tmp_path / "other.parquet", replace(HAIR, truncation_psi=0.5), rows(COLUMNS, range(0, 300)))
    with pytest.raises(UnusableFile, match=r"b\.parquet describes seed 199, as .*a\.parquet does"):
        SeedIndex(tmp_path)


def test_a_directory_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableFile, match="holds no file of an index"):
        SeedIndex(tmp_path)
    with pytest.raises(UnusableFile, match="is not a directory"):
        SeedIndex(tmp_path / "none")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = os.urandom(len(content) // 2 - 4)
    path.write_bytes(content)


def restamp(path: Path, change: Callable[[Path], None]) -> None:
    """Change a file so that it looks unchanged."""
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def other_seeds(path: Path) -> None:
    """Seed 17 becomes 18, and the footer stays as it is."""
    before, after = (np.array([16, seed], np.uint32).tobytes() for seed in (17, 18))
    assert path.read_bytes().count(before) == 1
    path.write_bytes(path.read_bytes().replace(before, after))


LATER = {
    "No such file": Path.unlink,
    "has changed since": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "cannot be read as a file of an index": lambda path: restamp(path, damage),
    "has other seeds": lambda path: restamp(path, other_seeds),
}


@pytest.mark.parametrize("problem", LATER)
def test_what_happens_to_a_file_later_is_noticed_when_it_is_read(tmp_path: Path, problem: str) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table(rows(COLUMNS, range(0, 500))).replace_schema_metadata(metadata_of(HAIR))
    pq.write_table(table, path, use_dictionary=False, compression="none")
    write(tmp_path / "b.parquet", HAIR, rows(COLUMNS, range(500, 600)))
    index = SeedIndex(tmp_path)
    part, other = index.part_at(HAIR, 0), index.part_at(HAIR, 500)
    assert part is not None and other is not None
    LATER[problem](path)
    with pytest.raises(UnusableFile, match=problem):
        index.columns(part, NAMES)
    assert index.leave_out(part) and not index.leave_out(part)
    assert index.runs(HAIR) == [(500, 600)] and index.part_at(HAIR, 0) is None
    assert set(index.columns(other, NAMES)) == set(NAMES)
    assert index.leave_out(other) and index.described == ()


def test_values_that_are_missing_are_noticed(tmp_path: Path) -> None:
    with_("pixels_hair", pa.array([*COLUMNS["pixels_hair"][:-1].tolist(), None], pa.uint32()))(tmp_path / "a.parquet")
    index = SeedIndex(tmp_path)
    part = index.part_at(HAIR, 950)
    assert part is not None
    with pytest.raises(UnusableFile, match="no value in column 'pixels_hair'"):
        index.columns(part, NAMES)


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", HAIR, COLUMNS, group=100)
    index = SeedIndex(tmp_path, cache_bytes=5 * 400)
    for seed in range(0, 1000, 100):
        part = index.part_at(HAIR, seed)
        assert part is not None
        index.columns(part, NAMES)
    assert 0 < index._cache.currsize <= 5 * 400
    (tmp_path / "a.parquet").unlink()
    assert set(index.columns(part, NAMES)) == set(NAMES), "the last ones are in the cache"


def test_ten_million_seeds_open_fast(tmp_path: Path) -> None:
    names = tuple(f"class{number}" for number in range(18))
    large = replace(HAIR, label_names=names)
    one = {name: np.zeros(65_536, np.uint32) for name in map(large.label_column, names)}
    one[large.score_column] = np.zeros(65_536, np.float32)
    schema = pa.schema([(SEED, pa.uint32()), *((name, pa.from_numpy_dtype(each.dtype)) for name, each in one.items())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema.with_metadata(metadata_of(large))) as writer:
        for first in range(0, 10_000_000, 65_536):
            writer.write_table(pa.table({SEED: np.arange(first, first + 65_536, dtype=np.uint32), **one}, schema))
    begun = time.perf_counter()
    index = SeedIndex(tmp_path)
    assert time.perf_counter() - begun < 2.0
    assert index.runs(large) == [(0, 10_027_008)]


def test_a_changed_byte_never_gives_other_values(tmp_path: Path) -> None:
    """With the checksums that a file has; they do not cover its footer, which is what the index trusts."""
    path = write(tmp_path / "a.parquet", HAIR, rows(COLUMNS, range(0, 300)), group=100)
    content, draw, refused = path.read_bytes(), np.random.default_rng(5), 0
    pages = len(content) - int.from_bytes(content[-8:-4], "little") - 8
    for _ in range(300):
        changed = bytearray(content)
        place = int(draw.integers(0, pages))
        changed[place] ^= int(draw.integers(1, 256))
        path.write_bytes(changed)
        index = SeedIndex(tmp_path)
        try:
            for first in (0, 100, 200):
                part = index.part_at(HAIR, first)
                assert part is not None
                for name, column in index.columns(part, NAMES).items():
                    assert np.array_equal(column, COLUMNS[name][first : first + 100]), place
        except UnusableFile:
            refused += 1
    assert refused > 100


def test_a_changed_footer_is_refused_or_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", HAIR, rows(COLUMNS, range(0, 300)), group=100)
    content, draw = path.read_bytes(), np.random.default_rng(6)
    footer = len(content) - int.from_bytes(content[-8:-4], "little") - 8
    for _ in range(300):
        changed = bytearray(content)
        changed[int(draw.integers(footer, len(content)))] ^= 1 << int(draw.integers(0, 8))
        path.write_bytes(changed)
        try:
            index = SeedIndex(tmp_path)
            for described in index.described:
                for first, _ in index.runs(described):
                    part = index.part_at(described, first)
                    assert part is not None
                    index.columns(part, (described.score_column,))
        except UnusableFile as error:
            assert "\n" not in error.message
