"""Checks a pulled directory: its files against the manifest, and its samples against a live service.

Rules of this file:
- All differences are reported, not only the first, one line each.
- A live sample goes through the same steps as in the pull, and is then compared with its line in `samples.jsonl`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from labelmint_client import Client, Filtered, Sample
from labelmint_client.pull.directory import MANIFEST, Json, completed, record
from labelmint_client.pull.errors import PullError
from labelmint_client.pull.labels import NO_FIELDS
from labelmint_client.pull.pulling import SAMPLES, PullOptions, as_written
from labelmint_client.pull.samples import other_executor

_BATCH = 8  # 32 MB at 1024 x 1024


@dataclass(frozen=True)
class Report:
    """The numbers of compared files and samples, and the differences, one line each: `problems` is empty if none."""

    files: int
    samples: int
    problems: list[str]


def verify(out: Path | str, client: Client | None = None, sample_count: int | None = None) -> Report:
    """Compare the sizes and SHA-256 of all files with the manifest; with a client, also samples with the service.

    sample_count: how many samples to request from the service, spread evenly over the pull; None for all.
    A directory of parts, as many pods pull it, has a manifest that lists the parts: each of them is compared.
    Raises PullError if there is no complete pull, and LabelmintError if a call to the service fails.
    """
    out = Path(out)
    manifest = completed(out)
    if manifest is None:
        raise PullError(f"{out} has no {MANIFEST}: it is not a pull, or the pull is not complete")
    if "parts" in manifest:
        return _verify_parts(out, manifest["parts"], client, sample_count)
    problems, files = [], 0
    for file in (*manifest["files"], *(file for line in _lines(out) for file in line["files"])):
        problems += _file_problems(out, file)
        files += 1
    if client is None:
        return Report(files, 0, problems)
    total = manifest["sample_count"]
    count = total if sample_count is None else min(sample_count, total)
    chosen = (line for index, line in enumerate(_lines(out)) if index * count % total < count)
    compared, differing = _compare(client, manifest, chosen)
    return Report(files, compared, problems + differing)


def _verify_parts(out: Path, parts: list[Json], client: Client | None, sample_count: int | None) -> Report:
    """Verify a directory whose manifest lists the manifests of complete pulls below it. They share the samples."""
    share = None if sample_count is None else -(-sample_count // len(parts))
    files, samples, problems = 0, 0, list[str]()
    for part in parts:
        directory = (out / part["path"]).parent
        problems += _file_problems(out, part)
        files += 1
        if completed(directory) is not None:
            report = verify(directory, client, share)
            files, samples = files + report.files, samples + report.samples
            problems += [f"{directory.name}/{problem}" for problem in report.problems]
    return Report(files, samples, problems)


def _lines(out: Path) -> Iterator[Json]:
    """Yield the lines of `samples.jsonl`, up to the first line that cannot be read."""
    try:
        with (out / SAMPLES).open("rb") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError):
        return  # the check of the file itself reports that it is missing or changed


def _file_problems(out: Path, file: Json) -> list[str]:
    path = file["path"]
    try:
        found = record(out, path)
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    if found["bytes"] != file["bytes"]:
        return [f"{path}: {found['bytes']} bytes, not {file['bytes']}"]
    if found["sha256"] != file["sha256"]:
        return [f"{path}: SHA-256 {found['sha256'][:12]}..., not {file['sha256'][:12]}..."]
    return []


def _compare(client: Client, manifest: Json, lines: Iterator[Json]) -> tuple[int, list[str]]:
    """Return how many samples were compared, and the differences."""
    options = PullOptions.from_json(manifest["request"])
    pulled = manifest["model"]
    model = client.get_model(pulled["name"], pulled["version"])
    if model.digest != pulled["digest"]:
        return 0, [_other_weights(model.digest, pulled["digest"])]
    if otherwise := other_executor(pulled, model):
        return 0, [otherwise]
    wire = dataclasses.replace(options.wire(), include_rejected=True)
    compared, problems = 0, list[str]()
    while batch := list(islice(lines, _BATCH)):
        seeds = [line["seed"] for line in batch]
        outcomes = client.batch_get_samples(model.name, seeds, wire, model_version=model.version)
        for line, sample in zip(batch, outcomes, strict=True):
            if isinstance(sample, Filtered):
                problems.append(f"seed {line['seed']}: content {line.get('content')}, served {dict(sample.content)}")
                continue
            assert isinstance(sample, Sample), "the request includes rejected samples"
            if sample.model_digest != pulled["digest"]:
                # One of several gateways serves other weights. Stop here, because each of its samples would differ.
                return compared, [*problems, _other_weights(sample.model_digest, pulled["digest"])]
            _, served = as_written(sample, model)
            line = {**NO_FIELDS, **line}  # the version that pulled may have known fewer tasks
            other = [
                f"{name} {line.get(name)}, served {served[name]}" for name in served if line.get(name) != served[name]
            ]
            if other:
                problems.append(f"seed {line['seed']}: {'; '.join(other)}")
        compared += len(batch)
    return compared, problems


def _other_weights(served: str, pulled: str) -> str:
    return f"the service has digest {served[:12]}..., the pull has {pulled[:12]}...: other weights"
