"""dispersion_pretrain.report on run folders made by hand: what the page says, what it survives, that it stands
alone.
"""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from dispersion_pretrain import figures, report, run_folder
from dispersion_pretrain.arms import group
from dispersion_pretrain.tables import Row
from report_runs import NASTY, make_run, position, seeded, write_scores
from small_run import launch_script

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class _Page(html.parser.HTMLParser):
    """Text, attributes and balance of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(attrs)

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def render(*folders: Path) -> tuple[str, _Page]:
    compiled = report.compile_report(folders)
    page = report.render(compiled, figures.draw_all(compiled.runs, compiled.arms))
    return page, _Page(page)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    baseline = make_run(tmp_path / "baseline")
    settings = {"run": {"name": "spread", "seed": 3}, "dispersion": {"coefficient": 0.1, "layers": "all"}}
    spread = make_run(
        tmp_path / "spread", settings=settings, validation=(9.1, 7.2), cosines=(0.2, 0.3), step_time_s=0.51
    )
    return baseline, spread


def test_findings_are_the_runs_own_numbers(pair: tuple[Path, Path]) -> None:
    sentences = report.findings(report.compile_report(pair))
    assert sentences == [
        "2 runs, baseline and spread, which differ in dispersion.",
        "Mean cosine of the last half of the layers, before → after: baseline 0.20 → 0.60, dispersion 0.20 → 0.30.",
        "Validation loss (lower is better): baseline 7.100; dispersion 7.200 (+0.100, not tested).",
        "Mean cosine, last half of the layers: baseline 0.6000; dispersion 0.3000 (−0.3000, not tested).",
        "Cost, step time in s: baseline 0.5000; dispersion 0.5100 (×\u00a01.020, not tested).",
        "Seeds were not varied in pairs for dispersion: figures of training are not tested, intervals of benchmarks "
        "are over examples only, and how far another seed would move a figure is not known.",
    ]


def test_findings_warn_of_runs_of_unequal_length(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "long"), make_run(tmp_path / "short", losses=(9.0, 8.0), validation=(9.1,))]
    sentences = report.findings(report.compile_report(runs))
    assert sentences[0] == "2 runs, long and short, set up alike."  # alike in their seed, too: two arms
    assert (
        "The runs have not seen the same number of tokens (long 30k, short 20k): compare at equal tokens." in sentences
    )


def test_findings_of_many_arms_name_the_extremes(tmp_path: Path) -> None:
    folders = []
    for place in range(6):
        settings = seeded(f"rate{place}", 3, dispersion={"coefficient": place})
        cosine = 0.3 + 0.1 * ((place * 3) % 5)
        folders.append(make_run(tmp_path / f"rate{place}", settings=settings, cosines=(0.2, cosine)))
    sentences = report.findings(report.compile_report(folders))
    assert "before → after: from rate0 0.20 → 0.30 to rate3 0.20 → 0.70." in sentences[1]
    assert sentences[2].endswith(": rate0 7.100; not tested: rate1, rate2, rate3, rate4 and rate5.")


def test_a_row_for_each_run(pair: tuple[Path, Path]) -> None:
    table = report.runs_table(run_folder.load_runs(pair))
    assert table.header == ["run", *report.HEADINGS]
    cells = {row.key: dict(zip(report.HEADINGS, row.cells, strict=True)) for row in table.rows}
    assert cells["baseline"] == {
        "tokens": "30k",
        "train loss": "7.000",
        "validation loss": "7.100",
        "perplexity": "1,212.0",
        "cosine, last half": "0.200 → 0.600",
        "Spearman ρ": "1.00",
        "tokens/s": "2k",
        "step time": "500 ms",
    }


def test_training_loss_is_the_mean_of_the_last_twentieth(tmp_path: Path) -> None:
    (run,) = run_folder.load_runs([make_run(tmp_path / "run", losses=(9.0,) * 38 + (2.0, 4.0))])
    assert run.training_loss == 3.0


def test_settings_that_differ_come_first_and_off_is_said(pair: tuple[Path, Path]) -> None:
    runs = run_folder.load_runs(pair)
    differing, same = report.compare_settings(runs)
    assert differing == [Row("dispersion.coefficient", ["off", "0.1"]), Row("dispersion.layers", ["off", "all"])]
    assert same == [Row("run.seed", ["3", "3"])]  # run.name is no setting
    page, _ = render(*pair)
    assert page.index("dispersion.coefficient") < page.index("run.seed")
    assert page.count('<tr class="differs">') == 2


def test_a_setting_that_is_off_and_one_that_is_not_there_yet_are_alike(tmp_path: Path) -> None:
    now = {"run": {"name": "a", "seed": 0}, "dispersion": None, "profiling": None}
    earlier = {"run": {"name": "b", "seed": 1}, "dispersion": None}
    folders = [make_run(tmp_path / name, settings=tree) for name, tree in (("a", now), ("b", earlier))]
    differing, same = report.compare_settings(run_folder.load_runs(folders))
    assert [row.key for row in differing] == ["run.seed"]
    assert Row("profiling", ["null", "null"]) in same
    assert len(report.compile_report(folders).arms) == 1, "two seeds of one arm"


def test_the_last_record_of_a_step_counts_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", losses=(9.0, 8.0), validation=())
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"loss/cross_entropy": 6.5} | position(10)) + "\n")
        file.write(json.dumps({"loss/cross_entropy": float("nan"), "loss/total": None} | position(30)) + "\n")
        file.write('[1, 2]\n{"step": "x"}\n{"step": 40, "loss/cross_en')
    (run,) = run_folder.load_runs([folder])
    series = run.series("loss/cross_entropy")
    assert series.tokens.tolist() == [10_000, 20_000]
    assert series.values.tolist() == [6.5, 8.0]
    assert len(run.series("loss/total").values) == 0
    assert run.records[0]["tokens_per_s"] == 2000  # what the later record does not say stays


def test_the_page_stands_alone_and_is_well_formed(pair: tuple[Path, Path]) -> None:
    page, parsed = render(*pair)
    assert parsed.open == []
    assert parsed.tags.count("svg") == 4 + 2 + 2 + 1
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert [address for address in parsed.addresses if not address.startswith(("#", "data:image/png;base64,"))] == []
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)
    assert targets and {a or b for a, b in targets} <= set(parsed.ids)
    assert page.lstrip().startswith("<!DOCTYPE html>")


def test_colours_of_the_figures_follow_the_theme(pair: tuple[Path, Path]) -> None:
    page, _ = render(*pair)
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    for color in (figures.INK, figures.MUTED, figures.GRID, *figures.SERIES):
        assert color not in pictures
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page))
    light, dark = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    defined = set(re.findall(r"--([a-z0-9-]+):", light))
    assert used <= defined
    assert defined - {"font"} == set(re.findall(r"--([a-z0-9-]+):", dark))


def test_everything_is_escaped(tmp_path: Path) -> None:
    settings = {"run": {"name": NASTY}, "model": {"pretrained": "</script><img src=x onerror=alert(1)>" + NASTY}}
    folders = [make_run(tmp_path / NASTY, settings=settings), make_run(tmp_path / "_other")]
    write_scores(folders[0], 20, 0.5)
    (folders[0] / "evaluations" / "offline").rename(folders[0] / "evaluations" / NASTY)
    page, parsed = render(*folders)
    assert "script" not in parsed.tags and "img" not in parsed.tags and "b" not in parsed.tags
    assert parsed.open == []
    assert "<!--" not in page
    assert parsed.text.count(NASTY) >= 6  # title, heading, findings, summary, legends, figures, tables
    assert "</script><img src=x onerror=alert(1)>" in parsed.text


def test_missing_parts_are_said_and_do_not_fail(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("run: {name: bare}\n")
    headless = make_run(tmp_path / "headless", validation=(), cosines=(0.3,))
    (headless / "config.yaml").unlink()
    (headless / "condensation" / "step-00000040.npz").write_bytes(b"cut")
    (headless / "evaluations" / "offline" / "step-00000020").mkdir(parents=True)
    (headless / "evaluations" / "offline" / "step-00000020" / "failed.json").write_text("{}")
    page, parsed = render(bare, headless)
    missing = {run.name: run.missing for run in run_folder.load_runs([bare, headless])}
    assert missing["bare"] == [
        "no training records",
        "no validation",
        "no condensation measurement",
        "no evaluation results",
        "no record of its starts",
    ]
    assert missing["headless"] == [
        "config.yaml cannot be read (FileNotFoundError)",
        "step-00000040.npz is damaged and left out",
        "evaluation offline/step-00000020 failed",
        "no validation",
        "one condensation measurement only, so no before and after",
        "no evaluation results",
    ]
    for words in missing["bare"] + missing["headless"]:
        assert words in parsed.text
    assert "whose settings are not all known" in parsed.text
    assert "Validation loss: " not in parsed.text and "validation_loss" not in page
    # of headless: training, last half, depth, heatmap, layers, speed
    assert parsed.tags.count("svg") == 6
    render(bare)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for wrong in (tmp_path / "absent", tmp_path, run / "condensation"):
        with pytest.raises(ValueError, match=f"^{re.escape(str(wrong))}: is no run folder"):
            run_folder.load_runs([run, wrong])
    with pytest.raises(ValueError, match="none are given"):
        run_folder.load_runs([])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / parent / "demo") for parent in ("a", "b")]
    runs = run_folder.load_runs([*folders, folders[0]])
    assert [run.name for run in runs] == ["a/demo", "b/demo"]


def test_pictures_of_runs_with_alike_names_have_names_of_their_own(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("x.y", "x-y")]
    runs = run_folder.load_runs(folders)
    slugs = [drawing.slug for drawing in figures.draw_all(runs, group(runs)).drawings]
    assert len(slugs) == len(set(slugs))


def test_benchmarks_show_the_last_step_with_errors_and_gaps(pair: tuple[Path, Path]) -> None:
    write_scores(pair[0], 10, 0.25)
    write_scores(pair[0], 20, 0.5, averages={"acc": 0.5}, errors={"task_b": "no data"})
    compiled = report.compile_report(pair)
    (table,) = report.benchmark_tables(compiled)
    assert table.header == ["offline", "baseline", "dispersion"]
    assert table.rows == [
        Row("task_a · acc", ["0.500", "–"], ["± 0.010", ""]),
        Row("average · acc", ["0.500", "–"], ["± 0.010", ""]),
        Row("Wilcoxon signed-rank test over tasks, acc", ["–", "too few tasks (0 with a difference, 6 are needed)"]),
        Row("at step", ["20", "–"]),
    ]
    assert "benchmark failed: task_b" in compiled.runs[0].missing


def test_long_curves_keep_their_spikes_and_stay_small() -> None:
    values = np.sin(np.arange(100_000.0))
    values[54_321], values[7] = 50.0, -50.0
    tokens, thinned = figures._thinned(np.arange(100_000.0), values)
    assert len(thinned) <= figures._POINTS
    assert thinned.max() == 50 and thinned.min() == -50
    assert (np.diff(tokens) > 0).all()


def test_moving_mean_does_not_bend_at_the_ends(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    (run,) = run_folder.load_runs([make_run(tmp_path / "run", losses=(5.0,) * 200)])
    axes = Figure().subplots()
    figures._draw_noisy(axes, run, 0, "loss/cross_entropy")
    raw, mean = axes.lines
    np.testing.assert_allclose(np.asarray(mean.get_ydata(), dtype=float), 5.0)
    assert len(np.asarray(raw.get_ydata())) == 200


def test_the_command_writes_page_figures_and_tables(pair: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "report.py")]
    folders = ["--figures", str(tmp_path / "figures"), "--tables", str(tmp_path / "tables")]
    arguments = [*map(str, pair), "--out", str(tmp_path / "new" / "page.html"), "--reference", "dispersion", *folders]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command + arguments, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "new" / "page.html"
    assert done.stdout.strip() == str(page)
    assert "which differ in dispersion" in page.read_text(encoding="utf-8")
    assert "dispersion (reference)" in page.read_text(encoding="utf-8")
    pictures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert {"training_loss", "heatmap-baseline", "layers-spread"} <= pictures
    assert {path.stem for path in (tmp_path / "figures").glob("*.svg")} == pictures
    for name in pictures:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        drawn = (tmp_path / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        xml.etree.ElementTree.fromstring(drawn)
        assert "var(--" not in drawn and "<text" not in drawn  # colours and letters of its own
        assert not re.search(r'(href|src)="(?!#|data:)', drawn)
    assert figures.SERIES[1] in (tmp_path / "figures" / "training_loss.svg").read_text(encoding="utf-8")
    files = {f"{name}.{end}" for name in ("arms", "runs", "settings", "environment") for end in ("csv", "tex")}
    assert {path.name for path in (tmp_path / "tables").iterdir()} == files
    wrong = {str(tmp_path): f"{tmp_path}: is no run folder", str(pair[0]): "--reference: 'dispersion' is no arm"}
    for folder, start in wrong.items():
        arguments = [folder, "--out", str(tmp_path / "none.html"), "--reference", "dispersion"]
        done = subprocess.run(command + arguments, capture_output=True, text=True, env=environment, timeout=120)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(start) and done.stderr.count("\n") == 1
        assert not (tmp_path / "none.html").exists()


def test_a_folder_in_place_of_a_file_is_named_and_the_reverse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file, script = make_run(tmp_path / "run"), tmp_path / "file", launch_script("report")
    file.write_text("")
    assert script.main([str(run), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"--out: {tmp_path} is a folder. The name of a file is needed.")
    for option in ("--figures", "--tables"):
        assert script.main([str(run), "--out", str(tmp_path / "page.html"), option, str(file)]) == 1
        assert capsys.readouterr().err.startswith(f"{option}: {file} is a file. The name of a folder is needed.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
