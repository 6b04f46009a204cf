"""An index of seeds says of each seed what the pipeline gives for it, however often the walk was interrupted."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import pytest_asyncio
import torch

from labelmint.core.calibration import CALIBRATION, calibrate
from labelmint.core.errors import InvalidRequest, LabelmintError
from labelmint.core.policy import latent_of
from labelmint.export.repository import export_repository
from labelmint.indexing import index_seeds, seeds_of
from labelmint.seed_index import writing
from labelmint.seed_index.layout import ROW_GROUP_SEEDS, Described, read_metadata
from labelmint.triton.client import Latents
from labelmint.triton.model_config import read_config, write_config
from labelmint.triton.server import TritonServer
from tests.support.commands import run
from tests.support.indexing import GROUP, PART, SMALL_PARTS
from tests.support.inference import connected, running, statistics
from tests.support.models import files, random_interpreter, small
from tests.support.repositories import add, copy_model

pytestmark = [pytest.mark.triton, pytest.mark.torch]

SEEDS = range(100, 300)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classes of `tiny` are a and b, the keypoints of `points` too. Its score is none that a JS map gives."""
    directory = tmp_path_factory.mktemp("indexed") / "repository"
    generator, _ = small()
    for model, task, score_kind in (("tiny", "segmentation", "sum"), ("points", "keypoints", "mixture_entropy")):
        torch.manual_seed(7)
        interpreter = random_interpreter(generator, task)
        interpreter.score_kind = score_kind
        export_repository(directory, model, (generator, interpreter))
    return directory


@pytest_asyncio.fixture(scope="module")
async def triton(repository: Path) -> AsyncIterator[TritonServer]:
    async with running(repository, "tiny", "points") as server:
        yield server


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of a few hundred seeds has several row groups, each of several parts."""
    monkeypatch.setattr(writing, "ROW_GROUP_SEEDS", GROUP)
    monkeypatch.setattr(writing, "PART_SEEDS", PART)


async def indexed(triton: TritonServer | str, directory: Path, seeds: range = SEEDS, *, model: str = "tiny") -> Path:
    url = triton if isinstance(triton, str) else triton.grpc_url
    return await index_seeds(model, seeds, directory, repository=Path("unused"), triton_url=url)


async def refused(triton: TritonServer | str, directory: Path, seeds: range = SEEDS, *, model: str = "tiny") -> str:
    """The one line of a run that fails, and changes no file."""
    before = files(directory)
    with pytest.raises(LabelmintError) as raised:
        await indexed(triton, directory, seeds, model=model)
    assert "\n" not in raised.value.message
    assert files(directory) == before
    return raised.value.message


@pytest.mark.parametrize("model", ["tiny", "points"])
async def test_each_value_is_what_the_pipeline_gives(model: str, triton: TritonServer, tmp_path: Path) -> None:
    path = await indexed(triton, tmp_path, model=model)
    label, own = {"tiny": ("label", "sum"), "points": ("confidence", "mixture_entropy")}[model]
    frame, told = pd.read_parquet(path), duckdb.connect().execute(f"select * from '{path}' order by seed").df()
    pd.testing.assert_frame_equal(frame, told)
    kinds = ["sum", "top10_mean", *({own} - {"sum"})]
    labels = [f"{'pixels' if model == 'tiny' else 'confidence'}_{name}" for name in "ab"]
    assert list(frame) == ["seed", *(f"score_{kind}" for kind in kinds), *labels]
    assert frame.seed.dtype == np.uint32 and (frame.seed == list(SEEDS)).all()
    async with connected(triton) as client:
        for seed, row in zip(SEEDS, frame.itertuples(index=False), strict=True):
            latent = latent_of(seed, 8)
            outputs = (label, "js_map", "js_score")
            arrays = await client.infer(model, "1", Latents(latent, latent, 0, 1.0), outputs=outputs)
            values = row._asdict()
            assert np.float32(values[f"score_{own}"]).tobytes() == arrays["js_score"].tobytes()
            js = np.sort(arrays["js_map"], axis=None).astype(np.float64)
            assert values["score_sum"] == pytest.approx(js.sum(), rel=1e-6)
            assert values["score_top10_mean"] == pytest.approx(js[-(js.size // 10) :].mean(), rel=1e-6)
            found = np.array([values[name] for name in labels], np.uint32 if model == "tiny" else np.float32)
            wanted = [(arrays["label"] == index).sum() for index in range(2)] if model == "tiny" else arrays[label]
            assert found.tolist() == np.asarray(wanted).tolist()
    assert frame[labels].std().min() > 0, "the models must tell seeds apart"


async def test_the_file_says_what_it_is_about(triton: TritonServer, repository: Path, tmp_path: Path) -> None:
    path = await indexed(triton, tmp_path, range(40), model="points")
    digest = read_config(repository / "points" / "config.pbtxt").parameters["model_digest"].string_value
    assert read_metadata(path, pq.read_metadata(path).metadata) == Described(
        model="points",
        digest=digest,
        executor="onnxruntime",
        truncation_psi=1.0,
        class_index=None,
        task="keypoints",
        score_kind="mixture_entropy",
        resolution=16,
        label_names=("a", "b"),
    )
    assert path.name == f"points-{digest[:12]}-onnxruntime-psi1.0-0000000000-0000000040.parquet"


@pytest.mark.usefixtures("small_parts")
async def test_row_groups_are_of_consecutive_seeds_with_statistics(triton: TritonServer, tmp_path: Path) -> None:
    metadata = pq.read_metadata(await indexed(triton, tmp_path))
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [64, 64, 64, 8]
    for group, start in zip(groups, range(100, 300, 64), strict=True):
        columns = [group.column(index) for index in range(group.num_columns)]
        assert (columns[0].statistics.min, columns[0].statistics.max) == (start, min(start + 64, 300) - 1)
        assert all(column.statistics.has_min_max for column in columns)
        assert {column.compression for column in columns} == {"ZSTD"}


async def test_the_command_starts_a_triton_and_is_done_once(
    repository: Path, triton: TritonServer, tmp_path: Path
) -> None:
    command = (
        "index",
        "tiny",
        "--model-repository",
        str(repository),
        "--seeds",
        "100:300",
        "--executor",
        "onnxruntime",
    )
    done = await asyncio.to_thread(run, *command, "--executor", "onnxruntime", "--out", str(tmp_path / "own"))
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "own").iterdir()
    assert done.stdout == f"{path} has the seeds 100:300\n"
    assert "200/200" in done.stderr, "it shows its progress"
    assert path.read_bytes() == (await indexed(triton, tmp_path / "other")).read_bytes()
    before = path.stat().st_mtime_ns
    async with connected(triton) as client:
        asked = await statistics(client, "tiny_generator")
        assert await indexed(triton, tmp_path / "own") == path
        assert await statistics(client, "tiny_generator") == asked
    assert path.stat().st_mtime_ns == before and list((tmp_path / "own").iterdir()) == [path]


@pytest.mark.usefixtures("small_parts")
async def test_the_files_of_all_shards_are_the_index(triton: TritonServer, tmp_path: Path) -> None:
    whole = await indexed(triton, tmp_path / "whole")
    for index in range(3):
        await indexed(triton, tmp_path / "shards", writing.shard_of(SEEDS, index, 3))
    paths = sorted((tmp_path / "shards").iterdir())
    assert [pq.read_metadata(path).num_rows for path in paths] == [64, 64, 72]
    merged = pq.read_table(tmp_path / "shards")
    assert merged.equals(pq.read_table(whole), check_metadata=True)


@pytest.mark.parametrize("length", [1, ROW_GROUP_SEEDS, 5 * ROW_GROUP_SEEDS + 7])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_shards_share_out_whole_row_groups(length: int, count: int) -> None:
    seeds = range(12, 12 + length)
    shards = [writing.shard_of(seeds, index, count) for index in range(count)]
    assert [seed for shard in shards for seed in (shard[:1], shard[-1:]) if seed] and sum(map(len, shards)) == length
    filled = [shard for shard in shards if shard]
    assert (filled[0].start, filled[-1].stop) == (seeds.start, seeds.stop)
    assert all(earlier.stop == later.start for earlier, later in itertools.pairwise(filled))
    assert all(len(shard) % ROW_GROUP_SEEDS == 0 for shard in filled[:-1])
    sizes = [-(-len(shard) // ROW_GROUP_SEEDS) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.usefixtures("small_parts")
async def test_it_is_killed_at_any_moment_and_goes_on(triton: TritonServer, tmp_path: Path) -> None:
    seeds, killed = range(7, 2007), tmp_path / "killed"
    whole = await indexed(triton, tmp_path / "whole", seeds)
    command = [*SMALL_PARTS, "index", "tiny", "--seeds", "7:2007", "--out", str(killed)]
    kept = 0
    async with connected(triton) as client:
        for parts in (0, 3, 20):  # more than the run before left, before it is killed
            process = subprocess.Popen([*command, "--triton-url", triton.grpc_url], stderr=subprocess.DEVNULL)
            try:
                deadline = time.monotonic() + 60
                while not list(killed.glob(".*/lock")) or len(list(killed.glob(".*/*.part"))) < kept + parts:
                    assert time.monotonic() < deadline and process.poll() is None
                    await asyncio.sleep(0.005)
            finally:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            assert not list(killed.glob("*.parquet"))
            kept = len(list(killed.glob(".*/*.part")))
        assert 20 < kept < len(seeds) // PART
        (work,) = killed.iterdir()
        (work / "aside").write_bytes(b"half a part")
        before, _ = await statistics(client, "tiny_generator")
        path = await indexed(triton, killed, seeds)
        after, _ = await statistics(client, "tiny_generator")
    assert after - before == len(seeds) - kept * PART
    assert path.read_bytes() == whole.read_bytes()
    assert list(killed.iterdir()) == [path]


@pytest.mark.usefixtures("small_parts")
async def test_it_ends_between_the_file_and_the_removal_of_the_parts(
    triton: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        path = await indexed(triton, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    before = path.stat().st_mtime_ns
    assert await indexed(triton, tmp_path) == path
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_mtime_ns == before


async def test_one_process_at_a_time(triton: TritonServer, tmp_path: Path) -> None:
    path = await indexed(triton, tmp_path / "other", range(1))
    described = read_metadata(path, pq.read_metadata(path).metadata)
    with writing.writing(tmp_path, described, SEEDS, ("sum", "top10_mean")):
        said = await refused(triton, tmp_path)
        assert said.endswith("is in use: another process indexes these seeds at this moment")
        await indexed(triton, tmp_path, range(10))
    await indexed(triton, tmp_path)


@pytest.mark.usefixtures("small_parts")
async def test_other_samples_share_the_directory_and_are_never_mixed_in(
    triton: TritonServer, repository: Path, tmp_path: Path
) -> None:
    path = await indexed(triton, tmp_path)
    other = tmp_path.parent / "of_other_weights"
    other.mkdir()
    copy_model(repository, "points", "tiny", other)
    await indexed(triton, tmp_path, model="points")
    async with running(other, "tiny") as differing:
        second = await indexed(differing, tmp_path)
        assert second != path and len(list(tmp_path.glob("*.parquet"))) == 3
        assert not pq.read_table(path).equals(pq.read_table(second))
        # A file under the name of another one.
        content = path.read_bytes()
        path.write_bytes(second.read_bytes())
        said = await refused(triton, tmp_path)
        assert said.startswith(f"{path} is about other samples: digest '") and "remove it" in said
        path.write_bytes(content)
        # And both Tritons under one address.
        both = f"ipv4:{triton.grpc_url},{differing.grpc_url}"
        assert "with several digests or executors" in await refused(both, tmp_path)


@pytest.mark.usefixtures("small_parts")
async def test_a_part_of_other_classes_or_a_damaged_one_is_refused(
    triton: TritonServer, repository: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed"
    add(repository, renamed, "tiny")
    config = read_config(renamed / "tiny" / "config.pbtxt")
    config.parameters["class_names"].string_value = json.dumps(["a", "c"])
    write_config(renamed / "tiny" / "config.pbtxt", config)
    async with running(renamed, "tiny") as server:
        await interrupted(server, tmp_path / "index")
    said = await refused(triton, tmp_path / "index")
    assert "0000000100.part is about other samples: label_names ('a', 'c'), not ('a', 'b'); remove it" in said
    (part,) = (tmp_path / "index").glob(".*/*.part")
    for content in (b"", part.read_bytes()[:-100], b"\0" * 1000):
        part.write_bytes(content)
        assert f"{part} is damaged (" in await refused(triton, tmp_path / "index")
    part.unlink()
    await indexed(triton, tmp_path / "index")


async def interrupted(triton: TritonServer, directory: Path, seeds: range = SEEDS) -> None:
    """A run that ends after its first part."""
    with pytest.MonkeyPatch.context() as patch:
        written = writing.IndexFile._write

        def once(self: writing.IndexFile, *arguments: object) -> None:
            written(self, *arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        patch.setattr(writing.IndexFile, "_write", once)
        with pytest.raises(KeyboardInterrupt):
            await indexed(triton, directory, seeds)


async def test_seeds_are_not_indexed_twice(triton: TritonServer, tmp_path: Path) -> None:
    path = await indexed(triton, tmp_path, range(10, 20))
    for seeds in (range(15, 25), range(19), range(12, 13), range(5, 30)):
        said = await refused(triton, tmp_path, seeds)
        assert said == f"{path} has the seeds 10:20 of these samples; index others, or remove it"
    await indexed(triton, tmp_path, range(10))
    await indexed(triton, tmp_path, range(20, 30))
    await interrupted(triton, tmp_path, range(30, 40))
    said = await refused(triton, tmp_path, range(39, 50))
    assert "has, unfinished, the seeds 30:40 of these samples; index others, or remove it" in said


@pytest.mark.parametrize(
    "text", ["", "5", "5:5", "7:5", "-1:5", "0:4294967297", "0:99999999999", "1:2:3", "a:b", "0x1:3"]
)
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a range of seeds; give START:END"):
        seeds_of(text)


def test_ranges() -> None:
    assert seeds_of("0:1") == range(1) and seeds_of("17:4294967296") == range(17, 2**32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--seeds", "9:3"),
            "seeds: '9:3' is not a range of seeds; give START:END, 0 <= START < END",
        ),
        (("--seeds", "0:9", "--shard-count", "2", "--shard-index", "2"), "shard_index: 2 is out of range; give 0 to 1"),
        (
            ("--seeds", "0:9", "--triton-url", "x:1", "--executor", "kernel"),
            "--triton-url names Tritons with ",
        ),
    ],
)
def test_options_that_do_not_fit(options: tuple[str, ...], said: str) -> None:
    done = run("index", "tiny", *options)
    assert done.returncode == 2 and done.stderr.startswith(f"labelmint: {said}") and done.stderr.count("\n") == 1


def test_a_shard_without_seeds_ends_well(tmp_path: Path) -> None:
    shard = ("--shard-index", "0", "--shard-count", "3", "--out", str(tmp_path / "none"))
    done = run("index", "tiny", "--seeds", "0:9", *shard)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("shard 0 of 3 has no seeds: ")
    assert not list(tmp_path.iterdir())


def test_without_pyarrow_it_says_what_to_install() -> None:
    script = "import sys; sys.modules['pyarrow'] = None; from labelmint.cli import main; main()"
    command = [sys.executable, "-c", script, "index", "tiny", "--seeds", "0:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "labelmint: an index of seeds needs pyarrow; run `pip install '.[index]'` in a clone of labelmint\n"
    )


async def test_models_that_are_not_there(triton: TritonServer, repository: Path, tmp_path: Path) -> None:
    assert "does not have 'nothing' version 1 ready, only: 'points' version 1" in await refused(
        triton, tmp_path, model="nothing"
    )
    assert "does not have 'tiny_generator' version 1" in await refused(triton, tmp_path, model="tiny_generator")
    with pytest.raises(InvalidRequest, match="model 'tiny' has no generator classes; leave it unset"):
        await index_seeds("tiny", SEEDS, tmp_path, repository=repository, triton_url=triton.grpc_url, class_index=1)


async def test_the_truncation_is_the_calibrated_one(repository: Path, tmp_path: Path) -> None:
    add(repository, tmp_path / "calibrated", "tiny")
    path = tmp_path / "calibrated" / "tiny" / "config.pbtxt"
    config = read_config(path)
    calibration = calibrate(
        np.arange(2000.0),
        model_digest=config.parameters["model_digest"].string_value,
        score_kind="sum",
        truncation_psi=0.5,
        first_seed=0,
    )
    config.parameters[CALIBRATION].string_value = calibration.to_json()
    write_config(path, config)
    async with running(tmp_path / "calibrated", "tiny") as server:
        default = await indexed(server, tmp_path / "index")
        options = {"repository": Path("unused"), "triton_url": server.grpc_url}
        given, whole = [
            await index_seeds("tiny", SEEDS, tmp_path / name, truncation_psi=psi, **options)  # type: ignore[arg-type]
            for name, psi in (("given", 0.5), ("index", 1.0))
        ]
    assert "-psi0.5-" in default.name and given.read_bytes() == default.read_bytes()
    assert not pq.read_table(whole).equals(pq.read_table(default))


@pytest.mark.usefixtures("small_parts")
async def test_a_triton_that_dies_costs_at_most_a_part(triton: TritonServer, repository: Path, tmp_path: Path) -> None:
    seeds = range(5000)
    async with running(repository, "tiny") as dying:
        walking = asyncio.create_task(indexed(dying, tmp_path / "index", seeds))
        while len(list((tmp_path / "index").glob(".*/*.part"))) < 5:
            await asyncio.sleep(0.01)
        dying.kill()
        with pytest.raises(LabelmintError) as raised:
            await walking
    assert raised.value.message.endswith(
        f"(Triton at {dying.grpc_url}); what was indexed is kept, so run the same command again"
    )
    assert len(list((tmp_path / "index").glob(".*/*.part"))) >= 5


@pytest.fixture(scope="module")
def unshare() -> list[str]:
    """What gives a command a mount namespace, which only some may have."""
    command = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    try:
        done = subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("unshare is not installed (package util-linux)")
    if done.returncode != 0:
        pytest.skip(f"this user may not mount file systems: {done.stderr.strip()}")
    return command


async def test_a_full_disk(unshare: list[str], triton: TritonServer, tmp_path: Path) -> None:
    """Nothing is lost: with more room, the same command goes on."""
    whole = await indexed(triton, tmp_path / "whole", range(2000))
    out = tmp_path / "out"
    out.mkdir()
    index = [*SMALL_PARTS, "index", "tiny", "--seeds", "0:2000", "--out", str(out)]
    script = (
        f'mount -t tmpfs -o size=256k tmpfs {out}; "$@"; echo $?; ls -A {out}/.*/ >&2; '
        f'mount -o remount,size=64m {out}; "$@" && cat {out}/*.parquet > {tmp_path}/copied; ls -A {out}'
    )
    command = [*unshare, "sh", "-c", script, "sh", *index, "--triton-url", triton.grpc_url]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[0] == "2", done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "cannot be written" in line]
    assert said.endswith(
        "cannot be written: No space left on device; what was indexed before is kept: make room, then run the same "
        "command again"
    )
    assert "aside" not in done.stderr
    assert pq.read_table(tmp_path / "copied").equals(pq.read_table(whole))
    assert len(done.stdout.splitlines()) == 3, "nothing but the file is left"
