"""Writes the samples of a walk into a directory. A killed pull can continue, and ends with the same bytes.

Rules of this file:
- The written bytes depend only on the options and the model, not on time, host or order of arrival.
- A pull stays with the model version, digest and calibration that it began with.
- Completed work is a number of shards; the last one may be partly full. If a pull ends early, the samples that it
  received become a shard. Only a kill loses the current shard.
- Further samples first fill the last shard and then go into new ones. The result is the same as that of a single pull.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from labelmint_client import Client, Model, Sample, SampleOptions
from labelmint_client.progress import Progress
from labelmint_client.pull.directory import Json, PullDirectory, completed, extensible, to_json
from labelmint_client.pull.errors import PullError
from labelmint_client.pull.formats import FORMATS, LabelMode, Written, open_format
from labelmint_client.pull.interrupts import put_off
from labelmint_client.pull.labels import labels_of
from labelmint_client.pull.pixels import IGNORE
from labelmint_client.pull.readme import README, readme
from labelmint_client.pull.samples import NO_NAMES, digests, evidence, model_json, other_executor
from labelmint_client.pull_formats import LABEL_MODES, PULL_FORMATS

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class PullOptions:
    """The options of a pull; raises PullError for invalid ones.

    model, model_version: the model and its version. Without a version, the pull takes the highest one at its beginning.
    count: how many samples to write. All are accepted ones, unless `sample.include_rejected` is set.
    format: the format of the data set, one of `PULL_FORMATS`.
    start_seed, shard_index, shard_count: the walk, as in `Client.stream_samples`; `count` is for this shard alone.
    samples_per_shard: samples per tar, Parquet or MDS file. A killed pull repeats at most this many samples.
    label_mode: the kind of label PNGs in `folder` and `parquet`: coloured ("palette") or gray ("ids").
    ignore_js_quantile: 0 to 1; pixels whose JS divergence is above this quantile of their own image become 255.
    sample: gate, conditions, truncation, style mixing and class. The pull itself chooses the other options.
    """

    model: str
    count: int
    format: str = "webdataset"
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
                self.label_mode == "ids" and self.format not in LABEL_MODES,
                f"format {self.format!r} writes label PNGs of one kind or no label PNGs: leave out label_mode",
            ),
            (self.samples_per_shard < 1, f"samples_per_shard is {self.samples_per_shard}; give at least 1"),
            (quantile is not None and not 0 <= quantile <= 1, f"ignore_js_quantile is {quantile}; give 0 to 1"),
            (
                self.sample != gate,
                "leave out image_encoding, include_js_map, omit_image, omit_label and the sample's own "
                "ignore_js_quantile: a pull sets them",
            ),
        ):
            if wrong:
                raise PullError(what)

    def wire(self) -> SampleOptions:
        """Return the options of the requests to the service."""
        return dataclasses.replace(self.sample, ignore_js_quantile=self.ignore_js_quantile)

    def to_json(self) -> Json:
        sample = {name: getattr(self.sample, name) for name in _GATE}
        return {**vars(self), "sample": {**sample, "where": list(self.sample.where)}}

    @classmethod
    def from_json(cls, value: Json) -> PullOptions:
        return cls(**{**value, "sample": SampleOptions(**value["sample"])})


_GATE = (
    "truncation_psi",
    "max_js",
    "max_quantile",
    "include_rejected",
    "style_seed",
    "crossover",
    "where",
    "class_index",
)


def pull(
    client: Client, options: PullOptions, out: Path | str, *, on_progress: Callable[[Progress], None] = lambda _: None
) -> Json:
    """Write the samples, or the rest of them, into the directory `out` and return the manifest.

    After an interruption, a call with the same options continues the pull. A complete directory stays unchanged; the
    service is not called then. A larger count extends a pull, even a complete one, and gives the bytes of a single pull
    of that count. Raises PullError, and LabelmintError for errors of the service.
    """
    out = Path(out)
    manifest = completed(out)
    if manifest is not None:
        _check_same(out, manifest, options)
        if options.count == manifest["request"]["count"]:
            return manifest
        if not extensible(out):
            raise PullError(
                f"{out} is complete and cannot be extended: it has no .labelmint-pull, which earlier versions removed; "
                "pull the further samples into another directory"
            )
    try:
        with PullDirectory(out) as directory:
            return _Pull(client, options, directory).run(on_progress)
    except OSError as error:
        what = f"{error.filename or out}: {os.strerror(error.errno) if error.errno else error}"
        raise PullError(f"{what}; completed shards are kept: run the same command to continue") from error


class _Pull:
    """A pull in a directory that this process has locked."""

    def __init__(self, client: Client, options: PullOptions, directory: PullDirectory) -> None:
        self._client = client
        self._options = options
        self._directory = directory
        header = directory.header()
        self._begun = header is not None and header["request"]["count"] == options.count
        self._model, self._header = self._keep_to(header)
        self._format = open_format(options.format, directory, self._model, label_mode=options.label_mode)
        # The completed shards as recorded by the parts, without a last one that has room; then the current shard.
        self._next_shard, self._done, self._accepted, self._next_seed = 0, 0, 0, options.start_seed
        self._samples: list[Json] = []
        self._samples_accepted = 0
        self._filtered = 0  # seeds up to the last sample
        self._with_room: Json | None = None
        self._whole = False  # whether the received samples can become a shard now
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
        """Make a shard that has room the current one."""
        self._with_room = last
        self._samples, self._samples_accepted = last["samples"], last["accepted"]
        self._next_shard -= 1
        self._done -= len(self._samples)
        self._accepted -= self._samples_accepted

    def _keep_to(self, header: Json | None) -> tuple[Model, Json]:
        """Return the model and the head of the manifest. `header` is that of an earlier run; None if there was none."""
        out, options = self._directory.path, self._options
        if header is not None:
            _check_same(out, header, options)
        version = options.model_version if header is None else header["model"]["version"]
        model = self._client.get_model(options.model, version, class_index=options.sample.class_index)
        if options.ignore_js_quantile is not None and not labels_of(model).HAS_LABEL_IMAGE:
            raise PullError(f"model {model.name!r} has task {model.task!r}: there are no label pixels to ignore")
        if options.label_mode == "ids" and not labels_of(model).HAS_LABEL_IMAGE:
            raise PullError(
                f"model {model.name!r} has task {model.task!r}: it has no label PNGs, so leave out label_mode"
            )
        if PULL_FORMATS[options.format].only_label_images and not labels_of(model).HAS_LABEL_IMAGE:
            raise PullError(
                f"model {model.name!r} has task {model.task!r}: format {options.format!r} holds only label images; use "
                f"{', '.join(name for name, each in PULL_FORMATS.items() if not each.only_label_images)}"
            )
        if len(model.class_names) > IGNORE:
            raise PullError(f"model {model.name!r} has {len(model.class_names)} classes; {IGNORE} is the ignore label")
        now = {"request": options.to_json(), "model": model_json(model, calibrated=options.sample.max_js is None)}
        if header is not None and (other := other_executor(header["model"], model)):
            raise PullError(f"{out}: {other}; pull into another directory, or serve with the first one (--executor)")
        # The version that began the pull may have known fewer tasks, and no executors.
        if header is not None and {**NO_NAMES, **header["model"], "executor": model.executor} != now["model"]:
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
        before = self._filtered
        on_progress(self._progress(self._next_seed, before))
        with stream:
            for sample in stream.with_heartbeats():
                if sample is not None:
                    with put_off():
                        self._take(sample, before + stream.filtered_count)
                on_progress(self._progress(stream.next_seed, before + stream.filtered_count))
        if self._done < options.count:
            raise PullError(
                f"the seeds end after {self._done + len(self._samples)} of {options.count} samples; give a smaller "
                "count, an earlier start seed or a wider gate"
            )

    def _progress(self, next_seed: int, filtered: int) -> Progress:
        done, accepted = self._done + len(self._samples), self._accepted + self._samples_accepted
        return Progress(done, accepted, filtered, self._seeds(next_seed))

    def _take(self, sample: Sample, filtered: int) -> None:
        """Write a sample. `filtered`: how many seeds were filtered up to it."""
        calibration = self._header["model"]["calibration"]
        if calibration is not None and sample.calibration_id != calibration["id"]:
            raise PullError(f"{self._options.model} got a new calibration during the pull; pull into a new directory")
        self._whole = False
        self._begin()
        written, line = as_written(sample, self._model)
        kept = self._format.add(written)
        line = {**line, "shard": self._next_shard, "files": kept.files}
        self._samples.append({"line": line, "annotations": kept.annotations})
        self._samples_accepted += sample.accepted
        self._filtered = filtered
        if (
            len(self._samples) == self._options.samples_per_shard
            or self._done + len(self._samples) == self._options.count
        ):
            self._end_shard()
        self._whole = True

    def _begin(self) -> None:
        """Begin writing. It runs at the first sample, because options that the service refuses must change nothing."""
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
            "filtered": self._filtered,  # of all seeds below next_seed
            "next_seed": self._samples[-1]["line"]["seed"] + 1,
        }
        self._directory.add_part(self._next_shard, part)
        self._samples, self._samples_accepted = [], 0
        self._count(part)

    def _count(self, part: Json) -> None:
        self._next_shard += 1
        self._done += len(part["samples"])
        self._accepted += part["accepted"]
        self._filtered = part.get("filtered", 0)  # earlier versions had no conditions
        self._next_seed = part["next_seed"]

    def _seeds(self, next_seed: int) -> int:
        """Return how many seeds of the walk are below next_seed."""
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
            "rejected_count": self._seeds(self._next_seed) - self._accepted - self._filtered,
            "filtered_count": self._filtered,
            "next_seed": self._next_seed,
            "files": files,
        }
        self._directory.complete(manifest)
        return manifest


def as_written(sample: Sample, model: Model) -> tuple[Written, Json]:
    """Return a sample as formats write it, and its line in `samples.jsonl` without `shard` and `files`."""
    assert sample.image is not None, "the image was left out"
    told = evidence(sample, model)
    return Written(sample.seed, sample.image, sample.label, told), {**told, **digests(sample.image, sample.label)}


def _check_same(out: Path, header: Json, options: PullOptions) -> None:
    # An option that an earlier version did not record has its default value.
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
