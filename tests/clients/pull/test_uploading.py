"""`labelmint upload` to a real S3-compatible server: what is there, in which order, and after which faults."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labelmint_client import Client
from labelmint_client.pull import PullError, PullOptions, pull, uploading, verify
from labelmint_client.pull.uploading import upload
from tests.conftest import ROOT, Service
from tests.support.buckets import NAME, Bucket, s3_server
from tests.support.files import contents

pytestmark = [pytest.mark.triton, pytest.mark.torch]


COUNT = 6
LARGE = 20 << 20  # three chunks


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(autouse=True)
def environment(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def pulled(gateway: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pull of many small files and a large one."""
    out = tmp_path_factory.mktemp("pulled") / "out"
    with Client(gateway.grpc) as client:
        pull(client, PullOptions("tiny", COUNT, "folder", sample=gate()), out)
    add_file(out, "large.bin", os.urandom(LARGE))
    return out


@pytest.fixture
def out(pulled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pulled, tmp_path / "out")


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"sets/{request.node.name.replace('[', '-').strip(']')}"


@pytest.fixture
def parts(gateway: Service, tmp_path: Path) -> Path:
    """Two parts of one data set, and the manifest of the whole as the pull job writes it."""
    directory = tmp_path / "whole"
    records = []
    for index in range(2):
        options = PullOptions("tiny", COUNT, "folder", shard_index=index, shard_count=2, sample=gate())
        with Client(gateway.grpc) as client:
            pull(client, options, directory / f"part-{index}")
        content = (directory / f"part-{index}" / "manifest.json").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        records.append({"path": f"part-{index}/manifest.json", "bytes": len(content), "sha256": digest})
    (directory / "manifest.json").write_text(json.dumps({"parts": records}))
    return directory


def gate() -> Any:
    from labelmint_client import SampleOptions

    return SampleOptions(max_js=1e9)


def add_file(out: Path, name: str, data: bytes) -> None:
    (out / name).write_bytes(data)
    list_file(out, name, len(data), hashlib.sha256(data).hexdigest())


def list_file(out: Path, name: str, size: int, digest: str) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"].append({"path": name, "bytes": size, "sha256": digest})
    (out / "manifest.json").write_text(json.dumps(manifest))


def of_the_pull(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(directory).items() if ".labelmint-pull" not in name}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def test_what_is_uploaded_is_what_was_pulled_and_the_manifest_came_last(bucket: Bucket, out: Path, prefix: str) -> None:
    done = upload(out, f"s3://{NAME}/{prefix}/")
    whole = of_the_pull(out)
    assert bucket.contents(prefix) == whole
    assert (done.sent, done.kept, done.complete) == (len(whole), 0, True)
    order = bucket.written(prefix)
    assert order[-1] == "manifest.json" and sorted(order) == sorted(whole)
    # Nothing is sent again.
    again = upload(out, f"s3://{NAME}/{prefix}")
    assert (again.sent, again.kept, again.complete) == (0, len(whole), True)
    assert bucket.written(prefix) == order


def test_s3_checks_what_it_gets(bucket: Bucket, out: Path, prefix: str) -> None:
    """S3 has the SHA-256 that boto3 computed of what it sent. The object names that of the whole file."""
    upload(out, f"s3://{NAME}/{prefix}")
    for name, data in of_the_pull(out).items():
        found = bucket.s3.head_object(Bucket=NAME, Key=f"{prefix}/{name}", ChecksumMode="ENABLED")
        assert found["Metadata"] == {"sha256": hashlib.sha256(data).hexdigest()}
        assert "ChecksumSHA256" in found, name
        if len(data) < LARGE:
            assert base64.b64decode(found["ChecksumSHA256"]).hex() == hashlib.sha256(data).hexdigest()


def test_killed_at_any_moment_it_goes_on(bucket: Bucket, out: Path, prefix: str) -> None:
    whole = run("tests.support.killed_upload", out, f"s3://{NAME}/{prefix}-whole", 0)
    assert whole.returncode == 0, whole.stderr
    steps, expected = int(whole.stdout), of_the_pull(out)
    kept = 0
    for kill_at in (1, steps // 3, steps // 3, steps // 4):
        killed = run("tests.support.killed_upload", out, f"s3://{NAME}/{prefix}", kill_at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        there = bucket.contents(prefix)
        assert "manifest.json" not in there
        assert there.items() <= expected.items(), "an object that is there is whole"
        assert len(there) >= kept
        kept = len(there)
    assert 0 < kept < len(expected)
    before = len(bucket.written(prefix))
    done = upload(out, f"s3://{NAME}/{prefix}")
    # The server may complete an object that it got from a killed process just after the process was killed.
    assert done.kept >= kept and done.kept + done.sent == len(expected)
    assert bucket.contents(prefix) == expected
    last = bucket.written(prefix)[before:]
    assert last[-1] == "manifest.json" and not set(last) & there.keys(), "nothing is sent again"


@pytest.mark.parametrize("change", ["flip", "grow", "shrink"])
@pytest.mark.parametrize("name", ["large.bin", "samples.jsonl", "README.md"])
def test_a_changed_file_is_refused(bucket: Bucket, out: Path, prefix: str, name: str, change: str) -> None:
    data = bytearray((out / name).read_bytes())
    if change == "flip":
        data[-1] ^= 1
    (out / name).write_bytes(data + b"x" if change == "grow" else data[:-1] if change == "shrink" else data)
    with pytest.raises(PullError, match=f"{name} is not what its manifest.json says; run `labelmint verify"):
        upload(out, f"s3://{NAME}/{prefix}")
    assert not bucket.keys(prefix) & {name, "manifest.json"}
    uploads = bucket.s3.list_multipart_uploads(Bucket=NAME, Prefix=f"{prefix}/")
    assert not uploads.get("Uploads"), "no chunk stays in the bucket"


def test_a_changed_list_of_files_is_refused_even_if_the_right_one_is_there(
    bucket: Bucket, out: Path, prefix: str
) -> None:
    upload(out, f"s3://{NAME}/{prefix}")
    images = [name for name in bucket.keys(prefix) if name.startswith("images/")]
    for name in ("manifest.json", images[0]):
        bucket.s3.delete_object(Bucket=NAME, Key=f"{prefix}/{name}")
    (out / "samples.jsonl").write_text("")
    with pytest.raises(PullError, match="samples.jsonl is not what"):
        upload(out, f"s3://{NAME}/{prefix}")
    assert "manifest.json" not in bucket.keys(prefix)


def test_an_object_with_other_bytes_is_replaced(bucket: Bucket, out: Path, prefix: str) -> None:
    """Of the same size, with another hash or none."""
    data = (out / "README.md").read_bytes()
    for metadata in ({}, {"sha256": "0" * 64}):
        bucket.s3.put_object(Bucket=NAME, Key=f"{prefix}/README.md", Body=b"x" * len(data), Metadata=metadata)
        assert upload(out, f"s3://{NAME}/{prefix}").sent >= 1
        assert bucket.contents(prefix)["README.md"] == data


def test_another_data_set_is_not_mixed_with(bucket: Bucket, out: Path, parts: Path, prefix: str) -> None:
    upload(out, f"s3://{NAME}/{prefix}")
    before = bucket.contents(prefix)
    with pytest.raises(PullError, match=f"{prefix}/manifest.json belongs to another data set; name another prefix"):
        upload(parts / "part-0", f"s3://{NAME}/{prefix}")
    for part in (None, "part-0"):
        with pytest.raises(PullError, match="belongs to another data set"):
            upload(parts, f"s3://{NAME}/{prefix}", part)
    (parts / "manifest.json").unlink()
    with pytest.raises(PullError, match="belongs to another data set"):
        upload(parts, f"s3://{NAME}/{prefix}", "part-0")
    assert bucket.contents(prefix) == before


def test_parts_one_after_the_other(bucket: Bucket, parts: Path, prefix: str) -> None:
    """The first pod ends before the whole is known, as in the job."""
    (parts / "manifest.json").rename(parts / "later")
    url = f"s3://{NAME}/{prefix}"
    first = run("labelmint_client", "upload", parts, url, "--part", "part-0")
    assert first.returncode == 0 and f"{url} has part-0: " in first.stdout, first.stderr
    assert bucket.keys(prefix) == {f"part-0/{name}" for name in of_the_pull(parts / "part-0")}
    (parts / "later").rename(parts / "manifest.json")
    assert not upload(parts, url, "part-0").complete, "part 1 is not there"
    second = run("labelmint_client", "upload", parts, url, "--part", "part-1")
    assert second.returncode == 0 and f"{url} is complete: " in second.stdout, second.stderr
    assert bucket.contents(prefix) == of_the_pull(parts)
    assert bucket.written(prefix)[-1] == "manifest.json"
    # A restarted pod, and a person with the whole directory, find everything there.
    assert (upload(parts, url, "part-0").sent, upload(parts, url).sent) == (0, 0)


def test_the_whole_is_read_after_the_part_was_sent(
    bucket: Bucket, parts: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another pod completes the directory while this one sends the last part."""
    url = f"s3://{NAME}/{prefix}"
    (parts / "manifest.json").rename(parts / "later")
    upload(parts, url, "part-0")
    sent = uploading._upload_pull

    def then_completed(*arguments: Any) -> None:
        sent(*arguments)
        (parts / "later").rename(parts / "manifest.json")

    monkeypatch.setattr(uploading, "_upload_pull", then_completed)
    assert upload(parts, url, "part-1").complete
    assert bucket.contents(prefix) == of_the_pull(parts)


def test_two_parts_at_once(bucket: Bucket, parts: Path, prefix: str) -> None:
    add_file(parts / "part-0", "large.bin", os.urandom(LARGE))
    whole = json.loads((parts / "manifest.json").read_text())
    content = (parts / "part-0" / "manifest.json").read_bytes()
    whole["parts"][0].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (parts / "manifest.json").write_text(json.dumps(whole))
    url = f"s3://{NAME}/{prefix}"
    command = [sys.executable, "-m", "labelmint_client", "upload", str(parts), url, "--part"]
    both = [subprocess.Popen([*command, f"part-{k}"], stdout=subprocess.PIPE, text=True) for k in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert any(f"{url} is complete" in text for text in said)
    assert bucket.contents(prefix) == of_the_pull(parts)
    order = bucket.written(prefix)
    assert order[-1] == "manifest.json" and {"part-0/manifest.json", "part-1/manifest.json"} < set(order)


def test_a_part_that_the_whole_does_not_know_is_refused(bucket: Bucket, parts: Path, prefix: str) -> None:
    add_file(parts / "part-1", "more.bin", b"more")
    with pytest.raises(PullError, match="the parts in .* are not those of its manifest.json"):
        upload(parts, f"s3://{NAME}/{prefix}")
    assert "manifest.json" not in bucket.keys(prefix)


def test_a_directory_of_parts_is_verified_part_by_part(parts: Path) -> None:
    report = verify(parts)
    each = [verify(parts / f"part-{index}").files for index in range(2)]
    assert (report.files, report.problems) == (sum(each) + 2, [])
    (parts / "part-0" / "README.md").write_text("")
    (parts / "part-1" / "manifest.json").unlink()
    first, second = verify(parts).problems
    assert first.startswith("part-0/README.md: 0 bytes, not ")
    assert second == "part-1/manifest.json: No such file or directory"


def test_errors_are_one_line(bucket: Bucket, out: Path, tmp_path: Path) -> None:
    url = f"s3://{NAME}/x"
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    nobody |= dict.fromkeys(("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"), str(tmp_path / "none"))
    for arguments, environment, said in (
        ((out, "s3://no-such-bucket/x"), {}, "there is no bucket 'no-such-bucket'; create it, or name another one"),
        ((out, url), nobody, "there are no credentials for S3; set AWS_ACCESS_KEY_ID"),
        ((out, url), {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "Could not connect to the endpoint URL"),
        ((out, "data/x"), {}, "data/x is no address in S3; give s3://BUCKET/PREFIX"),
        ((out, "s3://a b/x"), {}, 'Invalid bucket name "a b"'),
        ((tmp_path, url), {}, f"{tmp_path} has no manifest.json: it is not a pull, or the pull is not complete"),
        ((out, url, "--part", "part-7"), {}, "part-7 has no manifest.json"),
    ):
        done = run("labelmint_client", "upload", *arguments, **environment)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert done.stderr.startswith("labelmint: ") and done.stderr.count("\n") == 1, done.stderr
    script = (
        "import sys; sys.modules['boto3'] = None; import labelmint_client.cli as c; c.main(['upload', '.', 's3://b'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    wanted = "labelmint: boto3 is missing; run `pip install './clients/python[pull,s3]'` in a clone of labelmint\n"
    assert (done.returncode, done.stderr) == (2, wanted)


def test_memory_does_not_depend_on_the_size_of_a_file(bucket: Bucket, out: Path, prefix: str) -> None:
    """LARGE, 12 times. A file of the same size would be seen in the peak as a whole."""
    peaks = []
    for size in (1 << 20, 12 * LARGE):
        here = shutil.copytree(out, out.parent / str(size))
        (here / "sparse.bin").touch()
        os.truncate(here / "sparse.bin", size)
        digest = hashlib.sha256(bytes(size)).hexdigest()
        list_file(here, "sparse.bin", size, digest)
        peaks.append(peak(here, f"s3://{NAME}/{prefix}-{size}"))
        assert bucket.s3.head_object(Bucket=NAME, Key=f"{prefix}-{size}/sparse.bin")["ContentLength"] == size
    assert peaks[1] - peaks[0] < 12 * LARGE / 2**20 / 4, peaks


def peak(out: Path, url: str) -> float:
    """Upload in a process and return its largest memory in megabytes."""
    script = (
        "import sys; from labelmint_client.pull.uploading import upload; from tests.support.memory import memory\n"
        "upload(sys.argv[1], sys.argv[2]); print(memory('self', 'VmHWM'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(out), url], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)
