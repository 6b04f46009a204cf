"""Writes the samples of a walk into a directory, goes on where a killed pull stopped, and ends with the same bytes.

Rules of this file:
- What is written depends on the options and the model alone: no time, no host, no order of arrival.
- A pull keeps to the model version, digest and calibration that it began with.
- What is done is a number of shards, of which the last may have room. Whatever ends a pull, what it received is a shard
  then; only a kill loses the one that was under way.
- More samples go into the room of the last shard and into further ones, as if they had been asked for at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from labelmint_client import Client, Model, Sample, SampleOptions
from labelmint_client.pull.directory import Json, PullDirectory, completed, extensible, to_json
from labelmint_client.pull.errors import PullError
from labelmint_client.pull.formats import FORMATS, LabelMode, Written, open_format
from labelmint_client.pull.interrupts import put_off
from labelmint_client.pull.labels import labels_of
from labelmint_client.pull.pixels import IGNORE, written_label
from labelmint_client.pull.readme import README, readme
from labelmint_client.pull.samples import digests, evidence, model_json

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class PullOptions:
    """What is pulled; raises PullError where that cannot be.

    model, model_version: the version that is the highest now, where none is named.
    count: samples to write. All are accepted ones, unless `sample.include_rejected` is set.
    format: what they are written as.
    start_seed, shard_index, shard_count: the walk, as in `Client.stream_samples`; `count` is this shard's.
    samples_per_shard: of a tar or Parquet file; a pull that is killed does no more than these again.
    label_mode: what the values of label PNGs look like in `folder` and `parquet`: coloured ("palette") or gray ("ids").
    ignore_js_quantile: 0 to 1; pixels whose JS is above this quantile of their own image's become 255.
    sample: gate, truncation and mixing. What is delivered and how it travels is the pull's to choose.
    """

    model: str
    count: int
    format: Literal["webdataset", "coco", "folder", "parquet"] = "webdataset"
    model_version: str = ""
    start_seed: int = 0
    shard_index: int = 0
    shard_count: int = 1
    samples_per_shard: int = 500
    label_mode: LabelMode = "palette"
    ignore_js_quantile: float | None = None
    sample: SampleOptions = field(default_factory=SampleOptions)

    def __post_init__(self) -> None:
        quantile = self.ignore_js_quantile
        gate = SampleOptions(**{name: getattr(self.sample, name) for name in _GATE})
        for wrong, what in (
            (self.format not in FORMATS, f"format {self.format!r} is not one of {', '.join(FORMATS)}"),
            (self.count < 1, f"count is {self.count}; give at least 1"),
            (self.label_mode not in ("palette", "ids"), f"label_mode is {self.label_mode!r}; give 'palette' or 'ids'"),
            (
                self.label_mode == "ids" and self.format not in ("folder", "parquet"),
                f"format {self.format!r} writes no label PNGs that label_mode could be for",
            ),
            (self.samples_per_shard < 1, f"samples_per_shard is {self.samples_per_shard}; give at least 1"),
            (quantile is not None and not 0 <= quantile <= 1, f"ignore_js_quantile is {quantile}; give 0 to 1"),
            (self.sample != gate, "a pull itself chooses image_encoding, include_js_map, omit_image and omit_label"),
        ):
            if wrong:
                raise PullError(what)

    def wire(self) -> SampleOptions:
        """What each sample is asked for with."""
        return dataclasses.replace(self.sample, include_js_map=self.ignore_js_quantile is not None)

    def to_json(self) -> Json:
        return {**vars(self), "sample": {name: getattr(self.sample, name) for name in _GATE}}

    @classmethod
    def from_json(cls, value: Json) -> PullOptions:
        return cls(**{**value, "sample": SampleOptions(**value["sample"])})


_GATE = ("truncation_psi", "max_js", "max_quantile", "include_rejected", "style_seed", "crossover")


@dataclass(frozen=True)
class Progress:
    """How far a pull is, earlier runs included: samples taken, how many of them accepted, and seeds walked over."""

    done: int
    accepted: int
    seeds: int


def pull(
    client: Client, options: PullOptions, out: Path | str, on_progress: Callable[[Progress], None] = lambda _: None
) -> Json:
    """Writes the samples into the directory `out`, or the rest of them; returns the manifest.

    Called again after any end, with the same options, it goes on; a complete directory is left as it is, without a
    call to the service. With a larger count it goes on too, also where the smaller one is complete, and ends with the
    bytes of one pull of that count. Raises PullError, and LabelmintError where the service is the cause.
    """
    out = Path(out)
    manifest = completed(out)
    if manifest is not None:
        _check_same(out, manifest, options)
        if options.count == manifest["request"]["count"]:
            return manifest
        if not extensible(out):
            raise PullError(
                f"{out} is complete and cannot be extended: it has no .labelmint-pull, which an earlier version did "
                "not keep; pull the further samples into another directory"
            )
    try:
        with PullDirectory(out) as directory:
            return _Pull(client, options, directory).run(on_progress)
    except OSError as error:
        what = f"{error.filename or out}: {os.strerror(error.errno) if error.errno else error}"
        raise PullError(f"{what}; the shards that are done are kept: the same command goes on from there") from error


class _Pull:
    """A pull in a directory that this process holds."""

    def __init__(self, client: Client, options: PullOptions, directory: PullDirectory) -> None:
        self._client = client
        self._options = options
        self._directory = directory
        header = directory.header()
        self._begun = header is not None and header["request"]["count"] == options.count
        self._model, self._header = self._keep_to(header)
        self._format = open_format(options.format, directory, self._model, options.label_mode)
        # What the parts say is done, but for a last one with room, and what the shard under way has.
        self._next_shard, self._done, self._accepted, self._next_seed = 0, 0, 0, options.start_seed
        self._samples: list[Json] = []
        self._samples_accepted = 0
        self._with_room: Json | None = None
        self._whole = False  # whether what was received can be made a shard
        last = None
        for last in directory.parts():
            self._count(last)
        if last is not None and self._done < options.count and len(last["samples"]) < options.samples_per_shard:
            self._open(last)

    def run(self, on_progress: Callable[[Progress], None]) -> Json:
        if self._done < self._options.count:
            try:
                self._walk(on_progress)
            except BaseException:
                if self._whole and self._samples:
                    self._end_shard()
                raise
        return self._finish()

    def _open(self, last: Json) -> None:
        """Makes a shard that has room the one under way."""
        self._with_room = last
        self._samples, self._samples_accepted = last["samples"], last["accepted"]
        self._next_shard -= 1
        self._done -= len(self._samples)
        self._accepted -= self._samples_accepted

    def _keep_to(self, header: Json | None) -> tuple[Model, Json]:
        """The model, and the head of the manifest; `header` is what the pull began with, None where it begins now."""
        out, options = self._directory.path, self._options
        if header is not None:
            _check_same(out, header, options)
        version = options.model_version if header is None else header["model"]["version"]
        model = self._client.get_model(options.model, version)
        if options.ignore_js_quantile is not None and not labels_of(model).HAS_LABEL_IMAGE:
            raise PullError(f"model {model.name!r} has task {model.task!r}: there are no label pixels to ignore")
        if options.label_mode == "ids" and not labels_of(model).HAS_LABEL_IMAGE:
            raise PullError(
                f"model {model.name!r} has task {model.task!r}: it has no label PNGs that label_mode could be for"
            )
        if len(model.class_names) > IGNORE:
            raise PullError(f"model {model.name!r} has {len(model.class_names)} classes; {IGNORE} is the ignore label")
        now = {"request": options.to_json(), "model": model_json(model, calibrated=options.sample.max_js is None)}
        if header is not None and header["model"] != now["model"]:
            raise PullError(
                f"{out} began with other weights or another calibration than {model.name} version {version} has now "
                f"(digest {header['model']['digest'][:12]}..., now {model.digest[:12]}...); pull into another directory"
            )
        return model, now

    def _walk(self, on_progress: Callable[[Progress], None]) -> None:
        options = self._options
        stream = self._client.stream_samples(
            options.model,
            self._next_seed,
            count=options.count - self._done - len(self._samples),
            shard_index=options.shard_index,
            shard_count=options.shard_count,
            options=options.wire(),
            model_version=self._model.version,
            model_digest=self._model.digest,
        )
        on_progress(self._progress(self._next_seed))
        with stream:
            for sample in stream.with_heartbeats():
                if sample is not None:
                    with put_off():
                        self._take(sample)
                on_progress(self._progress(stream.next_seed))
        if self._done < options.count:
            raise PullError(
                f"the seeds end after {self._done + len(self._samples)} of {options.count} samples; ask for fewer, or "
                "give an earlier start seed or a wider gate"
            )

    def _progress(self, next_seed: int) -> Progress:
        done, accepted = self._done + len(self._samples), self._accepted + self._samples_accepted
        return Progress(done, accepted, self._seeds(next_seed))

    def _take(self, sample: Sample) -> None:
        calibration = self._header["model"]["calibration"]
        if calibration is not None and sample.calibration_id != calibration["id"]:
            raise PullError(f"{self._options.model} was calibrated anew while it was pulled; pull it anew")
        self._whole = False
        self._begin()
        written, line = as_written(sample, self._model, self._options.ignore_js_quantile)
        kept = self._format.add(written)
        line = {**line, "shard": self._next_shard, "files": kept.files}
        self._samples.append({"line": line, "annotations": kept.annotations})
        self._samples_accepted += sample.accepted
        if (
            len(self._samples) == self._options.samples_per_shard
            or self._done + len(self._samples) == self._options.count
        ):
            self._end_shard()
        self._whole = True

    def _begin(self) -> None:
        """Before the first sample: the service has accepted the options; those that it refuses change nothing."""
        if not self._begun:
            self._directory.begin(self._header)
            self._begun = True
        if self._with_room is not None:
            self._format.reopen(self._with_room["files"], len(self._samples))
            self._with_room = None

    def _end_shard(self) -> None:
        part = {
            "files": self._format.end_shard(self._next_shard),
            "samples": self._samples,
            "accepted": self._samples_accepted,
            "next_seed": self._samples[-1]["line"]["seed"] + 1,
        }
        self._directory.add_part(self._next_shard, part)
        self._samples, self._samples_accepted = [], 0
        self._count(part)

    def _count(self, part: Json) -> None:
        self._next_shard += 1
        self._done += len(part["samples"])
        self._accepted += part["accepted"]
        self._next_seed = part["next_seed"]

    def _seeds(self, next_seed: int) -> int:
        """How many seeds of the walk lie below next_seed."""
        first, index, step = self._options.start_seed, self._options.shard_index, self._options.shard_count
        return len(range(first + (index - first) % step, next_seed, step))

    def _finish(self) -> Json:
        files = [file for part in self._directory.parts() for file in part["files"]]
        files += self._format.finish()
        with self._directory.aside.open("wb") as lines:
            for part in self._directory.parts():
                lines.writelines(to_json(sample["line"]) for sample in part["samples"])
        files.append(self._directory.publish(SAMPLES))
        text = readme(self._options.format, self._options.label_mode, self._model)
        files.append(self._directory.write(README, text.encode()))
        manifest = {
            **self._header,
            "sample_count": self._done,
            "accepted_count": self._accepted,
            "rejected_count": self._seeds(self._next_seed) - self._accepted,
            "next_seed": self._next_seed,
            "files": files,
        }
        self._directory.complete(manifest)
        return manifest


def as_written(sample: Sample, model: Model, ignore_js_quantile: float | None) -> tuple[Written, Json]:
    """A sample as it is written, and what the manifest tells of it."""
    assert sample.image is not None, "the image was left out"
    label = written_label(sample, ignore_js_quantile)
    told = evidence(sample, model)
    return Written(sample.seed, sample.image, label, told), {**told, **digests(sample.image, label)}


def _check_same(out: Path, header: Json, options: PullOptions) -> None:
    # What an earlier version did not write down has its default.
    asked, begun = options.to_json(), PullOptions.from_json(header["request"]).to_json()
    asked, begun = ({**request, **request["sample"]} for request in (asked, begun))
    other = [
        f"{name} {begun[name]}, not {asked[name]}"
        for name in asked
        if name != "sample" and begun[name] != asked[name] and not (name == "count" and asked[name] > begun[name])
    ]
    if other:
        raise PullError(
            f"{out} holds a pull with {'; '.join(other)}: name another directory, or give the same options (the count "
            "may be larger)"
        )
