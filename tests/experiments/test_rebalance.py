"""New heads on a trained encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from longtail import Recognizer
from longtail.config import Config
from longtail.errors import LongtailError
from longtail.experiments.evaluate import evaluate
from longtail.experiments.rebalance import RebalanceSettings, rebalance
from longtail.training.run_io import alone_in, read_finished
from longtail.training.second_stage import fit_head, tau_normalize
from longtail.training.seen_images import FILE as TRAIN_IMAGES
from longtail.training.trainer import fit
from tests.conftest import TINY, Command

COUNTS = (300, 60, 12)


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtail.training.second_stage.MIN_STEPS", 400)


def toy(seed: int, counts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return overlapping clouds around the corners of a triangle."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    centres = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]]) * 1.5
    return centres[labels] + torch.randn(len(labels), 4, generator=generator), labels


def recall(head: torch.nn.Module) -> list[float]:
    features, labels = toy(1, (500, 500, 500))
    hits = head(features).argmax(dim=1) == labels
    return [hits[labels == c].float().mean().item() for c in range(3)]


def test_a_balanced_head_gives_the_tail_back_what_the_plain_one_took() -> None:
    features, labels = toy(0, COUNTS)
    torch.manual_seed(0)
    # with τ = 0 the head is the one that was trained as the images come
    plain, tau = fit_head(features, labels, 3, RebalanceSettings("tau", tau=0.0))
    assert tau == 0
    before = recall(plain)
    assert before[2] < 0.4 < before[0]
    head, _ = fit_head(features, labels, 3, RebalanceSettings("crt"))
    after = recall(head)
    assert after[2] > before[2] + 0.15
    assert sum(after) > sum(before) + 0.1


def test_factors_lower_the_balanced_loss_as_far_as_factors_can() -> None:
    features, labels = toy(0, COUNTS)
    torch.manual_seed(0)
    plain, _ = fit_head(features, labels, 3, RebalanceSettings("tau", tau=0.0))
    torch.manual_seed(0)
    scaled, _ = fit_head(features, labels, 3, RebalanceSettings("lws"))
    weights = 1 / torch.tensor(COUNTS).float()

    def balanced(factors: torch.Tensor) -> float:
        scores = features @ (plain.weight.detach() * factors[:, None]).t()
        return F.cross_entropy(scores, labels, weights).item()

    factors_of_lws = (scaled.weight / plain.weight).mean(dim=1).detach()
    assert balanced(factors_of_lws) < balanced(torch.ones(3)) - 0.02
    # near the best of a grid
    grid = torch.cartesian_prod(*[torch.linspace(0.0, 3.0, 16)] * 3)
    assert balanced(factors_of_lws) < min(balanced(factors) for factors in grid) + 0.02


def test_tau_and_factors_keep_the_directions() -> None:
    features, labels = toy(0, COUNTS)
    heads = {}
    for name, settings in {
        "plain": RebalanceSettings("tau", tau=0.0),
        "tau": RebalanceSettings("tau", tau=1.0),
        "lws": RebalanceSettings("lws"),
    }.items():
        torch.manual_seed(0)
        heads[name] = fit_head(features, labels, 3, settings)[0].weight.detach()
    for name in ("tau", "lws"):
        cosines = F.cosine_similarity(heads["plain"], heads[name])
        assert torch.allclose(cosines, torch.ones(3), atol=1e-5), name
    norms = heads["tau"].norm(dim=1)
    assert torch.allclose(norms, norms.mean().expand(3), rtol=1e-5)
    assert heads["plain"].norm(dim=1)[0] > heads["plain"].norm(dim=1)[2]


def test_tau_normalization_of_a_class_without_weights() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert tau_normalize(weight, 1.0).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
    assert torch.equal(tau_normalize(weight, 0.0), weight)


def test_tau_is_chosen_on_the_validation_images(tiny: Config) -> None:
    features, labels = toy(0, COUNTS)
    torch.manual_seed(0)
    validation = (*toy(2, (200, 200, 200)), tiny, list(COUNTS))
    head, tau = fit_head(features, labels, 3, RebalanceSettings("tau"), validation)
    assert tau is not None
    best = sum(recall(head))
    for other in (0.0, 1.0, 2.0):
        torch.manual_seed(0)
        assert best > sum(recall(fit_head(features, labels, 3, RebalanceSettings("tau", tau=other))[0])) - 0.03


@pytest.mark.slow
def test_a_rebalanced_run_is_a_run(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("train", "digits-lt", "--method", "ce", *TINY, "--out", run)[0] == 0
    weights = (run / "recognizer" / "model.safetensors").read_bytes()
    for method in ("crt", "lws", "reweight", "tau"):
        code, shown, err = command("rebalance", run, "--method", method, "--views", "1", "--epochs", "1")
        assert code == 0, err
        assert "uniform" in shown
        assert "Most confident errors" in (tmp_path / f"run-{method}" / "report.html").read_text(encoding="utf-8")
        out = tmp_path / f"run-{method}"
        recognizer = Recognizer.load(out)
        assert recognizer.config.head == "linear"
        assert recognizer.config.predicts_under == "uniform"
        assert recognizer.config.training_info["rebalanced"] == method
        assert evaluate(out)["balanced_accuracy"] == recognizer.config.metrics["balanced_accuracy"]
        assert recognizer.predict(torch.zeros(2, 1, 8, 8)).probabilities.shape == (2, 10)
    assert (run / "recognizer" / "model.safetensors").read_bytes() == weights


def test_a_rebalanced_run_knows_its_training_images(command: Command, photos: Path, tmp_path: Path) -> None:
    """Which a later run that starts from it must not be tested on."""
    run, out = tmp_path / "run", tmp_path / "rebalanced"
    small = ("--network", "conv8-tiny", "--pretrained", "none", "--tune", "full", "--data.image_size", "16")
    assert command("train", photos, *small, "--epochs", "1", "--method", "ce", "--out", run)[0] == 0
    code, _, err = command("rebalance", run, "--method", "tau", "--tau", "1", "--out", out)
    assert code == 0, err
    assert (out / TRAIN_IMAGES).read_bytes() == (run / TRAIN_IMAGES).read_bytes()
    assert (out / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()


def test_bad_input(command: Command, tiny: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(tiny.replace(method="ce", epochs=1), run, quiet=True)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    for arguments, message in (
        ([run, "--out", full], "is not empty; choose another --out"),
        ([run, "--views", "0"], "--views 0: expected at least 1"),
        ([run, "--method", "tau", "--tau", "-1"], "--tau -1.0: expected a value between 0"),
        ([tmp_path / "none"], "there is no such run folder"),
        ([full], "contains no model"),
        ([run, "--method", "norm"], "--method"),
    ):
        code, shown, err = command("rebalance", *arguments)
        assert code == 2, message
        assert message in err
        assert len(err.strip().splitlines()) == 1
        assert not shown
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]


def test_the_same_seed_gives_the_same_head(tiny: Config, tmp_path: Path) -> None:
    fit(tiny.replace(method="ce", epochs=1), tmp_path / "run", quiet=True)
    state = torch.get_rng_state()
    for out in ("a", "b"):
        rebalance(tmp_path / "run", tmp_path / out, RebalanceSettings("crt", epochs=1, views=1))
    assert torch.equal(torch.get_rng_state(), state)
    a, b = (Recognizer.load(tmp_path / out).classifier.weight for out in ("a", "b"))
    assert torch.equal(a, b)
    with pytest.raises(LongtailError, match="is not empty"):
        rebalance(tmp_path / "run", tmp_path / "a", RebalanceSettings("crt"))


def test_an_interrupted_call_is_repeated_and_two_do_not_meet(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, settings = tmp_path / "run", tmp_path / "out", RebalanceSettings("crt", epochs=1, views=1)
    fit(tiny.replace(method="ce", epochs=1), run, quiet=True)
    with alone_in(out), pytest.raises(LongtailError, match="another process trains in it"):
        rebalance(run, out, settings)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("longtail.experiments.rebalance.write_inputs", killed)
        with pytest.raises(KeyboardInterrupt):
            rebalance(run, out, settings)
    assert (out / "recognizer").is_dir()
    metrics = rebalance(run, out, settings)
    assert read_finished(out).test_metrics == metrics
    assert not [path.name for path in (*out.iterdir(), *tmp_path.iterdir()) if path.name.startswith(".")]
    with pytest.raises(LongtailError, match="is not empty"):
        rebalance(run, out, settings)
