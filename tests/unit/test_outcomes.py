"""Runs put together as arms, their figures compared, and the tables of it, on run folders made by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dispersion_pretrain import comparison, report, tables
from dispersion_pretrain.arms import choose_reference, group
from dispersion_pretrain.outcomes import SuiteOutcome, suite_outcomes, training_lines
from dispersion_pretrain.report import Report, compile_report
from dispersion_pretrain.run_folder import load_runs
from report_runs import (
    DISPERSION,
    TASKS,
    answers,
    make_run,
    seeded,
    two_arms,
    write_accuracies,
    write_examples,
    write_results,
    write_scores,
)

BOTH = (("base", None), ("spread", DISPERSION))


def outcome(folders: list[Path]) -> tuple[Report, SuiteOutcome]:
    compiled = compile_report(folders)
    (suite,) = compiled.suites
    return compiled, suite


# ---- arms


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path: Path) -> None:
    folders = two_arms(tmp_path, 0.0, seeds=(10, 2), tasks=TASKS[:1])
    arms = group(load_runs(folders))
    assert [(arm.name, [run.name for run in arm.runs]) for arm in arms] == [
        ("baseline", ["base_s2", "base_s10"]),
        ("dispersion", ["spread_s2", "spread_s10"]),
    ]
    assert choose_reference(list(reversed(arms)), None).name == "baseline"
    assert choose_reference(arms[1:], None).name == "dispersion"  # none is without a method: the first
    assert choose_reference(arms, "dispersion") is arms[1]
    with pytest.raises(ValueError, match=r"^--reference: 'spread' is no arm .*'baseline', 'dispersion'"):
        choose_reference(arms, "spread")


def test_arms_with_the_same_methods_are_named_by_their_runs(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / f"{name}_seed{seed}", settings=seeded(name, seed, dispersion={"coefficient": value}))
        for name, value in (("weak_p16", 0.1), ("strong", 1.0))
        for seed in (0, 1)
    ]
    both = seeded("both", 0, dispersion=DISPERSION, noisy_embeddings={"alpha": 5.0})
    folders.append(make_run(tmp_path / "both", settings=both))
    names = [arm.name for arm in group(load_runs(folders))]
    assert names == ["weak_p16", "strong", "dispersion + noisy_embeddings"]


def test_a_second_run_of_a_seed_is_an_arm_of_its_own(tmp_path: Path) -> None:
    """Else the spread over seeds would be taken for smaller than it is."""
    folders = [make_run(tmp_path / f"{code}_s{s}", settings=seeded(code, s)) for code in ("old", "new") for s in (0, 1)]
    arms = group(load_runs(folders))
    assert [(arm.name, list(arm.by_seed)) for arm in arms] == [("old", [0, 1]), ("new", [0, 1])]


def test_a_run_without_settings_is_an_arm_by_itself_and_no_reference(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("lost", "lost_too", "known")]
    for folder in folders[:2]:
        (folder / "config.yaml").unlink()
    arms = group(load_runs(folders))
    assert [arm.name for arm in arms] == ["lost", "lost_too", "baseline"]
    assert choose_reference(arms, None).name == "baseline"


# ---- figures of training


def test_figures_of_training_are_judged_over_pairs_of_seeds(tmp_path: Path) -> None:
    compiled, _ = outcome(two_arms(tmp_path, 0.03))
    words = {line.metric: tables.verdict(line, line.cells[1]) for line in compiled.lines}
    # Seeds differ by 0.3 and 0.6, the arms by 0.15: only pairs can show it.
    assert words["validation loss"].endswith("significantly better")
    assert words["mean cosine, last half of the layers"].endswith("significantly lower")
    assert re.fullmatch(r"×\u00a01\.01\d \[.*\], significantly slower", words["cost, step time in s"])
    loss = compiled.lines[0].cells[1]
    assert (loss.num_pairs, loss.basis) == (3, "seeds")
    by_seed = [[run.last("validation/cross_entropy") or math.nan for run in arm.runs] for arm in compiled.arms]
    differences = np.subtract(by_seed[1], by_seed[0])
    assert loss.difference == comparison.over_seeds(differences)


def test_figures_of_one_seed_are_not_tested_and_the_page_says_so(tmp_path: Path) -> None:
    compiled, suite = outcome(two_arms(tmp_path, 0.03, seeds=(4,)))
    assert {
        tables.judgement(line, line.cells[1].difference) for line in compiled.lines if line.cells[1].difference
    } == {"not tested"}
    assert all(line.cells[1].basis == "examples" for line in suite.lines)
    assert any(
        sentence.startswith("Seeds were not varied in pairs for dispersion") for sentence in report.findings(compiled)
    )


def test_seeds_without_a_counterpart_are_left_out_of_pairs_and_named(tmp_path: Path) -> None:
    folders = two_arms(tmp_path, 0.03)
    for path in (folders[0] / "evaluations").rglob("*.json"):
        path.unlink()
    _, suite = outcome(folders)
    cell = suite.lines[0].cells[1]
    assert (cell.num_seeds, cell.num_pairs) == (3, 2)
    compiled, _ = outcome(folders[:4])  # seed 0 alone has both arms
    assert any(
        sentence.endswith("differences are of the pairs alone (seed 0).") for sentence in report.findings(compiled)
    )
    assert "dispersion against baseline: only seeds 1, 2 in pairs." in suite.notes
    # No seed in common at all: examples are still paired.
    _, suite = outcome([folders[1], folders[5]])
    cell = suite.lines[0].cells[1]
    assert (cell.num_pairs, cell.basis) == (0, "examples")
    assert any("no seed in common" in note for note in suite.notes)


# ---- benchmarks


def test_no_effect_is_not_significant_anywhere(tmp_path: Path) -> None:
    compiled, suite = outcome(two_arms(tmp_path, 0.0))
    assert suite.lines[-1].task == "average"
    for line in suite.lines:
        assert tables.verdict(line, line.cells[1]).endswith("not significant"), line.label
    (average,) = [sentence for sentence in report.findings(compiled) if sentence.startswith("paper: average · acc")]
    assert "not significant" in average and "significantly" not in average
    test = suite.tests[1]
    assert test is not None and tables.wilcoxon_words(test).endswith("7 tasks, not significant")


def test_an_effect_is_significant_and_ranked(tmp_path: Path) -> None:
    compiled, suite = outcome(two_arms(tmp_path, 0.08))
    average = suite.lines[-1]
    assert tables.verdict(average, average.cells[1]).endswith("significantly better")
    assert average.cells[1].basis == "examples and seeds" and average.cells[1].num_examples == sum(range(300, 307))
    assert (suite.ranks, suite.num_ranked) == ([2.0, 1.0], 7)
    test = suite.tests[1]
    assert test is not None and test.p == pytest.approx(2 / 2**7)
    sentences = " ".join(report.findings(compiled))
    assert "average rank over 7 tasks (1 is best): baseline 2.00, dispersion 1.00" in sentences
    assert "dispersion p = 0.016, 7 tasks, significant." in sentences
    difference = average.cells[1].difference
    assert difference is not None and average.cells[0].mean is not None and average.cells[1].mean is not None
    assert difference.estimate == pytest.approx(average.cells[1].mean - average.cells[0].mean)


def test_the_average_has_fixed_tasks_whose_examples_are_drawn(tmp_path: Path) -> None:
    """Its variance is that of independent tasks, though these have the same answers: their mean variance over four."""
    folders = [make_run(tmp_path / name, settings=seeded(name, 0, dispersion=section)) for name, section in BOTH]
    for arm, folder in enumerate(folders):
        same = answers(300, 0.4, 0.02, 0, arm)
        write_accuracies(folder, dict.fromkeys(TASKS[:4], same))
    for basis in ("examples", "standard errors"):
        _, suite = outcome(folders)
        *tasks, average = [line.cells[1] for line in suite.lines]
        assert average.basis == basis
        errors = [cell.difference.standard_error for cell in tasks if cell.difference]
        assert len(errors) == 4 and average.difference is not None
        assert average.difference.standard_error == pytest.approx(np.mean(errors) / 2, rel=0.1)
        if basis == "examples":
            next(folders[1].rglob("examples.json")).unlink()


def test_examples_are_paired_by_key_in_whatever_order(tmp_path: Path) -> None:
    folders = two_arms(tmp_path, 0.02, seeds=(0,), tasks=TASKS[:1])
    _, before = outcome(folders)
    path = next(folders[1].rglob("examples.json"))
    content = json.loads(path.read_text())
    entry = content["tasks"]["anli_r2"]["acc"]
    order = np.random.default_rng(0).permutation(len(entry["keys"]))
    entry["keys"], entry["values"] = ([entry[name][place] for place in order] for name in ("keys", "values"))
    path.write_text(json.dumps(content))
    _, after = outcome(folders)
    assert before.lines[0].cells[1].difference == after.lines[0].cells[1].difference
    # The same values under other keys are other examples.
    entry["keys"] = sorted(entry["keys"])
    path.write_text(json.dumps(content))
    _, wrong = outcome(folders)
    errors = [one.lines[0].cells[1].difference for one in (after, wrong)]
    assert errors[0] and errors[1] and errors[1].standard_error > 1.5 * errors[0].standard_error


def rewrite_identity(folder: Path, **changes: Any) -> None:
    """Say with what settings an evaluation was made; keys of `changes` with a task replace fields of its entry."""
    path = next(folder.rglob("results.json"))
    content = json.loads(path.read_text())
    entries = [{"task": task, "num_fewshot": 0, "limit": None, "held_out": None} for task in content["results"]]
    entries[0] |= changes.pop("entry", {})
    identity = {"suite": {"tasks": entries}, "limit": None, "corpus_sha256": "a", "lm_eval": "0.4", **changes}
    path.write_text(json.dumps(content | {"settings": {"identity": identity}}))


@pytest.mark.parametrize(
    ("mine", "theirs", "difference"),
    [
        ({}, {"entry": {"num_fewshot": 5}}, "definition of the task"),
        ({"max_length": 64}, {"max_length": 128}, "--max-length"),
        ({}, {"lm_eval": "0.5"}, "version of lm-eval"),
        (
            {"entry": {"held_out": {"documents": 64}}},
            {"entry": {"held_out": {"documents": 64}}, "corpus_sha256": "b"},
            "corpus",
        ),
    ],
)
def test_answers_to_unlike_questions_are_not_compared(
    mine: dict[str, Any], theirs: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    folders = two_arms(tmp_path, 0.2, seeds=(0,), tasks=TASKS[:2])
    rewrite_identity(folders[0], **mine)
    rewrite_identity(folders[1], **theirs)
    compiled, suite = outcome(folders)
    first = suite.lines[0].cells[1]
    assert first.mean is not None and first.difference is None
    says = f"{TASKS[0]}: dispersion and baseline were not asked the same (they differ in {difference}), so they are not"
    assert any(note.startswith(says) for note in suite.notes), suite.notes
    assert suite.lines[-1].task == "average" and suite.lines[-1].cells[1].difference is None
    assert suite.num_ranked < 2
    assert not any("significant" in one for one in report.findings(compiled) if one.startswith("paper: average"))


def test_of_unlike_limits_the_examples_in_common_are_compared(tmp_path: Path) -> None:
    folders = two_arms(tmp_path, 0.0, seeds=(0,), tasks=TASKS[:1])
    write_accuracies(folders[1], {"anli_r2": answers(300, 0.3, 0.0, 0, 1)[:200]})
    rewrite_identity(folders[0], limit=300, entry={"limit": 500, "metrics": ["acc"]})
    rewrite_identity(folders[1], limit=200, entry={"limit": 500, "metrics": ["acc", "acc_norm"]})
    _, suite = outcome(folders)
    assert suite.lines[0].cells[1].difference and suite.lines[0].cells[1].num_examples == 200
    assert "anli_r2: 200 of 300 examples are in all evaluations; only these count." in suite.notes


def test_a_corpus_is_no_difference_where_no_task_reads_it(tmp_path: Path) -> None:
    folders = two_arms(tmp_path, 0.2, seeds=(0,), tasks=TASKS[:2])
    rewrite_identity(folders[0], corpus_sha256="a")
    rewrite_identity(folders[1], corpus_sha256="b")
    _, suite = outcome(folders)
    assert all(line.cells[1].difference for line in suite.lines) and suite.num_ranked == 2


def test_examples_of_one_key_with_other_weights_are_not_compared(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, settings=seeded(name, 0, dispersion=section)) for name, section in BOTH]
    keys, values = [f"text/{number}" for number in range(60)], np.linspace(-200, -100, 60)
    for folder, scale in zip(folders, (1.0, 1.5), strict=True):
        weights = 50.0 * scale * np.ones(60)
        perplexity = float(np.exp(-values.sum() / weights.sum()))
        written = write_results(folder, "paper", 40, {"text": {"byte_perplexity": perplexity, "samples": 60}})
        entry = {"keys": keys, "values": values.tolist(), "weights": weights.tolist()}
        write_examples(written, {"text": {"byte_perplexity": entry}})
    _, suite = outcome(folders)
    assert suite.lines[0].cells[1].difference is None
    assert any("they differ in weights of examples" in note for note in suite.notes)


def test_examples_that_not_all_have_are_left_out_and_counted(tmp_path: Path) -> None:
    folders = two_arms(tmp_path, 0.0, seeds=(0,), tasks=TASKS[:1])
    write_accuracies(folders[1], {"anli_r2": answers(300, 0.3, 0.0, 0, 1)[:200]})
    _, suite = outcome(folders)
    assert suite.lines[0].cells[1].num_examples == 200
    assert "anli_r2: 200 of 300 examples are in all evaluations; only these count." in suite.notes


def test_without_examples_standard_errors_do_and_it_is_said(tmp_path: Path) -> None:
    folders = two_arms(tmp_path, 0.0, seeds=(0,), tasks=TASKS[:2])
    _, paired = outcome(folders)
    next(folders[1].rglob("examples.json")).unlink()
    _, unpaired = outcome(folders)
    first, second = (suite.lines[0].cells[1].difference for suite in (paired, unpaired))
    assert first and second and second.estimate == pytest.approx(first.estimate)
    assert second.standard_error > 1.5 * first.standard_error
    assert unpaired.lines[-1].cells[1].basis == "standard errors"
    assert any("standard errors, as if arms had answered different examples" in note for note in unpaired.notes)
    assert not any("standard errors" in note for note in paired.notes)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "no examples of format version 1"),
        ('{"format_version": 2, "tasks": {}}', "no examples of format version 1"),
        ({"keys": ["a", "a"], "values": [1, 0], "weights": None}, "do not belong together"),
        ({"keys": ["a"], "values": [1, 0], "weights": None}, "do not belong together"),
        ({"keys": ["a", "b"], "values": [1, float("nan")], "weights": None}, "not finite"),
        ({"keys": ["a", "b"], "values": [1, 2], "weights": [1, -1]}, "below 0"),
        ({"values": [1]}, "no lists of keys"),
    ],
)
def test_damaged_examples_are_named_and_left_out(tmp_path: Path, content: Any, why: str) -> None:
    folder = make_run(tmp_path / "run")
    results = write_scores(folder, 20, 0.5)
    if isinstance(content, str):
        (results / "examples.json").write_text(content)
    else:
        write_examples(results, {"task_a": {"acc": content}})
    (run,) = load_runs([folder])
    assert run.examples == {"offline": {}}
    assert any("offline/step-00000020/examples.json is left out" in words and why in words for words in run.missing)


def test_examples_that_do_not_make_the_score_are_not_trusted(tmp_path: Path) -> None:
    folders = two_arms(tmp_path, 0.0, seeds=(0,), tasks=TASKS[:1])
    path = next(folders[1].rglob("examples.json"))
    content = json.loads(path.read_text())
    content["tasks"]["anli_r2"]["acc"]["values"][:50] = [1.0] * 50
    path.write_text(json.dumps(content))
    _, suite = outcome(folders)
    assert suite.lines[0].cells[1].basis == "standard errors"
    assert any(note.startswith("anli_r2 of spread_s0: its examples make acc") for note in suite.notes)


def test_perplexities_are_lower_when_better_and_suites_are_apart(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = generator.integers(50, 300, size=40).astype(float)
    loss = generator.normal(3.0, 0.3, size=40)
    folders = two_arms(tmp_path, 0.0, seeds=(0,), tasks=TASKS[:1])
    for arm, folder in enumerate(folders):
        likelihoods = -words * (loss - 0.1 * arm)
        values = {
            "word_perplexity": math.exp(-likelihoods.sum() / words.sum()),
            "bits_per_byte": -likelihoods.sum() / (5 * words.sum()) / math.log(2),
        }
        task = {**values, **{f"{name}_stderr": None for name in values}, "samples": 40}
        where = write_results(folder, "offline", 40, {"held_out_text": task})
        entry = {"keys": list(map(str, range(40))), "values": likelihoods.tolist()}
        by_metric = {"word_perplexity": {**entry, "weights": words.tolist()}}
        by_metric["bits_per_byte"] = {**entry, "weights": (5 * words).tolist()}
        write_examples(where, {"held_out_text": by_metric})
    suites = compile_report(folders).suites
    assert [suite.suite for suite in suites] == ["offline", "paper"]
    assert [line.label for line in suites[0].lines] == [
        "held_out_text · word_perplexity (lower is better)",
        "held_out_text · bits_per_byte (lower is better)",
    ]
    for line in suites[0].lines:
        assert tables.verdict(line, line.cells[1]).endswith("significantly better")
    assert suites[0].ranks == [2.0, 1.0]
    assert suites[0].tests[1] == (1, None)
    perplexity = suites[0].lines[0].cells
    assert perplexity[0].mean and perplexity[1].mean == pytest.approx(perplexity[0].mean * math.exp(-0.1))


def test_scores_at_unequal_steps_are_warned_of(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, settings=seeded(name, 0, dispersion=section)) for name, section in BOTH]
    for folder, step in zip(folders, (20, 40), strict=True):
        write_scores(folder, step, 0.5)
    _, suite = outcome(folders)
    assert "The runs were evaluated at unequal numbers of tokens." in suite.notes


# ---- tables


def test_csv_has_numbers_and_latex_has_words(tmp_path: Path) -> None:
    compiled, _ = outcome(two_arms(tmp_path, 0.08, seeds=(0,)))
    (table,) = report.benchmark_tables(compiled)
    records = list(csv.DictReader(io.StringIO(table.csv())))
    (average,) = [one for one in records if (one["task"], one["arm"]) == ("average", "dispersion")]
    assert float(average["low_95"]) < float(average["estimate"]) < float(average["high_95"])
    assert float(average["p"]) < 0.05 and average["verdict"] == "significantly better"
    assert [one["mean"] for one in records if one["metric"].startswith("average rank")] == ["2.0", "1.0"]
    latex = table.latex()
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {3}
    assert latex.count(r"\toprule") == latex.count(r"\midrule") == latex.count(r"\bottomrule") == 1
    assert r"average $\cdot$ acc" in latex and "significantly better" in latex and r"anli\_\allowbreak{}r2" in latex


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex, booktabs and tabularx")
def test_latex_typesets_them_no_wider_than_the_text(tmp_path: Path) -> None:
    compiled, _ = outcome(two_arms(tmp_path / "runs", 0.08, seeds=(0, 1)))
    (table,) = report.benchmark_tables(compiled)
    text = table._replace(rows=[*table.rows, tables.Row("ρ ± a_b/c", ["50 % & # {x} ~ ^ \\ [−1, 2] · 3", "–"])]).latex()
    head = r"\documentclass{article}\usepackage[utf8]{inputenc}\usepackage{booktabs,tabularx}\begin{document}\noindent"
    (tmp_path / "table.tex").write_text(f"{head}\n{text}\\end{{document}}", encoding="utf-8")
    done = subprocess.run(["pdflatex", "-halt-on-error", "table.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout and "Missing character" not in done.stdout


def test_text_is_escaped_for_latex_and_spreadsheets() -> None:
    table = tables.Table("t", ["a_b", "50 %"], [tables.Row("=HYPERLINK(1)", ["-1e-3", "x\\y {#} ~ ^ 1 − 2 → ρ & $"])])
    (row,) = [line for line in table.latex().splitlines() if "HYPERLINK" in line]
    assert row == (
        r"=HYPERLINK(1) & -1e-3 & x\textbackslash{}y \{\#\} \textasciitilde{} \textasciicircum{} 1 $-$ 2 "
        r"$\rightarrow$ $\rho$ \& \$ \\"
    )
    assert list(csv.reader(io.StringIO(table.csv())))[1][:2] == ["'=HYPERLINK(1)", "-1e-3"]


def test_numbers_show_what_their_errors_allow() -> None:
    assert tables.signed(-0.00004, 3) == "0.000" and tables.signed(-1.25, 1) == "−1.2"
    assert tables.number(-12345.678, 1) == "−12,345.7" and tables.number(None) == tables.number(math.nan) == "–"
    assert (tables.p_value(0.03125), tables.p_value(1e-9)) == ("p = 0.031", "p < 0.001")


def test_lines_of_arms_are_pure_functions_of_the_runs(tmp_path: Path) -> None:
    arms = group(load_runs(two_arms(tmp_path, 0.02)))
    assert training_lines(arms, arms[0]) == training_lines(arms, arms[0])
    assert suite_outcomes(arms, arms[0]) == suite_outcomes(arms, arms[0])
