"""The local page: its answers, what it refuses, a burst of uploads, and the page itself in a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
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
from longtail.data.dataset import ImageSet, LongTailedData
from longtail.data.images import FileImages
from longtail.inference.recognizer import Recognizer
from longtail.serve import app as serve_app
from longtail.serve import build_app
from longtail.serve.app import MOST_BYTES, reference_images
from longtail.serve.connections import is_local, listen, own_addresses, trusted_hosts
from longtail.tasks.loading import load_run
from longtail.training.trainer import fit
from tests.conftest import Command, save_image, small_card
from tests.processes import start_longtail

NAMES = ("<img src=x onerror=alert(1)>", 'a "quote" & more', "שלום 🐘")


def picture(size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(held, kind)
    return held.getvalue()


def tiff(values: list[list[float]]) -> bytes:
    held = io.BytesIO()
    Image.fromarray(np.array(values, dtype=np.float32)).save(held, "TIFF")
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


def test_classes_that_are_in_every_set(run: Path) -> None:
    recognizer = loaded(run)[0]
    assert recognizer.calibration_stats is not None
    labels = torch.tensor([0] * 9 + [1] * 8)
    sure = torch.full((17,), 0.9999)
    recognizer.calibration_stats = recognizer.calibration_stats._replace(labels=labels, true_probability=sure)
    response = TestClient(build_app(recognizer)).post("/predict", content=picture()).json()
    assert response["too_few"] == [str(digit) for digit in range(1, 10)]
    assert set(response["too_few"]) <= set(response["set"])


def test_a_neighbour_that_cannot_be_read_is_left_out(run: Path, tmp_path: Path, caplog: Any) -> None:
    recognizer, names = loaded(run)[0], [f"{number}.png" for number in range(8)]
    for number, name in enumerate(names):
        save_image(tmp_path / name, (8, 8), seed=number)
    labels = torch.zeros(len(names), dtype=torch.int64)
    images = FileImages(tmp_path, names, recognizer.config.stored_size, 1, labels, max_unreadable_fraction=0.0)
    reference = reference_images(recognizer, ImageSet(images, labels, torch.arange(len(names))))
    client, body = TestClient(build_app(recognizer, reference)), (tmp_path / "3.png").read_bytes()
    whole = client.post("/predict", content=body).json()["nearest"]
    assert len(whole) == 5
    (tmp_path / "3.png").unlink()  # the nearest
    for _ in range(3):
        assert client.post("/predict", content=body).json()["nearest"] == whole[1:]
    for name in names:
        (tmp_path / name).unlink(missing_ok=True)
    response = client.post("/predict", content=body)
    assert (response.status_code, response.json()["nearest"]) == (200, [])
    assert not images.unreadable
    (message,) = (record.getMessage() for record in caplog.records if record.name.startswith("longtail"))
    assert "3.png: cannot be read" in message


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


def test_names_that_are_not_utf8(run: Path) -> None:
    recognizer, name = loaded(run)[0], os.fsdecode(b"caf\xe9")
    names = tuple(f"{name} {digit}" for digit in range(10))
    recognizer.config = dataclasses.replace(recognizer.config, class_names=names)
    client = TestClient(build_app(recognizer, title=name))
    assert r"<h1>caf\xe9</h1>" in client.get("/").text
    response = client.post("/predict", content=picture())
    assert response.status_code == 200
    assert {entry["class"] for entry in response.json()["top"]} <= set(names)


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
        (b"\0\0\0\x18ftypheic", 400, "the upload: is in the format HEIC, which Pillow does not read here; convert it"),
        (picture()[:-40], 400, "is damaged"),
        (bomb(50_000, 50_000), 400, "larger than Pillow decodes safely"),
        (bomb(8_000, 8_000), 400, "has 8000 × 8000 pixels"),
        (tiff([[-5, 10]]), 400, "the upload: has values from -5 to 10, expected"),
        (b"\0" * (MOST_BYTES + 1), 413, "has more than 20 MiB"),
    ],
    ids=["empty", "text", "archive", "HEIC", "cut", "bomb", "too many pixels", "range", "too many bytes"],
)
def test_what_is_refused(client: TestClient, body: bytes, code: int, message: str) -> None:
    refused = client.post("/predict", content=body)
    assert refused.status_code == code
    assert message in refused.json()["error"]
    assert client.post("/predict", content=picture(kind="JPEG")).status_code == 200  # it lives on


def test_a_form_is_told_what_to_send_instead(client: TestClient) -> None:
    refused = client.post("/predict", files={"image": ("x.png", picture(), "image/png")})
    assert refused.status_code == 415
    assert "is a form (multipart); send the image itself as the body: curl --data-binary @FILE" in refused.text


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


@pytest.mark.parametrize(
    ("host", "answered", "refused"),
    [
        (
            "127.0.0.1",
            ["127.0.0.1", "127.0.0.1:8000", "LocalHost:8000", "[::1]:8000"],
            ["evil.example", "127.0.0.1.evil.example:8000", "192.168.0.5", "", "localhost.", "[::1", "localhost@evil"],
        ),
        ("192.168.0.5", ["192.168.0.5:80"], ["localhost", "192.168.0.50", "evil.example"]),
        ("fd00::7", ["[fd00::7]:8000"], ["fd00::7", "[fd00::8]:8000", "localhost"]),
        ("Page.example", ["page.example", "PAGE.example:80"], ["www.page.example", "127.0.0.1"]),
        ("0.0.0.0", ["192.168.0.5:80", "[fd00::7]", "localhost", socket.gethostname()], ["evil.example", "1.evil", ""]),
    ],
)
def test_only_the_hosts_that_it_was_started_for_are_answered(
    run: Path, host: str, answered: list[str], refused: list[str]
) -> None:
    client = TestClient(build_app(loaded(run)[0], hosts=trusted_hosts(host)))
    for name in answered:
        assert client.get("/", headers={"Host": name}).status_code == 200, name
    for name in refused:
        for response in (
            client.get("/", headers={"Host": name}),
            client.post("/predict", content=picture(), headers={"Host": name}),
        ):
            assert response.status_code == 400, name
            assert "is not one that this server was started for" in response.json()["error"]


def test_pages_of_other_hosts_are_refused(run: Path) -> None:
    client = TestClient(build_app(loaded(run)[0], hosts=[*trusted_hosts("127.0.0.1"), "page.example"]))
    host = "127.0.0.1:8000"

    def status(origin: str) -> int:
        return client.post("/predict", content=picture(), headers={"Host": host, "Origin": origin}).status_code

    for origin in (f"http://{host}", "http://localhost:8000", "https://page.example"):
        assert status(origin) == 200, origin
    for origin in ("https://evil.example", "null", "", "http://127.0.0.1:8000.evil.example", "http://a@127.0.0.1:8000"):
        assert status(origin) == 403, origin


def test_no_other_program_is_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("Ghostscript is run"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    client = TestClient(build_app(loaded(run)[0]))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    response = client.post("/predict", content=postscript)
    assert response.status_code == 400
    assert "is not an image that Pillow can read" in response.json()["error"]


def test_further_hosts(run: Path) -> None:
    hosts = [*trusted_hosts("127.0.0.1"), "page.example", "Other.example:8443", "[fd00::7]:80"]
    client = TestClient(build_app(loaded(run)[0], hosts=hosts))
    for host in ("page.example", "other.example", "other.example:8443", "[fd00::7]:8000"):
        assert client.get("/", headers={"Host": host}).status_code == 200, host


def test_uploads_beyond_what_is_kept_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(build_app(loaded(run)[0]))
    monkeypatch.setattr(serve_app, "MOST_PENDING_BYTES", 10_000)
    refused = client.post("/predict", content=b"\0" * 20_000)
    assert refused.status_code == 503
    assert "too many uploads at once" in refused.json()["error"]
    for _ in range(100):  # what was refused or answered is not counted any more
        assert client.post("/predict", content=picture()).status_code == 200


def test_a_file_system_that_is_full(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(28, "No space left on device")

    client = TestClient(build_app(loaded(run)[0]))
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda max_size: Full())
    refused = client.post("/predict", content=picture())
    assert refused.status_code == 503
    assert refused.json()["error"] == "the upload: cannot be kept: No space left on device"


@contextlib.contextmanager
def served(run: Path, prelude: str = "") -> Iterator[tuple[Any, str]]:
    with start_longtail("serve", run, "--port", "0", prelude=prelude) as process:
        while "\n" not in process.stdout and process.poll() is None:
            time.sleep(0.01)
        yield process, process.stdout.split()[0] if process.stdout else process.stderr
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


@pytest.fixture
def server(run: Path) -> Any:
    with served(run) as started:
        yield started


def resident(pid: int, field: str = "VmRSS") -> int:
    """Return a process's resident memory in KiB, 0 where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(rf"{field}:\s+(\d+)", status.read_text()) if status.is_file() else None
    return int(found[1]) if found else 0


async def request(port: int, body: bytes, pause: float = 0.0) -> int:
    """Return the status of the answer to an upload, 0 if there is none; with a pause it is sent a byte at a time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        answered = asyncio.ensure_future(reader.readline())
        for part in [body] if pause == 0 else [body[i : i + 1] for i in range(len(body))]:
            writer.write(part)
            await writer.drain()
            if pause:
                await asyncio.wait([answered], timeout=pause)
            if answered.done():
                break
        line = await answered
        return int(line.split()[1]) if line else 0
    except ConnectionError:
        return 0
    finally:
        writer.close()


async def silent(port: int, start: bytes) -> int:
    """Return what arrives at a connection that begins a request and never ends its header: 0, for it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(start)
    received = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return len(received)


LIMITS = "import longtail.serve.app as a, longtail.serve.connections as c; a.BODY_SECONDS = {}; c.HEADER_SECONDS = {}"


def test_a_client_that_sends_too_slowly_loses_its_place(run: Path) -> None:
    async def both(port: int) -> list[int]:
        return list(await asyncio.gather(request(port, picture(), pause=0.4), silent(port, b"POST /predict HTTP")))

    with served(run, LIMITS.format(3, 1)) as (_, address):
        port = int(address.rpartition(":")[2])
        assert asyncio.run(both(port)) == [408, 0]
        assert asyncio.run(request(port, picture(), pause=0.0005)) == 200


def test_an_upload_that_stalls_does_not_hold_up_the_end(run: Path) -> None:
    with served(run, "import longtail.serve.app as a; a.SHUTDOWN_SECONDS = 0.5") as (process, address):
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=60) as line:
            line.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nabc")
            time.sleep(0.5)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            answered = line.recv(4096)
        assert process.wait(timeout=30) == 130
    assert time.monotonic() - start < 10  # the upload had a minute
    assert b" 503 " in answered
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_two_hundred_at_once_slow_ones_among_them(run: Path) -> None:
    large = picture((1500, 1000))
    assert len(large) > 4 * 2**20  # noise does not compress

    async def all_at_once(port: int) -> list[int]:
        return await asyncio.gather(
            *(request(port, picture((64, 48), "JPEG")) for _ in range(120)),
            *(request(port, large) for _ in range(20)),
            *(request(port, zipped()) for _ in range(20)),
            *(request(port, picture((8, 8)), pause=0.001) for _ in range(10)),  # slow, but in time
            *(request(port, picture((8, 8)), pause=1.0) for _ in range(20)),  # for hours
            *(silent(port, start) for start in (b"", b"POST /predict HTTP/1.1\r\nHost: 127") for _ in range(5)),
        )

    with served(run, LIMITS.format(3, 1)) as (process, address):
        port = int(address.rpartition(":")[2])
        assert asyncio.run(request(port, large)) == 200
        start = resident(process.pid)
        asyncio.run(all_at_once(port))
        before = resident(process.pid)
        codes = asyncio.run(all_at_once(port))
        parts = {}
        for name, count in (("small", 120), ("large", 20), ("none", 20), ("slow", 10), ("endless", 20), ("silent", 10)):
            parts[name], codes = Counter(codes[:count]), codes[count:]
        assert parts == {
            "small": {200: 120},
            "large": {200: 20},
            "none": {400: 20},
            "slow": {200: 10},
            "endless": {408: 20},
            "silent": {0: 10},
        }
        assert process.poll() is None
        assert "Traceback" not in process.stderr
        # nothing is kept, and of 20 large uploads at once, 90 MB, two at a time are in memory
        assert resident(process.pid) - before < 20 * 1024
        assert resident(process.pid, "VmHWM") - start < 90 * 1024
        assert asyncio.run(request(port, picture())) == 200


def test_a_client_that_leaves_in_the_middle(server: Any) -> None:
    process, address = server
    port = int(address.rpartition(":")[2])
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as line:
            line.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nabc")
    assert asyncio.run(request(port, picture())) == 200
    assert "Traceback" not in process.stderr


def test_another_host_name_is_refused_by_the_real_server(server: Any) -> None:
    _, address = server
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
    assert httpx.get(address.replace("127.0.0.1", "localhost")).status_code == 200


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


def test_a_port_that_is_taken_and_a_host_that_is_no_name(run: Path, command: Command) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for place in (("--port", str(taken.getsockname()[1])), ("--host", "é" * 70)):
            code, _, err = command("serve", run, *place)
            assert (code, "cannot be listened at" in err, len(err.splitlines())) == (2, True, 1), err
        code, _, err = command("serve", run, "--host", "")  # not all addresses
        assert (code, "--host: is empty, expected an address" in err, len(err.splitlines())) == (2, True, 1), err


@pytest.mark.parametrize(("host", "exposed"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_who_can_use_it_is_said(
    run: Path, host: str, exposed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_app, "own_addresses", lambda _: ["192.0.2.7", "2001:db8::7"])

    async def announce(app: Any) -> None:
        async with app.router.lifespan_context(app):
            pass

    def run_server(server: Any, sockets: list[socket.socket]) -> None:
        asyncio.run(announce(server.config.app))
        sockets[0].close()

    monkeypatch.setattr("uvicorn.Server.run", run_server)
    serve_app.serve(run, host, 0)
    lines = capsys.readouterr().out.splitlines()
    port = lines[0].split()[0].rpartition(":")[2]
    assert lines[0] == f"http://{host}:{port}  (Ctrl-C ends it)"
    others = [
        f"at http://192.0.2.7:{port}, http://[2001:db8::7]:{port}",
        "anyone who reaches this machine can use it; there is no authentication",
    ]
    assert lines[1:] == (others if exposed else [])


def test_the_addresses_of_this_machine() -> None:
    with listen("127.0.0.1", 0) as local:
        assert is_local(local)
        assert own_addresses(local) == ["127.0.0.1"]
    with listen("0.0.0.0", 0) as everywhere:
        assert not is_local(everywhere)
        for address in own_addresses(everywhere):
            assert not address.startswith("127.")
            socket.create_connection((address, everywhere.getsockname()[1]), timeout=10).close()


BROWSER = shutil.which("chromium")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Debian's chromium")


def shown_by_browser(address: str, *flags: str) -> str:
    """Return the page at an address after its scripts have run."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    return subprocess.run([*command, *flags, address], capture_output=True, text=True, timeout=120, check=True).stdout


@needs_browser
def test_an_answer_that_comes_after_that_for_a_newer_prior_is_not_shown(client: TestClient, tmp_path: Path) -> None:
    script = """<script>
    const answer = url => ({ json: async () => ({ top: [{ class: url, probability: 1 }], nearest: [] }) });
    window.fetch = url => new Promise(done => setTimeout(() => done(answer(url)), url.endsWith("train") ? 10 : 500));
    add([new File(["image"], "a.png")]);
    const prior = document.getElementById("prior"); prior.value = "train"; prior.dispatchEvent(new Event("change"));
    </script></body>"""
    (tmp_path / "page.html").write_text(client.get("/").text.replace("</body>", script), encoding="utf-8")
    shown = shown_by_browser((tmp_path / "page.html").as_uri())
    assert "<bdi>predict?prior=train</bdi>" in shown
    assert "<bdi>predict?prior=uniform</bdi>" not in shown


@needs_browser
def test_a_set_of_very_many_classes_with_long_names(client: TestClient, tmp_path: Path) -> None:
    names = [f"{index:03}_" + "x" * 150 for index in range(13)]
    told = {"top": [{"class": names[0], "probability": 1}], "set": names, "too_few": names[4:], "nearest": []}
    script = f"""<script>
    window.fetch = async () => ({{ json: async () => ({json.dumps(told)}) }});
    add([new File(["image"], "IMG_".repeat(60) + ".heic")]);
    const page = document.documentElement;
    setTimeout(() => document.body.dataset.overflow = page.scrollWidth - page.clientWidth, 2000);
    </script></body>"""
    (tmp_path / "page.html").write_text(client.get("/").text.replace("</body>", script), encoding="utf-8")
    shown = shown_by_browser((tmp_path / "page.html").as_uri(), "--window-size=500,900")
    assert 'data-overflow="0"' in shown
    summary = "Prediction set: 13 of 10 classes, 9 of them only because they have too few validation images"
    assert f'<details class="soft"><summary>{summary}</summary>' in shown  # closed
    inside, rest = shown[shown.index(summary) : shown.index("</details>")].split("In the set of every image")
    assert (inside.count("<bdi>"), rest.count("<bdi>")) == (4, 9)
    assert "with fewer than 9 validation images each" in rest


@needs_browser
def test_in_a_browser(tmp_path: Path) -> None:
    """Class names that look like code are shown as text, and nothing of them runs."""
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
    shown = shown_by_browser(f"http://127.0.0.1:{port}/dropped")
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
