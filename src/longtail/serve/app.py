"""A local page to drop images on: classes with probabilities, a choice of prior, the nearest training images.

Everything is on one page without anything from elsewhere. An upload is one image in the body of a request; what is too
large, empty or no image gets a 4xx answer with one line, and the server lives on. Legend: N training images, C classes.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jinja2 import Environment, PackageLoader
from PIL import Image
from torch import Tensor

from longtail.data.dataset import ImageSet
from longtail.data.loaders import evaluation_batches
from longtail.data.pictures import explained, upright
from longtail.engine.evaluate import open_finished
from longtail.errors import LongtailError
from longtail.recognizer import Recognizer
from longtail.segmenter import Segmenter, load_kept

MOST_BYTES = 20 * 2**20
MOST_PIXELS = 60_000_000
_AT_ONCE = 2  # images that are predicted at the same time; the others wait
_NEIGHBOURS = 5
_MOST_KNOWN = 20_000  # training images that neighbours are looked for among


class Known(NamedTuple):
    """Training images and their features."""

    images: ImageSet
    place: Tensor
    """(N,) which of them."""
    features: Tensor
    """(N, F), unit norm."""


def known_images(recognizer: Recognizer, images: ImageSet) -> Known:
    """Return the features of the training images, of evenly spread ones where there are very many."""
    place = torch.arange(0, len(images), max(1, -(-len(images) // _MOST_KNOWN)))
    some = ImageSet(_Chosen(images, place), images.labels[place], images.ids[place])  # type: ignore[arg-type]
    device = recognizer.classifier.weight.device
    with torch.no_grad():
        parts = [
            F.normalize(recognizer.encoder(views.to(device))).cpu()
            for views, _ in evaluation_batches(some, recognizer.card.image_size)
        ]
    return Known(images, place, torch.cat(parts))


class _Chosen:
    """Some images of a set."""

    def __init__(self, images: ImageSet, place: Tensor) -> None:
        self.images, self.place, self.lazy = images.images, place, images.images.lazy

    def __len__(self) -> int:
        return len(self.place)

    def take(self, indices: Tensor) -> Tensor:
        return self.images.take(self.place[indices])


def read_upload(body: bytes) -> Image.Image:
    """Return the image that was sent.

    Raises:
        LongtailError: it is empty, no image, damaged, or larger than is safe.
    """
    if not body:
        raise LongtailError("the upload: is empty, expected an image")
    with explained("the upload"), Image.open(io.BytesIO(body)) as image:
        if image.width * image.height > MOST_PIXELS:
            raise LongtailError(
                f"the upload: has {image.width} × {image.height} pixels, expected at most {MOST_PIXELS:,} in all"
            )
        image.load()
    return image


def answer(recognizer: Recognizer, known: Known | None, image: Image.Image, prior: str, top: int = 5) -> dict[str, Any]:
    """Return what the page shows of an image, as JSON holds it."""
    with torch.no_grad():
        found = recognizer.predict(image, prior, coverage=0.9 if recognizer.held_out is not None else None)
        told: dict[str, Any] = {
            "top": [{"class": name, "probability": value} for name, value in found.top(top)[0]],
            "set": None if found.sets is None else found.sets[0],
            "calibrated": recognizer.card.temperature != 1 or bool(recognizer.card.class_temperatures),
            "nearest": [],
        }
        if known is not None:
            view = recognizer.prepared(image)
            similar = known.features @ F.normalize(recognizer.encoder(view)).cpu()[0]
            values, places = similar.topk(min(_NEIGHBOURS, len(similar)))
            for value, place in zip(values.tolist(), known.place[places].tolist(), strict=True):
                label = int(known.images.labels[place])
                picture = known.images.images.open_or_another(place)
                told["nearest"].append(
                    {"class": recognizer.card.class_names[label], "cosine": value, "image": _address(picture)}
                )
    return told


def _address(image: Image.Image) -> str:
    small = upright(image)
    small.thumbnail((128, 128))
    held = io.BytesIO()
    small.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def build_app(recognizer: Recognizer, known: Known | None = None, title: str = "longtail") -> Any:
    """Return the page and its answers as an ASGI application.

    Args:
        recognizer: what predicts.
        known: training images to find neighbours among; none are shown if not given.
        title: of the page.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    turns = asyncio.Semaphore(_AT_ONCE)
    pages = Environment(loader=PackageLoader("longtail.serve", "."), autoescape=True, trim_blocks=True)
    page = pages.get_template("page.html.j2").render(
        title=title, card=recognizer.card, neighbours=known is not None, most_bytes=MOST_BYTES
    )

    async def home(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})

    async def predict(request: Request) -> Response:
        prior = request.query_params.get("prior", "uniform")
        if prior not in {"uniform", "train"}:
            return JSONResponse({"error": f"prior '{prior[:50]}': expected uniform or train"}, 400)
        body = b""
        async for part in _body(request):
            body += part
            if len(body) > MOST_BYTES:
                return JSONResponse({"error": f"the upload: has more than {MOST_BYTES // 2**20} MiB"}, 413)
        try:
            async with turns:
                image = await run_in_threadpool(read_upload, body)
                told = await run_in_threadpool(answer, recognizer, known, image, prior)
        except LongtailError as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse(told)

    async def _body(request: Request) -> AsyncIterator[bytes]:
        given = request.headers.get("content-length", "0")
        if given.isdecimal() and int(given) > MOST_BYTES:
            yield b"\0" * (MOST_BYTES + 1)  # told before it is read
            return
        async for part in request.stream():
            yield part

    return Starlette(routes=[Route("/", home), Route("/predict", predict, methods=["POST"])])


# nothing from elsewhere is loaded, and nothing that an answer holds can run
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def serve(run: Path, host: str, port: int, data_root: str | None = None, quiet: bool = False) -> None:
    """Show the page until it is interrupted.

    Args:
        run: folder of a run, or of a recogniser.
        host: address to listen at.
        port: 0 takes a free one.
        data_root: where the training images are now, if not where they were.
        quiet: print nothing.

    Raises:
        LongtailError: the extra is missing, the run is a segmenter's, or the port is taken.
    """
    try:
        import uvicorn
    except ImportError:
        raise LongtailError("serve: needs the extra serve: pip install 'longtail[serve]'") from None
    recognizer = load_kept(run)
    if isinstance(recognizer, Segmenter):
        raise LongtailError(f"{run}: is a segmenter; the page shows classes of whole images")
    known = None
    try:
        opened, _, data = open_finished(run, data_root)
        recognizer, known = opened, known_images(opened, data.train)
    except LongtailError as error:
        if not quiet:
            print(f"without neighbours: {error}")
    listening = _listen(host, port)
    address = f"http://{host}:{listening.getsockname()[1]}"

    @asynccontextmanager
    async def told(_: Any) -> AsyncIterator[None]:
        if not quiet:
            print(f"{address}  (Ctrl-C ends it)", flush=True)
        yield

    app = build_app(recognizer, known, run.resolve().name)
    app.router.lifespan_context = told
    config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=5, limit_concurrency=200)
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> Any:
    import socket

    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # who comes as soon as the address is told, waits rather than is refused
    except (OSError, OverflowError) as error:
        listening.close()
        raise LongtailError(f"--host {host} --port {port}: cannot be listened at: {error}") from None
    return listening
