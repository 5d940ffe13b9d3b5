"""What `make evidence` trains: arms that differ in a few settings, each with the same seeds.

Sizes are those of 2 CPU cores, not the paper's; the questions are the paper's (arXiv 2602.00217).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SEEDS = (0, 1, 2)
FOLDER = Path("runs/evidence")
MODELS = FOLDER / "models"
SMOLLM2 = MODELS / "smollm2"
UNTOUCHED = FOLDER / "untouched"  # scores of SmolLM2 before any training
SCRATCH_CONFIG, SMOLLM2_CONFIG = "configs/evidence/scratch.yaml", "configs/evidence/smollm2.yaml"
# Corpus -> tokenizer. A tenth is held out: 84 sequences, the demo's share, would be few for a comparison.
CORPORA = {"data/evidence-scratch": "train:8192", "data/evidence-smollm2": str(SMOLLM2)}
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds only."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    processes: int = 2
    seeds: tuple[int, ...] = SEEDS
    examples: int = 100  # of each task; the suite has more
    teacher: Arm | None = None  # its first run is distilled into these

    @property
    def settings(self) -> tuple[str, ...]:
        """What the configuration is changed by: the arm's own, and its teacher."""
        if self.teacher is None:
            return self.overrides
        return (*self.overrides, f"distillation.teacher={self.teacher.model_folder}")

    @property
    def model_folder(self) -> Path:
        """Where the exported model of the first seed lies, if the arm is a teacher."""
        return MODELS / self.name

    def run_folder(self, seed: int) -> Path:
        """Where the run of a seed lies."""
        return FOLDER / f"{self.name}-s{seed}"


@dataclass(frozen=True)
class Question:
    """What is compared, the reference first."""

    key: str
    title: str
    arms: tuple[Arm, ...]


def _term(*settings: str) -> tuple[str, ...]:
    return tuple(f"dispersion.{setting}" for setting in ("coefficient=0.1", *settings))


# One set a sequence, every position: the paper's loss at this length.
_OF_THE_PAPER = _term("pool_sequences=1", "tokens_per_sequence=256", "norm_epsilon=1e-2")

BASELINE = Arm("baseline", SCRATCH_CONFIG)
NARROW = Arm("narrow", SCRATCH_CONFIG, ("model.config.n_inner=64",))
WIDE = Arm("wide", SCRATCH_CONFIG, ("model.config.n_inner=2048",))
DISPERSION = Arm("dispersion", SCRATCH_CONFIG, _OF_THE_PAPER)
# The whole global batch of 16 sequences, gathered over both processes, is one set of 512.
POOLED = Arm("pooled", SCRATCH_CONFIG, _term("pool_sequences=16", "tokens_per_sequence=32", "norm_epsilon=1e-2"))
_TWICE_AS_WIDE = ("model.config.n_embd=256",)
TEACHER = Arm("teacher", SCRATCH_CONFIG, _TWICE_AS_WIDE, seeds=SEEDS[:1])
DISPERSED_TEACHER = Arm("dispersed-teacher", SCRATCH_CONFIG, (*_TWICE_AS_WIDE, *_OF_THE_PAPER), seeds=SEEDS[:1])
DISTILLED = Arm("distilled", SCRATCH_CONFIG, teacher=TEACHER)
DISTILLED_FROM_DISPERSED = Arm("distilled-from-dispersed", SCRATCH_CONFIG, teacher=DISPERSED_TEACHER)
# One process with both cores: two would hold the weights, 0.5 GB of float32, twice. 100 examples would take minutes.
SMOLLM2_BASELINE = Arm("smollm2-baseline", SMOLLM2_CONFIG, processes=1, examples=40)
SMOLLM2_DISPERSION = Arm("smollm2-dispersion", SMOLLM2_CONFIG, _OF_THE_PAPER, processes=1, examples=40)

QUESTIONS = (
    Question("width", "Does condensation lessen with the width of the MLP?", (BASELINE, NARROW, WIDE)),
    Question("scratch", "From scratch, equal tokens: what does dispersion change?", (BASELINE, DISPERSION, POOLED)),
    Question(
        "smollm2",
        "Mid-training SmolLM2-135M, equal tokens: what does dispersion change?",
        (SMOLLM2_BASELINE, SMOLLM2_DISPERSION),
    ),
    Question(
        "distillation",
        "Does distillation from a wider model transfer dispersion?",
        (BASELINE, DISTILLED, DISTILLED_FROM_DISPERSED, TEACHER, DISPERSED_TEACHER),
    ),
)
