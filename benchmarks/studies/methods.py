"""Which method is ahead, under one recipe, at equal steps and student passes?

All methods get one student view an image and the same epochs; GML has a teacher besides, whose training is not counted
as the student's and stands in a column of its own.

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
    options.add_argument("--methods", default=",".join(METHODS), help="names, with commas between them")
    options.add_argument("--imbalance", type=int, default=100, choices=list(EPOCHS))
    given = options.parse_args()
    command = f"python benchmarks/studies/methods.py {given.study}"
    if given.study == "digits":
        base, budget = digits(), "digits-lt as it is: conv8, 200 epochs of one student view, batch 64"
    else:
        epochs = EPOCHS[given.imbalance]
        base = cifar(given.root, epochs, given.imbalance)
        command += f" --imbalance {given.imbalance}"
        budget = (
            f"ResNet-8, {epochs} epochs of one student view, batch 128, crop and mirror, one-cycle; "
            f"gml's teacher: ResNet-14, {epochs} epochs"
        )
    if given.methods != ",".join(METHODS):
        command += f" --methods {given.methods}"
    command += f" --seeds {given.seeds}"
    chosen = {name: METHODS[name] for name in given.methods.split(",")}
    study(base, chosen, given, command=command, budget=budget, baseline="la")


if __name__ == "__main__":
    main()
