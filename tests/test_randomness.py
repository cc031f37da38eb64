from __future__ import annotations

import torch

from longtail.randomness import draw_ids, generator, mix, uniform


def test_a_draw_depends_on_its_name_alone() -> None:
    ids = torch.randint(0, 2**62, (500,))
    draws = uniform(ids, 3, 1, 2)
    order = torch.randperm(500)
    assert torch.equal(uniform(ids[order], 3, 1, 2), draws[order])
    assert torch.equal(uniform(ids[7:8], 3, 1, 2), draws[7:8])
    assert not torch.equal(uniform(ids, 3, 2, 1), draws)
    assert torch.equal(uniform(ids, 5, 1, 2)[:, :3], draws)


def test_draws_are_uniform_and_independent() -> None:
    draws = uniform(torch.arange(20_000), 8, 0, 5)
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = torch.histc(draws, bins=20, min=0, max=1) / draws.numel()
    assert (histogram - 0.05).abs().max() < 0.003
    others = torch.cat(
        [draws, uniform(torch.arange(20_000), 8, 1, 5), uniform(torch.arange(1, 20_001), 8, 0, 5)], dim=1
    )
    correlation = torch.corrcoef(others.T) - torch.eye(24)
    assert correlation.abs().max() < 0.04


def test_every_occurrence_of_an_image_has_draws_of_its_own() -> None:
    ids = torch.arange(2000).repeat(10)
    occurrences = torch.arange(10).repeat_interleave(2000)
    drawn = draw_ids(ids, occurrences)
    assert torch.equal(drawn[:2000], ids[:2000])
    assert draw_ids(ids, None) is ids
    assert len(drawn.unique()) == len(drawn)
    assert drawn.min() >= 0
    draws = uniform(drawn, 1, 0, 5).view(10, 2000)
    assert (torch.corrcoef(draws) - torch.eye(10)).abs().max() < 0.1
    assert (draws.mean(dim=1) - 0.5).abs().max() < 0.03


def test_keys_are_not_interchangeable() -> None:
    names = {mix(a, b) for a in range(50) for b in range(50)}
    assert len(names) == 2500
    assert all(0 <= name < 2**63 for name in names)
    assert mix(-1) != mix(1)
    assert torch.equal(torch.randperm(9, generator=generator(3, 4)), torch.randperm(9, generator=generator(3, 4)))
