"""Settings: reading, overriding, extending, refusing; and how a global batch is dealt to ranks."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from dispersion_pretrain.config import Settings
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.settings_file import dump_settings, load_settings, parse_settings

CONFIGS = Path(__file__).parents[2] / "configs"

SMALL: dict[str, Any] = {
    "model": {"config": {"model_type": "gpt2", "n_layer": 2}},
    "data": {"corpus": "somewhere", "sequence_length": 8},
    "training": {"global_batch_tokens": 64, "max_tokens": 640},
    "dispersion": {"pool_sequences": 2, "tokens_per_sequence": 4},
}


def changed(change: dict[str, Any]) -> dict[str, Any]:
    """SMALL with `section.key` (or `section`) set."""
    tree = copy.deepcopy(SMALL)
    for key, value in change.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def settings_with(**change: Any) -> Settings:
    return parse_settings(changed({key.replace("__", "."): value for key, value in change.items()}), source="test")


def write(path: Path, tree: Any) -> Path:
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return path


class TestDefaults:
    def test_small_tree_is_complete(self) -> None:
        settings = settings_with()
        assert settings.dispersion is not None
        assert (settings.dispersion.coefficient, settings.dispersion.temperature) == (0.1, 1.0)
        assert settings.zero.stage == 2
        assert settings.condensation is None
        assert settings.run_folder == Path("runs/run")
        assert settings.num_steps == 10
        assert settings.global_batch_sequences == 8

    def test_a_started_step_counts(self) -> None:
        assert settings_with(training__max_tokens=641).num_steps == 11

    def test_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            settings_with().run.seed = 3  # type: ignore[misc]

    def test_run_folder_can_be_named(self) -> None:
        assert settings_with(run__folder="elsewhere/x").run_folder == Path("elsewhere/x")


REFUSED: list[tuple[dict[str, Any], str]] = [
    # unknown keys, with the nearest known one
    ({"optimiser": {}}, r"optimiser: unknown key, with the value \{\}\. Did you mean optimizer\?"),
    ({"optimizer.lerning_rate": 1.0}, r"optimizer\.lerning_rate: unknown key.* Did you mean learning_rate\?"),
    ({"dispersion.token_per_sequence": 4}, r"Did you mean tokens_per_sequence\?"),
    (
        {"validation.every_step": 3},
        r"validation\.every_step: unknown key, with the value 3\. Did you mean every_steps\?",
    ),
    (
        {"run.qqqqqq": 3},
        r"run\.qqqqqq: unknown key, with the value 3\. Known here: name, folder, seed, max_time, doctor\.",
    ),
    # missing
    ({"data": {"corpus": "x"}}, r"data\.sequence_length: is missing"),
    ({"training": {}}, r"training\.global_batch_tokens: is missing"),
    # wrong types and values
    ({"run.seed": "seven"}, r"run\.seed: 'seven' is not allowed.*valid integer"),
    ({"run.seed": 1.5}, r"run\.seed: 1\.5 is not allowed"),
    ({"run.seed": -1}, r"run\.seed: -1 is not allowed"),
    ({"run.name": "a/b"}, r"run\.name: 'a/b' is not allowed"),
    ({"run.name": "../b"}, r"run\.name: '\.\./b' is not allowed"),
    ({"run": None}, r"run: None is not allowed"),
    ({"dispersion": 3}, r"dispersion: 3 is not allowed"),
    ({"dispersion.layers": "some"}, r"dispersion\.layers: 'some' is not allowed.*'early_half'"),
    ({"dispersion.layers": ["a"]}, r"dispersion\.layers\.0: 'a' is not allowed"),
    ({"dispersion.temperature": 0}, r"dispersion\.temperature: 0 is not allowed.*greater than 0"),
    ({"dispersion.cosine_clamp": 1.0}, r"dispersion\.cosine_clamp: 1\.0 is not allowed.*less than 1"),
    ({"dispersion.coefficient": -0.1}, r"dispersion\.coefficient: -0\.1 is not allowed"),
    ({"dispersion.coefficient": math.nan}, r"dispersion\.coefficient: nan is not allowed"),
    ({"optimizer.learning_rate": 0}, r"optimizer\.learning_rate: 0 is not allowed"),
    ({"optimizer.betas": [0.9, 1.0]}, r"optimizer\.betas\.1: 1\.0 is not allowed"),
    ({"zero.stage": 4}, r"zero\.stage: 4 is not allowed.*0, 1, 2 or 3"),
    ({"model.precision": "fp16"}, r"model\.precision: 'fp16' is not allowed.*'float32' or 'bf16'"),
    ({"training.micro_batch": 0}, r"training\.micro_batch: 0 is not allowed"),
    ({"training.micro_batch": "most"}, r"training\.micro_batch: 'most' is not allowed.*'auto'"),
    # what does not fit together
    ({"model.pretrained": "gpt2"}, r"model\.config and pretrained: exactly one"),
    ({"model": {}}, r"model\.config and pretrained: exactly one"),
    ({"model.config": {"n_layer": 2}}, r"model\.config: model_type is missing"),
    ({"dispersion.pool_sequences": 1, "dispersion.tokens_per_sequence": 1}, r"1 embedding has no pair"),
    ({"dispersion.tokens_per_sequence": 9}, r"dispersion\.tokens_per_sequence: 9 of a sequence of 8 tokens.* Use 8 or"),
    ({"data": {"sequence_length": 8}}, r"data\.corpus and corpora: exactly one of them is needed"),
    ({"data.corpora": [{"path": "x"}]}, r"data\.corpus and corpora: exactly one of them is needed"),
    ({"data": {"sequence_length": 8, "corpora": []}}, r"data\.corpora: is empty"),
    (
        {"data": {"sequence_length": 8, "corpora": [{"path": "x", "proportion": 1, "repeat": 2}]}},
        r"data\.corpora\.0\.proportion and repeat: each says how much of x is read",
    ),
    (
        {"data": {"sequence_length": 8, "corpora": [{"path": "x", "proportion": 1}, {"path": "y"}]}},
        r"data\.corpora: some have a proportion",
    ),
    ({"data": {"sequence_length": 8, "corpora": [{"path": "x"}] * 2}}, r"data\.corpora: x stands there twice"),
    ({"data": {"sequence_length": 8, "corpora": [{"path": "x", "proportion": 0}]}}, r"proportion: 0 is not allowed"),
    ({"data.shuffle": "py1e"}, r"data\.shuffle: 'py1e' is not allowed.*'windows' or 'none'"),
    ({"training.global_batch_tokens": 60}, r"global_batch_tokens: 60 is no multiple .* Use 56 or 64\."),
    ({"training.global_batch_tokens": 5}, r"global_batch_tokens: 5 is no multiple .* Use 8 or 8\."),
    ({"training.max_tokens": 63}, r"training\.max_tokens: 63 is less than one step"),
    ({"schedule.kind": "warmup_stable_decay"}, r"schedule\.decay_tokens: 0 leaves"),
    ({"schedule.warmup_tokens": 641}, r"schedule: warm-up and decay take 641 tokens of training\.max_tokens 640"),
    (
        {"schedule": {"kind": "warmup_stable_decay", "warmup_tokens": 320, "decay_tokens": 321}},
        r"schedule: warm-up and decay take 641",
    ),
    ({"evaluation.every": 10}, r"evaluation\.every: 10 steps.* checkpoint\.every_steps is None"),
    (
        {"evaluation.every": 10, "checkpoint.every_steps": 4},
        r"evaluation\.every: 10 steps.* checkpoint\.every_steps is 4",
    ),
    ({"zero.overrides": {"train_batch_size": 4}}, r"zero\.overrides: train_batch_size is derived"),
    ({"zero.overrides": {"optimizer": {}, "bf16": {}}}, r"zero\.overrides: bf16, optimizer is derived"),
    ({"zero": {"stage": 0, "offload_optimizer": True}}, r"zero\.offload_optimizer: stage 0"),
    ({"zero": {"stage": 2, "offload_parameters": True}}, r"zero\.offload_parameters: stage 2"),
]


class TestRefused:
    @pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(change) for change, _ in REFUSED])
    def test_with_place_and_value(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            parse_settings(changed(change), source="some.yaml")
        assert all(line.startswith("some.yaml: ") for line in str(caught.value).splitlines())

    def test_all_faults_at_once(self) -> None:
        with pytest.raises(ValueError) as caught:
            parse_settings(changed({"run.seed": -1, "zero.stage": 7, "nothing": 1}), source="some.yaml")
        assert len(str(caught.value).splitlines()) == 3

    def test_what_is_allowed_beside_it(self) -> None:
        settings_with(evaluation__every=8, checkpoint__every_steps=4)
        settings_with(zero={"stage": 3, "offload_parameters": True, "overrides": {"zero_optimization": {"x": 1}}})
        settings_with(schedule={"kind": "warmup_stable_decay", "warmup_tokens": 320, "decay_tokens": 320})
        settings_with(dispersion=None, training__max_tokens=64)
        settings_with(dispersion__tokens_per_sequence=8, dispersion__layers=[1, 2])


class TestFiles:
    def test_extends_merges_sections_key_by_key(self, tmp_path: Path) -> None:
        write(tmp_path / "base.yaml", SMALL | {"run": {"name": "base", "seed": 4}, "condensation": {"num_texts": 3}})
        child = {"extends": "base.yaml", "run": {"name": "child"}, "dispersion": None, "condensation": {}}
        settings = load_settings(write(tmp_path / "child.yaml", child))
        assert (settings.run.name, settings.run.seed) == ("child", 4)
        assert settings.dispersion is None
        assert settings.condensation is not None
        assert settings.condensation.num_texts == 3

    def test_a_child_replaces_free_mappings_whole(self, tmp_path: Path) -> None:
        write(tmp_path / "base.yaml", SMALL | {"zero": {"overrides": {"a": 1}}})
        child = {"extends": "base.yaml", "model": {"config": {"model_type": "qwen3"}}, "zero": {"overrides": {"b": 2}}}
        settings = load_settings(write(tmp_path / "child.yaml", child))
        assert settings.model.config == {"model_type": "qwen3"}
        assert settings.zero.overrides == {"b": 2}

    def test_a_child_can_turn_a_section_on(self, tmp_path: Path) -> None:
        write(tmp_path / "base.yaml", SMALL | {"dispersion": None})
        child = {"extends": "base.yaml", "dispersion": {"tokens_per_sequence": 2}}
        settings = load_settings(write(tmp_path / "child.yaml", child))
        assert settings.dispersion is not None
        assert settings.dispersion.tokens_per_sequence == 2

    def test_one_level_of_extends(self, tmp_path: Path) -> None:
        write(tmp_path / "a.yaml", SMALL)
        write(tmp_path / "b.yaml", {"extends": "a.yaml"})
        with pytest.raises(ValueError, match=r"b\.yaml: a file that is extended extends another. One level"):
            load_settings(write(tmp_path / "c.yaml", {"extends": "b.yaml"}))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("run: [", r"bad\.yaml: is no valid YAML"),
            ("- 1\n- 2\n", r"bad\.yaml: holds list\. A mapping"),
            ("", r"bad\.yaml: holds NoneType\. A mapping"),
            ("extends: absent.yaml", r"absent\.yaml: no such file"),
        ],
    )
    def test_files_that_are_no_settings(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_settings(write(tmp_path / "bad.yaml", text))

    def test_no_file_a_folder_and_no_text(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"absent\.yaml: no such file"):
            load_settings(tmp_path / "absent.yaml")
        with pytest.raises(ValueError, match="cannot be read"):
            load_settings(tmp_path)
        (tmp_path / "bytes.yaml").write_bytes(b"run: \xff\xfe")
        with pytest.raises(ValueError, match=r"bytes\.yaml: cannot be read"):
            load_settings(tmp_path / "bytes.yaml")

    def test_model_config_names_a_file_or_a_shipped_model(self, tmp_path: Path) -> None:
        write(tmp_path / "mine.yaml", {"model_type": "gpt2", "n_layer": 7})
        for name, layers in [("mine.yaml", 7), ("gpt2_tiny", 8)]:
            path = write(tmp_path / "run.yaml", changed({"model.config": name}))
            config = load_settings(path).model.config
            assert config is not None
            assert config["n_layer"] == layers
        with pytest.raises(ValueError, match=r"model\.config: no file 'gpt3'\. .*gpt2_small.*gpt2_tiny"):
            load_settings(write(tmp_path / "run.yaml", changed({"model.config": "gpt3"})))

    def test_model_config_of_a_parent_lies_beside_the_parent(self, tmp_path: Path) -> None:
        (tmp_path / "below").mkdir()
        write(tmp_path / "mine.yaml", {"model_type": "gpt2", "n_layer": 7})
        write(tmp_path / "base.yaml", changed({"model.config": "mine.yaml"}))
        settings = load_settings(write(tmp_path / "below" / "run.yaml", {"extends": "../base.yaml"}))
        assert settings.model.config == {"model_type": "gpt2", "n_layer": 7}

    def test_dump_is_read_back(self, tmp_path: Path) -> None:
        for settings in (
            settings_with(),
            settings_with(dispersion=None, validation=None, condensation={"num_texts": 2}, optimizer__betas=[0.8, 0.9]),
            settings_with(dispersion__layers=[2, 1], optimizer__learning_rate=1e-7, zero__overrides={"a": {"b": None}}),
        ):
            assert load_settings(write(tmp_path / "dump.yaml", dump_settings(settings))) == settings

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_shipped_file_loads(self, path: Path, tmp_path: Path) -> None:
        settings = load_settings(path)
        assert load_settings(write(tmp_path / "dump.yaml", dump_settings(settings))) == settings
        fitting = []
        for world_size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 640, 1024):
            try:
                fitting.append(BatchLayout.derive(settings, world_size))
            except ValueError:
                continue
        assert fitting, "it runs on some number of ranks"


class TestOverrides:
    def load(self, tmp_path: Path, *overrides: str) -> Settings:
        return load_settings(write(tmp_path / "small.yaml", SMALL), list(overrides))

    def test_values_are_yaml_and_floats_without_a_dot_too(self, tmp_path: Path) -> None:
        settings = self.load(
            tmp_path, "optimizer.learning_rate=1e-3", "run.seed=7", "run.name=other", "dispersion.layers=[1,2]",
            "model.activation_checkpointing=true", "checkpoint.every_steps=null", "run.folder=a=b",
        )  # fmt: skip
        assert settings.optimizer.learning_rate == 1e-3
        assert (settings.run.seed, settings.run.name, settings.run.folder) == (7, "other", "a=b")
        assert settings.dispersion is not None
        assert settings.dispersion.layers == [1, 2]
        assert settings.model.activation_checkpointing is True

    @pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+1e-3", "0.001"])
    def test_free_mappings_get_floats_too(self, tmp_path: Path, text: str) -> None:
        """No type of ours would turn the string that YAML 1.1 makes of 1e-3 into a number there."""
        config = self.load(tmp_path, f"model.config.initializer_range={text}").model.config
        assert config is not None
        assert config["initializer_range"] == 1e-3

    def test_sections_are_turned_off_and_on(self, tmp_path: Path) -> None:
        assert self.load(tmp_path, "dispersion=null").dispersion is None
        settings = self.load(
            tmp_path, "dispersion=null", "dispersion.tokens_per_sequence=3", "condensation.num_texts=5"
        )
        assert settings.dispersion is not None
        assert (settings.dispersion.tokens_per_sequence, settings.dispersion.coefficient) == (3, 0.1)
        assert settings.condensation is not None
        assert settings.condensation.num_texts == 5

    def test_the_last_one_wins_over_file_and_parent(self, tmp_path: Path) -> None:
        write(tmp_path / "base.yaml", SMALL | {"run": {"seed": 1}})
        child = write(tmp_path / "child.yaml", {"extends": "base.yaml", "run": {"seed": 2}})
        assert load_settings(child).run.seed == 2
        assert load_settings(child, ["run.seed=3", "run.seed=4"]).run.seed == 4

    def test_fields_of_model_config(self, tmp_path: Path) -> None:
        assert self.load(tmp_path, "model.config.n_layer=5").model.config == {"model_type": "gpt2", "n_layer": 5}

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("run.seed", r"'run\.seed': is no override\. section\.key=value is allowed"),
            ("=3", r"'=3': is no override"),
            ("run.sed=3", r"small\.yaml: run\.sed: unknown key, with the value 3\. Did you mean seed\?"),
            ("run.name.x=3", r"run\.name: \{'x': 3\} is not allowed"),
            ("model.config.n_layer.x=3", r"model\.config\.n_layer\.x: n_layer is 2, not a section"),
            ("run.seed=[", r"run\.seed: '\[' is not allowed"),
        ],
    )
    def test_refused(self, tmp_path: Path, override: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.load(tmp_path, override)


def legal_by_hand(sequences: int, ranks: int, micro_batch: int, pool: int) -> bool:
    """Deal sample by sample: no pool may cross a micro-step, and each rank of a pool must hold as many of it."""
    if sequences % (ranks * micro_batch) or sequences % pool:
        return False
    places = [
        (step, rank)
        for step in range(sequences // (ranks * micro_batch))
        for rank in range(ranks)
        for _ in range(micro_batch)
    ]
    for first in range(0, sequences, pool):
        members = places[first : first + pool]
        steps, holders = {step for step, _ in members}, {rank for _, rank in members}
        share = min(pool, micro_batch)
        if len(steps) > 1 or len(holders) * share != pool or min(holders) % len(holders):
            return False
    return True


class TestBatchLayout:
    def derive(
        self, sequences: int, ranks: int, pool: int | None, micro_batch: int | None, length: int = 8
    ) -> BatchLayout:
        section = None if pool is None else {"pool_sequences": pool, "tokens_per_sequence": 2}
        settings = settings_with(
            data__sequence_length=length,
            training={"global_batch_tokens": sequences * length, "max_tokens": 10**9, "micro_batch": micro_batch},
            dispersion=section,
        )
        return BatchLayout.derive(settings, ranks)

    @pytest.mark.parametrize(
        ("ranks", "micro_batch", "accumulation", "pool_ranks", "pools_per_rank"),
        [(1, 4, 2, 1, 1), (2, 4, 1, 1, 1), (2, 2, 2, 2, 1), (4, 2, 1, 2, 1), (4, 1, 2, 4, 1), (1, 8, 1, 1, 2)],
    )
    def test_the_layouts_of_one_batch(
        self, ranks: int, micro_batch: int, accumulation: int, pool_ranks: int, pools_per_rank: int
    ) -> None:
        expected = BatchLayout(ranks, micro_batch, accumulation, pool_ranks, pools_per_rank)
        assert self.derive(8, ranks, pool=4, micro_batch=micro_batch) == expected

    @given(
        accumulation=st.integers(1, 6),
        ranks=st.integers(1, 8),
        per_rank=st.integers(1, 12),
        pool=st.none() | st.integers(1, 48),
        data=st.data(),
    )
    def test_exactly_what_dealing_by_hand_allows(
        self, accumulation: int, ranks: int, per_rank: int, pool: int | None, data: st.DataObject
    ) -> None:
        sequences = accumulation * ranks * per_rank
        micro_batch = data.draw(st.none() | st.sampled_from([per_rank]) | st.integers(1, 12))
        legal = [n for n in range(1, sequences // ranks + 1) if legal_by_hand(sequences, ranks, n, pool or 1)]
        try:
            layout = self.derive(sequences, ranks, pool, micro_batch)
        except ValueError as error:
            assert micro_batch not in legal if micro_batch else not legal
            self.check_advice(str(error), sequences, ranks, pool, legal)
            return
        assert layout.micro_batch in legal
        assert layout.micro_batch == (micro_batch or max(legal))  # 8 tokens a sequence: nothing comes near the bound
        assert layout.world_size * layout.micro_batch * layout.accumulation == sequences
        assert layout.pool_ranks * layout.micro_batch == (pool or 1) * layout.pools_per_rank
        assert layout.pool_ranks == 1 or layout.pools_per_rank == 1

    def check_advice(self, message: str, sequences: int, ranks: int, pool: int | None, legal: list[int]) -> None:
        """Every value that an error names is one that works."""
        advice = re.search(r"Use (training\.micro_batch|pool_sequences) ([\d, ]+)\.", message)
        assert advice, message
        named = [int(number) for number in advice[2].split(", ")]
        if advice[1] == "training.micro_batch":
            assert named == legal
        else:
            assert not legal
            for other in named:
                self.derive(sequences, ranks, other, None)

    @given(sequences=st.integers(1, 40), ranks=st.integers(2, 12))
    def test_a_batch_that_does_not_divide_names_ones_that_do(self, sequences: int, ranks: int) -> None:
        assume(sequences % ranks)
        with pytest.raises(ValueError, match=r"^training\.global_batch_tokens: ") as caught:
            self.derive(sequences, ranks, 1, None)
        advice = re.search(r"Use ([\d or]+) tokens, or ([\d, ]+) ranks", str(caught.value))
        assert advice
        for tokens in advice[1].split(" or "):
            self.derive(int(tokens) // 8, ranks, 1, None)
        for other in advice[2].split(", "):
            self.derive(sequences, int(other), 1, None)

    def test_a_derived_micro_batch_is_bounded_in_tokens(self) -> None:
        assert self.derive(64, 1, None, None, length=1024).micro_batch == 16
        assert self.derive(64, 1, 32, None, length=1024).micro_batch == 32, (
            "the smallest legal one, where none is smaller"
        )
        assert self.derive(64, 4, 32, None, length=1024).micro_batch == 16
        assert self.derive(4, 1, None, None, length=65536).micro_batch == 1

    def test_errors_name_key_value_and_cure(self) -> None:
        with pytest.raises(
            ValueError, match=r"^dispersion\.pool_sequences: 3 fits no .* Use pool_sequences 1, 2, 4, 8\."
        ):
            self.derive(8, 2, pool=3, micro_batch=None)
        with pytest.raises(
            ValueError, match=r"^training\.micro_batch: a micro-batch of 3 .* Use training\.micro_batch 2, 4\."
        ):
            self.derive(8, 2, pool=4, micro_batch=3)
        with pytest.raises(
            ValueError, match=r"^dispersion\.pool_sequences: a micro-batch of 1 .* pools of 4 sequences on 2"
        ):
            self.derive(8, 2, pool=4, micro_batch=1)
        with pytest.raises(ValueError, match=r": 8 sequences cannot be divided among 3 ranks.* Use 48 or 72 tokens"):
            self.derive(8, 3, pool=1, micro_batch=None)


NAMES = sorted(
    {name for section in (SMALL, *SMALL.values()) for name in section} | {"run", "seed", "zero", "layers", "x"}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["all", "1e-3", "gpt2_tiny"])
)
KEYS = st.sampled_from(NAMES) | st.text(max_size=6) | st.integers(0, 3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
OPTIONAL = {
    "condensation": {}, "noisy_embeddings": {}, "active_forgetting": {}, "distillation": {"teacher": "x"},
    "profiling": {"first_step": 1, "steps": 1},
}  # fmt: skip
PATHS = [(section, key) for section, fields in settings_with(**OPTIONAL).model_dump().items() for key in fields]


def settings_or_value_error(tree: Any) -> Settings | None:
    try:
        settings = parse_settings(tree, source="tree")
    except ValueError as error:
        assert str(error).startswith("tree: ")
        return None
    for world_size in (1, 2, 3):
        try:
            BatchLayout.derive(settings, world_size)
        except ValueError:
            continue
    return settings


class TestNothingButValueErrors:
    @given(tree=st.dictionaries(KEYS, VALUES, max_size=6))
    def test_any_tree(self, tree: dict[Any, Any]) -> None:
        settings_or_value_error(tree)

    @given(changes=st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3))
    def test_a_good_tree_with_odd_values(self, changes: list[tuple[tuple[str, str], Any]]) -> None:
        tree = copy.deepcopy(SMALL)
        for (section, key), value in changes:
            node = tree.setdefault(section, {})
            node[key] = value
        settings = settings_or_value_error(tree)
        if settings is not None:
            assert parse_settings(yaml.safe_load(dump_settings(settings)), source="dump") == settings

    @given(
        path=st.sampled_from([".".join(path) for path in PATHS] + [section for section, _ in PATHS]),
        text=st.text(st.characters(codec="utf-8"), max_size=12),
    )
    def test_any_override(self, path: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        file = write(tmp_path_factory.getbasetemp() / "small.yaml", SMALL)
        try:
            load_settings(file, [f"{path}={text}"])
        except ValueError:
            pass

    @given(text=st.text(st.characters(codec="utf-8"), max_size=30) | VALUES.map(yaml.safe_dump))
    def test_any_file(self, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = write(tmp_path_factory.getbasetemp() / "any.yaml", text)
        try:
            load_settings(path)
        except ValueError:
            pass
