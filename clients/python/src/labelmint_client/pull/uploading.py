"""Uploads a pulled directory to S3, so that a manifest in the bucket means that all its files are there.

Rules of this file:
- A directory's files go first and its `manifest.json` last. The same holds for a directory of parts.
- Each file is hashed while it is sent. If it differs from the manifest, its object is not created.
- An object that is there with the same size and SHA-256 is not sent again. S3 has no SHA-256 of a large object as a
  whole, so each object carries it as metadata.
- Memory does not depend on the size of a file: each worker holds one chunk.
- boto3 reads the credentials, the region and the endpoint from the environment. It comes with the extra `s3`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from labelmint_client.pull.directory import MANIFEST, Json, completed, record
from labelmint_client.pull.errors import PullError
from labelmint_client.pull.pulling import SAMPLES

_WORKERS = 8
_CHUNK = 8 << 20  # a worker's memory; S3 allows 10,000 chunks per object, so larger files get larger ones
_CHUNKS = 10_000
_BATCH = 1000  # files that are queued at a time


@dataclass
class Uploaded:
    """How many files were sent, how many were there already, and whether the manifest of the whole is there now."""

    sent: int = 0
    kept: int = 0
    complete: bool = False


def upload(out: Path | str, url: str, part: str | None = None) -> Uploaded:
    """Upload the complete pull in the directory `out` to `url`, which is s3://BUCKET/PREFIX.

    `out` may be a directory of parts: its manifest lists the manifests of complete pulls below it. With `part`, the
    name of such a pull, only that part is uploaded, and the manifest of the whole if all parts are there. So whoever
    uploads the last part completes the data set. Raises PullError, and OSError if a file cannot be read.
    """
    out = Path(out)
    match = re.fullmatch(r"s3://([^/]+)/*(.*?)/*", url)
    if match is None:
        raise PullError(f"{url} is no address in S3; give s3://BUCKET/PREFIX")
    if part is None:
        _complete(out)
    try:
        bucket = _Bucket(match[1], match[2])
        return _upload_all(bucket, out) if part is None else _upload_part(bucket, out, part)
    except (BotoCoreError, ClientError) as error:
        raise PullError(_told(error, match[1])) from error


def _upload_all(bucket: _Bucket, out: Path) -> Uploaded:
    whole = _complete(out)
    if "parts" not in whole:
        _upload_pull(bucket, out, "")
    else:
        bucket.refuse_another(bucket.head(MANIFEST), record(out, MANIFEST))
        for each in whole["parts"]:
            _upload_pull(bucket, out, f"{Path(each['path']).parent}/")
        if not _upload_whole(bucket, out):
            raise PullError(f"the parts in {out} are not those of its {MANIFEST}; pull them again")
    bucket.done.complete = True
    return bucket.done


def _upload_part(bucket: _Bucket, out: Path, part: str) -> Uploaded:
    # In this order: a manifest of this data set comes to the bucket only after it was in the directory.
    found = bucket.head(MANIFEST)
    bucket.refuse_another(found, record(out, MANIFEST) if completed(out) else {"path": MANIFEST})
    _upload_pull(bucket, out, f"{part}/")
    # Read again: another process may have completed the directory meanwhile, and have found this part missing in S3.
    bucket.done.complete = completed(out) is not None and _upload_whole(bucket, out)
    return bucket.done


def _upload_whole(bucket: _Bucket, out: Path) -> bool:
    """Upload the manifest of a directory of parts if all parts are there, and return whether they are."""
    if not all(bucket.has(part) for part in _complete(out)["parts"]):
        return False
    bucket.send(out, [record(out, MANIFEST)])
    return True


def _complete(directory: Path) -> Json:
    manifest = completed(directory)
    if manifest is None:
        raise PullError(f"{directory} has no {MANIFEST}: it is not a pull, or the pull is not complete")
    return manifest


def _upload_pull(bucket: _Bucket, out: Path, below: str) -> None:
    """Upload a pull in the subdirectory `below`, "" or "NAME/": its files, then its manifest."""
    directory = out / below
    manifest = _complete(directory)
    last = {**record(directory, MANIFEST), "path": f"{below}{MANIFEST}"}
    bucket.refuse_another(bucket.head(last["path"]), last)
    bucket.send(out, ({**file, "path": below + file["path"]} for file in _files(directory, manifest)))
    bucket.send(out, [last])


def _files(directory: Path, manifest: Json) -> Iterator[Json]:
    """Yield the records of all files that belong to a pull, except that of its manifest."""
    yield from manifest["files"]
    for file in manifest["files"]:
        if file["path"] == SAMPLES and record(directory, SAMPLES) != file:
            raise PullError(_changed(directory / SAMPLES))
    with (directory / SAMPLES).open("rb") as lines:
        for line in lines:
            yield from json.loads(line)["files"]


@dataclass
class _Bucket:
    """A prefix in a bucket. `done` counts what `send` did."""

    name: str
    prefix: str
    done: Uploaded = field(default_factory=Uploaded)

    def __post_init__(self) -> None:
        self._s3: Any = boto3.client("s3")
        self._s3.head_bucket(Bucket=self.name)
        self._stop = threading.Event()

    def key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def head(self, path: str) -> Json | None:
        """Return what S3 knows of an object, None if there is none."""
        try:
            found: Json = self._s3.head_object(Bucket=self.name, Key=self.key(path))
        except ClientError as error:
            if _status(error) == 404:
                return None
            raise
        return found

    def has(self, file: Json) -> bool:
        return _is(self.head(file["path"]), file)

    def refuse_another(self, found: Json | None, manifest: Json) -> None:
        """Raise PullError if a manifest was found, and another one: files of two data sets must not be mixed."""
        if found is not None and not _is(found, manifest):
            where = f"s3://{self.name}/{self.key(manifest['path'])}"
            raise PullError(f"{where} belongs to another data set; name another prefix, or remove that object")

    def send(self, out: Path, files: Iterable[Json]) -> None:
        """Send the files that are not there, several at a time. Returns when all are there."""
        remaining = iter(files)
        with ThreadPoolExecutor(_WORKERS) as pool:
            try:
                while batch := list(islice(remaining, _BATCH)):
                    for sent in pool.map(lambda file: self._send(out, file), batch):
                        self.done.sent += sent
                        self.done.kept += not sent
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _send(self, out: Path, file: Json) -> bool:
        """Send one file and return whether that was necessary."""
        if self.has(file):
            return False
        # One thread per file. With more, boto3 would hold several chunks of it in memory.
        chunk = max(_CHUNK, -(-file["bytes"] // _CHUNKS))
        config = TransferConfig(multipart_threshold=chunk, multipart_chunksize=chunk, use_threads=False)
        extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": file["sha256"]}}
        with closing(_Reader(out / file["path"], file, self._stop)) as reader:
            self._s3.upload_fileobj(reader, self.name, self.key(file["path"]), ExtraArgs=extra, Config=config)
        return True


class _Reader:
    """A file that raises at its end if it is not what its record says, so that boto3 gives its object up.

    It cannot seek. Therefore boto3 reads it once, one chunk at a time.
    """

    def __init__(self, path: Path, file: Json, stop: threading.Event) -> None:
        self._file: BinaryIO = path.open("rb")
        self._path = path
        self._expected = file
        self._left: int = file["bytes"]
        self._digest = hashlib.sha256()
        self._stop = stop

    def read(self, size: int = -1) -> bytes:
        if self._stop.is_set():
            raise PullError("the upload was stopped")
        data = self._file.read(size)
        self._digest.update(data)
        self._left -= len(data)
        # The last bytes are checked before boto3 gets them: once it has them, it completes the object.
        over = self._left < 0 or (self._left > 0 and size != 0 and not data)
        if over or (self._left == 0 and self._digest.hexdigest() != self._expected["sha256"]):
            raise PullError(_changed(self._path))
        return data

    def close(self) -> None:
        self._file.close()


def _is(found: Json | None, file: Json) -> bool:
    """Whether an object is the file of this record."""
    if found is None:
        return False
    told = (found["ContentLength"], found["Metadata"].get("sha256"))
    return told == (file.get("bytes"), file.get("sha256"))


def _changed(path: Path) -> str:
    return f"{path} is not what its {MANIFEST} says; run `labelmint verify {path.parent}`, and pull the data set again"


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _told(error: BotoCoreError | ClientError, bucket: str) -> str:
    """Return one line: what S3 or boto3 refused, and what to do."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return (
            "there are no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a role"
        )
    if isinstance(error, ConnectionError | HTTPClientError):
        return f"S3: {error}; run the same command to continue"
    if not isinstance(error, ClientError):
        return f"S3: {' '.join(str(error).split())}"
    if error.response["Error"].get("Code") in ("NoSuchBucket", "404"):
        return f"there is no bucket {bucket!r}; create it, or name another one"
    if _status(error) in (401, 403):
        return (
            f"S3 refuses access to the bucket {bucket!r}: {error}; allow s3:ListBucket, s3:GetObject, s3:PutObject "
            "and s3:AbortMultipartUpload"
        )
    return f"S3: {error}" + ("; run the same command to continue" if _status(error) >= 500 else "")
