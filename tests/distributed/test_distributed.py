"""dispersion_pretrain.distributed in one process without a group and on gloo ranks; sums of metrics over ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dispersion_pretrain import distributed, metrics
from dispersion_pretrain.distributed import counter_hash
from spawn import run_ranks

# ---- a world of one


def test_without_a_process_group_the_world_is_one_rank() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.any_rank(True) is True
    assert distributed.any_rank(False) is False
    assert distributed.all_reduce_sum(torch.tensor([2.0])).item() == 2.0
    assert distributed.pool_groups(1) is None
    assert distributed.from_main("reading", lambda: 5) == 5
    distributed.raise_together(None)
    with pytest.raises(RuntimeError, match="^disk full$"):
        distributed.raise_together("disk full")


def test_local_rank_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.local_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.local_rank() == 3


def test_failing_together_names_the_action_and_keeps_the_cause() -> None:
    with pytest.raises(RuntimeError, match="^saving: OSError: no space$") as caught:
        with distributed.failing_together("saving"):
            raise OSError("no space")
    assert isinstance(caught.value.__cause__, OSError)


# ---- several ranks


def _collectives() -> dict[str, Any]:
    rank = distributed.rank()
    return {
        "rank": (rank, distributed.world_size(), distributed.is_main()),
        "broadcast": distributed.broadcast_object(f"from {rank}", source=1),
        "gather": distributed.gather_objects({"rank": rank}),
        "any": (distributed.any_rank(rank == 1), distributed.any_rank(False)),
        "sum": distributed.all_reduce_sum(torch.tensor([1.0, float(rank)], requires_grad=True)).tolist(),
        "main": distributed.from_main("reading", lambda: f"read by {distributed.rank()}"),
    }


def test_collectives_on_two_ranks() -> None:
    results = run_ranks(_collectives, 2)
    assert [result.pop("rank") for result in results] == [(0, 2, True), (1, 2, False)]
    for result in results:
        assert result == {
            "broadcast": "from 1",
            "gather": [{"rank": 0}, {"rank": 1}],
            "any": (True, False),
            "sum": [2.0, 1.0],
            "main": "read by 0",
        }


def _one_rank_fails() -> list[str]:
    messages = []
    for failing in ([1], [0, 2]):
        try:
            with distributed.failing_together("saving shard"):
                if distributed.rank() in failing:
                    raise OSError(f"disk of rank {distributed.rank()} is full")
        except RuntimeError as error:
            messages.append(str(error))
    try:
        distributed.from_main("reading the index", lambda: Path("/does/not/exist").read_bytes())
    except RuntimeError as error:
        messages.append(str(error))
    distributed.barrier()  # nobody was left behind in a collective
    return messages


def test_all_ranks_raise_the_same_error_naming_those_that_failed() -> None:
    results = run_ranks(_one_rank_fails, 3)
    assert results[0] == results[1] == results[2]
    one, two, main = results[0]
    assert one.splitlines() == [
        "rank(s) 1 of 3 failed:",
        "rank 1: saving shard: OSError: disk of rank 1 is full",
    ]
    assert two.startswith("rank(s) 0, 2 of 3 failed:")
    assert main.startswith("rank(s) 0 of 3 failed:\nrank 0: reading the index: FileNotFoundError")


def _sum_in_pool(pool_size: int) -> tuple[bool, float]:
    group = distributed.pool_groups(pool_size)
    if group is None:
        return False, float(distributed.rank())
    total = distributed.all_reduce_sum(torch.tensor([float(distributed.rank())]), group)
    return group is dist.group.WORLD, total.item()


def _pools() -> list[Any]:
    sums: list[Any] = [_sum_in_pool(size) for size in (1, 2, 4)]
    try:
        distributed.pool_groups(3)
    except ValueError as error:
        sums.append(str(error))
    return sums


def test_pools_are_consecutive_ranks() -> None:
    results = run_ranks(_pools, 4)
    assert [result[0] for result in results] == [(False, 0.0), (False, 1.0), (False, 2.0), (False, 3.0)]
    assert [result[1] for result in results] == [(False, 1.0), (False, 1.0), (False, 5.0), (False, 5.0)]
    assert [result[2] for result in results] == [(True, 6.0)] * 4
    assert all("Legal sizes in ranks: 1, 2, 4" in result[3] for result in results)


def _seeded_draws() -> tuple[list[float], list[float]]:
    distributed.seed_everything(7)
    alike = [random.random(), float(np.random.rand()), torch.rand(()).item()]
    distributed.seed_dropout(7)
    return alike, torch.rand(4).tolist()


def test_ranks_build_the_same_weights_but_drop_different_units() -> None:
    (weights_0, dropout_0), (weights_1, dropout_1) = run_ranks(_seeded_draws, 2)
    assert weights_0 == weights_1
    assert dropout_0 != dropout_1


# ---- sums of metrics


def _reduce_on_ranks() -> tuple[dict[str, float], int]:
    rank = distributed.rank()
    totals = metrics.StepTotals()
    names = [("x", torch.tensor(float(rank)), 1.0), ("loss", torch.tensor(10.0 + rank), 1.0 + 3 * rank)]
    for name, total, count in names if rank == 0 else reversed(names):  # the order of adding does not matter
        totals.add(name, total, count)
    totals.add(["layer_1", "layer_2"], torch.tensor([1.0, 2.0]) * rank)
    calls = []
    real = distributed.all_reduce_sum

    def counting(tensor: Tensor) -> Tensor:
        calls.append(tensor.numel())
        return real(tensor)

    distributed.all_reduce_sum = counting  # type: ignore[assignment]
    return totals.reduce(), len(calls)


def test_totals_of_two_ranks_in_one_reduction() -> None:
    for means, reductions in run_ranks(_reduce_on_ranks, 2):
        assert means == {"x": 0.5, "loss": 21 / 5, "layer_1": 0.5, "layer_2": 1.0}
        assert reductions == 1


# ---- random state


def _draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        *torch.rand(3).tolist(),
        *torch.nn.functional.dropout(torch.ones(16), 0.5).tolist(),
    ]


def test_random_state_survives_a_file_and_repeats_every_stream(tmp_path: Path) -> None:
    distributed.seed_everything(3)
    _draw()  # one gauss and one randn: the second half of each pair is part of the state
    torch.save(distributed.random_state(), tmp_path / "state.pt")
    expected = _draw() + _draw()
    distributed.seed_everything(99)
    distributed.restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert _draw() + _draw() == expected


def test_random_state_without_a_needed_generator_is_refused() -> None:
    state = distributed.random_state()
    del state["numpy"]
    with pytest.raises(RuntimeError, match="no entry for numpy"):
        distributed.restore_random_state(state)


# ---- counter-based draws

_MASK = 2**64 - 1


def _mix(x: int) -> int:
    """splitmix64 in plain Python integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _reference(seed: int, *counters: int) -> int:
    state = _mix(seed & _MASK)
    for counter in counters:
        state = _mix(state ^ (counter & _MASK))
    return state


def _bits(value: Tensor) -> int:
    return int(value.item()) & _MASK


def test_hash_is_splitmix64() -> None:
    # The first outputs of splitmix64 for the seeds 0 and 1234567, as published for the reference code.
    assert _bits(counter_hash(0)) == 0xE220A8397B1DCDAF
    assert _bits(counter_hash(1234567)) == 6457827717110365317
    # Frozen: another value here would silently change the positions that every stored run has drawn.
    assert _bits(counter_hash(1, 2, 3, 4)) == _reference(1, 2, 3, 4) == 0xD55CCD4AEB3CCAFB


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_hash_equals_plain_integers(seed: int) -> None:
    counters = [0, 1, 2**31, 2**62 + 5, -3]
    hashed = counter_hash(seed, 17, torch.tensor(counters))
    assert hashed.dtype == torch.int64
    assert [value & _MASK for value in hashed.tolist()] == [_reference(seed, 17, counter) for counter in counters]


def test_counters_broadcast_and_their_order_matters() -> None:
    rows = torch.arange(3)[:, None]
    columns = torch.arange(4, dtype=torch.int32)
    table = counter_hash(5, rows, columns)
    assert table.shape == (3, 4)
    assert all(table[i, j] == counter_hash(5, i, j) for i in range(3) for j in range(4))
    assert table[1, 2] != table[2, 1]
    assert table.unique().numel() == 12


def test_hash_neither_reads_nor_moves_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = counter_hash(1, torch.arange(5))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(12345)
    assert torch.equal(counter_hash(1, torch.arange(5)), first)


@pytest.mark.parametrize("shift", [0, 24, 56])
def test_bits_are_uniform(shift: int) -> None:
    draws = 256 * 1000
    values = (counter_hash(11, torch.arange(1000)[:, None], torch.arange(256)) >> shift) & 255
    counts = torch.bincount(values.flatten(), minlength=256).double()
    chi_square = ((counts - draws / 256) ** 2 / (draws / 256)).sum().item()
    assert 165 < chi_square < 370  # 255 degrees of freedom: 1e-6 lies outside on either side


def test_flipping_one_bit_of_seed_or_counter_flips_half_of_the_hash() -> None:
    counters = torch.arange(2000)
    base = counter_hash(21, counters)
    for bit in range(0, 62, 5):
        changed = [counter_hash(21, counters ^ (1 << bit)), counter_hash(21 ^ (1 << bit), counters)]
        for other in changed:
            flips = torch.stack([((base ^ other) >> position) & 1 for position in range(64)]).double().mean(dim=1)
            assert abs(flips.mean().item() - 0.5) < 0.01
            assert (flips - 0.5).abs().max().item() < 0.06  # every single output bit, 2000 draws: 5 sigma


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hash_is_the_same_on_cuda() -> None:
    counters = torch.arange(1000)
    on_cpu = counter_hash(1, counters, counters[:10, None])
    on_cuda = counter_hash(1, counters.cuda(), counters.cuda()[:10, None])
    assert torch.equal(on_cuda.cpu(), on_cpu)
