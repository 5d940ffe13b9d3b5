"""The dispersion loss written naively: what the closed form of the package is measured against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plain_dispersion_loss(
    embeddings: Tensor, *, temperature: float = 1.0, cosine_clamp: float = 0.1, norm_epsilon: float = 0.0
) -> Tensor:
    """(sets, tokens, dim) -> (sets,): the paper's formula, differentiated by autograd, all pairs in memory."""
    num_tokens = embeddings.shape[1]
    unit = embeddings / (embeddings.norm(dim=-1, keepdim=True) + norm_epsilon)
    cosine = unit @ unit.transpose(1, 2)
    off_diagonal = ~torch.eye(num_tokens, dtype=torch.bool, device=embeddings.device)
    cosine = cosine[:, off_diagonal]  # leaving the diagonal out of the graph: its slope is infinite
    edge = 1.0 - max(cosine_clamp, torch.finfo(embeddings.dtype).eps)
    cosine = cosine + (cosine.clamp(-edge, edge) - cosine).detach()  # straight-through
    distance = torch.arccos(cosine) / math.pi
    return torch.exp(-distance / temperature).mean(dim=1).log()


def double_loop_dispersion(
    embeddings: list[list[float]], *, temperature: float, cosine_clamp: float, norm_epsilon: float
) -> float:
    """The value for one set, pair by pair in plain Python."""
    units = []
    for vector in embeddings:
        norm = math.sqrt(sum(x * x for x in vector)) + norm_epsilon
        units.append([x / norm for x in vector])
    total = 0.0
    for i, left in enumerate(units):
        for j, right in enumerate(units):
            if i != j:
                cosine = sum(a * b for a, b in zip(left, right, strict=True))
                cosine = min(1 - cosine_clamp, max(-1 + cosine_clamp, cosine))
                total += math.exp(-math.acos(cosine) / math.pi / temperature)
    return math.log(total / (len(units) * (len(units) - 1)))
