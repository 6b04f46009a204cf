"""Changes of a model repository on disk; without torch."""

import hashlib
import shutil
from pathlib import Path

from labelmint.core.calibration import NUM_QUANTILES, Calibration
from labelmint.core.executor import calibration_of_class
from labelmint.triton.model_config import digest_of_steps, ensembles, read_config, write_config

HOLD_SECONDS = 2.0


def copy_model(repository: Path, model: str, name: str, target: Path | None = None) -> None:
    """The fused pipeline of a model under another name, in the same repository or in `target`."""
    for suffix in ("", "_generator", "_style_interpreter"):
        copied = Path(shutil.copytree(repository / f"{model}{suffix}", (target or repository) / f"{name}{suffix}"))
        config = copied / "config.pbtxt"
        config.write_text(config.read_text().replace(f'"{model}', f'"{name}'))


def accept(repository: Path, model: str) -> None:
    """Give a fused ensemble of ONNX files the digest of its steps as they are now."""
    steps = ("generator", "style_interpreter")
    files = {step: repository / f"{model}_{step}" / "1" / "model.onnx" for step in steps}
    config = read_config(repository / model / "config.pbtxt")
    digest = digest_of_steps((step, hashlib.sha256(path.read_bytes()).hexdigest()) for step, path in files.items())
    config.parameters["model_digest"].string_value = digest
    write_config(repository / model / "config.pbtxt", config)


def gate_class(
    repository: Path, model: str, class_index: int | None, *, threshold: float, parameter: str = "calibration"
) -> Calibration:
    """Give a generator class of a fused ensemble a calibration that nobody measured, with this gate."""
    config = read_config(repository / model / "config.pbtxt")
    calibration = Calibration(
        model_digest=config.parameters["model_digest"].string_value,
        score_kind=config.parameters["score_kind"].string_value,
        truncation_psi=1.0,
        threshold=threshold,
        threshold_quantile=0.9,
        quantiles=tuple(threshold * level / 90 for level in range(NUM_QUANTILES)),
        first_seed=0,
        seed_count=1000,
        class_index=class_index,
    )
    config.parameters[calibration_of_class(parameter, class_index)].string_value = calibration.to_json()
    write_config(repository / model / "config.pbtxt", config)
    return calibration


def hold(repository: Path, step: str, max_queue_size: int | None = None, *, seconds: float = HOLD_SECONDS) -> None:
    """Make Triton's batcher hold requests of a step until a batch of 16 is full or this time is over."""
    path = repository / step / "config.pbtxt"
    config = read_config(path)
    config.dynamic_batching.max_queue_delay_microseconds = int(seconds * 1e6)
    if max_queue_size is not None:
        config.dynamic_batching.default_queue_policy.max_queue_size = max_queue_size
    write_config(path, config)


def add(source: Path, target: Path, *prefixes: str) -> None:
    """Copy models between repositories; ensembles last, as the exporter writes them."""
    described = ensembles(source)
    for path in sorted(source.iterdir(), key=lambda path: path.name in described):
        if path.name.startswith(prefixes):
            shutil.rmtree(target / path.name, ignore_errors=True)
            shutil.copytree(path, target / path.name)


def exchange(second: Path, repository: Path) -> None:
    """Put other weights, those of `other` in `second`, in the place of version 1 of `tiny`."""
    for path in repository.glob("tiny*"):
        shutil.rmtree(path)
    copy_model(second, "other", "tiny", repository)
