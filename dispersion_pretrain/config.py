"""All settings of a run, checked before anything starts.

What the science fixes is stated (`training.global_batch_tokens`, `training.max_tokens`, `run.seed`); what the machine
fixes is derived (layout.py). settings_file.py reads a YAML file into this tree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

_DERIVED_BY_ENGINE = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
}


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


class RunSettings(_Section):
    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run folder, jobs and pages"
    )
    folder: str = Field("", description="the run folder; empty: runs/<name>")
    seed: int = Field(
        0, ge=0, lt=2**31, description="initial weights, data order, dropout, positions of the dispersion term"
    )
    max_time: str | None = Field(
        None,
        pattern=r"^(\d+-)?\d{1,3}:[0-5]\d:[0-5]\d$",
        description="[days-]hours:minutes:seconds after which a start saves and asks to be started again; null: none",
    )
    doctor: bool = Field(
        True, description="before each start, compare gradients through the engine with a one-process reference"
    )


class ModelSettings(_Section):
    config: dict[str, Any] | None = Field(
        None,
        description="Hugging Face config fields with model_type: from scratch; a string names a YAML file of them",
    )
    pretrained: str | None = Field(None, description="Hugging Face name or local folder: mid-training")
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="of parameters in the forward pass; master weights are float32"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    activation_checkpointing: bool | Annotated[int, Field(ge=1)] = Field(
        False, description="recompute blocks in the backward pass: true: each; a number k: every k-th"
    )
    compile: bool = Field(False, description="torch.compile the model")
    kernels: Literal["torch", "liger"] = Field(
        "torch", description="of RMSNorm, rotary embeddings and SwiGLU; liger: fused, for GPUs (extra gpu)"
    )
    loss_head: Literal["pieces", "whole"] = Field(
        "pieces",
        description="pieces: logits of a few tokens at a time, where a family's head is a bare matrix; whole: of all",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSettings:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError(
                "config and pretrained: exactly one of them is needed. config trains from scratch, pretrained goes "
                "on from weights. "
                "Give one and leave the other out."
            )
        if self.config is not None and "model_type" not in self.config:
            raise ValueError(
                "config: model_type is missing. Any causal language model of transformers is allowed, such as gpt2 "
                "or qwen3. Add model_type."
            )
        if self.compile and self.kernels == "liger":
            raise ValueError("kernels: compile fuses these operations itself. Set kernels: torch or compile: false.")
        return self


class CorpusSettings(_Section):
    path: str = Field(description="folder or URL that data_prep wrote (corpus.json and the MDS shards)")
    mirrors: list[str] = Field([], description="folders or URLs with the same content, tried where `path` fails")
    proportion: float | None = Field(
        None, gt=0, description="its tokens in the run, in relation to the proportions of the others"
    )
    repeat: float | None = Field(
        None, gt=0, description="how often it is read in one round of the mix; 1 if neither this nor tokens is given"
    )
    tokens: int | None = Field(None, ge=1, description="its tokens in one round of the mix, in place of repeat")

    @model_validator(mode="after")
    def _one_share(self) -> CorpusSettings:
        given = [name for name in ("proportion", "repeat", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)}: each says how much of {self.path} is read. At most one of them is allowed. "
                "Leave the others out."
            )
        return self


class DataSettings(_Section):
    corpus: str | None = Field(None, description="path of the one corpus, if it is one and has no mirrors")
    corpora: list[CorpusSettings] | None = Field(None, description="in place of corpus: one or several to be mixed")
    cache: str | None = Field(
        None, description="local folder for the shards of remote corpora; ranks and jobs of a node may share it"
    )
    cache_limit_gib: float | None = Field(
        None, gt=0, description="bound of the shards in that folder; the least recently used make room. null: none"
    )
    sequence_length: int = Field(ge=2, description="tokens a sample; must be the corpus' own")
    shuffle: Literal["windows", "none"] = Field(
        "windows", description="shards in random order, samples shuffled within windows of it; none: as prepared"
    )
    shuffle_window_tokens: int = Field(
        2**28, ge=2, description="tokens of a window; a cache should hold two (here 1 GiB a corpus at 16 bits a token)"
    )
    prefetch: int = Field(8, ge=1, description="micro-batches read ahead by each rank")
    prefetch_threads: int = Field(2, ge=1, description="shards that each rank fetches and checks at a time")
    allow_change: bool = Field(
        False, description="resume although what decides the order of samples was changed; the new order goes on"
    )

    @model_validator(mode="after")
    def _some_corpus(self) -> DataSettings:
        if (self.corpus is None) == (self.corpora is None):
            raise ValueError(
                "corpus and corpora: exactly one of them is needed. corpus is a path, corpora a list of them with "
                "shares or mirrors. Give one and leave the other out."
            )
        sources = self.sources
        if not sources:
            raise ValueError("corpora: is empty. At least one corpus is needed. Name one.")
        kinds = {source.proportion is not None for source in sources}
        if len(kinds) == 2:
            raise ValueError(
                "corpora: some have a proportion, others have none. Either all have one, or each has repeat, tokens "
                "or neither. Make them agree."
            )
        paths = [source.path for source in sources]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(f"corpora: {twice[0]} stands there twice. Once is allowed. Add up what it is to have.")
        return self

    @property
    def sources(self) -> list[CorpusSettings]:
        """The corpora of the run, however they were named."""
        return [CorpusSettings(path=self.corpus)] if self.corpus is not None else list(self.corpora or [])

    @property
    def window_samples(self) -> int:
        """Samples of a window of the shuffle."""
        return max(1, self.shuffle_window_tokens // self.sequence_length)


class TrainingSettings(_Section):
    global_batch_tokens: int = Field(
        ge=2, description="tokens an optimizer step, over all ranks and accumulation micro-steps"
    )
    max_tokens: int = Field(
        ge=2, description="tokens of the whole run; the run has ceil(max_tokens / global_batch_tokens) steps"
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="sequences a rank and micro-step; null: derived; auto: the most that fit the memory, tried out",
    )


class OptimizerSettings(_Section):
    learning_rate: float = Field(3e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices only: biases, norms and other vectors have none")
    gradient_clipping: float = Field(1.0, ge=0, description="bound of the global gradient norm; 0: off")


class ScheduleSettings(_Section):
    kind: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = "cosine"
    warmup_tokens: int = Field(0, ge=0)
    decay_tokens: int = Field(0, ge=0, description="warmup_stable_decay: length of the final decay")
    final_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak")


class DispersionSettings(_Section):
    coefficient: float = Field(
        0.1, ge=0, description="lambda of the total loss; 0 is bit-equal to leaving the section out"
    )
    pool_sequences: int = Field(
        1, ge=1, description="P: consecutive samples of the global batch that form one set; 1 is the paper's loss"
    )
    tokens_per_sequence: int = Field(
        256, ge=1, description="m: positions drawn from each sequence, without replacement"
    )
    layers: Literal["all", "last", "early_half", "late_half"] | list[StrictInt] = Field(
        "all", description="block outputs, 1 ... num_layers; the last is after the final norm"
    )
    variant: str = Field("angular", description="an entry of dispersion.VARIANTS")
    temperature: float = Field(1.0, gt=0, description="tau of the variants with an exponential")
    cosine_clamp: float = Field(0.1, ge=0, lt=1, description="t: straight-through clamp of cosines to [-1 + t, 1 - t]")
    angle: Literal["arccos", "atan2"] = Field(
        "arccos", description="how angles are computed; atan2 has no clamp, and a gradient that does not fade"
    )
    margin: float = Field(0.5, gt=0, le=1, description="orthogonalization: pairs closer than this share of pi count")
    norm_weight: float = Field(0.1, ge=0, description="l2_repel: weight of the mean square of the embeddings")
    norm_epsilon: float = Field(0.0, ge=0, description="added to norms; the paper's scripts use 1e-2")
    warmup_tokens: int = Field(0, ge=0, description="the coefficient rises linearly over so many tokens")
    decay_tokens: int = Field(0, ge=0, description="the coefficient falls linearly over the last so many tokens")
    final_ratio: float = Field(
        0.0, ge=0, le=1, description="where it falls: the coefficient right after the last step over its peak"
    )
    gradient_ratio_cap: float | None = Field(
        None,
        gt=0,
        description="bound of the term's gradient norm over that of cross-entropy (with a teacher: and distillation), "
        "both at the last hidden state; a step is bounded by what the step before showed; null: neither measured nor "
        "bound",
    )

    @model_validator(mode="after")
    def _has_pairs(self) -> DispersionSettings:
        if self.pool_sequences * self.tokens_per_sequence < 2:
            raise ValueError(
                "pool_sequences x tokens_per_sequence: 1 embedding has no pair. At least 2 are needed. Raise one of "
                "the two."
            )
        if self.gradient_ratio_cap is not None and self.layers == "early_half":
            raise ValueError(
                "gradient_ratio_cap: it is measured at the last hidden state, which layers: early_half leaves out. "
                "all, last, late_half or a list with the last layer are allowed. Change layers or remove the cap."
            )
        return self

    def layer_indices(self, num_layers: int) -> list[int]:
        """The chosen hidden states, 1 ... num_layers. Raises ValueError for a list that leaves that range."""
        half = num_layers // 2
        if isinstance(self.layers, str):
            everything = list(range(1, num_layers + 1))
            chosen = {"all": everything, "last": everything[-1:], "early_half": everything[:half] or everything,
                      "late_half": everything[half:]}  # fmt: skip
            return chosen[self.layers]
        wrong = [layer for layer in self.layers if not 1 <= layer <= num_layers]
        if wrong or not self.layers or len(set(self.layers)) != len(self.layers):
            raise ValueError(
                f"dispersion.layers: {self.layers} does not fit. Distinct layers from 1 to {num_layers} are allowed. "
                "Correct the list."
            )
        return sorted(self.layers)


class NoisyEmbeddingsSettings(_Section):
    alpha: float = Field(
        5.0, gt=0, description="uniform noise in +-alpha / sqrt(sequence_length x width) on the input embeddings"
    )


class ActiveForgettingSettings(_Section):
    every_steps: int = Field(
        1000, ge=1, description="steps between resets of the input embeddings and of their optimizer state"
    )
    last_phase: float = Field(0.2, ge=0, lt=1, description="last share of the run, without resets")


class DistillationSettings(_Section):
    teacher: str = Field(description="Hugging Face name or local folder, with the corpus' tokenizer")
    weight: float = Field(1.0, gt=0, description="of the divergence beside the cross-entropy, whose weight stays 1")
    temperature: float = Field(
        1.0, gt=0, description="of both distributions; the divergence is multiplied by its square"
    )
    precision: Literal["float32", "bf16"] | None = Field(None, description="of the teacher; null: model.precision")
    sharded: bool = Field(False, description="the teacher's parameters lie in shards over the ranks, as ZeRO-3's do")


class ZeroSettings(_Section):
    stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = Field(False, description="optimizer state and step on the CPU (stages 1-3)")
    offload_parameters: bool = Field(False, description="parameters on the CPU (stage 3)")
    overrides: dict[str, Any] = Field(default_factory=dict, description="DeepSpeed settings passed through as they are")

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> ZeroSettings:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError(
                "offload_optimizer: stage 0 cannot offload. Stages 1, 2 and 3 can. Raise zero.stage or turn it off."
            )
        if self.offload_parameters and self.stage != 3:
            raise ValueError(
                f"offload_parameters: stage {self.stage} cannot offload parameters. Only stage 3 can. Set zero.stage=3."
            )
        derived = _DERIVED_BY_ENGINE & set(self.overrides)
        if derived:
            raise ValueError(
                f"overrides: {', '.join(sorted(derived))} is derived from other settings. Keys that this file does "
                "not derive are allowed. "
                "Use training, optimizer, schedule and model.precision instead."
            )
        return self


class ValidationSettings(_Section):
    every_steps: int = Field(100, ge=1, description="also before the first and after the last step")
    sequences: int = Field(64, ge=1, description="of the validation split; at most all of it is used")


class CondensationSettings(_Section):
    every_steps: int = Field(100, ge=1, description="also before the first and after the last step")
    num_texts: int = Field(32, ge=1, description="validation sequences whose cosines are averaged")


class CheckpointSettings(_Section):
    every_steps: int | None = Field(None, ge=1, description="also after the last step")
    every_minutes: float | None = Field(None, gt=0)
    keep_last: int = Field(2, ge=1)
    keep_every_tokens: int | None = Field(
        None, ge=1, description="the first checkpoint at or after each multiple of so many tokens is kept for ever"
    )
    background: bool = Field(
        True, description="training goes on while a copy in host memory is written; false: it waits"
    )
    local_folder: str | None = Field(
        None, description="folder on a fast disk of each node for a second tier of checkpoints between the shared ones"
    )
    local_every_steps: int | None = Field(None, ge=1, description="steps between those; only the newest is kept")
    on_mismatch: Literal["stop", "warn"] = Field(
        "stop", description="what a resume does when its first step is not the one that the checkpoint promises"
    )

    @model_validator(mode="after")
    def _tiers_are_whole(self) -> CheckpointSettings:
        if (self.local_folder is None) != (self.local_every_steps is None):
            raise ValueError(
                "local_folder and local_every_steps: one is set without the other. Both or neither are allowed. "
                "Set both, or leave both out."
            )
        return self


class FaultSettings(_Section):
    non_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="a step with a loss or gradient that is not finite: end the run; make no update and go on; "
        "or go back to the last checkpoint and pass over the samples since",
    )
    max_skips: int = Field(3, ge=1, description="of skip: more than so many in a row end the run")
    max_rollbacks: int = Field(3, ge=1, description="more than so many within one run end it")
    spike: Literal["off", "warn", "rollback"] = Field("warn", description="what a sudden rise of the loss does")
    spike_score: float = Field(
        8.0, gt=0, description="a rise is sudden if it is so many robust standard deviations above the window's median"
    )
    spike_window_steps: int = Field(128, ge=8, description="steps of which median and deviation are taken")
    hang_s: float | None = Field(
        1800.0,
        gt=0,
        description="without any progress for so long the run reports who waits where and ends; null: never",
    )
    replica_check_steps: int | None = Field(
        None, ge=1, description="steps between checks that ranks hold the same weights; null: none"
    )


class LoggingSettings(_Section):
    every_steps: int = Field(10, ge=1)


class ProfilingSettings(_Section):
    first_step: int = Field(10, ge=1, description="0-based; compilation and warm-up should lie before it")
    steps: int = Field(5, ge=1, description="that are timed phase by phase; as many after them are traced")


class EvaluationSettings(_Section):
    every: int | None = Field(
        None, ge=1, description="steps between evaluation jobs, a multiple of checkpoint.every_steps; null: none"
    )
    via: Literal["local", "slurm", "none"] = Field(
        "local",
        description="a process on this machine; a job of Slurm's; or nothing, for evaluate_checkpoint.py --watch",
    )
    suite: str = Field("configs/eval/offline.yaml", description="what such a job runs")
    sbatch: dict[str, str] = Field(
        {}, description="long options of sbatch for such a job: {partition: small, gpus: '1'}"
    )
    device: str = Field(
        "cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="where; on a GPU of the training it takes memory"
    )


class Settings(_Section):
    """The whole tree. Sections that are null are off."""

    run: RunSettings = RunSettings()
    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    dispersion: DispersionSettings | None = None
    noisy_embeddings: NoisyEmbeddingsSettings | None = None
    active_forgetting: ActiveForgettingSettings | None = None
    distillation: DistillationSettings | None = None
    zero: ZeroSettings = ZeroSettings()
    validation: ValidationSettings | None = ValidationSettings()
    condensation: CondensationSettings | None = None
    checkpoint: CheckpointSettings = CheckpointSettings()
    faults: FaultSettings = FaultSettings()
    logging: LoggingSettings = LoggingSettings()
    profiling: ProfilingSettings | None = None
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Settings:
        training, length = self.training, self.data.sequence_length
        if training.global_batch_tokens % length:
            below = training.global_batch_tokens // length * length
            raise ValueError(
                f"training.global_batch_tokens: {training.global_batch_tokens} is no multiple of "
                f"data.sequence_length {length}. "
                f"Whole sequences are allowed. Use {below or length} or {below + length}."
            )
        if training.max_tokens < training.global_batch_tokens:
            raise ValueError(
                f"training.max_tokens: {training.max_tokens} is less than one step of training.global_batch_tokens "
                f"{training.global_batch_tokens}. At least one step is needed. Raise max_tokens."
            )
        schedule = self.schedule
        decay = schedule.decay_tokens if schedule.kind == "warmup_stable_decay" else 0
        if schedule.kind == "warmup_stable_decay" and not decay:
            raise ValueError(
                "schedule.decay_tokens: 0 leaves warmup_stable_decay without a decay. More than 0 is allowed. Set it."
            )
        if schedule.warmup_tokens + decay > training.max_tokens:
            raise ValueError(
                f"schedule: warm-up and decay take {schedule.warmup_tokens + decay} tokens of training.max_tokens "
                f"{training.max_tokens}. "
                "Together they must fit. Shorten warmup_tokens or decay_tokens."
            )
        term = self.dispersion
        if term is not None and term.warmup_tokens + term.decay_tokens > training.max_tokens:
            raise ValueError(
                f"dispersion: warm-up and decay take {term.warmup_tokens + term.decay_tokens} tokens of "
                f"training.max_tokens {training.max_tokens}. Together they must fit. Shorten dispersion.warmup_tokens "
                "or dispersion.decay_tokens."
            )
        if term is not None and 0 < term.decay_tokens <= training.global_batch_tokens:
            raise ValueError(
                f"dispersion.decay_tokens: {term.decay_tokens} are no more than one step of "
                f"training.global_batch_tokens {training.global_batch_tokens}, in which nothing falls. More are "
                "allowed. Raise it or leave it out."
            )
        if term is not None and term.gradient_ratio_cap is not None and self.model.compile:
            raise ValueError(
                "dispersion.gradient_ratio_cap: model.compile joins head and loss, where the gradient at the last "
                "hidden state cannot be seen. It works without. Set model.compile=false or remove the cap."
            )
        if term is not None and term.tokens_per_sequence > length:
            raise ValueError(
                f"dispersion.tokens_per_sequence: {term.tokens_per_sequence} of a sequence of {length} "
                "tokens. "
                f"At most data.sequence_length are allowed. Use {length} or fewer."
            )
        watched = self.profiling
        if watched is not None and watched.first_step + 2 * watched.steps > self.num_steps:
            last = watched.first_step + 2 * watched.steps - 1
            raise ValueError(
                f"profiling: steps {watched.first_step} to {last} are watched, but the run has {self.num_steps}, from "
                "0. They must lie within. Lower first_step or steps."
            )
        every, saved = self.evaluation.every, self.checkpoint.every_steps
        if every is not None and (saved is None or every % saved):
            raise ValueError(
                f"evaluation.every: {every} steps, but checkpoint.every_steps is {saved}. A multiple of it is allowed. "
                "Change one of the two."
            )
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder or f"runs/{self.run.name}")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return -(-self.training.max_tokens // self.training.global_batch_tokens)

    @property
    def global_batch_sequences(self) -> int:
        return self.training.global_batch_tokens // self.data.sequence_length
