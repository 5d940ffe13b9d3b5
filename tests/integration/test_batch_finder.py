"""`training.micro_batch: auto` through the real command, with a rank that really runs out of memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from integration.jobs import ROOT, TINY_MODEL, finish, pretrain_command, records, write_config
from token_corpus import write_token_corpus

LENGTH, SEQUENCES, VOCABULARY = 64, 128, 16_384
# Of two ranks one may have so much: logits and their gradients of 64 sequences take 0.8 GiB, of 32 half of that, and
# the rest of the process 0.5 GiB.
LIMIT = "1 1100"
LOSSES = ("loss/total", "loss/cross_entropy", "loss/dispersion", "grad_norm")


def test_one_rank_without_memory_halves_the_micro_batch_of_all_and_changes_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3 * SEQUENCES, LENGTH), dtype=np.uint16)
    corpus = write_token_corpus(tmp_path / "corpus", {"train": tokens, "validation": tokens[:8]}, vocabulary=VOCABULARY)
    model = {**TINY_MODEL, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = write_config(
        tmp_path, corpus, validation=None,
        run={"doctor": False},
        model={"config": model, "loss_head": "whole"},
        training={
            "global_batch_tokens": SEQUENCES * LENGTH, "max_tokens": 2 * SEQUENCES * LENGTH, "micro_batch": "auto"
        },
        zero={"stage": 2, "overrides": {"zero_optimization": {"reduce_bucket_size": 100_000}}},
    )  # fmt: skip
    fixed = ["training.micro_batch=16", f"run.folder={tmp_path / 'fixed'}"]
    finish(pretrain_command(config, *fixed, ranks=1, launcher="warm"), tmp_path / "fixed.log")

    command = pretrain_command(config, launcher="warm")
    place = command.index(str(ROOT / "launch" / "pretrain.py"))
    command[place] = str(Path(__file__).parent / "limited_pretrain.py")
    monkeypatch.setenv("MEMORY_LIMIT", LIMIT)
    said = finish(command, tmp_path / "auto.log")
    assert "micro-batch: 64 sequences do not fit on 1 of 2 ranks" in said
    assert "micro-batch: 32, the largest that fits of 2, 4, 8, 16, 32, 64" in said
    (start,) = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert (start["world_size"], start["micro_batch"], start["accumulation"]) == (2, 32, 2)
    pairs = list(zip(records(tmp_path / "fixed"), records(tmp_path / "run"), strict=True))
    assert sum("loss/total" in one for one, _ in pairs) == 2
    for one, other in pairs:
        for name in LOSSES:
            assert math.isclose(one.get(name, 0.0), other.get(name, 0.0), rel_tol=1e-5), name

    further = finish([*command, f"training.max_tokens={3 * SEQUENCES * LENGTH}"], tmp_path / "further.log")
    assert "micro-batch: 32, as an earlier start found" in further and "do not fit" not in further
    assert records(tmp_path / "run")[-1]["step"] == 3
