"""How heavy the report of a run of many classes is, and how long a browser takes to open it.

    python benchmarks/page.py --classes 1000

The images are noise: what the page holds depends on how many classes there are, not on what they show. The time is the
browser's own, from the start of the navigation to the end of its load event, the middle one of five; needs chromium.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from longtail.config import load_recipe
from longtail.data.dataset import from_arrays
from longtail.engine.fit import fit
from longtail.report import run_report

_TOLD = """<script>addEventListener("load", () => setTimeout(() => {
const entry = performance.getEntriesByType("navigation")[0];
document.body.textContent = "ended " + entry.loadEventEnd; }));</script></body>"""


def main() -> None:
    """Print a line each for the page's weight, the time to write it and the time to open it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--classes", type=int, default=1000)
    options.add_argument("--keep", type=Path, help="folder that keeps the page")
    given = options.parse_args()
    generator = torch.Generator().manual_seed(0)
    counts = [max(2, round(200 * 100 ** (-c / (given.classes - 1)))) for c in range(given.classes)]
    labels = torch.repeat_interleave(torch.arange(given.classes), torch.tensor(counts))
    truth = torch.arange(given.classes).repeat(5)
    made = [torch.randint(0, 256, (len(part), 3, 32, 32), generator=generator).byte() for part in (labels, truth)]
    data = from_arrays((made[0], labels), (made[1], truth), class_names=[f"species {c}" for c in range(given.classes)])
    config = load_recipe("digits-lt").config.replace(method="gml", network="resnet8", epochs=3, batch_size=256)
    config = config.replace(teacher={"network": "resnet8", "epochs": 1})
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fit(config, run, quiet=True, data=data)
        started = time.perf_counter()
        page = run_report(run)
        print(f"{given.classes} classes: written in {time.perf_counter() - started:.2f} s")
        print(f"weight: {page.stat().st_size / 2**20:.2f} MiB")
        if given.keep:
            given.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(page, given.keep)
        browser = shutil.which("chromium")
        if browser is None:
            sys.exit("the time to open it needs chromium")
        told = Path(folder) / "told.html"
        told.write_text(page.read_text(encoding="utf-8").replace("</body>", _TOLD), encoding="utf-8")
        times = []
        for _ in range(5):
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", told.as_uri()]
            shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
            times.append(float(shown.split("ended ")[1].split("<")[0]))
        print(f"opened in {statistics.median(times):.0f} ms ({min(times):.0f} to {max(times):.0f})")


if __name__ == "__main__":
    main()
