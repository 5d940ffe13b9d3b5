"""How far the hidden states of a model condense into a cone: cosine statistics, layer by layer.

Source: arXiv 2602.00217, section on embedding condensation. For hidden state l (0 = embedding output, 1 ... L = block
outputs, the last one after the final norm, as transformers returns them) and tokens i, j of one text, cos[l, i, j] is
averaged elementwise over the texts; everything here is a statistic of that average, its diagonal included, except the
effective rank, which is of each text's own matrix.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from dispersion_pretrain import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_TOKENS = 512  # of each text, as in the paper; the sums of cosines grow with the square
NUM_BINS = 128  # of the histogram over [-1, 1]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_LATER_FIELDS = ("quantiles", "effective_rank")  # files of older versions lack them
_CHUNK_BYTES = 64 * 2**20  # float32 cosines held at once, besides the sums


@dataclass(frozen=True)
class Condensation:
    """One measurement of a model with L blocks, hence L + 1 hidden states.

    `spearman` and `kendall` correlate `mean_cosine` with the layer index: near +1 it condenses with depth.

    `effective_rank` is the number of directions that the tokens of a text share out evenly, averaged over the texts: 1
    where all are parallel, min(tokens, dim) where they are spread over all there is. It is the participation ratio
    (tr G)^2 / |G|_F^2 of a text's cosine matrix G, whose eigenvalues are the squared singular values of its unit
    vectors; so it is exp of the Renyi entropy of order 2 of their shares, where Roy and Vetterli (2007) take Shannon's
    of the singular values. It needs no decomposition. Source: Gao et al. (2017), "A theory of multineuronal
    dimensionality, dynamics and measurement"; here of unit vectors that are not centred, since the common direction is
    what is measured.
    """

    mean_cosine: NDArray[np.float64]  # (L + 1,) mean over all token pairs, the diagonal included
    histogram: NDArray[np.float64]  # (L + 1, 128) probability density of the pairs' text-averaged cosines
    bin_edges: NDArray[np.float64]  # (129,) from -1 to 1
    spearman: float  # NaN where mean_cosine is constant
    kendall: float
    last_half: float  # mean of mean_cosine over block outputs L // 2 + 1 ... L
    num_texts: int
    sequence_length: int
    step: int = 0
    tokens: int = 0  # seen in training so far
    # (L + 1, 5) of the pairs' text-averaged cosines, at QUANTILES, and (L + 1,); both empty where a file lacks them
    quantiles: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, len(QUANTILES))))
    effective_rank: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    @property
    def last_k(self) -> tuple[float, ...]:
        """Mean of mean_cosine over the last 1, 2, ... 5 block outputs; shorter for a model of fewer blocks."""
        num_blocks = len(self.mean_cosine) - 1
        return tuple(float(self.mean_cosine[-k:].mean()) for k in range(1, min(5, num_blocks) + 1))

    @property
    def layer_fraction(self) -> NDArray[np.float64]:
        """(L + 1,) depth of each hidden state, from 0 (embedding output) to 1."""
        return np.linspace(0.0, 1.0, len(self.mean_cosine))

    def scalars(self) -> dict[str, float]:
        """The measurement under its metric keys."""
        values = {f"condensation/cosine/layer_{layer:02d}": float(mean) for layer, mean in enumerate(self.mean_cosine)}
        ranks = enumerate(self.effective_rank)
        values |= {f"condensation/effective_rank/layer_{layer:02d}": float(rank) for layer, rank in ranks}
        values |= {f"condensation/cosine/last_blocks_{k}": mean for k, mean in enumerate(self.last_k, 1)}
        values["condensation/cosine_last_half"] = self.last_half
        values["condensation/spearman"] = self.spearman
        values["condensation/kendall"] = self.kendall
        return values

    def save(self, path: str | Path) -> None:
        """Write an npz file of the fields, and make its folder; a kill leaves the old file or the new one, whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {part.name: np.asarray(getattr(self, part.name)) for part in fields(self)}
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            os.fchmod(descriptor, 0o644)  # mkstemp makes it private
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Condensation:
        """Read what `save` wrote, here or in a version that measured less.

        Raises:
            ValueError: the file is missing, damaged, or no measurement.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                values: dict[str, Any] = {
                    part.name: archive[part.name]
                    for part in fields(cls)
                    if part.name not in _LATER_FIELDS or part.name in archive
                }
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path}: is no condensation measurement ({type(error).__name__}: {error}). An npz file that "
                "training or measure_condensation.py wrote is needed. Measure again or remove the file."
            ) from None
        values |= {name: values[name].item() for name in values if values[name].ndim == 0}
        return cls(**values)


class CosineAccumulator:
    """Sums the cosine matrices of texts, one batch after another; what it holds does not grow with their number.

    The sums take 8 x num_states x sequence_length^2 bytes on `device`.
    """

    def __init__(self, num_states: int, sequence_length: int, device: torch.device | str) -> None:
        """Start at zero texts.

        Raises:
            ValueError: fewer than 2 tokens, or no block output beside the embedding output.
        """
        if sequence_length < 2:
            raise ValueError(
                f"sequence length: a text of {sequence_length} token(s) has no pair. At least 2 are needed. "
                "Use longer texts."
            )
        if num_states < 2:
            raise ValueError(
                f"hidden states: {num_states}. The embedding output and at least one block output are needed. "
                "Call the model with output_hidden_states=True."
            )
        self.num_states = num_states
        self.sequence_length = sequence_length
        # float64, so that thousands of float32 matrices add up without loss, in whatever order ranks and batches come
        self._sums = torch.zeros(num_states, sequence_length, sequence_length, dtype=torch.float64, device=device)
        self._rank_sums = torch.zeros(num_states, dtype=torch.float64, device=device)
        self._num_texts = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, hidden_states: Sequence[Tensor], valid: Tensor | None = None) -> None:
        """Add a batch of texts. Does not wait for the device; non-finite values are found by `result`.

        Args:
            hidden_states: num_states of (batch, sequence_length, dim), any float type; dim may differ by layer.
            valid: (batch,) bool; texts that are False are left out (they only fill up a batch). None: all count.

        Raises:
            ValueError: the shapes are not those of the constructor.
        """
        self._check_shapes(hidden_states, valid)
        device = self._sums.device
        batch = hidden_states[0].shape[0]
        ignored = None if valid is None else ~valid.to(device=device, dtype=torch.bool)
        chunk = max(1, _CHUNK_BYTES // (4 * self.sequence_length**2))
        with torch.autocast(device_type=device.type, enabled=False), _exact_float32_matmul(device):
            for layer, states in enumerate(hidden_states):
                vectors = states.detach().to(device=device, dtype=torch.float32)
                # A zero vector has no direction: its cosine with everything, itself included, counts as 0.
                norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
                unit = vectors / norms.clamp_min(torch.finfo(torch.float32).tiny)
                for first in range(0, batch, chunk):
                    part = unit[first : first + chunk]
                    cosines = torch.bmm(part, part.mT).clamp_(-1.0, 1.0)
                    if ignored is not None:
                        cosines.masked_fill_(ignored[first : first + chunk, None, None], 0.0)
                    self._sums[layer] += cosines.sum(0, dtype=torch.float64)
                    self._rank_sums[layer] += _participation_ratios(cosines).sum(dtype=torch.float64)
        self._num_texts += batch if ignored is None else (~ignored).sum()

    def reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the sums of all ranks, in place, on every rank; call it once, after the last `add`.

        Collective: `group` (None: the world), also on ranks that added nothing; a world of one does nothing.
        """
        device = distributed.collective_device()
        for tensor in (self._sums, self._rank_sums, self._num_texts):
            tensor.copy_(distributed.all_reduce_sum(tensor.to(device), group))

    def average(self, layer: int) -> NDArray[np.float64]:
        """(sequence_length, sequence_length) cosines of one hidden state, averaged over the texts added so far."""
        return (self._sums[layer] / self._num_texts).cpu().numpy()

    def result(self, step: int = 0, tokens: int = 0) -> Condensation:
        """Statistics of the texts added so far. `step` and `tokens` say when in training they were measured.

        Raises:
            ValueError: no text was added.
            RuntimeError: hidden states were not finite; names the layers. After `reduce`, the same on every rank.
        """
        num_texts = int(self._num_texts.item())
        if num_texts == 0:
            raise ValueError("texts: 0 were measured. At least 1 is needed. Give texts, or mark at least one as valid.")
        finite = torch.isfinite(self._sums).all(-1).all(-1)
        if not bool(finite.all()):
            layers = [layer for layer, good in enumerate(finite.tolist()) if not good]
            raise RuntimeError(
                f"hidden states: layer(s) {', '.join(map(str, layers))} of 0 ... {self.num_states - 1} hold NaN or "
                "infinity. Finite values are needed. Check the weights (did training diverge?) or measure in float32."
            )
        mean_cosine = np.empty(self.num_states)
        histogram = np.empty((self.num_states, NUM_BINS))
        quantiles = np.empty((self.num_states, len(QUANTILES)))
        bin_edges = np.linspace(-1.0, 1.0, NUM_BINS + 1)
        for layer in range(self.num_states):
            cosines = self.average(layer)
            mean_cosine[layer] = cosines.mean()
            histogram[layer], _ = np.histogram(cosines, bins=NUM_BINS, range=(-1.0, 1.0), density=True)
            quantiles[layer] = np.quantile(cosines, QUANTILES)
        spearman, kendall = rank_correlations(np.arange(self.num_states), mean_cosine)
        return Condensation(
            mean_cosine=mean_cosine,
            histogram=histogram,
            bin_edges=bin_edges,
            spearman=spearman,
            kendall=kendall,
            last_half=float(mean_cosine[1:][(self.num_states - 1) // 2 :].mean()),
            num_texts=num_texts,
            sequence_length=self.sequence_length,
            step=step,
            tokens=tokens,
            quantiles=quantiles,
            effective_rank=(self._rank_sums / num_texts).cpu().numpy(),
        )

    def _check_shapes(self, hidden_states: Sequence[Tensor], valid: Tensor | None) -> None:
        if len(hidden_states) != self.num_states:
            raise ValueError(
                f"hidden states: {len(hidden_states)} of them, but {self.num_states} before. One model is measured at "
                "a time. Use an accumulator of its own for each model."
            )
        batch = hidden_states[0].shape[0]
        for layer, states in enumerate(hidden_states):
            if states.ndim != 3 or states.shape[:2] != (batch, self.sequence_length):
                raise ValueError(
                    f"hidden state {layer}: shape {tuple(states.shape)}. ({batch}, {self.sequence_length}, dim) is "
                    "needed: all texts have the same number of tokens, for their matrices are averaged elementwise. "
                    "Cut them to equal length."
                )
        if valid is not None and valid.shape != (batch,):
            raise ValueError(
                f"valid: shape {tuple(valid.shape)}. One flag a text is needed. Pass a tensor of shape ({batch},)."
            )


def measure(
    model_forward: Callable[[Tensor], Sequence[Tensor]], batches: Iterable[Tensor], *, step: int = 0, tokens: int = 0
) -> Condensation:
    """Measure a model on texts of equal length.

    Args:
        model_forward: input_ids (batch, tokens) int64 -> hidden states, L + 1 of (batch, tokens, dim);
            `causal_lm_forward` makes one.
        batches: of input_ids; no padding. They are read once, one at a time.

    Raises:
        ValueError: no text, texts of unequal length or of fewer than 2 tokens.
        RuntimeError: hidden states are not finite; names the layers.
    """
    accumulator: CosineAccumulator | None = None
    with torch.no_grad():
        for input_ids in batches:
            hidden_states = model_forward(input_ids)
            if accumulator is None:
                accumulator = CosineAccumulator(len(hidden_states), input_ids.shape[1], hidden_states[0].device)
            accumulator.add(hidden_states)
    if accumulator is None:
        raise ValueError("texts: none were given. At least 1 is needed. Check the corpus and the number of texts.")
    return accumulator.result(step, tokens)


def require_finite(model: PreTrainedModel) -> None:
    """Try a causal LM, its head included, on two tokens, before it is measured on whole texts without its head.

    Raises:
        RuntimeError: a hidden state or the logits hold NaN or infinity.
    """
    with torch.no_grad():
        outputs = model(input_ids=torch.tensor([[0, 1]], device=model.device), output_hidden_states=True)
    found = {f"hidden state {layer}": states for layer, states in enumerate(outputs.hidden_states)}
    for place, values in {**found, "logits": outputs.logits}.items():
        if not bool(torch.isfinite(values).all()):
            raise RuntimeError(
                f"{place}: NaN or infinity after two tokens. Finite values are needed. Check the weights (did training "
                "diverge, is the file damaged?) or measure in float32."
            )


def causal_lm_forward(model: PreTrainedModel) -> Callable[[Tensor], Sequence[Tensor]]:
    """Put a Hugging Face causal LM into evaluation mode and return its hidden states as a function of input_ids."""
    model.eval()
    trunk = model.base_model  # the same hidden states, without the logits, which take the most memory of all

    def forward(input_ids: Tensor) -> Sequence[Tensor]:
        outputs = trunk(input_ids=input_ids.to(model.device), use_cache=False, output_hidden_states=True)
        states: Sequence[Tensor] = outputs.hidden_states
        return states

    return forward


@contextmanager
def _exact_float32_matmul(device: torch.device) -> Iterator[None]:
    """Keep float32 products on CUDA out of TF32, whose cosines are right to three digits only."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _participation_ratios(cosines: Tensor) -> Tensor:
    """(tr G)^2 / |G|_F^2 of each of (texts, tokens, tokens) cosine matrices; 0 for a matrix of zeros."""
    traces = cosines.diagonal(dim1=1, dim2=2).sum(1)
    norms = torch.linalg.vector_norm(cosines, dim=(1, 2)).clamp_min(torch.finfo(cosines.dtype).tiny)
    return (traces / norms) ** 2


def rank_correlations(first: NDArray[Any], second: NDArray[Any]) -> tuple[float, float]:
    """Spearman's rho and Kendall's tau; NaN where one of the two is constant, so that every rank is tied."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:  # scipy would warn
        return float("nan"), float("nan")
    return float(scipy.stats.spearmanr(first, second).statistic), float(scipy.stats.kendalltau(first, second).statistic)
