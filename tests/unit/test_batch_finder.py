"""The search for the largest micro-batch, and what a trial's end means."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispersion_pretrain import batch_finder
from dispersion_pretrain.batch_finder import fits_this_rank, largest_that_fits
from dispersion_pretrain.layout import legal_micro_batches
from dispersion_pretrain.memory_trial import trial_settings
from small_run import small_settings


class TestSearch:
    @given(st.sets(st.integers(1, 5000), min_size=1), st.integers(0, 5001))
    def test_finds_the_largest_whatever_the_legal_values(self, values: set[int], limit: int) -> None:
        legal, tried = sorted(values), []
        found = largest_that_fits(legal, lambda value: not tried.append(value) and value <= limit)  # type: ignore[func-returns-value]
        assert found == max((value for value in legal if value <= limit), default=None)
        assert len(tried) == len(set(tried)) <= 2 * len(legal).bit_length() + 13

    def test_halves_until_one_fits(self) -> None:
        tried: list[int] = []
        legal = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
        assert largest_that_fits(legal, lambda value: not tried.append(value) and value <= 8) == 8  # type: ignore[func-returns-value]
        assert tried == [48, 24, 12, 6, 8]


class TestTrial:
    def test_has_the_micro_batch_and_at_most_two_micro_steps(self) -> None:
        settings = small_settings(Path("corpus"))
        many = settings.model_copy(
            update={"training": settings.training.model_copy(update={"global_batch_tokens": 64 * 32})}
        )
        for micro_batch, sequences in ((4, 2 * 2 * 4), (16, 2 * 2 * 16), (32, 2 * 32)):
            trial = trial_settings(many, micro_batch, world_size=2)
            assert trial.global_batch_sequences == sequences
            assert micro_batch in legal_micro_batches(trial, 2)

    @pytest.mark.parametrize(
        ("program", "fits"),
        [
            ("pass", True),
            ("raise MemoryError", False),
            ("import torch; torch.empty(2**60)", False),  # a tensor that no machine has room for
            ("import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", False),
            (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", False),  # as the kernel does
        ],
    )
    def test_says_by_its_end_whether_memory_was_enough(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, fits: bool
    ) -> None:
        self.let_trials_run(tmp_path, monkeypatch, program)
        assert fits_this_rank(small_settings(Path("corpus")), 1) is fits

    def test_that_fails_otherwise_is_an_error_with_its_last_words(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.let_trials_run(tmp_path, monkeypatch, "raise ValueError('a corpus is missing')")
        with pytest.raises(RuntimeError, match=r"(?s)another reason than memory.*as a number.*a corpus is missing"):
            fits_this_rank(small_settings(Path("corpus")), 1)

    def test_sees_nothing_of_the_caller_when_that_ends_early(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a program that never reads what it is asked: the pipe is broken, which is no error of ours."""
        self.let_trials_run(tmp_path, monkeypatch, "import os; os.close(0)")
        assert fits_this_rank(small_settings(Path("corpus")), 1)

    @staticmethod
    def let_trials_run(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
        """A module of another name in the place of memory_trial."""
        (folder / "another_trial.py").write_text(program + "\n")
        monkeypatch.setenv("PYTHONPATH", f"{folder}:{':'.join(filter(None, sys.path))}")
        monkeypatch.setattr(batch_finder.memory_trial, "__name__", "another_trial")
