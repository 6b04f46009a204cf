"""One process of a training job of two on a map-style dataset: what a real library delivers to it, as JSON.

    python map_style_rank.py LIBRARY ENDPOINT END_SEED MAX_JS OUT

Rules of this file:
- Each case is two shuffled epochs over the same samples; an item has its seed, so that what was delivered is known.
- `test_map_style_ranks.py` adds both processes up.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from labelmint_client import Sample, SampleOptions
from labelmint_client.torch import LabeledSamples

LIBRARY, ENDPOINT, END_SEED, MAX_JS, OUT = sys.argv[1:]
BATCH, EPOCHS = 3, 2


def item(sample: Sample) -> dict[str, torch.Tensor]:
    assert sample.image is not None
    return {"image": torch.tensor(sample.image.mean((0, 1)) / 255).float(), "seed": torch.tensor(sample.seed)}


def dataset() -> LabeledSamples[Any]:
    options = SampleOptions(max_js=float(MAX_JS))
    return LabeledSamples(ENDPOINT, "light", end_seed=int(END_SEED), options=options, transform=item)


def loader(workers: int = 0, **arguments: Any) -> DataLoader[Any]:
    context = "fork" if workers else None
    return DataLoader(dataset(), BATCH, num_workers=workers, multiprocessing_context=context, **arguments)


def seeds(batches: Any) -> list[int]:
    return [seed for batch in batches for seed in batch["seed"].tolist()]


def torchrun(cases: dict[str, Any]) -> None:
    torch.distributed.init_process_group("gloo")
    read = dataset()
    sampler = DistributedSampler(read, shuffle=True)
    made = DataLoader(read, BATCH, sampler=sampler)
    cases["DistributedSampler"] = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        cases["DistributedSampler"].append(seeds(made))
    torch.distributed.destroy_process_group()


def accelerate(cases: dict[str, Any]) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for workers in (0, 1):
        made = accelerator.prepare(loader(workers, shuffle=True))
        cases[f"prepared, {workers} workers"] = [seeds(made) for _ in range(EPOCHS)]


def trainer(cases: dict[str, Any]) -> None:
    from transformers import Trainer, TrainingArguments

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(3, 1)
            self.seen: list[int] = []

        def forward(self, image: torch.Tensor, seed: torch.Tensor) -> dict[str, torch.Tensor]:
            self.seen += seed.tolist()
            out = self.line(image)
            return {"loss": out.square().mean(), "logits": out}

    network, read = Network(), dataset()
    arguments = TrainingArguments(
        output_dir=OUT,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(network, arguments, train_dataset=read).train()
    cases["trained"] = halves(network.seen)


def lightning(cases: dict[str, Any]) -> None:
    import lightning

    class Network(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(3, 1)
            self.seen: list[int] = []

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            self.seen += batch["seed"].tolist()
            return self.line(batch["image"]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    both = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    network = Network()
    both.fit(network, loader(shuffle=True))
    cases["trained"] = halves(network.seen)


def halves(seen: list[int]) -> list[list[int]]:
    """What was seen in each of two epochs of equal length."""
    return [seen[: len(seen) // 2], seen[len(seen) // 2 :]]


if __name__ == "__main__":
    collected: dict[str, Any] = {}
    globals()[LIBRARY](collected)
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    Path(f"{OUT}.{rank}.json").write_text(json.dumps(collected))
