"""The server of the annotation page: a FastAPI application on this machine, under a secret path.

Rules of this file:
- Each route checks its input, calls the studio or the workspace, and describes what is there. The routes hold no state.
- Whoever does not know the secret, or comes by another name of this machine (DNS rebinding), gets 404 for every path.
- Changes run on the event loop, one after the other, because they are short. What computes runs in the studio's thread.
"""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from labelmint.annotate.elsewhere import write_elsewhere
from labelmint.annotate.job import Job, Plan
from labelmint.annotate.strokes import Mask, Strokes, region_at, runs_of
from labelmint.annotate.studio import Studio
from labelmint.annotate.workspace import Place, Sheet, Workspace
from labelmint.core.errors import InvalidRequest, LabelmintError
from labelmint.core.policy import SEED_END, check_seed
from labelmint.models.annotations import UNDRAWN
from labelmint.models.annotations.masks import LabelClasses

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
Seed = Annotated[int, Field(ge=0, lt=SEED_END)]
Channel = Annotated[int, Field(ge=0, le=255)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class NewImage(_Body):
    seed: Seed | None = None


class StrokesBody(_Body):
    revision: Annotated[int, Field(ge=0)]
    strokes: Strokes


class PointsBody(_Body):
    revision: Annotated[int, Field(ge=0)]
    points: list[Place]


class ClassBody(_Body):
    name: Annotated[str, Field(min_length=1, max_length=128)]
    rgb: tuple[Channel, Channel, Channel]


class ClassesBody(_Body):
    classes: list[ClassBody]


class PreviewBody(_Body):
    seed: Seed
    others: Annotated[list[Seed], Field(max_length=6)] = []


class RegionBody(_Body):
    preview: int
    at: tuple[float, float]


class JobBody(_Body):
    model: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)] = "mine"
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 4000
    heads: Annotated[int, Field(ge=2, le=100)] = 10
    seeds: Annotated[int, Field(ge=1000, le=1_000_000)] = 2000


class ElsewhereBody(_Body):
    format: Literal["labelme", "coco"]


def create_app(
    workspace: Workspace, studio: Studio, job: Job, *, plan: Callable[[JobBody], Plan], secret: str
) -> FastAPI:
    """The application. `plan` fills in what the page does not choose; `secret` is the first part of every path."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    for router in (_session(workspace), _images(workspace), _previews(workspace, studio), _jobs(workspace, job, plan)):
        app.include_router(router, prefix=f"/{secret}/api")
    app.include_router(_pages(), prefix=f"/{secret}")  # last, because its route matches every path
    app.add_exception_handler(LabelmintError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.middleware("http")(_guarded)
    return app


async def _guarded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse other names of this machine, and give every response its headers."""
    if (request.url.hostname or "") not in ("127.0.0.1", "localhost", "::1"):
        return JSONResponse({"title": "Not found"}, 404)
    response = await call_next(request)
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["Referrer-Policy"] = "no-referrer"  # the address has the secret
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _pages() -> APIRouter:
    router = APIRouter()
    folder = files(__package__) / "page"

    @router.get("/{name:path}")
    async def page(name: str) -> Response:
        if name.startswith("api/"):
            return JSONResponse({"title": "Not found", "detail": f"no such path: {name}"}, 404)
        name = name or "index.html"
        suffix = name[name.rfind(".") :]
        known = {each.name for each in folder.iterdir()}
        if name not in known or suffix not in PAGE_TYPES:
            return JSONResponse({"title": "Not found", "detail": f"no such path: {name}"}, 404)
        return Response((folder / name).read_bytes(), media_type=PAGE_TYPES[suffix])

    return router


def _session(workspace: Workspace) -> APIRouter:
    router = APIRouter()

    @router.get("/session")
    async def session() -> dict[str, Any]:
        return _described(workspace)

    @router.put("/classes")
    async def classes(body: ClassesBody) -> dict[str, Any]:
        names, palette = tuple(each.name for each in body.classes), tuple(each.rgb for each in body.classes)
        workspace.save_classes(LabelClasses(names, palette))
        return _described(workspace)

    @router.post("/elsewhere")
    async def elsewhere(body: ElsewhereBody) -> dict[str, Any]:
        with workspace.saving():
            written = write_elsewhere(workspace.directory, workspace.annotated(), body.format)
        return {"files": [str(path) for path in written]}

    return router


def _images(workspace: Workspace) -> APIRouter:
    router = APIRouter(prefix="/images/{seed}")

    @router.get("/image.png")
    async def image(seed: int) -> Response:
        return _png(Image.fromarray(workspace.sheet(seed).image))

    @router.get("/mask.png")
    async def mask(seed: int) -> Response:
        return _png(_coloured(workspace.sheet(seed).mask, workspace.classes))

    @router.post("/skip")
    async def skip(seed: int) -> dict[str, Any]:
        workspace.skip(seed)
        return _described(workspace)

    @router.get("/strokes")
    async def strokes(seed: int) -> dict[str, Any]:
        sheet = workspace.sheet(seed)
        return {"revision": sheet.revision, "strokes": [each.model_dump(by_alias=True) for each in sheet.strokes]}

    @router.put("/strokes")
    async def save_strokes(seed: int, body: StrokesBody) -> dict[str, Any]:
        return _sheet(workspace.save_strokes(seed, body.strokes, body.revision))

    @router.get("/points")
    async def points(seed: int) -> dict[str, Any]:
        sheet = workspace.sheet(seed)
        return {"revision": sheet.revision, "points": [each.model_dump() for each in sheet.points]}

    @router.put("/points")
    async def save_points(seed: int, body: PointsBody) -> dict[str, Any]:
        return _sheet(workspace.save_points(seed, body.points, body.revision))

    return router


def _previews(workspace: Workspace, studio: Studio) -> APIRouter:
    router = APIRouter()

    @router.post("/images")
    async def add(body: NewImage) -> dict[str, Any]:
        seed = body.seed
        if seed is None:
            seed = (await studio.suggestions(1))[0].seed
        await studio.prepare(check_seed(seed))
        return _sheet(workspace.add(seed))

    @router.post("/images/{seed}/region")
    async def region(seed: int, body: RegionBody) -> dict[str, Any]:
        label = studio.preview(body.preview).label(seed)
        area = region_at(label, *body.at)
        return {"region": runs_of(area), "class": int(label[area][0])}

    @router.post("/preview")
    async def preview(body: PreviewBody) -> dict[str, Any]:
        return (await studio.look(workspace.sheet(body.seed).seed, body.others)).described()

    @router.get("/preview/{number}/{seed}/{name}.png")
    async def picture(number: int, seed: int, name: Literal["image", "label", "uncertainty"]) -> Response:
        found = studio.preview(number)
        if name == "image":
            return _png(Image.fromarray(found.image(seed)))
        if name == "label":
            return _png(_coloured(found.label(seed), workspace.classes))
        return _png(Image.fromarray(found.heat(seed)))

    @router.get("/suggestions")
    async def suggestions(count: Annotated[int, Field(ge=1, le=24)] = 6) -> list[dict[str, Any]]:
        return [{"seed": each.seed, "reason": each.reason} for each in await studio.suggestions(count)]

    @router.get("/estimate")
    async def estimate() -> dict[str, Any]:
        return await studio.estimate()

    return router


def _jobs(workspace: Workspace, job: Job, plan: Callable[[JobBody], Plan]) -> APIRouter:
    router = APIRouter()

    @router.post("/commands")
    async def commands(body: JobBody) -> dict[str, Any]:
        return {"commands": plan(body).lines()}

    @router.get("/serve")
    async def status() -> dict[str, Any]:
        return vars(job.status)

    @router.post("/serve", status_code=202)
    async def start(body: JobBody) -> dict[str, Any]:
        if not workspace.drawn:
            raise InvalidRequest("images", "nothing is drawn yet; draw on an image first")
        job.start(plan(body))
        return vars(job.status)

    @router.delete("/serve")
    async def cancel() -> dict[str, Any]:
        await job.cancel()
        return vars(job.status)

    return router


def _described(workspace: Workspace) -> dict[str, Any]:
    classes = zip(workspace.classes.names, workspace.classes.palette, strict=True)
    return {
        "task": workspace.bound.task,
        "resolution": workspace.bound.resolution,
        "truncation_psi": workspace.bound.truncation_psi,
        "classes": [{"id": number, "name": name, "rgb": rgb} for number, (name, rgb) in enumerate(classes)],
        "images": [_sheet(sheet) for sheet in workspace.sheets.values()],
        "skipped": workspace.skipped,
    }


def _sheet(sheet: Sheet) -> dict[str, Any]:
    drawn = sheet.mask != UNDRAWN
    return {
        "seed": sheet.seed,
        "revision": sheet.revision,
        "drawn": float(drawn.mean()),
        "classes": [int(each) for each in np.unique(sheet.mask[drawn])],
        "touched": sheet.touched,
    }


def _coloured(mask: Mask, classes: LabelClasses) -> Image.Image:
    """A mask uint8 [R,R] in the classes' colours, transparent where nothing is drawn."""
    colours = np.zeros((256, 4), np.uint8)
    colours[: len(classes.palette), :3] = np.array(classes.palette, np.uint8).reshape(-1, 3)
    colours[: len(classes.palette), 3] = 255
    return Image.fromarray(colours[mask])


def _png(picture: Image.Image) -> Response:
    data = io.BytesIO()
    picture.save(data, "PNG", compress_level=1)
    return Response(data.getvalue(), media_type="image/png")


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LabelmintError)
    body = {"title": error.title, "status": error.http_status, "detail": error.message, "reason": error.reason}
    return JSONResponse(body, error.http_status, media_type="application/problem+json")


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or "body"
    return await _answer_error(request, InvalidRequest(field, str(first["msg"])))
