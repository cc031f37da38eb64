"""Splits of samples in groups, against all splits that there are of small sets."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtail.config import Data
from longtail.data.grouped_split import ALWAYS_TRAIN, class_folds, grouped_folds, grouped_split, number_groups
from longtail.data.listing.groups import read_groups
from longtail.data.listing.tables import unused_columns
from longtail.data.splits import write_split
from longtail.errors import LongtailError
from tests.conftest import Command, save_image

Samples = list[tuple[int, int]]
"""(class, group) of each sample."""


def tensors(samples: Samples) -> tuple[Tensor, Tensor]:
    labels, groups = (torch.tensor(column, dtype=torch.int64) for column in zip(*samples, strict=True))
    return labels, groups


def parts_of(parts: Tensor, of: Tensor, value: int) -> set[int]:
    return set(parts[of == value].tolist())


def whole_groups_suffice(labels: Tensor, groups: Tensor) -> bool:
    """Return whether some placing of whole groups has every class with two samples in both of two parts."""
    numbers = groups.unique().tolist()
    classes = [label for label in labels.unique().tolist() if (labels == label).sum() > 1]
    singles = [label for label in labels.unique().tolist() if (labels == label).sum() == 1]
    of = {label: set(groups[labels == label].tolist()) for label in [*classes, *singles]}
    for choice in itertools.product((0, 2), repeat=len(numbers)):
        part = dict(zip(numbers, choice, strict=True))
        if all({part[g] for g in of[label]} == {0, 2} for label in classes) and all(
            {part[g] for g in of[label]} == {0} for label in singles
        ):
            return True
    return False


some_samples = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=2, max_size=25)


@given(some_samples, st.sampled_from([0.1, 0.3, 0.5]), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_every_class_is_in_both_parts_and_groups_are_divided_only_where_they_must_be(
    samples: Samples, test: float, seed: int
) -> None:
    labels, groups = tensors(samples)
    split = grouped_split(labels, groups, 5, 0.0, test, seed)
    for label in labels.unique().tolist():
        expected = {0, 2} if (labels == label).sum() > 1 else {0}
        assert parts_of(split.parts, labels, label) == expected
    divided = [group for group in groups.unique().tolist() if len(parts_of(split.parts, groups, group)) > 1]
    assert split.divided == divided
    assert bool(divided) == (not whole_groups_suffice(labels, groups))
    assert bool(split.divided_for) == bool(divided)
    again = grouped_split(labels, groups, 5, 0.0, test, seed)
    assert torch.equal(split.parts, again.parts)


@given(some_samples, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_strict_groups_are_never_divided(samples: Samples, seed: int) -> None:
    labels, groups = tensors(samples)
    split = grouped_split(labels, groups, 5, 0.2, 0.2, seed, strict=True)
    folds = grouped_folds(labels, groups, 5, 3, seed, strict=True)
    for parts in (split.parts, folds.parts):
        assert all(len(parts_of(parts, groups, group)) == 1 for group in groups.unique().tolist())
    assert split.divided == folds.divided == []
    for result, wanted in ((split, {0, 1, 2}), (folds, {0, 1, 2})):
        missing = [label for label in labels.unique().tolist() if parts_of(result.parts, labels, label) != wanted]
        assert result.missing == missing
    if whole_groups_suffice(labels, groups):
        two = grouped_split(labels, groups, 5, 0.0, 0.3, seed, strict=True)
        assert all(
            parts_of(two.parts, labels, label) == {0, 2}
            for label in labels.unique().tolist()
            if (labels == label).sum() > 1
        )


@given(some_samples, st.integers(2, 5), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_every_class_is_trained_in_every_fold(samples: Samples, folds: int, seed: int) -> None:
    labels, groups = tensors(samples)
    single = torch.bincount(labels, minlength=5) == 1
    split = grouped_folds(labels, groups, 5, folds, seed, train_only=single)
    for label in labels.unique().tolist():
        parts = parts_of(split.parts, labels, label)
        assert parts == {ALWAYS_TRAIN} if single[label] else len(parts) > 1
        assert parts <= set(range(folds)) or single[label]
    divided = [group for group in groups.unique().tolist() if len(parts_of(split.parts, groups, group)) > 1]
    assert split.divided == divided


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(2, 6), st.integers(0, 3))
@settings(deadline=None)
def test_folds_of_a_class_differ_by_one(labels: list[int], folds: int, seed: int) -> None:
    fold = class_folds(torch.tensor(labels), 6, folds, seed)
    counts = torch.zeros(folds, 6, dtype=torch.int64).index_put_(
        (fold, torch.tensor(labels)), torch.ones(len(labels), dtype=torch.int64), accumulate=True
    )
    assert int((counts.amax(0) - counts.amin(0)).max()) <= 1
    assert int(counts.sum(1).max() - counts.sum(1).min()) <= 1


def test_three_groups_that_share_three_classes_pairwise_are_the_smallest_contradiction() -> None:
    labels, groups = tensors([(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 0)])
    split = grouped_split(labels, groups, 3, 0.0, 0.5, 0)
    assert all(parts_of(split.parts, labels, label) == {0, 2} for label in range(3))
    assert len(split.divided) == 1
    assert len(split.divided_for) == 1
    assert grouped_split(labels, groups, 3, 0.0, 0.5, 0, strict=True).missing != []


def test_a_search_that_greed_alone_does_not_win() -> None:
    """Random contradiction-free sets of 40 groups, each of two to four of 60 classes: a solution is planted."""
    rng = np.random.default_rng(0)
    for seed in range(5):
        side = rng.permutation(np.repeat([0, 1], 20))
        samples = []
        for label in range(60):
            train, test = (rng.choice(np.flatnonzero(side == part), 1 + (label % 2)) for part in (0, 1))
            samples += [(label, int(group)) for group in {*train.tolist(), *test.tolist()}]
        labels, groups = tensors(samples)
        split = grouped_split(labels, groups, 60, 0.0, 0.5, seed)
        assert (split.divided, split.missing) == ([], [])


def test_the_parts_have_their_fractions_of_a_long_tail() -> None:
    rng = np.random.default_rng(1)
    counts = [400, 200, 100, 50, 25, 12, 6, 3, 2]
    samples = [
        (label, 100 * label + int(rng.integers(max(2, n // 4)))) for label, n in enumerate(counts) for _ in range(n)
    ]
    labels, groups = tensors(samples)
    split = grouped_split(labels, groups, 9, 0.1, 0.2, 0)
    shares = torch.bincount(split.parts, minlength=3) / len(labels)
    assert [round(float(share), 2) for share in shares] == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    for label in range(4):
        of_class = torch.bincount(split.parts[labels == label], minlength=3) / counts[label]
        assert of_class.tolist() == pytest.approx([0.7, 0.1, 0.2], abs=0.06)
    folds = grouped_folds(labels, groups, 9, 5, 0)
    sizes = torch.bincount(folds.parts, minlength=5)
    assert int(sizes.max() - sizes.min()) < 0.05 * len(labels)
    assert folds.divided == split.divided


def test_wrong_arguments_are_named() -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(LongtailError, match=r"labels: expected values in \[0, 1\), got 1 for image 1"):
        grouped_split(labels, labels, 1, 0.1, 0.1, 0)
    for groups in (torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.tensor([0, -1])):
        with pytest.raises(LongtailError, match=r"groups: expected shape \(2,\) of int64 of at least 0"):
            grouped_split(labels, groups, 2, 0.1, 0.1, 0)


def test_unknown_groups_are_groups_of_their_own() -> None:
    numbers, names = number_groups(["a", None, "a", float("nan"), "", " ", np.nan, 3, 3])
    assert numbers.tolist() == [0, 1, 0, 2, 3, 4, 5, 6, 6]
    assert names == ["a", "sample 1", "sample 3", "sample 4", "sample 5", "sample 6", "3"]
    no_time = np.datetime64("NaT")
    assert number_groups([no_time, no_time, np.datetime64("2020-01-01")])[0].tolist() == [0, 1, 2]


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """A table of owls (four birds), kites (two) and one emu; a café's path is written in two ways."""
    rows = [("owl", f"bird {bird}") for bird in range(4) for _ in range(3)]
    rows += [("kite", "k1"), ("kite", "k1"), ("kite", "k2"), ("emu", "e"), ("emu", "e"), ("owl", "")]
    lines = ["Path,label,Animal ID"]
    for number, (label, bird) in enumerate(rows):
        save_image(tmp_path / "birds" / f"{number}.png", seed=number)
        lines.append(f"./birds//{number}.png,{label},{bird}")
    table = tmp_path / "birds.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def written(path: Path) -> list[dict[str, str]]:
    import csv

    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_keeps_groups_together(birds: Path, tmp_path: Path, command: Command) -> None:
    out, summary = tmp_path / "split.csv", tmp_path / "split.json"
    code, text, err = command(
        *("split", birds, "--groups", "animal_id", "--out", out, "--val", "0", "--test", "0.3", "--json", summary)
    )
    assert (code, err) == (0, "")
    assert (
        "groups in several splits: 1 of 7 (e); without that, these classes would be missing from train or test: emu"
        in (text)
    )
    assert "1 images have no group" in text
    rows = written(out)
    assert list(rows[0]) == ["path", "class_name", "split", "Animal ID"]
    assert len(rows) == 18
    splits = {bird: {row["split"] for row in rows if row["Animal ID"] == bird} for bird in ("bird 0", "k1", "k2", "e")}
    assert all(len(splits[bird]) == 1 for bird in ("bird 0", "k1", "k2"))
    assert splits["e"] == {"train", "test"}
    for name in ("owl", "kite", "emu"):
        assert {row["split"] for row in rows if row["class_name"] == name} == {"train", "test"}
    content = json.loads(summary.read_text())
    assert (content["groups"], content["ungrouped"]) == (7, 1)
    assert (content["divided"], content["divided_for"], content["short"]) == (["e"], ["emu"], [])
    code, text, _ = command(
        *(
            "split",
            birds,
            "--groups",
            "Animal ID",
            "--out",
            out,
            "--val",
            "0",
            "--test",
            "0.3",
            "--strict_groups",
            "--overwrite",
        )
    )
    assert code == 0
    assert "each of 7 groups is in one split" in text
    assert "too few images or groups for every split: emu" in text
    assert {row["split"] for row in written(out) if row["Animal ID"] == "e"} == {"train"}


def test_a_split_with_groups_can_be_trained_on(birds: Path, tmp_path: Path) -> None:
    from longtail.data.sources import load_data

    summary = write_split(
        Data(source="list", train=str(birds)), tmp_path / "s.csv", 0.0, 0.3, 0, group_column="Animal ID"
    )
    data = load_data(Data(source="list", train=str(tmp_path / "s.csv"), root=summary["root"]), 0)
    assert {"train": len(data.train), "val": 0, "test": len(data.test)} == summary["images"]
    (remark,) = (remark for remark in data.remarks if "group" in remark)
    assert remark.endswith("column 'Animal ID' is not used: groups in several splits: 1")  # the emu


@pytest.mark.parametrize("before", ["photos\\", "{}/photos/"])
def test_paths_of_groups_may_be_written_in_another_way(tmp_path: Path, before: str) -> None:
    rows = [f"{before.format(tmp_path)}{n}.png,{'ab'[n % 2]},g{n // 2}\n" for n in range(8)]
    for n in range(8):
        save_image(tmp_path / "photos" / f"{n}.png", seed=n)
    (tmp_path / "t.csv").write_text("path,label,site\n" + "".join(rows))
    summary = write_split(
        Data(source="list", train=str(tmp_path / "t.csv")), tmp_path / "s.csv", 0.0, 0.3, 0, group_column="site"
    )
    assert (summary["groups"], summary["divided"]) == (4, [])
    assert {row["path"]: row["site"] for row in written(tmp_path / "s.csv")} == {
        f"photos/{n}.png": f"g{n // 2}" for n in range(8)
    }


def test_groups_in_several_splits_are_remarked() -> None:
    columns = {"path": ["a", "b", "c", "d"], "label": list("xyxy"), "patient": ["p", "q", "p", ""]}
    used = {"image": "path", "label": "label", "split": None}
    assert unused_columns(columns, used, "t.csv") == [
        "t.csv: column 'patient' is not used: images of one group may be in several splits; "
        "longtail split --groups 'patient' keeps them together"
    ]
    used["split"] = "split"
    leaking = columns | {"split": ["train", "train", "test", "test"]}
    assert unused_columns(leaking, used, "t.csv") == [
        "t.csv: column 'patient' is not used: groups in several splits: 1"
    ]
    assert unused_columns(columns | {"split": ["train", "test", "train", "test"]}, used, "t.csv") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["birds.csv", "--groups", "bird"], "--groups bird: birds.csv has no such column; there are: label, Animal ID"),
        (
            ["birds.csv", "--groups", "path"],
            "--groups path: expected the column of groups, this one of birds.csv holds",
        ),
        (["birds", "--groups", "bird"], "--groups bird: expected a table (.csv, .tsv, .parquet) with this column, got"),
        (["birds.csv", "--strict_groups"], "--strict_groups: needs --groups COLUMN"),
    ],
)
def test_groups_that_cannot_be_had(
    birds: Path, command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(birds.parent)
    for name in ("a", "b"):
        save_image(birds.parent / "birds" / name / "0.png")
    for path in (birds.parent / "birds").glob("*.png"):
        if arguments[0] == "birds":
            path.unlink()
    code, _, err = command("split", *arguments, "--out", "s.csv")
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (birds.parent / "s.csv").exists()


def test_an_image_in_two_groups_is_named(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,label,site\na.png,0,x\n./a.png,0,y\n")
    message = "line 3: ./a.png is in the group 'y', but in 'x' in a row above"
    with pytest.raises(LongtailError, match=re.escape(message)):
        read_groups(table, tmp_path, None, "site")
