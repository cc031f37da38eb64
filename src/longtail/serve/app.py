"""A local page to drop images on: classes with probabilities and the nearest training images, or objects in boxes.

Everything is on one page without anything from elsewhere. An upload is one image in the body of a request; what is too
large, too slow, empty or no image gets a 4xx answer with one line, and the server lives on. Legend: N training images,
C classes.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jinja2 import Environment, PackageLoader
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from longtail.data.data_uri import image_data_uri
from longtail.data.dataset import ImageSet
from longtail.data.image_io import image_errors, open_header, open_image, to_rgb
from longtail.data.paths import printable
from longtail.errors import LongtailError
from longtail.evaluation.calibration import conformal_minimum
from longtail.inference.features import encode_split
from longtail.inference.model import TrainedModel
from longtail.inference.options import TTA
from longtail.inference.recognizer import Recognizer
from longtail.registry import TASKS
from longtail.serve.connections import (
    TrustedHosts,
    is_local,
    listen,
    own_addresses,
    reaping_protocol,
    trusted_hosts,
    url,
)
from longtail.tasks.loading import load_model, load_run

logger = logging.getLogger(__name__)

MOST_BYTES = 20 * 2**20
MOST_PIXELS = 60_000_000
BODY_SECONDS = 60.0
"""Time that an upload may take to arrive."""
SHUTDOWN_SECONDS = 2
"""Time that requests under way have to end when the server is stopped."""
MOST_PENDING_BYTES = 2**30
"""Of all uploads that arrive or wait."""
_IN_MEMORY_BYTES = 2**18  # of each of them; the rest lies in a temporary file
_CONCURRENCY = 2  # images that are predicted at the same time; the others wait
_MOST_CONNECTIONS = 400  # at once; with a temporary file each, below the usual limit of 1,024 open files
_COVERAGE = 0.9
_NEIGHBOURS = 5
_MAX_REFERENCE_IMAGES = 20_000  # training images among which neighbours are searched


@dataclass
class ReferenceImages:
    """Training images and their features."""

    images: ImageSet
    positions: Tensor
    """(N,) where they are in the training set."""
    features: Tensor
    """(N, F), unit norm."""
    unreadable_logged: bool = False
    """Whether the log says that some of the images cannot be read any more."""

    def open(self, position: int) -> Image.Image | None:
        """Return the image at a position of the training set; None, which is logged once, where it cannot be read.

        Another image of its class in its place would not have the features of this one.
        """
        try:
            return self.images.images.open(position)
        except LongtailError as error:
            if not self.unreadable_logged:
                self.unreadable_logged = True
                logger.warning("training images that cannot be read are not shown as neighbours; the first: %s", error)
            return None


def reference_images(model: Recognizer, images: ImageSet, quiet: bool = True) -> ReferenceImages:
    """Return the features of the training images, or of evenly spaced ones where there are very many."""
    positions = torch.arange(0, len(images), max(1, -(-len(images) // _MAX_REFERENCE_IMAGES)))
    subset = ImageSet(_Subset(images, positions), images.labels[positions], images.ids[positions])  # type: ignore[arg-type]
    batches = encode_split(model.encoder, subset, model.config.image_size, device=model.device)
    parts = []
    every = 0.5 if sys.stderr.isatty() else 20.0
    with tqdm(
        desc="features of the training images", total=len(positions), disable=quiet, mininterval=every, delay=2
    ) as bar:
        for features, labels in batches:
            parts.append(F.normalize(features).cpu())
            bar.update(len(labels))
    return ReferenceImages(images, positions, torch.cat(parts))


class _Subset:
    """Some images of a split."""

    def __init__(self, images: ImageSet, positions: Tensor) -> None:
        self.images, self.positions, self.lazy = images.images, positions, images.images.lazy

    def __len__(self) -> int:
        return len(self.positions)

    def plain(self, indices: Tensor, size: int) -> Tensor:
        return self.images.plain(self.positions[indices], size)


def read_upload(body: bytes) -> Image.Image:
    """Return the uploaded image.

    Raises:
        LongtailError: it is empty, not an image, damaged, or too large, or the range of its values is no usual one.
    """
    if not body:
        raise LongtailError("the upload: is empty, expected an image")
    with image_errors("the upload"), open_header(io.BytesIO(body)) as image:
        if image.width * image.height > MOST_PIXELS:
            raise LongtailError(
                f"the upload: has {image.width} × {image.height} pixels, expected at most {MOST_PIXELS:,} in all"
            )
    return open_image(io.BytesIO(body), "the upload")


def answer(
    model: TrainedModel,
    reference: ReferenceImages | None,
    image: Image.Image,
    prior: str,
    top: int = 5,
    tta: TTA = "none",
) -> dict[str, Any]:
    """Return what the page shows of an image, as JSON holds it; no conformal set with test-time augmentation.

    ``set`` has the names of the classes in the conformal set, ``too_few`` those of them that are in the set of every
    image since they have too few validation images. Neighbours whose image cannot be read are left out.

    Of a model that does not classify whole images ``objects``, see :meth:`longtail.tasks.base.Task.find_objects`, and
    ``size``, width and height of the image as it is shown.
    """
    if not isinstance(model, Recognizer):
        shown = to_rgb(image)
        with torch.no_grad():
            objects = TASKS[model.config.task].find_objects(model, shown, prior)
        return {"objects": objects, "size": list(shown.size)}
    with torch.no_grad():
        stats = model.calibration_stats if tta == "none" else None
        predictions = model.predict(image, prior, coverage=None if stats is None else _COVERAGE, tta=tta)
        too_few = None
        if stats is not None:
            names = model.config.class_names
            counts = torch.bincount(stats.labels, minlength=len(names)).tolist()
            minimum = conformal_minimum(_COVERAGE)
            too_few = [name for name, count in zip(names, counts, strict=True) if count < minimum]
        response: dict[str, Any] = {
            "top": [{"class": name, "probability": value} for name, value in predictions.top(top)[0]],
            "set": None if predictions.sets is None else predictions.sets[0],
            "too_few": too_few,
            "calibrated": model.config.temperature != 1 or bool(model.config.temperature_fits),
            "nearest": [],
        }
        if reference is not None:
            features = F.normalize(model.encoder(model.preprocess(image))).cpu()[0]
            similarity = reference.features @ features
            values, nearest = similarity.topk(min(_NEIGHBOURS, len(similarity)))
            for value, position in zip(values.tolist(), reference.positions[nearest].tolist(), strict=True):
                neighbour = reference.open(position)
                if neighbour is None:
                    continue
                name = model.config.class_names[int(reference.images.labels[position])]
                response["nearest"].append({"class": name, "cosine": value, "image": image_data_uri(neighbour, 128)})
    return response


class _RefusedError(Exception):
    """An upload that is not taken."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Uploads:
    """The bodies of all requests that arrive or wait for their turn."""

    def __init__(self) -> None:
        self.pending = 0

    async def collect(self, request: Any, file: Any) -> int:
        """Write a body to a file and return its size, which the caller subtracts from :attr:`pending` in the end.

        Raises:
            _RefusedError: it is too large, or there are too many.
        """
        size, given = 0, request.headers.get("content-length", "0")
        if given.isdecimal() and int(given) > MOST_BYTES:  # refused before it is read
            raise _RefusedError(413, f"the upload: has more than {MOST_BYTES // 2**20} MiB")
        try:
            async for part in request.stream():
                size += len(part)
                self.pending += len(part)
                if size > MOST_BYTES:
                    raise _RefusedError(413, f"the upload: has more than {MOST_BYTES // 2**20} MiB")
                if self.pending > MOST_PENDING_BYTES:
                    raise _RefusedError(503, "the server: has too many uploads at once; try again in a moment")
                file.write(part)
        except OSError as error:
            self.pending -= size
            raise _RefusedError(503, f"the upload: cannot be kept: {error.strerror}") from None
        except BaseException:
            self.pending -= size
            raise
        return size


def build_app(
    model: TrainedModel,
    reference: ReferenceImages | None = None,
    title: str = "longtail",
    tta: TTA = "none",
    hosts: Sequence[str] | None = None,
    body_seconds: float = BODY_SECONDS,
) -> Any:
    """Return the page and its answers as an ASGI application.

    Args:
        model: what predicts.
        reference: training images among which neighbours are searched; none are shown if not given.
        title: of the page.
        tta: test-time augmentation, see :meth:`Recognizer.scores`.
        hosts: names in the Host header that are answered to, see :class:`~longtail.serve.connections.TrustedHosts`; all
            if not given.
        body_seconds: time that an upload may take to arrive.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    slots, uploads = asyncio.Semaphore(_CONCURRENCY), _Uploads()
    pages = Environment(loader=PackageLoader("longtail.serve", "."), autoescape=True, trim_blocks=True)
    page = pages.get_template("page.html.j2").render(
        title=printable(title),
        model=model.config,
        neighbours=reference is not None,
        most_bytes=MOST_BYTES,
        coverage=_COVERAGE,
        min_images=conformal_minimum(_COVERAGE),
        tta=tta,
        objects=not isinstance(model, Recognizer),
    )

    async def home(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})

    async def predict(request: Request) -> Response:
        try:
            return await respond(request)
        except asyncio.CancelledError:  # the server ends; uvicorn would print a traceback
            return JSONResponse({"error": "the server: is being stopped"}, 503, headers={"Connection": "close"})

    async def respond(request: Request) -> Response:
        prior = request.query_params.get("prior", "uniform")
        if prior not in {"uniform", "train"}:
            return JSONResponse({"error": f"prior '{prior[:50]}': expected uniform or train"}, 400)
        if request.headers.get("content-type", "").strip().lower().startswith("multipart/"):
            message = "the upload: is a form (multipart); send the image itself as the body: curl --data-binary @FILE"
            return JSONResponse({"error": message}, 415, headers={"Connection": "close"})
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as file:
            try:
                size = await asyncio.wait_for(uploads.collect(request, file), body_seconds)
            except asyncio.TimeoutError:
                message = f"the upload: has not arrived within {body_seconds:g} seconds"
                return JSONResponse({"error": message}, 408, headers={"Connection": "close"})
            except _RefusedError as error:
                return JSONResponse({"error": str(error)}, error.status, headers={"Connection": "close"})
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            try:
                async with slots:
                    file.seek(0)
                    image = await run_in_threadpool(read_upload, file.read())
                    response = await run_in_threadpool(answer, model, reference, image, prior, tta=tta)
            except LongtailError as error:
                return JSONResponse({"error": str(error)}, 400)
            finally:
                uploads.pending -= size
        # names of classes need not be Unicode, which JSONResponse expects
        return Response(json.dumps(response, allow_nan=False), media_type="application/json")

    middleware = [] if hosts is None else [Middleware(TrustedHosts, hosts=hosts)]
    routes = [Route("/", home), Route("/predict", predict, methods=["POST"])]
    return Starlette(routes=routes, middleware=middleware)


# nothing from elsewhere is loaded, and nothing that an answer holds can run
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def serve(
    run: Path,
    host: str,
    port: int,
    data_root: str | None = None,
    quiet: bool = False,
    tta: TTA = "none",
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serve the page until it is interrupted.

    Requests are answered only to the names that it was started for: a page from elsewhere whose own name is made to
    resolve to this machine (DNS rebinding) would read the answers otherwise.

    Args:
        run: folder of a run, or of a model.
        host: address to listen at.
        port: 0 takes a free one.
        data_root: where the training images are now, if not where they were.
        quiet: print nothing.
        tta: test-time augmentation, see :meth:`Recognizer.scores`.
        allowed_hosts: further names that it is reached by, as behind another server.

    Raises:
        LongtailError: the extra is missing, the model labels pixels, test-time augmentation is not for it, or the port
            is taken.
    """
    try:
        import uvicorn
    except ImportError:
        raise LongtailError("serve: needs the extra serve: pip install 'longtail[serve]'") from None
    model = load_model(run)
    is_recognizer = isinstance(model, Recognizer)
    if not is_recognizer and not TASKS[model.config.task].finds_objects:
        raise LongtailError(f"{run}: labels pixels; the page shows classes of whole images, or objects")
    if not is_recognizer and tta != "none":
        raise LongtailError(f"--tta {tta}: is for models that classify whole images")
    listening = listen(host, port)  # before what takes minutes
    reference = None
    if is_recognizer:
        try:
            loaded, _, data = load_run(run, data_root)
            assert isinstance(loaded, Recognizer)
            model, reference = loaded, reference_images(loaded, data.train, quiet)
        except LongtailError as error:
            if not quiet:
                print(f"without neighbours: {error}")
    port = listening.getsockname()[1]

    @asynccontextmanager
    async def announce(_: Any) -> AsyncIterator[None]:
        if not quiet:
            print(f"{url(host, port)}  (Ctrl-C ends it)", flush=True)
            if not is_local(listening):
                addresses = ", ".join(url(address, port) for address in own_addresses(listening))
                print(f"at {addresses or 'the addresses of this machine'}", flush=True)
                print("anyone who reaches this machine can use it; there is no authentication", flush=True)
        yield

    hosts = [*trusted_hosts(host), *allowed_hosts]
    app = build_app(model, reference, run.resolve().name, tta, hosts, BODY_SECONDS)
    app.router.lifespan_context = announce
    config = uvicorn.Config(
        app,
        http=reaping_protocol(),
        log_level="warning",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        limit_concurrency=_MOST_CONNECTIONS,
    )
    uvicorn.Server(config).run(sockets=[listening])
