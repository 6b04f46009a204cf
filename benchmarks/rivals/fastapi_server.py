"""FastAPI over eager torch: a queue, and tasks that take batches from it into threads.

Rules of this file:
- FastAPI has no batching, so this file has the usual micro-batcher: the first request opens a batch, and requests that
  arrive within WAIT_SECONDS join it.
- The workers are threads of one process, because torch releases the interpreter lock and one queue keeps all busy.

Run by benchmarks/alternatives.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

from rivals.model import Painter, Request
from rivals.settings import WAIT_SECONDS, Settings

settings = Settings.of_environment()


class Ask(BaseModel):
    seed: int
    truncation_psi: float
    crossover: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.queue = asyncio.Queue()
    painter = Painter(settings)
    with ThreadPoolExecutor(settings.workers) as pool:
        tasks = [asyncio.create_task(serve_batches(app.state.queue, painter, pool)) for _ in range(settings.workers)]
        yield
        for task in tasks:
            task.cancel()


async def serve_batches(
    queue: asyncio.Queue[tuple[Request, asyncio.Future[bytes]]], painter: Painter, pool: ThreadPoolExecutor
) -> None:
    while True:
        batch = [await queue.get()]
        await asyncio.sleep(WAIT_SECONDS)
        while len(batch) < settings.batch and not queue.empty():
            batch.append(queue.get_nowait())
        requests = [request for request, _ in batch]
        bodies = await asyncio.get_running_loop().run_in_executor(pool, painter.bodies, requests)
        for (_, answer), body in zip(batch, bodies, strict=True):
            if not answer.done():
                answer.set_result(body)


app = FastAPI(lifespan=lifespan)


@app.post("/sample")
async def sample(ask: Ask) -> Response:
    answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    await app.state.queue.put((Request(**ask.model_dump()), answer))
    return Response(await answer, media_type="application/octet-stream")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=settings.port, log_level="warning", access_log=False)
