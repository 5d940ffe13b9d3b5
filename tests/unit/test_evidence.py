"""tests/evidence: every arm is a valid run that differs from its reference in what its question is about."""

from __future__ import annotations

import pytest

from dispersion_pretrain.settings_file import load_settings
from evidence import experiments
from evidence.experiments import Question

# Question -> sections in which an arm may differ from the reference.
ABOUT = {"width": {"model"}, "scratch": {"dispersion"}, "smollm2": {"dispersion"}, "distillation": {"distillation"}}
TEACHERS = [arm.teacher for arm in experiments.QUESTIONS[-1].arms if arm.teacher]


@pytest.mark.parametrize("question", experiments.QUESTIONS, ids=lambda question: question.key)
def test_arms_differ_in_what_is_asked(question: Question) -> None:
    reference, *others = [arm for arm in question.arms if arm not in TEACHERS]
    settings = load_settings(reference.config, list(reference.settings)).model_dump()
    assert others
    for arm in others:
        mine = load_settings(arm.config, list(arm.settings)).model_dump()
        assert {section for section in mine if mine[section] != settings[section]} == ABOUT[question.key]
        assert (arm.seeds, arm.processes) == (reference.seeds, reference.processes)


def test_the_gathered_pools_span_both_processes() -> None:
    settings = load_settings(experiments.POOLED.config, list(experiments.POOLED.settings))
    assert settings.dispersion is not None
    assert settings.dispersion.pool_sequences == settings.global_batch_sequences
    assert experiments.POOLED.processes == 2


def test_one_teacher_is_dispersed_and_one_is_not() -> None:
    plain, dispersed = (load_settings(arm.config, list(arm.settings)).model_dump() for arm in TEACHERS)
    assert {section for section in plain if plain[section] != dispersed[section]} == {"dispersion"}
    assert plain["dispersion"] is None or not plain["dispersion"]["coefficient"]


def test_run_folders_are_distinct() -> None:
    arms = list(dict.fromkeys(arm for question in experiments.QUESTIONS for arm in question.arms))
    folders = [arm.run_folder(seed) for arm in arms for seed in arm.seeds]
    assert len(set(folders)) == len(folders) == 3 * len(arms) - 2 * len(TEACHERS)
