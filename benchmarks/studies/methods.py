"""Comparison of the methods with one recipe, at equal steps and student passes.

All methods have one student view per image and the same epochs. GML also has a teacher; its training time is in a
separate column.

Commands:
    python benchmarks/studies/methods.py digits --seeds 5
    python benchmarks/studies/methods.py cifar --imbalance 100 --seeds 3      (--root DATA)
    python benchmarks/studies/methods.py cifar --imbalance 10 --seeds 3      (--root DATA)
each with --out FOLDER and --json FILE.
"""

from __future__ import annotations

from common import Variant, cifar, digits, parser, study

METHODS: dict[str, Variant] = {
    name: {"method": name}
    for name in ("ce", "focal", "cb", "la", "ldam", "supcon", "paco", "gpaco", "bcl", "proco", "gml")
}
EPOCHS = {100: 16, 10: 8}  # so that both imbalances have about the same number of steps


def main() -> None:
    options = parser(__doc__)
    options.add_argument("study", choices=["digits", "cifar"])
    options.add_argument("--methods", default=",".join(METHODS), help="names, separated by commas")
    options.add_argument("--imbalance", type=int, default=100, choices=list(EPOCHS))
    args = options.parse_args()
    command = f"python benchmarks/studies/methods.py {args.study}"
    if args.study == "digits":
        base, budget = digits(), "digits-lt as it is: conv8, 200 epochs of one student view, batch 64"
    else:
        epochs = EPOCHS[args.imbalance]
        base = cifar(args.root, epochs, args.imbalance)
        command += f" --imbalance {args.imbalance}"
        budget = (
            f"ResNet-8, {epochs} epochs of one student view, batch 128, crop and mirror, one-cycle; "
            f"gml's teacher: ResNet-14, {epochs} epochs"
        )
    if args.methods != ",".join(METHODS):
        command += f" --methods {args.methods}"
    command += f" --seeds {args.seeds}"
    chosen = {name: METHODS[name] for name in args.methods.split(",")}
    study(base, chosen, args, command=command, budget=budget, baseline="la")


if __name__ == "__main__":
    main()
