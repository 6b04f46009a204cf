"""One process of a training job of two: what a real library delivers to it, as JSON. `test_ranks.py` adds it up.

    python rank.py LIBRARY ENDPOINT END_SEED MAX_JS OUT

Rules of this file:
- Each case is a pass over the same seeds; an item has its seed, so that what was delivered is known.
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

from labelmint_client import Sample, SampleOptions
from labelmint_client.torch import LabeledSampleDataset

LIBRARY, ENDPOINT, END_SEED, MAX_JS, OUT = sys.argv[1:]
BATCH = 3


def item(sample: Sample) -> dict[str, torch.Tensor]:
    assert sample.image is not None
    return {"image": torch.tensor(sample.image.mean((0, 1)) / 255).float(), "seed": torch.tensor(sample.seed)}


def dataset(**arguments: Any) -> LabeledSampleDataset[Any]:
    options = SampleOptions(max_js=float(MAX_JS))
    return LabeledSampleDataset(ENDPOINT, "tiny", end_seed=int(END_SEED), options=options, transform=item, **arguments)


def loader(workers: int = 0, context: str | None = None, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(dataset(**arguments), BATCH, num_workers=workers, multiprocessing_context=context)


def seeds(batches: Any) -> list[int] | str:
    try:
        return [seed for batch in batches for seed in batch["seed"].tolist()]
    except (ValueError, RuntimeError) as error:
        return str(error)


def accelerate(cases: dict[str, Any]) -> None:
    from accelerate import Accelerator, DataLoaderConfiguration
    from torch.utils.data import ChainDataset

    accelerator = Accelerator(cpu=True)
    prepare = accelerator.prepare
    cases["dispatched"] = seeds(prepare(loader()))
    cases["dispatched, forked worker"] = seeds(prepare(loader(1, "fork")))
    cases["not prepared"] = seeds(loader())
    cases["refused: not prepared, workers"] = seeds(loader(1, "fork"))
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    cases["not prepared, workers, told"] = seeds(loader(1, "fork", **place))
    cases["refused: divided twice"] = seeds(prepare(loader(**place)))
    fixed = prepare(loader(fixed=True))
    cases["fixed, second pass"] = (seeds(fixed), seeds(fixed))[1]
    for name in ("sliced", "stateful"):  # what Accelerate's first process reads for all it does not resume exactly
        accelerator.dataloader_config = DataLoaderConfiguration(
            dispatch_batches=False, use_stateful_dataloader=name == "stateful"
        )
        made = prepare(loader())
        if name == "sliced":
            cases["sliced"] = seeds(made)
            cases["sliced, workers"] = seeds(prepare(loader(1, "forkserver")))
        else:
            first = seeds(itertools.islice(made, 2))
            again = prepare(loader())
            again.load_state_dict(made.state_dict())
            rest = seeds(again)
            cases["stateful, resumed"] = rest if isinstance(rest, str) else [*first, *rest]
    # Last: it leaves a loader behind of which Accelerate believes that it is read.
    cases["refused: wrapped"] = seeds(prepare(DataLoader(ChainDataset([dataset()]), BATCH)))


def accelerate_with_workers(cases: dict[str, Any]) -> None:
    from accelerate import Accelerator

    cases["refused: workers whose last batches differ"] = seeds(Accelerator(cpu=True).prepare(loader(2, "fork")))


def accelerate_stateful(cases: dict[str, Any]) -> None:
    from accelerate import Accelerator, DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
    cases["refused: states of batches that are fetched ahead"] = seeds(accelerator.prepare(loader()))


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

    for name, dispatch in (("dispatched", None), ("sliced", False)):
        network = Network()
        arguments = TrainingArguments(
            output_dir=f"{OUT}.{name}",
            max_steps=len_of_pass(),
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            accelerator_config={"dispatch_batches": dispatch},
        )
        trained = Trainer(network, arguments, train_dataset=dataset(), eval_dataset=dataset(fixed=True))
        trained.train()
        cases[name], network.seen = network.seen, []
        trained.evaluate()
        cases[f"{name}, evaluated"] = network.seen


def len_of_pass() -> int:
    return int(os.environ["STEPS"])


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

        def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
            self.seen += batch["seed"].tolist()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    both = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=2, max_epochs=1, **quiet)
    # Made before the launcher has told a rank to anybody.
    made = {"train": loader(), "": loader(), "workers": loader(1, "forkserver")}
    network = Network()
    both.fit(network, made["train"])
    cases["trained"], network.seen = network.seen, []
    both.validate(network, made[""], verbose=False)
    cases["validated"], network.seen = network.seen, []
    both.validate(network, made["workers"], verbose=False)
    cases["validated, workers"] = network.seen


def torchrun(cases: dict[str, Any]) -> None:
    made = loader()
    cases["before torch.distributed"] = seeds(made)
    torch.distributed.init_process_group("gloo")
    cases["plain"] = seeds(made)
    cases["workers"] = seeds(loader(1, "forkserver"))
    first = dataset()
    begun = seeds([{"seed": each["seed"].reshape(1)} for each in itertools.islice(first, 4)])
    again = dataset()
    again.load_state_dict(first.state_dict())
    cases["resumed"] = [*begun, *(int(each["seed"]) for each in again)]
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    collected: dict[str, Any] = {}
    globals()[LIBRARY](collected)
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    Path(f"{OUT}.{rank}.json").write_text(json.dumps(collected))
