"""A pull that is killed, disturbed or started twice ends with the bytes of one that was not."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from labelmint_client import Client, Model, ModelVersionGone, SampleOptions
from labelmint_client.pull import Progress, PullError, PullOptions, parquet, pull, verify
from labelmint_client.pull.directory import PullDirectory
from labelmint_client.pull.formats import FORMATS
from tests.conftest import ROOT, Service
from tests.support.files import contents

pytestmark = [pytest.mark.triton, pytest.mark.torch]


KILLS = 4


def options_of(name: str, gate: SampleOptions) -> PullOptions:
    """Two whole shards and a smaller one."""
    return PullOptions("tiny", 8, name, samples_per_shard=3, ignore_js_quantile=0.9, sample=gate)  # type: ignore[arg-type]


def run(gateway: Service, out: Path, options: PullOptions, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.killed_pull", gateway.grpc, str(out)]
    command += [json.dumps(options.to_json()), str(kill_at)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", FORMATS)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    name: str, gateway: Service, options: SampleOptions, tmp_path: Path
) -> None:
    wanted = options_of(name, options)
    whole = run(gateway, tmp_path / "whole", wanted)
    assert whole.returncode == 0, whole.stderr
    steps = int(whole.stdout)
    # The same pull is killed again and again; another one in its last steps, which remove the state.
    draw = random.Random(name)
    for out, kills in (("often", [draw.randint(1, steps // 2) for _ in range(KILLS)]), ("late", [steps - 1])):
        for kill_at in kills:
            killed = run(gateway, tmp_path / out, wanted, kill_at)
            assert killed.returncode == -signal.SIGKILL, (kill_at, killed.stderr)
        done = run(gateway, tmp_path / out, wanted)
        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / out) == contents(tmp_path / "whole"), kills


def test_a_shard_that_is_done_is_not_asked_for_again(client: Client, options: SampleOptions, tmp_path: Path) -> None:
    wanted = options_of("folder", options)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pull(client, wanted, out, on_progress=_interrupt_after(5))
    reports: list[Progress] = []
    manifest = pull(client, wanted, out, on_progress=reports.append)
    assert reports[0].done == 5 and reports[-1].done == 8
    assert reports[-1].seeds == manifest["accepted_count"] + manifest["rejected_count"]
    # Complete: nothing is asked for at all, not even the service.
    before = contents(out)
    with Client("localhost:1") as nobody:
        assert pull(nobody, wanted, out) == manifest
    assert contents(out) == before


def test_a_pull_by_a_version_with_fewer_tasks_goes_on(client: Client, options: SampleOptions, tmp_path: Path) -> None:
    wanted = options_of("folder", options)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pull(client, wanted, out, on_progress=_interrupt_after(5))
    path = out / ".labelmint-pull" / "header.json"
    header = json.loads(path.read_text())
    assert header["model"].pop("keypoint_classes") == []
    path.write_text(json.dumps(header))
    assert pull(client, wanted, out)["sample_count"] == 8


def test_what_cannot_be_is_one_error(client: Client, options: SampleOptions, tmp_path: Path) -> None:
    wanted = options_of("folder", options)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pull(client, wanted, out, on_progress=_interrupt_after(5))
    other = PullOptions("tiny", 7, "coco", samples_per_shard=3, ignore_js_quantile=0.9, sample=options)
    with pytest.raises(PullError, match="holds a pull with count 8, not 7; format folder, not coco"):
        pull(client, other, out)
    with PullDirectory(out), pytest.raises(PullError, match="another pull is writing to"):
        pull(client, wanted, out)
    header = out / ".labelmint-pull" / "header.json"
    header.write_text(header.read_text().replace('"digest": "', '"digest": "0'))
    with pytest.raises(PullError, match="other weights"):
        pull(client, wanted, out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    for path in (foreign, foreign / "thesis.tex"):
        with pytest.raises(PullError, match="holds no unfinished pull"):
            pull(client, wanted, path)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    last = PullOptions("tiny", 3, start_seed=2**32 - 2, sample=SampleOptions(max_js=1e9))
    with pytest.raises(PullError, match="the seeds end after 2 of 3 samples"):
        pull(client, last, tmp_path / "last")


@pytest.mark.parametrize("name", ["webdataset", "parquet"])
def test_a_full_disk_is_one_line_and_loses_nothing(
    name: str, gateway: Service, client: Client, options: SampleOptions, tmp_path: Path
) -> None:
    """The limit on a file's size stands for the disk's: the same error of the same calls."""
    wanted = options_of(name, options)
    command = [sys.executable, "-m", "tests.support.killed_pull", gateway.grpc, str(tmp_path / "full")]
    command += [json.dumps(wanted.to_json()), "0"]
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "limited", *command]  # KiB; a shard of 3 samples has more
    full = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert full.returncode == 1, full.stderr
    assert f"{tmp_path / 'full'}: File too large; completed shards are kept" in full.stderr.splitlines()[-1]
    pull(client, wanted, tmp_path / "full")
    pull(client, wanted, tmp_path / "whole")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_received_is_kept(name: str, client: Client, options: SampleOptions, tmp_path: Path) -> None:
    """Interrupted in every shard, at every sample of it: nothing is asked for again, and the bytes are the same."""
    wanted = options_of(name, options)
    for done in (1, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            pull(client, wanted, tmp_path / "out", on_progress=_interrupt_after(done))
        first: list[Progress] = []
        with pytest.raises(KeyboardInterrupt):
            pull(client, wanted, tmp_path / "out", on_progress=lambda progress, first=first: _stop(first, progress))
        assert [progress.done for progress in first] == [done]
    pull(client, wanted, tmp_path / "out")
    pull(client, wanted, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", FORMATS)
def test_a_larger_count_goes_on(name: str, client: Client, options: SampleOptions, tmp_path: Path) -> None:
    """From a complete pull whose last shard has room, from one without, and from one that was interrupted."""
    wanted, out = options_of(name, options), tmp_path / "out"
    for count in (2, 3, 4):
        pull(client, replace(wanted, count=count), out)
        assert verify(out).problems == []
    with pytest.raises(KeyboardInterrupt):
        pull(client, replace(wanted, count=6), out, on_progress=_interrupt_after(5))
    with pytest.raises(PullError, match="it is not a pull, or the pull is not complete"):
        verify(out)
    pull(client, wanted, out)
    pull(client, wanted, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    left = {path.name for path in (out / ".labelmint-pull").iterdir() if "part-" not in path.name}
    assert left == {"header.json", "lock"}
    assert verify(out, client).problems == []
    with pytest.raises(PullError, match="count 8, not 7"):
        pull(client, replace(wanted, count=7), out)


@pytest.mark.parametrize("name", FORMATS)
def test_a_shard_that_was_published_but_not_recorded(
    name: str, client: Client, options: SampleOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a shard that had room then has more samples than its record: they are taken again, not twice."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    wanted, out = options_of(name, options), tmp_path / "out"
    pull(client, replace(wanted, count=1), out)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PullDirectory, "add_part", killed)
        pull(client, replace(wanted, count=3), out)
    with pytest.raises(KeyboardInterrupt):
        pull(client, wanted, out, on_progress=_interrupt_after(2))
    pull(client, wanted, out)
    pull(client, wanted, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_pull_of_an_earlier_version(client: Client, options: SampleOptions, tmp_path: Path) -> None:
    """One that is not complete goes on; a complete one stays what it is, and says why it cannot be extended."""
    wanted, out = options_of("folder", options), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pull(client, wanted, out, on_progress=_interrupt_after(3))
    header = out / ".labelmint-pull" / "header.json"
    header.write_text(header.read_text().replace('"label_mode": "palette", ', ""))
    assert "label_mode" not in header.read_text()
    manifest = pull(client, wanted, out)
    shutil.rmtree(out / ".labelmint-pull")
    assert pull(client, wanted, out) == manifest and verify(out).problems == []
    with pytest.raises(PullError, match="cannot be extended: it has no .labelmint-pull"):
        pull(client, replace(wanted, count=9), out)


def test_a_parquet_pull_of_an_earlier_version(
    client: Client, options: SampleOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had no column of classes. All files of a pull have the same columns, or `datasets` would not open it."""
    wanted, out = options_of("parquet", options), tmp_path / "out"
    with monkeypatch.context() as earlier:
        earlier.setattr(parquet, "_has_classes", lambda directory: False)
        pull(client, replace(wanted, count=4), out)
    pull(client, wanted, out)
    columns = [pq.read_schema(file).names for file in sorted((out / "data").iterdir())]
    assert len(columns) == 3 and all("classes" not in names and names == columns[0] for names in columns)
    pull(client, wanted, tmp_path / "now")
    assert "classes" in pq.read_schema(tmp_path / "now" / "data" / "train-00000.parquet").names


def test_what_would_change_a_data_set_is_refused(client: Client, options: SampleOptions, tmp_path: Path) -> None:
    """Only the count of a complete pull may grow. Each refusal is one line that names the option."""
    wanted, out = options_of("mds", options), tmp_path / "out"
    pull(client, wanted, out)
    before = contents(out)
    for change, told in (
        ({"format": "yolo"}, "format mds, not yolo"),
        ({"start_seed": 1}, "start_seed 0, not 1"),
        ({"shard_count": 2}, "shard_count 1, not 2"),
        ({"samples_per_shard": 4}, "samples_per_shard 3, not 4"),
        ({"ignore_js_quantile": None}, "ignore_js_quantile 0.9, not None"),
        ({"sample": replace(options, max_js=1e9)}, f"max_js {options.max_js}, not 1000000000.0"),
        ({"model": "other"}, "model tiny, not other"),
    ):
        with pytest.raises(PullError) as refused:
            pull(client, replace(wanted, count=20, **change), out)  # type: ignore[arg-type]
        assert told in str(refused.value) and "\n" not in str(refused.value)
    assert contents(out) == before


def test_the_digest_is_kept_to(client: Client, options: SampleOptions, tmp_path: Path) -> None:
    """From the first answer on. The service says another one between it and the walk, as a replica of other weights."""
    asked = iter(("0" * 64, None))
    real = Client.get_model

    class Replaced(Client):
        def get_model(self, model: str, model_version: str = "", *, class_index: int | None = None) -> Model:
            described = real(self, model, model_version, class_index=class_index)
            return replace(described, digest=next(asked) or described.digest)

    with Replaced(client._connection.endpoints) as replicas, pytest.raises(ModelVersionGone, match="000000000000"):
        pull(replicas, options_of("folder", options), tmp_path / "out")
    assert not (tmp_path / "out" / "images").exists()


def _stop(reports: list[Progress], progress: Progress) -> None:
    reports.append(progress)
    raise KeyboardInterrupt


def _interrupt_after(samples: int) -> Callable[[Progress], None]:
    def interrupt(progress: Progress) -> None:
        if progress.done == samples:
            raise KeyboardInterrupt

    return interrupt
