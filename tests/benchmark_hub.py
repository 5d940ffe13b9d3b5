"""Small data sets laid out as repositories of the hub, in the columns of those that the paper's benchmarks read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import yaml

_NUM_ROWS = 6


def _choices(number: int) -> dict[str, list[str]]:
    return {"text": [f"{word} {number}" for word in ("red", "green", "blue", "grey")], "label": list("ABCD")}


def _mmlu(number: int) -> dict[str, Any]:
    return {"question": f"What is {number}?", "choices": ["one", "two", "three", "four"], "answer": number % 4}


def _arc(number: int) -> dict[str, Any]:
    return {"question": f"Which colour is {number}?", "choices": _choices(number), "answerKey": "ABCD"[number % 4]}


def _openbookqa(number: int) -> dict[str, Any]:
    return {"question_stem": f"The colour {number} is", "choices": _choices(number), "answerKey": "ABCD"[number % 4]}


def _anli(number: int) -> dict[str, Any]:
    return {"premise": f"It is {number}.", "hypothesis": "It is odd.", "label": number % 3}


def _piqa(number: int) -> dict[str, Any]:
    return {"goal": f"to count to {number}", "sol1": "start at one", "sol2": "stop at one", "label": number % 2}


def _winogrande(number: int) -> dict[str, Any]:
    sentence = f"Ann saw Eve {number} times since _ was there."
    return {"sentence": sentence, "option1": "Ann", "option2": "Eve", "answer": str(number % 2 + 1)}


def _lambada(number: int) -> dict[str, Any]:
    return {"text": f"One and {number} make the next"}


def _truthfulqa(number: int) -> dict[str, Any]:
    targets = {"choices": [f"It is {number}.", "It is not.", "Who knows."], "labels": [1, 0, 0]}
    return {"question": f"Is it {number}?", "mc1_targets": targets, "mc2_targets": targets}


def _medmcqa(number: int) -> dict[str, Any]:
    options = {f"op{letter}": f"{letter} {number}" for letter in "abcd"}
    return {"question": f"How many is {number}?", **options, "cop": number % 4}


def _paloma(number: int) -> dict[str, Any]:
    return {"text": f"A page of the encyclopedia, its number {number}.\n"}


# Of each data set: configuration, its splits, what makes a row.
DATASETS: dict[str, list[tuple[str, list[str], Any]]] = {
    "cais/mmlu": [(subject, ["test", "dev"], _mmlu) for subject in ("anatomy", "astronomy", "marketing")],
    "allenai/ai2_arc": [(name, ["train", "validation", "test"], _arc) for name in ("ARC-Easy", "ARC-Challenge")],
    "allenai/openbookqa": [("main", ["train", "validation", "test"], _openbookqa)],
    "facebook/anli": [("default", ["train_r2", "dev_r2", "test_r2"], _anli)],
    "baber/piqa": [("default", ["train", "validation"], _piqa)],
    "allenai/winogrande": [("winogrande_xl", ["train", "validation"], _winogrande)],
    "EleutherAI/lambada_openai": [("default", ["test"], _lambada)],
    "truthfulqa/truthful_qa": [("multiple_choice", ["validation"], _truthfulqa)],
    "openlifescienceai/medmcqa": [("default", ["train", "validation"], _medmcqa)],
    "allenai/paloma": [("wikitext_103", ["val", "test"], _paloma)],
}


def write_hub(folder: Path, names: list[str] | None = None) -> Path:
    """Write copies of the repositories: a README.md that says which file is which split, and Parquet files."""
    for name in names or list(DATASETS):
        configs = []
        for config, splits, row in DATASETS[name]:
            files = []
            for split in splits:
                path = folder / name / config / f"{split}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                datasets.Dataset.from_list([row(number) for number in range(_NUM_ROWS)]).to_parquet(path)
                files.append({"split": split, "path": f"{config}/{split}.parquet"})
            configs.append({"config_name": config, "data_files": files})
        (folder / name / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return folder
