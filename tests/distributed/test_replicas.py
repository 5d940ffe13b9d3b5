"""The check of replicas on three ranks: which one is odd, and in what."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dispersion_pretrain.replicas import bit_sum, refuse_odd_ranks
from spawn import run_ranks


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "layer.0": torch.randn(7, 5),
        "layer.1": torch.randn(33).bfloat16(),
        "mask": torch.ones(3, dtype=torch.bool),
        "turned": torch.randn(4, 6).t(),
        "count": torch.tensor(3.0),
    }


def errors_on_rank() -> dict[str, str]:
    """What the check says when something is done to one or more ranks."""
    rank = dist.get_rank()
    found = {}
    for name, ranks in {"nothing": (), "layer.0": (1,), "layer.1": (2,), "mask": (0,), "turned": (0, 1, 2),
                        "learning rate": (0,)}.items():  # fmt: skip
        held, numbers = tensors(), {"the learning rate": 0.1}
        if rank in ranks:
            if name == "learning rate":
                numbers["the learning rate"] = 0.1 + 1e-17 + 1e-16
            elif name == "mask":
                held[name][1] = False
            else:
                whole = held[name].contiguous()
                whole.view(torch.int16 if whole.element_size() == 2 else torch.int32).view(-1)[3 + rank] ^= 1 << rank
                held[name] = whole
        try:
            refuse_odd_ranks(held.items(), numbers, 12, torch.device("cpu"))
            found[name] = ""
        except RuntimeError as error:
            found[name] = str(error)
    return found


def test_the_odd_rank_and_tensor_are_named() -> None:
    for found in run_ranks(errors_on_rank, 3):
        assert found["nothing"] == ""
        assert found["layer.0"].startswith("step 12: rank 1 differs from the other 2 in layer.0. All ranks must")
        assert found["layer.1"].startswith("step 12: rank 2 differs from the other 2 in layer.1.")
        assert found["mask"].startswith("step 12: rank 0 differs from the other 2 in mask.")
        assert found["turned"].startswith("step 12: ranks 0, 1 and 2 differ in turned.")
        assert found["learning rate"].startswith("step 12: rank 0 differs from the other 2 in the learning rate.")


@pytest.mark.parametrize("bit", [0, 7, 15, 22, 30, 31])
def test_any_one_bit_changes_the_sum(bit: int) -> None:
    tensor = tensors()["layer.0"]
    before = bit_sum(tensor)
    tensor.view(torch.int32)[2, 3] ^= -(2**31) if bit == 31 else 1 << bit
    assert bit_sum(tensor) != before
