"""One process of a training job of two: its share of the global batches, as JSON. `test_global_order.py` joins them.

    python global_rank.py LIBRARY ENDPOINT MAX_JS WHERE OUT

Rules of this file:
- Each case is a pass over the same seeds: for each step, the seeds that this process gets.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from labelmint_client import Sample, SampleOptions
from labelmint_client.torch import LabeledSampleDataset, merge_states

LIBRARY, ENDPOINT, MAX_JS, WHERE, OUT = sys.argv[1:]
GLOBAL = 12
BATCH = GLOBAL // 2
STEPS = 3


def item(sample: Sample) -> dict[str, torch.Tensor]:
    return {"image": torch.full((3,), sample.js_score), "seed": torch.tensor(sample.seed)}


def loader(workers: int = 0, context: str | None = None, batch_size: int = BATCH, **arguments: Any) -> DataLoader[Any]:
    options = SampleOptions(max_js=float(MAX_JS), where=(WHERE,), omit_image=True, omit_label=True)
    dataset = LabeledSampleDataset(
        ENDPOINT,
        "light",
        end_seed=256,
        options=options,
        transform=item,
        order="global",
        global_batch_size=GLOBAL,
        shuffle_seed=7,
        drop_last=True,
        **arguments,
    )
    return StatefulDataLoader(dataset, batch_size, num_workers=workers, multiprocessing_context=context, drop_last=True)


def batches(of: Any) -> list[list[int]] | str:
    try:
        return [batch["seed"].tolist() for batch in of]
    except (ValueError, RuntimeError) as error:
        return str(error)


def torchrun(cases: dict[str, Any]) -> None:
    made = loader()
    torch.distributed.init_process_group("gloo")
    cases["plain"] = batches(made)
    cases["workers"] = batches(loader(2, "forkserver"))
    begun = loader(2, "forkserver")
    first = list(itertools.islice(begun, STEPS))
    resumed = loader(1, "forkserver", resume=merge_states([begun.state_dict()]))
    cases["resumed"] = [*batches(first), *batches(resumed)]
    cases["refused: the whole batch"] = batches(loader(batch_size=GLOBAL))
    torch.distributed.destroy_process_group()


def accelerate(cases: dict[str, Any]) -> None:
    from accelerate import Accelerator, DataLoaderConfiguration

    accelerator = Accelerator(cpu=True)
    cases["dispatched"] = batches(accelerator.prepare(loader()))
    cases["dispatched, forked worker"] = batches(accelerator.prepare(loader(1, "fork")))
    cases["dispatched, spawned worker"] = batches(accelerator.prepare(loader(1, "forkserver")))
    configuration = DataLoaderConfiguration(dispatch_batches=True, split_batches=True)
    accelerator.dataloader_config = configuration
    cases["dispatched, split"] = batches(accelerator.prepare(loader(batch_size=GLOBAL)))
    accelerator.dataloader_config = DataLoaderConfiguration(dispatch_batches=False)
    cases["sliced"] = batches(accelerator.prepare(loader()))
    cases["sliced, forked workers"] = batches(accelerator.prepare(loader(3, "fork")))
    cases["sliced, spawned workers"] = batches(accelerator.prepare(loader(2, "forkserver")))
    cases["refused: the whole batch"] = batches(accelerator.prepare(loader(batch_size=GLOBAL)))
    accelerator.dataloader_config = DataLoaderConfiguration(dispatch_batches=False, split_batches=True)
    cases["sliced, split"] = batches(accelerator.prepare(loader(batch_size=GLOBAL)))


def accelerate_workers(cases: dict[str, Any]) -> None:
    from accelerate import Accelerator

    cases["refused: batches of several workers"] = batches(Accelerator(cpu=True).prepare(loader(2, "fork")))


def trainer(cases: dict[str, Any]) -> None:
    from transformers import Trainer, TrainingArguments

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(3, 1)
            self.seen: list[list[int]] = []

        def forward(self, image: torch.Tensor, seed: torch.Tensor) -> dict[str, torch.Tensor]:
            self.seen.append(seed.tolist())
            return {"loss": self.line(image).square().mean()}

    for name, dispatch in (("dispatched", None), ("sliced", False)):
        network = Network()
        arguments = TrainingArguments(
            output_dir=f"{OUT}.{name}",
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            accelerator_config={"dispatch_batches": dispatch},
        )
        Trainer(network, arguments, train_dataset=loader().dataset).train()
        cases[f"trained, {name}"] = network.seen


def lightning(cases: dict[str, Any]) -> None:
    import lightning

    class Network(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(3, 1)
            self.seen: list[list[int]] = []

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            self.seen.append(batch["seed"].tolist())
            return self.line(batch["image"]).square().mean()

        def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
            self.seen.append(batch["seed"].tolist())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    both = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, **quiet)
    network = Network()
    both.fit(network, loader(2, "forkserver"))
    cases["whole epoch"], network.seen = network.seen, []
    both.validate(network, loader(), verbose=False)
    cases["validated"] = network.seen


if __name__ == "__main__":
    collected: dict[str, Any] = {}
    globals()[LIBRARY](collected)
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    Path(f"{OUT}.{rank}.json").write_text(json.dumps(collected))
