"""From drawings to a service: the page's job gives what its commands give, and can be cancelled."""

import asyncio
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from labelmint.annotate.job import Job, Plan, Status
from labelmint.core.errors import ChangedElsewhere
from labelmint.models.annotations import LabelClasses, sha256_of, write_dataset, write_masks
from labelmint.models.draw import drawn_images
from labelmint.models.store import save_generator
from tests.support.models import files, small

pytestmark = [pytest.mark.torch, pytest.mark.triton, pytest.mark.minutes]

CLASSES = LabelClasses(("dark", "bright"), ((0, 0, 0), (255, 255, 255)))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    generator, _ = small()
    path, directory = tmp_path / "generator.safetensors", tmp_path / "work"
    save_generator(path, generator, {})
    with torch.no_grad():
        images = dict(drawn_images(generator, [1, 2], 1.0))
    write_dataset(directory, sha256_of(path), 1.0, images=images)
    masks = {seed: (image.mean(axis=2) > np.median(image)).astype(np.uint8) for seed, image in images.items()}
    write_masks(directory, CLASSES, masks)
    return Plan(path, directory, "mine", "paper", 2, 40, 1000, 1.0, ())


async def until(job: Job, *states: str) -> None:
    while job.status.state not in states:
        await asyncio.sleep(0.05)


async def test_the_job_serves_and_gives_the_bytes_of_its_commands(plan: Plan) -> None:
    job = Job()
    job.start(plan)
    with pytest.raises(ChangedElsewhere, match="a job is running"):
        job.start(plan)
    await until(job, "serving", "failed")
    assert job.status.state == "serving", job.status
    url = job.status.url
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.get("/v1/models/mine/samples/7", params={"include_rejected": True})
        assert answer.status_code == 200 and answer.json()["seed"] == 7
    await job.cancel()
    assert job.status.state == "cancelled" and not job.status.url
    with pytest.raises(httpx.ConnectError):
        await asyncio.to_thread(httpx.get, url)
    made = files(plan.directory / "build")
    shutil.rmtree(plan.directory / "build")
    for line in plan.lines()[:3]:
        program, *arguments = shlex.split(line)
        assert program == "labelmint"
        command = [sys.executable, "-m", "labelmint.cli", *arguments]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert files(plan.directory / "build") == made


async def test_a_cancelled_fit_leaves_no_process_and_the_next_start_resumes(plan: Plan) -> None:
    """Unless something was drawn meanwhile: `fit` would refuse the checkpoint of other drawings."""
    long = replace(plan, steps=100_000)
    checkpoint = plan.build / "interpreter.safetensors.checkpoint"

    async def training(job: Job) -> None:
        while not 0 < job.status.share < 1 and job.status.state == "running":
            await asyncio.sleep(0.05)
        assert job.status.step == "fit" and job.status.state == "running", job.status

    for known in (False, True):
        job = Job()
        job.start(long)
        assert checkpoint.exists() == known
        await training(job)
        await job.cancel()
        assert job.status.state == "cancelled" and job.status.step == "fit"
        assert checkpoint.exists()
    held = checkpoint.read_bytes()
    write_masks(plan.directory, CLASSES, {1: np.eye(16, dtype=np.uint8)})
    job.start(long)
    assert not checkpoint.exists()
    assert checkpoint.with_name(f"{checkpoint.name}.old").read_bytes() == held
    await training(job)
    await job.cancel()


def test_progress_is_that_of_the_step(plan: Plan) -> None:
    job = Job()
    job.status = Status("running", "fit")
    for text, share in (("\rdraw pixels:  50%|#", 0.0), ("\rfit:  12%|#", 0.12), ("fit: 100%|#\rother:   1%|", 1.0)):
        job._look(text)
        assert job.status.share == share


async def test_a_command_that_fails_says_why(plan: Plan) -> None:
    (plan.directory / "classes.json").write_text("[]")
    job = Job()
    job.start(plan)
    await until(job, "failed")
    assert job.status.step == "fit" and "classes.json" in job.status.message, job.status
