"""The commands `pull`, `verify` and `upload`, of the program `labelmint` and of `python -m labelmint_client`.

Rules of this file:
- It only turns arguments into options and prints results. `labelmint_client.pull` does the work.
- The libraries of the extras `pull` and `s3` are imported when a command runs, so `--help` works without them.
- `pull` also takes options from the variable LABELMINT_PULL_OPTIONS. Those of the command line come after them and win.
- Exit code 0: done. 1: `verify` found a difference. 2: an error, reported in one line on stderr. 130, 143: interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from labelmint_client.client import Client
from labelmint_client.connection import Tls
from labelmint_client.errors import LabelmintError
from labelmint_client.messages import Model, SampleOptions
from labelmint_client.progress import Bar
from labelmint_client.pull_formats import PULL_FORMATS

_SILENT_SECONDS = 1.0  # how long to wait for the service before printing that the command is waiting
_SAMPLES = 100  # how many samples `verify` requests from a service by default
_OF_THE_SERVICE = ("sample", "token_file", "tls", "tls_ca", "tls_certificate", "tls_key", "insecure")
_PULL_OPTIONS = "LABELMINT_PULL_OPTIONS"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and raise SystemExit. `arguments` begin with the command's name; None: the process's arguments."""
    parsed = _parser().parse_args(_with_pull_options(list(sys.argv[1:] if arguments is None else arguments)))
    # The first process of a container ignores SIGTERM unless it installs a handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        raise SystemExit(_run(parsed))
    except ModuleNotFoundError as error:
        extra = "pull,s3" if (error.name or "").startswith("boto") else "pull"
        _fail(f"{error.name} is missing; run `pip install './clients/python[{extra}]'` in a clone of labelmint")


def _with_pull_options(arguments: list[str]) -> list[str]:
    """Insert the options of the environment, where a Job of Kubernetes holds them in one variable."""
    if arguments[:1] != ["pull"]:
        return arguments
    try:
        return ["pull", *shlex.split(os.environ.get(_PULL_OPTIONS, "")), *arguments[1:]]
    except ValueError as error:
        _fail(f"{_PULL_OPTIONS}: {error}; write options as on a command line")


def _run(parsed: argparse.Namespace) -> int:
    from labelmint_client.pull import PullError

    try:
        code: int = parsed.run(parsed)
        return code
    except LabelmintError as error:
        _fail(error.message + ("; run the same command to continue" if error.retryable else ""))
    except (PullError, ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("labelmint: interrupted; run the same command to continue", file=sys.stderr)
        return 128 + signal.SIGINT


def _fail(message: str) -> NoReturn:
    print(f"labelmint: {message}", file=sys.stderr)
    raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("labelmint", description=__doc__.split("\n\n", 1)[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_pull(commands.add_parser("pull", help="write accepted samples to a directory, as a data set"))
    _add_verify(commands.add_parser("verify", help="check a pulled directory, optionally against a live service"))
    _add_upload(commands.add_parser("upload", help="send a complete pull to S3, the manifest last"))
    return parser


def _add_pull(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write accepted samples to a directory. After an interruption or a kill, the same command continues. With a "
        "larger --count, it also extends a complete pull. Options may also be in the variable LABELMINT_PULL_OPTIONS."
    )
    parser.set_defaults(run=_pull)
    parser.add_argument("out", type=Path, help="directory to create, or one with a pull to continue")
    parser.add_argument("--model", required=True, help="name of the model")
    parser.add_argument("--model-version", default="", help="its version (default: the highest)")
    parser.add_argument("--count", type=int, required=True, help="number of samples to write")
    formats = "; ".join(f"{name}: {each.about}" for name, each in PULL_FORMATS.items())
    parser.add_argument("--format", choices=PULL_FORMATS, default="webdataset", help=f"{formats} (default: webdataset)")
    parser.add_argument("--start-seed", type=int, default=0, help="first seed of the walk (default: 0)")
    parser.add_argument("--shard-index", type=int, default=0, help="take the seeds congruent to this (default: 0)")
    parser.add_argument("--shard-count", type=int, default=1, help="modulo this (default: 1)")
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=500,
        help="samples per tar, Parquet or MDS file; also the most that a killed pull repeats (default: 500)",
    )
    parser.add_argument(
        "--label-mode",
        choices=("palette", "ids"),
        default="palette",
        help="labels of the formats folder and parquet: palette PNGs whose indices are class ids, or gray PNGs whose "
        "values are class ids (default: palette)",
    )
    gate = parser.add_argument_group("gate and generator (default: as the model was calibrated)")
    gate.add_argument("--max-js", type=float, help="accept JS scores up to this, in nats")
    gate.add_argument("--max-quantile", type=float, help="accept JS scores up to this quantile of the calibration")
    gate.add_argument("--include-rejected", action="store_true", help="write rejected samples too, marked as such")
    gate.add_argument("--truncation-psi", type=float, help="truncation of the latents, 0 to 2")
    gate.add_argument("--style-seed", type=int, help="style mixing: give all samples the appearance of this seed")
    gate.add_argument("--crossover", type=int, help="style mixing: the first layer that takes that appearance")
    gate.add_argument("--class-index", type=int, help="the class that a conditional generator draws")
    gate.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="NAME:MIN..MAX",
        help="take only samples with this content; repeat for more conditions. NAME is a class, and the bounds are "
        "shares of the image's pixels; or a keypoint, and the bounds are confidences. glasses:0.01.. is at least 1 %%, "
        "hat:..0 is none",
    )
    gate.add_argument(
        "--ignore-js-quantile",
        type=float,
        help="write 255, the ignore label, for pixels whose JS divergence is above this quantile of their own image",
    )
    _add_connection(parser, "localhost:50051")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check the files of a pulled directory. With --endpoint, also compare samples with a service."
    parser.set_defaults(run=_verify)
    parser.add_argument("out", type=Path, help="directory with a complete pull")
    parser.add_argument(
        "--sample",
        type=lambda text: sys.maxsize if text == "all" else int(text),
        metavar="K|all",
        help=f"how many samples to request from the service and compare (default: {_SAMPLES})",
    )
    _add_connection(parser, None)


def _add_upload(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Send a complete pull to S3, its manifest last. After an interruption or a kill, the same command continues. "
        "The variables of AWS tools set credentials, region and endpoint: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ..."
    )
    parser.set_defaults(run=_upload)
    parser.add_argument("out", type=Path, help="directory with a complete pull, or with parts that are complete pulls")
    parser.add_argument("url", help="where to: s3://BUCKET/PREFIX")
    parser.add_argument(
        "--part", help="send only this part of the directory, and the manifest of the whole if that was the last one"
    )


def _add_connection(parser: argparse.ArgumentParser, endpoint: str | None) -> None:
    group = parser.add_argument_group("service")
    group.add_argument(
        "--endpoint",
        action="append",
        metavar="HOST:PORT",
        help=f"a gateway's gRPC address; repeat for more gateways{f' (default: {endpoint})' if endpoint else ''}",
    )
    group.add_argument("--token-file", type=Path, help="file that contains the token")
    group.add_argument("--tls", action="store_true", help="use TLS with the public certificate authorities")
    group.add_argument("--tls-ca", type=Path, help="use TLS with the certificate authorities in this file (PEM)")
    group.add_argument("--tls-certificate", type=Path, help="client certificate (PEM)")
    group.add_argument("--tls-key", type=Path, help="private key of the client certificate (PEM)")
    group.add_argument("--insecure", action="store_true", help="send a token to other machines without TLS")
    parser.set_defaults(default_endpoint=endpoint)


class _PatientClient(Client):
    """A client that prints which endpoints it is waiting for if the first answer takes longer than a second."""

    def get_model(self, model: str, model_version: str = "", *, class_index: int | None = None) -> Model:
        waited = (
            f"labelmint: waiting for {', '.join(self._connection.endpoints)} for up to {self._deadline_seconds:.0f} s"
        )
        timer = threading.Timer(_SILENT_SECONDS, lambda: print(waited, file=sys.stderr, flush=True))
        timer.daemon = True
        timer.start()
        try:
            return super().get_model(model, model_version, class_index=class_index)
        finally:
            timer.cancel()


def _client(parsed: argparse.Namespace) -> Client:
    files = {"ca": parsed.tls_ca, "certificate": parsed.tls_certificate, "key": parsed.tls_key}
    return _PatientClient(
        parsed.endpoint or [parsed.default_endpoint],
        token=parsed.token_file.read_text(encoding="utf-8-sig").strip() if parsed.token_file else None,
        tls=Tls(**files) if parsed.tls or any(files.values()) else None,
        insecure=parsed.insecure,
    )


def _pull(parsed: argparse.Namespace) -> int:
    from labelmint_client.pull import PullOptions, pull

    options = PullOptions(
        model=parsed.model,
        count=parsed.count,
        format=parsed.format,
        model_version=parsed.model_version,
        start_seed=parsed.start_seed,
        shard_index=parsed.shard_index,
        shard_count=parsed.shard_count,
        samples_per_shard=parsed.samples_per_shard,
        label_mode=parsed.label_mode,
        ignore_js_quantile=parsed.ignore_js_quantile,
        sample=SampleOptions(
            truncation_psi=parsed.truncation_psi,
            max_js=parsed.max_js,
            max_quantile=parsed.max_quantile,
            include_rejected=parsed.include_rejected,
            style_seed=parsed.style_seed,
            crossover=parsed.crossover,
            where=tuple(parsed.where),
            class_index=parsed.class_index,
        ),
    )
    with _client(parsed) as client, Bar(options.count) as bar:
        manifest = pull(client, options, parsed.out, on_progress=bar.show)
    filtered = manifest.get("filtered_count", 0)  # earlier versions had no conditions
    accepted, rejected = manifest["accepted_count"] + filtered, manifest["rejected_count"]
    share = f"{accepted / (accepted + rejected):.1%} of {accepted + rejected} seeds accepted"
    share += f", {filtered} of them filtered" if options.sample.where else ""
    print(f"{parsed.out} is complete: {manifest['sample_count']} samples, {share}")
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from labelmint_client.pull import verify

    if parsed.endpoint is None:
        for name in _OF_THE_SERVICE:
            if getattr(parsed, name) not in (None, False):
                _fail(f"--{name.replace('_', '-')} needs --endpoint: without it, verify calls no service")
        report = verify(parsed.out)
    else:
        with _client(parsed) as client:
            report = verify(parsed.out, client, _SAMPLES if parsed.sample is None else parsed.sample)
    for problem in report.problems:
        print(problem)
    served = "" if parsed.endpoint is None else f", {report.samples} samples with what is served"
    verdict = {0: "no difference", 1: "1 difference"}.get(len(report.problems), f"{len(report.problems)} differences")
    print(f"{parsed.out}: compared {report.files} files with the manifest{served}: {verdict}")
    return 1 if report.problems else 0


def _upload(parsed: argparse.Namespace) -> int:
    from labelmint_client.pull.uploading import upload

    done = upload(parsed.out, parsed.url, parsed.part)
    counts = f"{done.sent} files sent, {done.kept} were there"
    if done.complete:
        print(f"{parsed.url} is complete: {counts}")
    else:
        print(f"{parsed.url} has {parsed.part}: {counts}; whoever sends the last part completes it")
    return 0
