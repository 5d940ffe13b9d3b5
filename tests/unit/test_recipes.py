"""Recipes of corpora: those that are shipped, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest

import job_arguments
import recipes
from prep_errors import InputError

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_a_whole_command(path: Path) -> None:
    recipe = recipes.read_recipe(path)
    arguments = job_arguments.parse_arguments(["--recipe", str(path), "--out", "corpus"])
    for key, value in recipe.items():
        assert getattr(arguments, key) == ([value] if key == "seq_len" else value)
    assert path.read_text().startswith("# ")


def test_the_recipes_are_there() -> None:
    assert [path.stem for path in RECIPES] == ["c4", "fineweb_edu", "python_docs", "wikitext103"]


def test_a_recipe_may_say_what_the_command_line_may() -> None:
    """But for what is of this machine or of this moment."""
    options = {action.dest for action in job_arguments._parser()._actions}
    assert set(recipes._TYPES) == options - {"help", "recipe", "out", "processes", "work", "overwrite"}


def test_command_line_goes_before_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("source: python-docs\ntokenizer: train:300\nseq_len: [8, 16]\nvalidation_share: 0.1\n")
    arguments = job_arguments.parse_arguments(["--recipe", str(path), "--out", "x", "--tokenizer", "train:400"])
    assert (arguments.tokenizer, arguments.seq_len, arguments.validation_share) == ("train:400", [8, 16], 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sorce: x", "unknown option 'sorce'. Allowed are source, text_column, .* Did you mean source?"),
        ("seq-len: 8", "unknown option 'seq-len'.* Did you mean seq_len?"),
        ("out: x", "unknown option 'out'"),
        ("3: x", "unknown option '3'"),
        ("seq_len: long", "seq_len is 'long'. It must be an integer or a list of integers"),
        ("seq_len: [8, true]", "seq_len is \\[8, True\\]"),
        ("seq_len: []", "seq_len is \\[\\]"),
        ("minimum_characters: true", "minimum_characters is True. It must be an integer"),
        ("deduplicate: 1", "deduplicate is 1. It must be true or false"),
        ("validation_share: 5e-2", "validation_share is '5e-2'. It must be a number"),
        ("tokenizer: 300", "tokenizer is 300. It must be text"),
        ("source:", "source is None. It must be text"),
        ("validation_share: 0.1\nvalidation_source: x", "has validation_source and validation_share"),
        ("- source", "holds no options"),
        ("", "holds no options"),
        ("a: [", "is no YAML"),
        ("source: a\nsource: b", "option 'source' is there twice"),
    ],
)
def test_wrong_recipe_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        recipes.read_recipe(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_recipe_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"source: caf\xe9")
    for path, message in (
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "cannot"),
        (tmp_path / "r.yaml", "utf-8"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            recipes.read_recipe(path)
        assert str(caught.value).startswith(f"--recipe {path}: ")
