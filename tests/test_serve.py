"""The local page: its answers, what it refuses, a burst of uploads, and the page itself in a real browser."""

from __future__ import annotations

import io
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from longtail.config import load_recipe
from longtail.data.dataset import LongTailedData
from longtail.inference.recognizer import Recognizer
from longtail.serve import build_app
from longtail.serve.app import MOST_BYTES, reference_images
from longtail.tasks.loading import load_run
from longtail.training.trainer import fit
from tests.conftest import Command, small_card
from tests.processes import start_longtail

NAMES = ("<img src=x onerror=alert(1)>", 'a "quote" & more', "שלום 🐘")


def picture(size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(held, kind)
    return held.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is so large, in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_recipe("digits-lt").config
    config = config.replace(method="la", network="conv8-tiny", epochs=3, data={"val_fraction": 0.2})
    folder = tmp_path_factory.mktemp("serve") / "run"
    fit(config, folder, quiet=True)
    return folder


def loaded(run: Path) -> tuple[Recognizer, LongTailedData]:
    recognizer, _, data = load_run(run)
    assert isinstance(recognizer, Recognizer)
    return recognizer, data


@pytest.fixture(scope="module")
def client(run: Path) -> TestClient:
    recognizer, data = loaded(run)
    return TestClient(build_app(recognizer, reference_images(recognizer, data.train), "digits"))


def test_an_answer(client: TestClient, run: Path) -> None:
    response = client.post("/predict", content=picture()).json()
    with Image.open(io.BytesIO(picture())) as image:
        expected = Recognizer.load(run).predict(image).top(5)[0]
    assert [entry["class"] for entry in response["top"]] == [name for name, _ in expected]
    assert response["top"][0]["probability"] == pytest.approx(expected[0][1], abs=1e-5)
    assert response["calibrated"]
    assert set(response["set"]) <= {str(digit) for digit in range(10)}
    assert len(response["nearest"]) == 5
    assert response["nearest"][0]["image"].startswith("data:image/png;base64,")
    cosines = [entry["cosine"] for entry in response["nearest"]]
    assert cosines == sorted(cosines, reverse=True)
    other = client.post("/predict?prior=train", content=picture()).json()
    assert other["top"] != response["top"]


def test_a_training_image_is_its_own_nearest(run: Path) -> None:
    recognizer, data = loaded(run)
    client = TestClient(build_app(recognizer, reference_images(recognizer, data.train)))
    held = io.BytesIO()
    data.train.images.open_with_fallback(7).save(held, "PNG")
    nearest = client.post("/predict", content=held.getvalue()).json()["nearest"][0]
    assert nearest["cosine"] == pytest.approx(1, abs=1e-4)
    assert nearest["class"] == data.class_names[int(data.train.labels[7])]


def test_test_time_augmentation(run: Path) -> None:
    recognizer, data = loaded(run)
    client = TestClient(build_app(recognizer, reference_images(recognizer, data.train), "digits", tta="flip"))
    assert "Test-time augmentation: flip." in client.get("/").text
    response = client.post("/predict", content=picture()).json()
    with Image.open(io.BytesIO(picture())) as image:
        expected, plain = (recognizer.predict(image, tta=tta).top(1)[0][0][1] for tta in ("flip", "none"))
    assert response["top"][0]["probability"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - plain) > 1e-4
    assert response["set"] is None  # these are calibrated on single views
    assert len(response["nearest"]) == 5


def zipped() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a.txt", "none")
    return held.getvalue()


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"", 400, "is empty"),
        (b"none", 400, "is not an image"),
        (zipped(), 400, "is not an image"),
        (picture()[:-40], 400, "is damaged"),
        (bomb(50_000, 50_000), 400, "larger than Pillow decodes safely"),
        (bomb(8_000, 8_000), 400, "has 8000 × 8000 pixels"),
        (b"\0" * (MOST_BYTES + 1), 413, "has more than 20 MiB"),
    ],
    ids=["empty", "text", "archive", "cut", "bomb", "too many pixels", "too many bytes"],
)
def test_what_is_refused(client: TestClient, body: bytes, code: int, message: str) -> None:
    refused = client.post("/predict", content=body)
    assert refused.status_code == code
    assert message in refused.json()["error"]
    assert client.post("/predict", content=picture(kind="JPEG")).status_code == 200  # it lives on


def test_an_upload_that_does_not_say_how_long_it_is(client: TestClient) -> None:
    refused = client.post("/predict", content=(b"\0" * 2**20 for _ in range(30)))
    assert refused.status_code == 413


def test_other_requests(client: TestClient) -> None:
    assert client.post("/predict?prior=evil", content=picture()).status_code == 400
    assert client.get("/predict").status_code == 405
    assert client.get("/../../etc/passwd").status_code == 404
    home = client.get("/")
    assert "default-src 'none'" in home.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["']https?:""", home.text)
    assert "Test-time augmentation" not in home.text


@pytest.fixture
def server(run: Path) -> Any:
    with start_longtail("serve", run, "--port", "0") as process:
        while "\n" not in process.stdout and process.poll() is None:
            time.sleep(0.01)
        yield process, process.stdout.split()[0] if process.stdout else process.stderr
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def test_fifty_at_once(server: Any) -> None:
    process, address = server
    assert address.startswith("http://127.0.0.1:")
    bodies = [picture(), b"", bomb(50_000, 50_000), zipped(), picture((64, 48), "JPEG")] * 10

    def send(body: bytes) -> int:
        return httpx.post(f"{address}/predict", content=body, timeout=60).status_code

    with ThreadPoolExecutor(50) as pool:
        codes = list(pool.map(send, bodies))
    assert codes == [200, 400, 400, 400, 200] * 10
    assert process.poll() is None
    assert urllib.request.urlopen(address).status == 200


def test_a_hundred_megabytes_are_not_taken_in(server: Any) -> None:
    process, address = server
    # who says how much is coming is refused before it comes; who sends it all the same finds the line closed
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as line:
        line.sendall(f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Length: {100 * 2**20}\r\n\r\n".encode())
        assert b" 413 " in line.recv(4096)
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"{address}/predict", data=bytes(100 * 2**20), timeout=60)
    status = Path(f"/proc/{process.pid}/status")
    if status.is_file():
        peak = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        now = re.search(r"VmRSS:\s+(\d+)", status.read_text())
        assert peak is not None
        assert now is not None
        assert int(peak[1]) - int(now[1]) < 60 * 1024  # nor kept, nor read to its end
    with urllib.request.urlopen(f"{address}/predict", data=picture(), timeout=60) as answered:
        assert answered.status == 200


def test_a_port_that_is_taken(run: Path, command: Command) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = command("serve", run, "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "cannot be listened at" in err
    assert len(err.splitlines()) == 1


def test_in_a_browser(tmp_path: Path) -> None:
    """Class names that look like code are shown as text, and nothing of them runs."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs Debian's chromium")
    from longtail.nn import CosineClassifier, Encoder

    torch.manual_seed(0)
    config = small_card(NAMES, (90, 9, 1))
    encoder = Encoder("conv8-tiny", [0.5], [0.5])
    recognizer = Recognizer(encoder, CosineClassifier(encoder.num_features, 3), config)
    app = build_app(recognizer, None, 'run <b>"1"</b>')
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    page = TestClient(app).get("/").text
    data = ",".join(map(str, picture()))
    drop = f"add([new File([new Uint8Array([{data}])], 'a.png', {{type: 'image/png'}})]);"
    drop += "add([new File([new Uint8Array(100 * 2 ** 20)], 'large.png')]);"
    script = f"<script>window.alert = () => document.title = 'ran'; {drop}</script></body>"
    clicked = page.replace("</body>", script)
    app.router.routes.append(Route("/dropped", lambda _: HTMLResponse(clicked)))
    import threading

    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    shown = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/dropped"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    server.should_exit = True
    thread.join(timeout=30)
    results = shown[
        shown.index('id="results"') : shown.index("<script>const results") if "<script>const results" in shown else None
    ]
    assert "&lt;img src=x onerror=alert(1)&gt;" in results
    assert "שלום 🐘" in results
    assert "<title>ran</title>" not in shown
    assert "run &lt;b&gt;" in shown
    assert results.count('class="bar"') == 3
    assert "the upload: has more than 20 MiB" in results
