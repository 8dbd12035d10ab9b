"""A small world of known features, after SynthSAEBench (arXiv 2602.14687), and how well an SAE recovers it.

Its 16,384 features in 768 dimensions are scaled down to what a CPU trains on in seconds; what makes it hard is kept:
more features than dimensions, Zipf firing frequencies, correlated firing (a low-rank Gaussian copula), trees in which
a child fires only with its parent and siblings exclude each other, magnitudes that fall with rank and vary, a bias.
Written from the description in the benchmark's documentation, so its figures are not the published ones.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """Feature directions and how they fire."""

    features: Tensor
    """[num_features, d], unit rows, the most frequent first."""
    cutoff: Tensor
    """What a feature's Gaussian must exceed for it to fire (given that its parent does)."""
    factors: Tensor
    """[num_features, rank]: the correlated part of the Gaussians."""
    parent: Tensor
    """Each feature's parent, or itself."""
    magnitude: Tensor
    bias: Tensor

    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """`n` activations [n, d] and which features are in them [n, num_features]."""
        rng = torch.Generator().manual_seed(seed)
        own = (1 - self.factors.square().sum(1)).sqrt()
        g = torch.randn(n, len(own), generator=rng) * own
        g += torch.randn(n, self.factors.shape[1], generator=rng) @ self.factors.T
        fires, rank = g > self.cutoff, torch.arange(len(own))
        children = (self.parent != rank).nonzero().squeeze(1)
        if len(children):
            # of the siblings that would fire, the one that exceeds its cutoff most
            excess = torch.where(fires, g - self.cutoff, -math.inf)[:, children]
            parents = self.parent[children].expand(n, -1)
            most = torch.full((n, len(own)), -math.inf).scatter_reduce_(1, parents, excess, "amax")
            fires[:, children] &= excess >= most[:, self.parent[children]]
            for _ in range(2):  # trees have three levels
                fires[:, children] &= fires[:, self.parent[children]]
        size = (self.magnitude + (0.5 * torch.randn(n, len(own), generator=rng)).clamp(-2, 2)).clamp(min=0.5)
        return (size * fires) @ self.features + self.bias, fires


def world(num_features: int = 512, d: int = 64, *, l0: float = 5.0, roots: int = 12, seed: int = 0) -> World:
    """A world whose tokens have about `l0` features."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(num_features, d, generator=rng)
    features /= features.norm(dim=1, keepdim=True)
    for _ in range(100):  # push apart what is closest
        overlap = features @ features.T - torch.eye(num_features)
        features -= 0.02 * overlap.pow(3) @ features
        features /= features.norm(dim=1, keepdim=True)
    rank = torch.arange(num_features)
    p = (rank + 1.0) ** -0.5
    p = (p * l0 / p.sum()).clamp(5e-4, 0.4)
    parent = rank.clone()
    first, level = 0, torch.arange(roots)
    for _ in range(2):  # roots, four children each, four grandchildren each
        first += len(level)
        below = torch.arange(first, first + 4 * len(level))
        parent[below] = level.repeat_interleave(4)
        level = below
    given = torch.where(parent == rank, p, (p / p[parent]).clamp(max=0.25))
    factors = torch.randn(num_features, 8, generator=rng) * math.sqrt(0.1 / 8)
    return World(
        features=features,
        cutoff=torch.special.ndtri(1 - given),
        factors=factors * (0.95 / factors.norm(dim=1, keepdim=True).clamp(min=0.95)),
        parent=parent,
        magnitude=torch.linspace(5, 4, num_features),
        bias=0.5 * torch.randn(d, generator=rng) / math.sqrt(d),
    )


def match(similarity: np.ndarray) -> np.ndarray:
    """For each row the column that makes the sum over pairs largest; no more rows than columns.

    The Hungarian method by shortest augmenting paths, one row after the other.
    """
    rows, columns = similarity.shape
    u, v = np.zeros(rows), np.zeros(columns + 1)
    owner = np.full(columns + 1, -1)
    for row in range(rows):
        owner[columns], at = row, columns
        shortest, previous = np.full(columns, np.inf), np.full(columns, columns)
        done = np.zeros(columns + 1, bool)
        while owner[at] >= 0:
            done[at] = True
            reduced = -similarity[owner[at]] - u[owner[at]] - v[:columns]
            better = ~done[:columns] & (reduced < shortest)
            shortest[better], previous[better] = reduced[better], at
            nearest = int(np.where(done[:columns], np.inf, shortest).argmin())
            delta = shortest[nearest]
            u[owner[done]] += delta
            v[done] -= delta
            shortest[~done[:columns]] -= delta
            at = nearest
        while at != columns:
            owner[at] = owner[previous[at]]
            at = previous[at]
    result = np.full(rows, -1)
    for column, row in enumerate(owner[:columns]):
        if row >= 0:
            result[row] = column
    return result


def scores(f: Tensor, W_dec: Tensor, fires: Tensor, features: Tensor) -> dict[str, float]:
    """MCC: mean |cosine| of latents with their matched features; F1 of latents as classifiers of those; L0."""
    cosine = (W_dec / W_dec.norm(dim=1, keepdim=True)) @ features.T
    pair = torch.from_numpy(match(cosine.abs().double().numpy()))
    on, truth = f > 0, fires[:, pair]
    hits = (on & truth).sum(0).double()
    f1 = 2 * hits / (on.sum(0) + truth.sum(0)).clamp(min=1)
    mcc = cosine.abs()[torch.arange(len(pair)), pair].mean()
    return {"f1": float(f1.mean()), "mcc": float(mcc), "l0": float(on.sum(1).double().mean())}
