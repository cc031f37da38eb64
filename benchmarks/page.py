"""Size of the report of a run with many classes, and the time that a browser takes to open it.

    python benchmarks/page.py --classes 1000

The images are noise: the contents of the page depend on the number of classes, not on what the images show. The time is
the browser's own, from the start of the navigation to the end of its load event, the median of five; needs chromium.
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
from longtail.report import run_report
from longtail.training.trainer import fit

_TIMER = """<script>addEventListener("load", () => setTimeout(() => {
const entry = performance.getEntriesByType("navigation")[0];
document.body.textContent = "ended " + entry.loadEventEnd; }));</script></body>"""


def main() -> None:
    """Print the time to write the page, its size, and the time to open it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--classes", type=int, default=1000)
    options.add_argument("--keep", type=Path, help="folder that keeps the page")
    args = options.parse_args()
    generator = torch.Generator().manual_seed(0)
    counts = [max(2, round(200 * 100 ** (-c / (args.classes - 1)))) for c in range(args.classes)]
    labels = torch.repeat_interleave(torch.arange(args.classes), torch.tensor(counts))
    test_labels = torch.arange(args.classes).repeat(5)
    train, test = (
        torch.randint(0, 256, (len(part), 3, 32, 32), generator=generator).byte() for part in (labels, test_labels)
    )
    class_names = [f"species {c}" for c in range(args.classes)]
    data = from_arrays((train, labels), (test, test_labels), class_names=class_names)
    config = load_recipe("digits-lt").config.replace(method="gml", network="resnet8", epochs=3, batch_size=256)
    config = config.replace(teacher={"network": "resnet8", "epochs": 1})
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fit(config, run, quiet=True, data=data)
        started = time.perf_counter()
        page = run_report(run)
        print(f"{args.classes} classes: written in {time.perf_counter() - started:.2f} s")
        print(f"size: {page.stat().st_size / 2**20:.2f} MiB")
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(page, args.keep)
        browser = shutil.which("chromium")
        if browser is None:
            sys.exit("chromium is not installed; the time to open the page is not measured")
        timed_page = Path(folder) / "timed.html"
        timed_page.write_text(page.read_text(encoding="utf-8").replace("</body>", _TIMER), encoding="utf-8")
        times = []
        for _ in range(5):
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", timed_page.as_uri()]
            text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
            times.append(float(text.split("ended ")[1].split("<")[0]))
        print(f"opened in {statistics.median(times):.0f} ms ({min(times):.0f} to {max(times):.0f})")


if __name__ == "__main__":
    main()
