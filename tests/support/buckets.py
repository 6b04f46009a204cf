"""A real S3-compatible server, moto's, with one bucket."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3

from tests.support.waiting import wait_for

NAME = "data-sets"


class Bucket:
    """The bucket of a running server. `environment` is what programs need to reach it."""

    def __init__(self, endpoint: str, log: Path) -> None:
        self.environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.s3: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        self.s3.create_bucket(Bucket=NAME)
        self._log = log

    def keys(self, prefix: str) -> set[str]:
        """Return the keys below a prefix, without it."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=NAME, Prefix=f"{prefix}/")
        return {each["Key"].removeprefix(f"{prefix}/") for page in pages for each in page.get("Contents", [])}

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Return the bytes of all objects below a prefix, by their keys without it."""
        return {key: self.s3.get_object(Bucket=NAME, Key=f"{prefix}/{key}")["Body"].read() for key in self.keys(prefix)}

    def written(self, prefix: str) -> list[str]:
        """Return the keys that were completed below a prefix, in this order, once per write, without the prefix."""
        lines = re.findall(rf'"\S*?(PUT|POST) /{NAME}/{prefix}/(\S+) HTTP', self._log.read_text())
        # A large object is completed by a POST with its upload's id; its chunks are PUTs with a number.
        return [
            target.partition("?")[0]
            for method, target in lines
            if (method == "PUT" and "?" not in target) or (method == "POST" and "uploadId=" in target)
        ]


@contextmanager
def s3_server(directory: Path) -> Iterator[Bucket]:
    log = directory / "s3.log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
        environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb"}
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    try:
        address = wait_for(lambda: re.search(r"Running on (http://\S+?:\d+)", log.read_text()) or process.poll())
        assert isinstance(address, re.Match), log.read_text()
        yield Bucket(address[1], log)
    finally:
        process.kill()
        process.wait()
