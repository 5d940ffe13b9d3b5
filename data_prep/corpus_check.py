"""A whole corpus against what it says of itself: corpus.json, indexes, tokenizer, shards, stray files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pydantic
import tokenizers

from corpus_manifest import CHECKSUM, Index, Manifest, ShardEntry, SplitEntry, checksum, contradictions, faults_of
from places import Place
from prep_errors import InputError
from progress_bar import ShardProgress
from shard_check import ShardPlan, ShardReport, check_shard

SHOWN_CHARACTERS = 100
SHOWN_STRAY_FILES = 10
_Model = TypeVar("_Model", bound=pydantic.BaseModel)


@dataclass
class CorpusReport:
    """What was found; `lines` are figures and samples, `size_bytes` is what was read of shards."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    size_bytes: int = 0


@dataclass
class _Split:
    name: str
    entry: SplitEntry
    shards: list[ShardEntry]
    ends: int = 0
    whole: bool = True  # every shard could be looked at
    shown: dict[int, list[int]] = field(default_factory=dict)  # first tokens by sample


class CorpusCheck:
    """The check of one corpus; `run` does all of it.

    Raises:
        InputError: there is no corpus at the place, or one of another format.
    """

    def __init__(self, place: Place, num_samples: int) -> None:
        self._place = place
        self._num_samples = num_samples
        self._report = CorpusReport()
        self._known_files = {"corpus.json"}

    def run(self, workers: int) -> CorpusReport:
        """Check everything with so many threads: reading, hashing and numpy let each other run."""
        manifest = self._read_manifest()
        if manifest is None:
            return self._report
        self._report.errors += [f"corpus.json: {fault}" for fault in contradictions(manifest)]
        tokenizer = self._check_tokenizer(manifest)
        splits = [self._read_index(manifest, name, entry) for name, entry in manifest.splits.items()]
        self._check_shards(manifest, splits, workers)
        for split in splits:
            self._check_counts(manifest, split)
            self._show(split, tokenizer)
        self._find_stray_files()
        return self._report

    def _read_manifest(self) -> Manifest | None:
        try:
            with self._place.file("corpus.json") as path:
                content = path.read_bytes()
        except FileNotFoundError as error:
            raise InputError(
                f"{self._place.location}: is no corpus (no corpus.json). A corpus is what tokenize_to_mds.py makes; it "
                "writes that file last. Give another place, or let the data job end."
            ) from error
        except OSError as error:
            raise InputError(f"{self._place.location}/corpus.json: {error}. It must be readable.") from error
        parsed = self._parsed(content, "corpus.json", Manifest)
        if parsed is None:
            return None
        manifest, found = parsed
        if CHECKSUM not in found:
            self._report.warnings.append(
                f"corpus.json: has no {CHECKSUM}, as one from before there were checksums. What shards do not prove "
                "(source, documents, bytes) is not checked."
            )
        elif found[CHECKSUM] != checksum(found):
            self._report.errors.append(f"corpus.json: was changed: its {CHECKSUM} is not that of its content")
        return manifest

    def _parsed(self, content: bytes, name: str, model: type[_Model]) -> tuple[_Model, dict[str, Any]] | None:
        """Return a JSON file as a model and as it is; report what is wrong with it and return None."""
        try:
            found = json.loads(content)
            if isinstance(found, dict) and model is Manifest and found.get("format_version", 1) != 1:
                version = str(found["format_version"])[:20]
                raise InputError(
                    f"{self._place.location}/{name}: format_version {version} is unknown here. 1 is checked. "
                    "Use the verify_mds.py of the project's version that made the corpus."
                )
            return model.model_validate(found), found
        except pydantic.ValidationError as error:
            self._report.errors += [f"{name}: {fault}" for fault in faults_of(error)]
        except InputError:
            raise
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
            self._report.errors.append(f"{name}: is not JSON ({error})")
        return None

    def _read_checked(self, name: str, sha256: str) -> bytes | None:
        """Read a small file and compare its hash; None if it cannot be read."""
        self._known_files.add(name)
        try:
            with self._place.file(name) as path:
                content = path.read_bytes()
        except OSError as error:
            self._report.errors.append(f"{name}: {_reason(error)}")
            return None
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            self._report.errors.append(f"{name}: sha256 is {found[:16]}..., corpus.json says {sha256[:16]}...")
        return content

    def _check_tokenizer(self, manifest: Manifest) -> tokenizers.Tokenizer | None:
        entry, folder = manifest.tokenizer, manifest.tokenizer.folder
        contents = {
            name: self._read_checked(f"{folder}/{name}", sha256)
            for name, sha256 in {**entry.files, "tokenizer.json": entry.sha256}.items()
        }
        content = contents["tokenizer.json"]
        if content is None:
            return None
        name = f"{folder}/tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            self._report.errors.append(f"{name}: the tokenizers library cannot load it ({error})")
            return None
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= manifest.vocab_size:
            self._report.errors.append(f"{name}: has id {largest}, vocab_size in corpus.json is {manifest.vocab_size}")
        if tokenizer.id_to_token(manifest.eos_token_id) is None:
            self._report.errors.append(f"{name}: has no token for eos_token_id {manifest.eos_token_id} of corpus.json")
        return tokenizer

    def _read_index(self, manifest: Manifest, split: str, entry: SplitEntry) -> _Split:
        name = f"{split}/index.json"
        content = self._read_checked(name, entry.index_sha256)
        parsed = None if content is None else self._parsed(content, name, Index)
        result = _Split(split, entry, parsed[0].shards if parsed else [])
        names = set()
        for number, shard in enumerate(result.shards):
            place, file = f"{name}: shard {number} ({shard.raw_data.basename})", shard.raw_data
            columns = (shard.column_names, shard.column_encodings, shard.column_sizes)
            if columns != (["tokens"], [manifest.encoding], [manifest.sample_bytes]):
                self._report.errors.append(
                    f"{place}: has columns {columns[0]} as {columns[1]}, by corpus.json ['tokens'] as "
                    f"['{manifest.encoding}']"
                )
            if file.bytes <= 4 + 4 * (shard.samples + 1) + shard.samples * manifest.sample_bytes:
                self._report.errors.append(f"{place}: {file.bytes:,} bytes cannot hold {shard.samples:,} samples")
            if "sha256" not in file.hashes:
                self._report.errors.append(f"{place}: has no sha256")
            if file.basename in names:
                self._report.errors.append(f"{place}: is listed twice")
            names.add(file.basename)
        self._known_files |= {f"{split}/{file}" for file in names}
        return result

    def _plan(self, manifest: Manifest, shard: ShardEntry, shown_rows: tuple[int, ...]) -> ShardPlan | None:
        """Return what a shard must be; None where the index contradicts itself, which was reported."""
        plan = ShardPlan(
            samples=shard.samples,
            size_bytes=shard.raw_data.bytes,
            sha256=shard.raw_data.hashes.get("sha256", ""),
            encoding=manifest.encoding,
            dtype=manifest.token_dtype,
            sequence_length=manifest.sequence_length,
            vocab_size=manifest.vocab_size,
            eos_token_id=manifest.eos_token_id,
            shown_rows=shown_rows,
        )
        return plan if plan.sha256 and plan.first_sample_byte > plan.columns_byte else None

    def _plans(self, manifest: Manifest, splits: list[_Split]) -> Iterator[tuple[_Split, int, str, ShardPlan]]:
        """Yield each shard's split, first sample, name and plan."""
        for split in splits:
            total = sum(shard.samples for shard in split.shards)
            count = min(self._num_samples, total)
            wanted = [number * total // count for number in range(count)]
            first = 0
            for shard in split.shards:
                rows = tuple(sample - first for sample in wanted if first <= sample < first + shard.samples)
                plan = self._plan(manifest, shard, rows)
                if plan is None:
                    split.whole = False
                else:
                    yield split, first, f"{split.name}/{shard.raw_data.basename}", plan
                first += shard.samples

    def _check_shards(self, manifest: Manifest, splits: list[_Split], workers: int) -> None:
        planned = list(self._plans(manifest, splits))
        reports: dict[int, ShardReport] = {}
        with ShardProgress(len(planned)) as progress, ThreadPoolExecutor(workers) as pool:
            futures = {
                pool.submit(self._check_one, name, plan): number for number, (_, _, name, plan) in enumerate(planned)
            }
            try:
                for future in as_completed(futures):
                    number = futures[future]
                    reports[number] = future.result()
                    progress.add(planned[number][3].size_bytes)
            except BaseException:  # Control-C above all: do not read the rest first
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for number, (split, first, name, plan) in enumerate(planned):  # in the corpus' order, whoever was first
            report = reports[number]
            self._report.errors += [f"{name}: {fault}" for fault in report.faults]
            self._report.size_bytes += plan.size_bytes
            split.ends += report.ends
            split.whole &= not report.faults
            split.shown |= {first + row: tokens for row, tokens in report.shown.items()}

    def _check_one(self, name: str, plan: ShardPlan) -> ShardReport:
        try:
            with self._place.file(name) as path:
                return check_shard(path, plan)
        except OSError as error:
            return ShardReport([_reason(error)])

    def _check_counts(self, manifest: Manifest, split: _Split) -> None:
        entry, errors = split.entry, self._report.errors
        sequences = sum(shard.samples for shard in split.shards)
        if not split.shards:
            return  # the index was reported
        if sequences != entry.sequences:
            errors.append(
                f"{split.name}: the index lists {sequences:,} sequences, corpus.json says {entry.sequences:,}"
            )
        self._report.lines.append(
            f"{split.name}: {len(split.shards):,} shards, {sequences:,} sequences, "
            f"{sequences * manifest.sequence_length:,} tokens, {split.ends:,} ends of documents"
        )
        if not split.whole:
            return  # ends of documents may be missing with their shard
        if split.ends < entry.documents - entry.dropped_tokens:
            errors.append(
                f"{split.name}: the end-of-document id {manifest.eos_token_id} occurs {split.ends:,} times; "
                f"{entry.documents:,} documents, of which {entry.dropped_tokens:,} tokens were dropped, have more ends"
            )
        elif split.ends > entry.documents:
            self._report.warnings.append(
                f"{split.name}: the end-of-document id {manifest.eos_token_id} occurs {split.ends:,} times in "
                f"{entry.documents:,} documents. Some have it in their text."
            )

    def _show(self, split: _Split, tokenizer: tokenizers.Tokenizer | None) -> None:
        for sample, tokens in sorted(split.shown.items()):
            if tokenizer is None:
                text = " ".join(map(str, tokens))
            else:
                text = tokenizer.decode(tokens, skip_special_tokens=False)
            shown = "".join(character if character.isprintable() else " " for character in text)
            self._report.lines.append(f"{split.name} sample {sample}: {' '.join(shown.split())[:SHOWN_CHARACTERS]}")

    def _find_stray_files(self) -> None:
        try:
            stray = [name for name in self._place.names() if name not in self._known_files]
        except OSError as error:
            self._report.warnings.append(f"{self._place.location}: {error}. Files of no index are not looked for.")
            return
        self._report.warnings += [
            f"{name}: is in no index and not part of the corpus" for name in stray[:SHOWN_STRAY_FILES]
        ]
        if len(stray) > SHOWN_STRAY_FILES:
            self._report.warnings.append(f"{len(stray) - SHOWN_STRAY_FILES:,} more files are not part of the corpus")


def _reason(error: OSError) -> str:
    return f"is missing ({error})" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
