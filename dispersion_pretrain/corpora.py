"""The corpora of a run: manifests that fit together, the order over them, and each rank's batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dispersion_pretrain.config import CorpusSettings, DataSettings
from dispersion_pretrain.corpus import CorpusManifest, TokenCorpus, read_manifest, tokenizer_path
from dispersion_pretrain.data import Batch, BatchStream, validation_batches, validation_counts
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.order import GlobalOrder, OrderedCorpus, Share, round_samples

_GIB = 2**30


@dataclass(frozen=True)
class CorporaPlan:
    """What the manifests say, without a shard at hand. `manifests` are in the sequence of `settings.sources`."""

    settings: DataSettings
    manifests: list[CorpusManifest]
    round_samples: list[int]  # of each corpus in one round of the mix

    @classmethod
    def make(cls, settings: DataSettings) -> CorporaPlan:
        """Read the manifests and check that settings and corpora fit together.

        Raises:
            ValueError: they do not; names the place, the value and what is legal.
        """
        manifests = [read_manifest(source.path, source.mirrors) for source in settings.sources]
        for source, manifest in zip(settings.sources, manifests, strict=True):
            _check_fit(settings, source, manifest, first=manifests[0])
        shares = [Share(source.proportion, source.repeat, source.tokens) for source in settings.sources]
        sizes = [manifest.splits["train"].sequences for manifest in manifests]
        return cls(settings, manifests, round_samples(sizes, shares, settings.sequence_length))

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer that all share."""
        return self.manifests[0].vocab_size

    def tokenizer(self) -> Path:
        """Return a local folder with that tokenizer, fetched if it is remote.

        Raises:
            RuntimeError: a file is missing or not what was written.
        """
        return tokenizer_path(self.manifests[0], self.settings.cache, self.settings.sources[0].mirrors)

    def describe(self, run_tokens: int) -> list[str]:
        """Lines about the corpora, and how often a run of so many tokens reads each."""
        lines = []
        total = sum(self.round_samples)
        for source, manifest, samples in zip(self.settings.sources, self.manifests, self.round_samples, strict=True):
            train, share = manifest.splits["train"], samples / total
            mixed = "" if len(self.manifests) == 1 else f"{share:.4g} of the mix, "
            lines.append(
                f"corpus       {source.path}: {train.tokens:,} training tokens in {train.sequences:,} sequences of "
                f"{manifest.sequence_length}; {mixed}{share * run_tokens / train.tokens:.2f} epochs"
            )
        return lines


def _check_fit(settings: DataSettings, source: CorpusSettings, manifest: CorpusManifest, first: CorpusManifest) -> None:
    if manifest.sequence_length != settings.sequence_length:
        raise ValueError(
            f"data.sequence_length: {settings.sequence_length}, but {source.path} holds sequences of "
            f"{manifest.sequence_length} tokens. They must agree. Use {manifest.sequence_length}, or prepare the "
            "corpus again with --seq-len."
        )
    if manifest.tokenizer.sha256 != first.tokenizer.sha256:
        raise ValueError(
            f"data.corpora: {source.path} was made with the tokenizer {manifest.tokenizer.name}, {first.location} with "
            f"{first.tokenizer.name}; their tokenizer.json differ. The corpora of a mix need one tokenizer. Prepare "
            f"one again with --tokenizer {first.location}/{first.tokenizer.folder}."
        )


class Corpora:
    """The opened corpora of a run. `order` is that of the training samples.

    Raises:
        ValueError: the cache is too small for the shuffle.
        RuntimeError: an index is missing, damaged or not what the manifest says.
    """

    def __init__(self, plan: CorporaPlan, seed: int) -> None:
        self.plan, settings = plan, plan.settings
        limit = None if settings.cache_limit_gib is None else int(settings.cache_limit_gib * _GIB)
        self._train, self._validation = (
            [
                TokenCorpus(manifest, split, settings.cache, mirrors=source.mirrors, cache_limit_bytes=limit)
                for source, manifest in zip(settings.sources, plan.manifests, strict=True)
            ]
            for split in ("train", "validation")
        )
        if limit is not None:
            _check_limit(settings, self._train, limit)
        self.order = GlobalOrder(
            [
                OrderedCorpus(corpus.index_sha256, corpus.shard_sizes, samples)
                for corpus, samples in zip(self._train, plan.round_samples, strict=True)
            ],
            shuffle=settings.shuffle,
            seed=seed,
            window_samples=settings.window_samples,
            sequence_length=settings.sequence_length,
        )

    def batches(self, layout: BatchLayout, rank: int, first_step: int) -> BatchStream:
        """A rank's micro-batches from a step on; read ahead in the background."""
        return BatchStream(
            self._train,
            self.order,
            rank=rank,
            world_size=layout.world_size,
            micro_batch=layout.micro_batch,
            accumulation=layout.accumulation,
            start_step=first_step,
            prefetch=self.plan.settings.prefetch,
            prefetch_threads=self.plan.settings.prefetch_threads,
        )

    def validation_batches(self, layout: BatchLayout, rank: int, num_sequences: int) -> Iterator[Batch]:
        """A rank's share of the validation sequences, of each corpus those first in its split; the same number of
        batches on every rank.
        """
        counts = validation_counts(self.order, [len(corpus) for corpus in self._validation], num_sequences)
        return iter(
            validation_batches(
                self._validation,
                counts,
                rank=rank,
                world_size=layout.world_size,
                micro_batch=layout.micro_batch,
            )
        )


def _check_limit(settings: DataSettings, corpora: list[TokenCorpus], limit: int) -> None:
    """Raise if the cache cannot hold the window that is read and the one that is fetched meanwhile."""
    needed = 0
    for corpus in corpora:
        whole, largest = int(corpus.shard_bytes.sum()), int(corpus.shard_bytes.max())
        window = whole * settings.window_samples // len(corpus) + 2 * largest  # it begins and ends within shards
        needed += min(whole, 2 * window)
    if limit < needed:
        raise ValueError(
            f"data.cache_limit_gib: {settings.cache_limit_gib:g}, but two windows of the shuffle take "
            f"{needed / _GIB:.3g} GiB, and shards would be fetched again and again. At least that much is needed. "
            f"Raise it, or lower data.shuffle_window_tokens ({settings.shuffle_window_tokens:,})."
        )
