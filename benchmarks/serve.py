"""Two hundred uploads at once to the local page, slow ones among them: what is answered, and the resident memory.

A small network with random weights classifies, so that the server's own work is measured. The server runs in a process
of its own, as a user starts it. 140 clients send a photograph of about 0.1 MB, 30 one of about 4.5 MB, 10 no image, and
20 a byte every 0.2 seconds. The resident memory is that of the server: before, at its peak, and after the answers.

Command: python benchmarks/serve.py [--requests 200] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from longtail import Recognizer
from longtail.inference.model_config import ModelConfig
from longtail.nn import CosineClassifier, Encoder


def save_model(folder: Path) -> None:
    """Write a model with random weights."""
    torch.manual_seed(0)
    config = ModelConfig(
        class_names=("a", "b", "c"),
        class_counts=(90, 9, 1),
        network="resnet32",
        scale=30.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        image_size=32,
        stored_size=32,
        predicts_under="uniform",
    )
    encoder = Encoder(config.network, config.mean, config.std)
    Recognizer(encoder, CosineClassifier(encoder.num_features, 3, config.scale), config).save(folder)


def photograph(size: tuple[int, int], kind: str) -> bytes:
    """Return an image file of noise, which hardly compresses."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


async def upload(port: int, body: bytes, pause: float = 0.0) -> int:
    """Return the status of the answer, 0 if the connection was closed; with a pause a byte is sent at a time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        answered = asyncio.ensure_future(reader.readline())
        for part in [body] if pause == 0 else [body[index : index + 1] for index in range(len(body))]:
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


async def burst(port: int, requests: int) -> tuple[dict[str, Counter[int]], float, float]:
    """Return the answers by kind, and the seconds until the last of the quick clients and of all had theirs."""
    small, large = photograph((240, 180), "PNG"), photograph((1500, 1000), "PNG")
    kinds = {
        "0.1 MB": (requests * 14 // 20, small, 0.0),
        "4.5 MB": (requests * 3 // 20, large, 0.0),
        "no image": (requests // 20, b"none", 0.0),
        "a byte every 0.2 s": (requests // 10, small, 0.2),
    }
    started = time.perf_counter()
    tasks = {
        name: [asyncio.ensure_future(upload(port, body, pause)) for _ in range(count)]
        for name, (count, body, pause) in kinds.items()
    }
    await asyncio.gather(*(task for name, group in tasks.items() if not kinds[name][2] for task in group))
    quick = time.perf_counter() - started
    codes: dict[str, Counter[int]] = {}
    for name, group in tasks.items():  # Python 3.10 knows no await in nested comprehensions
        codes[name] = Counter([await task for task in group])
    return codes, quick, time.perf_counter() - started


def resident_mib(pid: int, field: str = "VmRSS") -> float:
    """Return the resident memory of a process."""
    match = re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def main() -> None:
    """Print answers, seconds and memory of every round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        command = [sys.executable, "-m", "longtail", "serve", folder, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = 0
            for line in server.stdout:  # before its address it says that there are no training images
                if match := re.match(r"http://127\.0\.0\.1:(\d+)", line):
                    port = int(match[1])
                    break
            try:
                asyncio.run(upload(port, photograph((1500, 1000), "PNG")))
                for number in range(options.rounds):
                    before = resident_mib(server.pid)
                    codes, quick, seconds = asyncio.run(burst(port, options.requests))
                    shown = "; ".join(f"{name} {dict(counts)}" for name, counts in codes.items())
                    print(f"round {number + 1}: {shown}")
                    print(
                        f"  quick clients {quick:.1f} s, all {seconds:.1f} s; resident memory {before:.0f} MiB before",
                        end="",
                    )
                    print(
                        f", {resident_mib(server.pid, 'VmHWM'):.0f} at its peak, {resident_mib(server.pid):.0f} after"
                    )
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
