"""Settings files that nobody means: whatever stands in them, the answer is settings or a ValueError with its place."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispersion_pretrain.assembly import Plan
from dispersion_pretrain.config import Settings
from dispersion_pretrain.distributed import is_own_error
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.settings_file import dump_settings, load_settings
from small_run import write_corpus

SCHEMA = Settings.model_json_schema()
ODD_TEXT = st.text(max_size=12) | st.sampled_from(
    ["\0", "\ud800", "../../x", "https://u:p@h/x", "1e3", "0x" + "f" * 5000, "nan", "~", "2020-13-45", "é" * 300, "*a"]
)
NUMBERS = st.integers(-(10**30), 10**30) | st.integers(-3, 70) | st.floats(width=64) | st.just(-(2**63))
SCALARS = st.none() | st.booleans() | NUMBERS | ODD_TEXT | st.binary(max_size=4) | st.dates()
KEYS = ODD_TEXT | st.integers(-3, 3) | st.none() | st.booleans()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


def properties(schema: dict[str, Any]) -> dict[str, Any]:
    """The keys of a section; an optional section is one of two alternatives."""
    for option in (schema, *schema.get("anyOf", ())):
        if "$ref" in option:
            return properties(SCHEMA["$defs"][option["$ref"].rpartition("/")[2]])
        if "properties" in option:
            return dict(option["properties"])
    return {}


PATHS = [(section, key) for section, schema in SCHEMA["properties"].items() for key in properties(schema)]
# With other values a tiny model becomes one that no test can build.
SMALL = {
    "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 64}},
    "data": {"sequence_length": 32},
    "training": {"global_batch_tokens": 256, "max_tokens": 2560},
}


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tree that can be planned with, corpus and all."""
    tree: dict[str, Any] = copy.deepcopy(SMALL)
    tree["data"]["corpus"] = str(write_corpus(tmp_path_factory.mktemp("corpus")))
    return tree


def load(
    content: str | bytes, folder: Path, overrides: list[str] | None = None, changed: Collection[str] = ()
) -> Settings | None:
    """The settings, dealt to several ranks and planned for one; None where they are refused with a place and a cure.

    A refusal must name one of the keys `changed`, if there are any.
    """
    path = folder / "odd.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        found = load_settings(path, overrides)
        Settings.model_validate(yaml.safe_load(dump_settings(found)))
        for world_size in (2, 4):
            BatchLayout.derive(found, world_size)
        Plan.make(found, 1)
    except ValueError as error:
        assert not isinstance(error, UnicodeError)
        assert is_own_error(error), "launch/pretrain.py would show a traceback"
        assert ": " in str(error) and str(error).rstrip().endswith((".", "?")), str(error)
        assert len(str(error)) < 20_000
        if changed:
            assert any(re.search(rf"(?<![\w]){re.escape(key)}(?![\w])", str(error)) for key in changed), (
                f"{error} names none of {changed}"
            )
        return None
    return found


ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@ANY_SPEED
@given(changes=st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3))
def test_values_of_a_wrong_kind(
    changes: list[tuple[tuple[str, str], Any]], good: dict[str, Any], tmp_path: Path
) -> None:
    tree = copy.deepcopy(good)
    for (section, key), value in changes:
        below = tree.setdefault(section, {})
        below[key] = value
    load(yaml.dump(tree, allow_unicode=True), tmp_path, changed=[key for (_, key), _ in changes])


@ANY_SPEED
@given(fields=st.dictionaries(st.sampled_from(
    ["n_head", "n_embd", "n_positions", "activation_function", "resid_pdrop", "bos_token_id", "tie_word_embeddings",
     "initializer_range", "layer_norm_epsilon", "vocab_size", "model_type", "torch_dtype", "auto_map"]
), st.integers(-2, 40) | st.floats() | st.booleans() | st.none() | ODD_TEXT | st.lists(st.integers(0, 3), max_size=2),
    min_size=1, max_size=3))  # fmt: skip
def test_odd_fields_of_a_model(fields: dict[str, Any], good: dict[str, Any], tmp_path: Path) -> None:
    tree = copy.deepcopy(good)
    tree["model"]["config"] |= fields
    load(yaml.dump(tree, allow_unicode=True), tmp_path, changed=[*fields, "config"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 0}, "0 layers of width 8; at least 1 of each is needed"),
        ({"n_embd": 0}, "1 layers of width 0; at least 1 of each is needed"),
        ({"n_positions": 0}, "max_position_embeddings is 0. A whole number from 1 on is needed"),
        ({"layer_norm_epsilon": "x"}, r"layer_norm_epsilon is 'x'. A number is needed \(the default is 1e-05\)"),
    ],
)
def test_a_model_that_could_not_train_is_refused_before_it_is_built(
    fields: dict[str, Any], message: str, good: dict[str, Any], tmp_path: Path
) -> None:
    tree, path = copy.deepcopy(good), tmp_path / "odd.yaml"
    tree["model"]["config"] |= fields
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=message):
        Plan.make(load_settings(path), 1)


@ANY_SPEED
@given(key=st.sampled_from([".".join(path) for path in PATHS]) | ODD_TEXT, text=ODD_TEXT | VALUES.map(str))
def test_odd_overrides(key: str, text: str, good: dict[str, Any], tmp_path: Path) -> None:
    load(yaml.safe_dump(good), tmp_path, [f"{key}={text}"])


@ANY_SPEED
@given(
    content=st.binary(max_size=60)
    | st.lists(
        st.sampled_from([*"[]{}:,-#&*!|>%@`'\" \n", "\t", "a", "&a", "*a", "<<", "data", "? "]), max_size=30
    ).map("".join)
)
def test_odd_bytes(content: str | bytes, tmp_path: Path) -> None:
    load(content, tmp_path)


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "a key twice": ("run: {seed: 1}\nrun: {seed: 2}", r"run: stands a second time; once is allowed"),
    "a key twice below": ("run:\n  seed: 1\n  seed: 2", r"seed: stands a second time with the value '2'"),
    "a bomb": ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "\n".join(
        f"{one}: &{one} [{', '.join(['*' + before] * 10)}]" for before, one in zip("abcdefgh", "bcdefghi", strict=True)
    ), r"more than 100,000 values"),
    "a circle": ("run: &a {seed: *a}", r"more than 100,000 values"),
    "deep": ("[" * 5000, r"is no valid YAML \(nested too deeply\)|is no valid YAML"),
    "no UTF-8": (b"run: {name: \xff\xfe}", r"cannot be read"),
    "an object": ("run: !!python/object/apply:os.system ['true']", r"could not determine a constructor"),
    "a date that is none": ("run: {name: 2020-13-45}", r"is no valid YAML \(month must be in 1\.\.12"),
    "a huge number": ("training: {max_tokens: 0x" + "f" * 4000 + "}", r"max_tokens: a whole number of 16000 bits"),
    "half a character": ('run: {folder: "\\ud800"}', r"run\.folder: '\\ud800' has characters that no file can hold"),
    "a null": ('run: {folder: "a\\0b"}', r"run\.folder: 'a\\x00b' has characters that no file can hold"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_words(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    path = tmp_path / "odd.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_settings(path)
    assert str(caught.value).startswith(str(path))


def test_aliases_and_merges_that_are_meant_are_allowed(good: dict[str, Any], tmp_path: Path) -> None:
    text = (
        yaml.safe_dump(good) + "optimizer: &o {learning_rate: 0.1}\nschedule:\n  <<: {kind: constant}\n  kind: linear\n"
    )
    found = load(text, tmp_path)
    assert found is not None and found.schedule.kind == "linear"


# ---- secrets


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "corpus", "s3://AKIA123:SeCrEt/4@bucket/corpus"),
        ("data", "corpus", "https://user:SeCrEt@host/corpus"),
        ("data", "corpus", "https://host/corpus?X-Amz-Expires=9&X-Amz-Signature=SeCrEt"),
        ("model", "pretrained", "https://host/x?token=SeCrEt"),
        ("zero", "overrides", {"wandb": {"enabled": True, "api_key": "SeCrEt"}}),
        ("model", "config", {"model_type": "gpt2", "hub_token": "SeCrEt"}),
        ("run", "password", "SeCrEt"),
    ],
)
def test_secrets_are_refused_and_not_shown(
    section: str, key: str, value: Any, good: dict[str, Any], tmp_path: Path
) -> None:
    tree, path = copy.deepcopy(good), tmp_path / "secret.yaml"
    tree.setdefault(section, {})[key] = value
    path.write_text(yaml.safe_dump(tree))
    clean = tmp_path / "clean.yaml"
    clean.write_text(yaml.safe_dump(good))
    for arguments in ((path, None), (clean, [f"{section}.{key}={value}"])):
        with pytest.raises(ValueError, match=rf": {section}\.{key}.*(written into the run folder)") as caught:
            load_settings(*arguments)
        assert "SeCrEt" not in str(caught.value)


def test_names_with_key_or_token_in_them_are_no_secrets(good: dict[str, Any], tmp_path: Path) -> None:
    tree = copy.deepcopy(good)
    tree["model"]["config"] |= {"bos_token_id": 0, "eos_token_id": None}
    tree["data"] |= {"cache": "http://localhost:8333/bucket@2"}
    assert load(yaml.safe_dump(tree), tmp_path) is not None
