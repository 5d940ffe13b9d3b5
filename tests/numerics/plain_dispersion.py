"""The dispersion loss written naively: what the closed form of the package is measured against."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plain_dispersion_loss(
    embeddings: Tensor,
    *,
    variant: str = "angular",
    temperature: float = 1.0,
    cosine_clamp: float = 0.1,
    angle: str = "arccos",
    margin: float = 0.5,
    norm_weight: float = 0.1,
    norm_epsilon: float = 0.0,
) -> Tensor:
    """(sets, tokens, dim) -> (sets,): the papers' formulas, differentiated by autograd, all pairs in memory."""
    num_tokens = embeddings.shape[1]
    # leaving the diagonal out of the graph: its slope is infinite
    off_diagonal = ~torch.eye(num_tokens, dtype=torch.bool, device=embeddings.device)
    if variant in ("infonce_l2", "l2_repel"):
        apart = (embeddings[:, :, None] - embeddings[:, None]).square().sum(-1)[:, off_diagonal]
        loss = torch.logsumexp(-apart / temperature, dim=1) - math.log(num_tokens * (num_tokens - 1))
        return loss if variant == "infonce_l2" else loss + norm_weight * embeddings.square().mean((1, 2))
    if variant == "decorrelation":
        embeddings = embeddings - embeddings.mean(-1, keepdim=True)
    unit = embeddings / (embeddings.norm(dim=-1, keepdim=True) + norm_epsilon)
    if angle == "atan2":
        apart = (unit[:, :, None] - unit[:, None])[:, off_diagonal].norm(dim=-1)
        together = (unit[:, :, None] + unit[:, None])[:, off_diagonal].norm(dim=-1)
        distance = 2 * torch.atan2(apart, together) / math.pi
    else:
        cosine = unit @ unit.transpose(1, 2)
        cosine = cosine[:, off_diagonal]
        if variant == "decorrelation":
            return cosine.square().mean(1)
        if variant == "infonce_cosine":
            return torch.exp(cosine / temperature).mean(1).log()
        edge = 1.0 - max(cosine_clamp, torch.finfo(embeddings.dtype).eps)
        cosine = cosine + (cosine.clamp(-edge, edge) - cosine).detach()  # straight-through
        distance = torch.arccos(cosine) / math.pi
    if variant == "orthogonalization":
        return torch.relu(margin - distance).square().mean(1)
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
