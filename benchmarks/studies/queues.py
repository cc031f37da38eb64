"""Accuracy and training time for different queue sizes K and minimum sizes per class k_m.

Commands:
    python benchmarks/studies/queues.py --seeds 3
with --out FOLDER and --json FILE.
"""

from __future__ import annotations

from common import Variant, digits, parser, study

SIZES: dict[str, Variant] = {
    f"K = {size}": {"method": "gml", "gml": {"queue_size": size}} for size in (20, 50, 100, 200, 400, 1600)
}
MINIMA: dict[str, Variant] = {
    f"k_m = {minimum}": {"method": "gml", "gml": {"queue_size": 400, "queue_minimum": minimum}}
    for minimum in (1, 4, 8, 16, 40)
}


def main() -> None:
    options = parser(__doc__)
    args = options.parse_args()
    study(
        digits(),
        SIZES | MINIMA,
        args,
        command=f"python benchmarks/studies/queues.py --seeds {args.seeds}",
        budget="conv8 student and teacher, 200 epochs of one student view, batch 64; k_m = 2 along K, K = 400 along "
        "k_m",
        baseline="K = 400",
    )


if __name__ == "__main__":
    main()
