"""k-means on directions. Every number is a torch tensor; the same seed gives the same clusters."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

ROUNDS = 25


def directions(points: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` unit vectors, shape (count, width), so that each of `points` (tokens, width) is near one of them.

    Spherical k-means (Dhillon and Modha, 2001) started by k-means++: a direction is what a linear router can prefer,
    since it scores by a dot product and has no bias. A cluster that runs empty starts anew at the worst served point.
    """
    unit = normalize(points, dim=-1)
    centres = _spread(unit, count, torch.Generator().manual_seed(seed))
    for _ in range(ROUNDS):
        nearest, cluster = (unit @ centres.T).max(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, cluster, unit)
        for empty in (sums.norm(dim=1) == 0).nonzero().flatten().tolist():
            worst = int(nearest.argmin())
            sums[empty], nearest[worst] = unit[worst], 1.0
        centres = normalize(sums, dim=-1)
    return centres


def balanced(profiles: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Parts `profiles` (items, width) into `count` groups of the same size by direction; shape (count, items / count).

    Greedy: the items that lose most if they do not get their nearest centre choose first.
    """
    size = len(profiles) // count
    likeness = normalize(profiles, dim=-1) @ directions(profiles, count, seed).T
    ranked = likeness.sort(dim=1, descending=True)
    regret = ranked.values[:, 0] - ranked.values[:, 1] if count > 1 else ranked.values[:, 0]
    groups: list[list[int]] = [[] for _ in range(count)]
    for item in regret.argsort(descending=True, stable=True).tolist():
        group = next(group for group in ranked.indices[item].tolist() if len(groups[group]) < size)
        groups[group].append(item)
    return torch.tensor([sorted(group) for group in groups])


def _spread(unit: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each next centre is a point, likely one that is far from those before."""
    chosen = [int(torch.randint(len(unit), (1,), generator=generator))]
    while len(chosen) < count:
        distance = (1 - (unit @ unit[chosen].T).amax(dim=1)).clamp_min(0) + 1e-9
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return unit[chosen].clone()
