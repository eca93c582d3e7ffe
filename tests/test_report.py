"""Tables from runs written here, against the same numbers worked out slowly."""

import csv
import functools
import gzip
import itertools
import json
import re
import statistics
import warnings

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import wilcoxon

from monai_morse import InputError
from monai_morse.__main__ import main
from monai_morse.experiments.figures import curves_figure, differences_figure
from monai_morse.experiments.report import report
from monai_morse.experiments.runs import _settings, read_runs, save_runs, write_curve
from monai_morse.experiments.statistics import paired_difference, rows_of
from tools import price
from tools.experiments import read_experiments, write_page
from tools.overview import percent, read_lines

COLUMNS = ("dice", "jaccard", "hd95_mm", "asd_mm", "paper_dice", "paper_jaccard", "paper_hd95", "paper_asd")
CLASSES = ("liver", "spleen")


def write_run(folder, rng, gain=0.0, fold=0, seed=0, cases=6, status="done", blank=False, **settings):
    """A run; returns its values by (case, class)."""
    folder.mkdir(parents=True)
    settings = {"experts": "none", "renderer": "none", "alpha": 0.7, "fold": fold, "seed": seed, **settings}
    record = {"bundle": "toy", "cell": {}, "options": {}, "settings": settings, "status": status}
    (folder / "run.json").write_text(json.dumps(record))
    values = {}
    if status == "done":
        with open(folder / "metrics.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "class", *COLUMNS, "seconds"])
            for case, name in itertools.product(range(cases), CLASSES):
                figures = np.round(rng.uniform(0.5, 0.8, 8) + gain, 6).tolist()
                if blank and case == 0:
                    figures[2] = figures[3] = ""
                values[f"f{fold}c{case}", name] = dict(zip(COLUMNS, figures))
                writer.writerow([f"f{fold}c{case}", name, *figures, 1.0])
    return values


@pytest.fixture
def sweep(tmp_path):
    """Two folds and two seeds of the baseline and of MORSE."""
    rng = np.random.default_rng(0)
    values = {}
    for fold, seed in itertools.product((0, 1), (0, 1)):
        values["none", fold, seed] = write_run(tmp_path / f"b{fold}{seed}", rng, fold=fold, seed=seed)
        system = {"experts": "stochastic", "renderer": "anatomical"}
        values["morse", fold, seed] = write_run(tmp_path / f"m{fold}{seed}", rng, 0.1, fold=fold, seed=seed, **system)
    return tmp_path, values


def cells(text):
    """Rows of the first table by their method."""
    lines = [line.strip("| ").split(" | ") for line in text.split("\n\n")[1].splitlines()]
    return {row[0]: dict(zip(lines[0], row)) for row in lines[2:]}


@pytest.mark.parametrize("metric, names", [("paper", COLUMNS[4:]), ("monai", COLUMNS[:4])])
def test_means_and_deviations_are_over_runs_of_means_over_classes(metric, names, sweep):
    folder, values = sweep
    rows = cells(report(folder, metric=metric))
    assert list(rows) == ["Baseline", "+ MORSE"]
    for method, key in (("Baseline", "none"), ("+ MORSE", "morse")):
        for figure, name, scale in zip(("DSC ↑", "Jaccard ↑", "95HD ↓", "ASD ↓"), names, (100, 100, 1, 1)):
            runs = [
                statistics.mean(statistics.mean(v[name] * scale for (_, c), v in run.items() if c == k) for k in CLASSES)
                for (system, _, _), run in values.items()
                if system == key
            ]
            assert rows[method][figure] == f"{statistics.mean(runs):.2f} ± {statistics.stdev(runs):.2f}"
        livers = [v[names[0]] * 100 for k, run in values.items() if k[0] == key for (_, c), v in run.items() if c == "liver"]
        assert rows[method]["liver"] == f"{statistics.mean(livers):.2f}"
        assert (rows[method]["runs"], rows[method]["cases"]) == ("4", "24")


def test_the_difference_is_paired_by_fold_seed_and_case_and_tested_over_cases(sweep):
    folder, values = sweep
    deltas, by_run = [], {}
    for fold, case in itertools.product((0, 1), range(6)):
        seeds = []
        for seed in (0, 1):
            ours, base = (
                statistics.mean(values[key, fold, seed][f"f{fold}c{case}", k]["paper_dice"] * 100 for k in CLASSES)
                for key in ("morse", "none")
            )
            seeds.append(ours - base)
            by_run.setdefault((fold, seed), []).append(ours - base)
        deltas.append(statistics.mean(seeds))
    rows, _ = rows_of(read_runs(folder)[0])
    found = rows[1].difference(0)
    assert found.mean == pytest.approx(statistics.mean(deltas)) and found.cases == 12
    assert found.p == pytest.approx(wilcoxon(deltas).pvalue)
    rng = np.random.default_rng(7)  # another's draws
    means = sorted(np.mean([deltas[i] for i in rng.integers(0, 12, 12)]) for _ in range(10_000))
    assert (found.low, found.high) == pytest.approx((means[250], means[9750]), abs=0.2)
    assert found.low < found.mean < found.high
    assert found == rows[1].difference(0)  # a fixed seed
    assert rows[0].difference(0) is None and paired_difference(rows[1].runs, [], 0) is None
    of_runs = sorted(map(statistics.mean, by_run.values()))
    assert sorted(found.runs) == pytest.approx(of_runs) and len(of_runs) == 4
    text = cells(report(folder))["+ MORSE"]
    assert text["of single runs"] == f"{of_runs[0]:+.2f} to {of_runs[-1]:+.2f}"
    assert text["ΔDSC [95 % CI]"] == f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    assert text["p"] == f"{found.p:.2g}"


def test_equal_runs_differ_by_nothing(tmp_path):
    for name, experts in (("a", "none"), ("b", "dense")):
        write_run(tmp_path / name, np.random.default_rng(0), experts=experts)
    rows, _ = rows_of(read_runs(tmp_path)[0])
    d = rows[1].difference(0)
    assert (d.mean, d.low, d.high, d.p) == (0, 0, 0, 1)
    assert cells(report(tmp_path))["+ MoE"]["of single runs"] == "-"


def test_files_hold_the_tables_and_all_numbers(sweep, tmp_path, capsys):
    folder, _ = sweep
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    assert (out / "report.md").read_text() == capsys.readouterr().out
    latex = (out / "report.tex").read_text()
    rows = [line for line in latex.splitlines() if line.startswith(("Baseline", "+ MORSE"))]
    assert [r.count("&") for r in rows] == [11, 11, 4] and all(r.endswith(r"\\") and "±" not in r for r in rows)
    assert r"95 \% CI" in latex and latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 2
    with open(out / "report.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(r["method"], r["figure"]) for r in lines[:2]] == [("Baseline", "DSC"), ("Baseline", "Jaccard")]
    assert len(lines) == 8 and lines[4]["pairs"] == "12" and float(lines[4]["low"]) < float(lines[4]["difference"])
    assert float(lines[4]["lowest_run"]) < float(lines[4]["difference"]) < float(lines[4]["highest_run"])


def test_the_picture_has_every_difference_with_its_interval_and_those_of_single_runs(sweep):
    folder, _ = sweep
    write_run(folder / "iar", np.random.default_rng(2), 0.05, renderer="anatomical", fold=1, seed=0)
    rows, _ = rows_of(read_runs(folder)[0])
    figure = differences_figure({"toy": rows, "bare alone": rows[:1]}, "Baseline")
    shown = [row for row in reversed(rows) if row.name != "Baseline"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [row.name for row in shown]
    for axis, i in zip(figure.axes, (0, 2), strict=True):
        for y, row in enumerate(shown):
            d = row.difference(i)
            dots, mean = ([x for line in axis.lines if line.get_marker() == m for x in drawn(line, y)] for m in (".", "o"))
            assert sorted(dots) == sorted(d.runs) and mean == [d.mean]
            (interval,) = axis.containers[y].lines[2]
            assert interval.get_segments()[0].tolist() == pytest.approx(np.array([[d.low, y], [d.high, y]]))
    report(folder)
    assert (folder / "report.png").is_file()
    assert differences_figure({"bare alone": rows[:1]}, "Baseline") is None
    report(folder, against="SMoE")  # of which there is no run
    assert not (folder / "report.png").exists()


def drawn(line, y):
    return line.get_xdata().tolist() if set(line.get_ydata()) == {y} else []


@pytest.mark.parametrize("against", ["Baseline", "MORSE"])
def test_distances_are_compared_in_voxels_and_in_percent(against, sweep):
    folder, values = sweep
    ours, base = ("morse", "none") if against == "Baseline" else ("none", "morse")
    text = report(folder, against=against).split(f"distances, difference to {against}**\n\n")[1].split("\n\n")[0]
    header, _, row = (line.strip("| ").split(" | ") for line in text.splitlines())
    assert header == ["Method", "Δ95HD [95 % CI]", "p", "ΔASD [95 % CI]", "p"]
    assert row[0] == ("+ MORSE" if against == "Baseline" else "Baseline")
    for cell, name in ((row[1], "paper_hd95"), (row[3], "paper_asd")):
        means = {
            key: statistics.mean(v[name] for k, run in values.items() if k[0] == key for v in run.values())
            for key in (ours, base)
        }
        change = means[ours] - means[base]
        assert cell.startswith(f"{change:+.3f} [") and cell.endswith(f"], {100 * change / means[base]:+.0f} %")


def test_rows_are_compared_with_another_system_on_request(sweep):
    folder, _ = sweep
    rng = np.random.default_rng(2)
    write_run(folder / "iar", rng, 0.05, renderer="anatomical", fold=1, seed=0)
    write_run(folder / "morse0.3", rng, 0.2, experts="stochastic", renderer="anatomical", alpha=0.3, fold=1, seed=0)
    rows = {row.name: row for row in rows_of(read_runs(folder)[0], "IAR")[0]}
    assert set(rows) == {"Baseline", "+ IAR", "+ MORSE", "+ MORSE, alpha 0.3"}  # alpha is nothing to IAR
    assert all(row.baseline == rows["+ IAR"].runs for row in rows.values())
    assert rows["+ IAR"].difference(0) is None and rows["Baseline"].difference(0).cases == 6
    assert rows["Baseline"].difference(0).mean < 0 < rows["+ MORSE, alpha 0.3"].difference(0).mean
    assert "- there is no run of SMoE, to which" in report(folder, against="SMoE") and "there is no" not in report(folder)
    with pytest.raises(InputError, match="against must be one of .*'MORSE'.*'nnU-Net'"):
        report(folder, against="nnU-Net")


def test_rows_are_compared_with_one_row_on_request(sweep):
    folder, values = sweep
    long = write_run(folder / "long", np.random.default_rng(2), 0.05, fold=1, seed=0, max_epochs=200)
    rows = cells(report(folder, against="Baseline, max_epochs 200"))
    assert rows["Baseline, max_epochs 200"]["ΔDSC [95 % CI]"] == "-"
    for name, key in (("Baseline", "none"), ("+ MORSE", "morse")):  # the one fold and seed that they share
        change = statistics.mean(values[key, 1, 0][k]["paper_dice"] - long[k]["paper_dice"] for k in long)
        assert rows[name]["ΔDSC [95 % CI]"].startswith(f"{100 * change:+.2f} [")
    with pytest.raises(
        InputError, match="against must be one of .*'Baseline, max_epochs 200'.*, got 'Baseline, max_epochs 20'"
    ):
        report(folder, against="Baseline, max_epochs 20")


def test_rows_with_long_names_are_drawn(sweep):
    folder, _ = sweep
    settings = {f"network_def#head#setting_of_the_head_{i}": i for i in range(8)}
    write_run(folder / "long", np.random.default_rng(2), renderer="anatomical", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the layout's, that it did not find room for the axes
        report(folder)


def test_what_is_missing_is_said(sweep):
    folder, _ = sweep
    rng = np.random.default_rng(1)
    write_run(folder / "iar", rng, experts="none", renderer="anatomical", fold=1, seed=1)
    write_run(folder / "broken", rng, experts="dense", status="failed")
    write_run(folder / "deep" / "running", rng, experts="dense", seed=5, status="training")
    write_run(folder / "twice", rng, fold=1, seed=1)
    text = report(folder)
    rows = cells(text)
    assert (rows["+ IAR"]["runs"], rows["+ IAR"]["cases"]) == ("1 of 4", "6 of 24")
    assert "±" not in rows["+ IAR"]["DSC ↑"] and rows["+ IAR"]["p"] != "-"
    assert "- broken: failed" in text and "- deep/running: unfinished (training)" in text
    assert "- twice: left out, the same as b11" in text


def test_rows_have_the_papers_names_and_order_and_new_cells_their_words(tmp_path):
    rng = np.random.default_rng(0)
    for experts, renderer in itertools.product(
        ("stochastic", "none", "dense"), ("anatomical", "pointrend", "none", "implicit_pointrend")
    ):
        write_run(tmp_path / f"{experts}-{renderer}", rng, experts=experts, renderer=renderer)
    names = [row.name for row in rows_of(read_runs(tmp_path)[0])[0]]
    paper = ["Baseline", "+ PointRend", "+ Implicit PointRend", "+ MoE", "+ SMoE", "+ IAR", "+ IAR+MoE", "+ MORSE"]
    assert names[:8] == paper
    assert set(names[8:]) == {f"{e} + {r}" for e in ("dense", "stochastic") for r in ("pointrend", "implicit_pointrend")}


def test_options_that_vary_name_rows_and_make_tables_3_and_4(tmp_path):
    rng = np.random.default_rng(0)
    morse = {"experts": "stochastic", "renderer": "anatomical"}
    write_run(tmp_path / "b", rng, patch_size=[32, 32])
    for alpha, patch in itertools.product((0.5, 0.9), ([32, 32], [64, 64])):
        write_run(tmp_path / f"m{alpha}{patch[0]}", rng, alpha=alpha, patch_size=patch, **morse)
    write_run(tmp_path / "late", rng, alpha=0.5, patch_size=[32, 32], schedule="half", **morse)
    rows, _ = rows_of(read_runs(tmp_path)[0])
    named = {row.name: row for row in rows}
    assert set(named) == {
        "Baseline",
        *(f"+ MORSE{a}{p}" for a in ("", ", alpha 0.9") for p in ("", ", patch_size [64, 64]")),
        "+ MORSE, schedule half",  # the only one that sets it
    }
    # what trains the baseline must be the same, what it does not depend on need not
    assert named["+ MORSE, alpha 0.9"].difference(0) is not None
    assert named["+ MORSE, alpha 0.9, patch_size [64, 64]"].difference(0) is None
    text = report(tmp_path)
    assert "- rows have, unless their names say otherwise: alpha 0.5, patch_size [32, 32]\n" in text + "\n"
    assert "Table 3, stochastic rate: MORSE**" in text
    table = text.split("Table 3, stochastic rate: MORSE, patch_size [64, 64]**\n\n")[1].split("\n\n")[0].splitlines()
    assert table[0] == "| alpha | DSC ↑ | ASD ↓ | runs |" and [r.split(" | ")[0] for r in table[2:]] == ["| 0.5", "| 0.9"]


def test_options_name_only_the_rows_they_matter_to(tmp_path):
    rng = np.random.default_rng(0)
    for seed, (alpha, width) in enumerate(((0.3, 8), (0.7, 16))):
        for i, (experts, renderer) in enumerate(itertools.product(("none", "dense", "stochastic"), ("none", "anatomical"))):
            words = {
                "experts": experts,
                "renderer": renderer,
                "width": width,
                "schedule": f"half{alpha}",
                "seed": seed,
            }
            write_run(tmp_path / f"{i}{alpha}", rng, alpha=alpha, **words)
    ends = {
        "Baseline": [""],
        "+ IAR": [", schedule half0.3", ", schedule half0.7"],
        "+ MoE": [", width 8", ", width 16"],
        "+ SMoE": [", alpha 0.3, width 8", ", alpha 0.7, width 16"],
        "+ IAR+MoE": [", width 8, schedule half0.3", ", width 16, schedule half0.7"],
        "+ MORSE": [", alpha 0.3, width 8, schedule half0.3", ", alpha 0.7, width 16, schedule half0.7"],
    }
    rows = rows_of(read_runs(tmp_path)[0])[0]
    assert sorted(r.name for r in rows) == sorted(name + end for name in ends for end in ends[name])
    assert all(r.difference(0) is not None for r in rows if r.name != "Baseline")


def test_what_the_renderer_alone_reads_is_no_other_baseline(tmp_path):
    rng = np.random.default_rng(0)
    write_run(tmp_path / "b", rng)
    write_run(tmp_path / "a_wide_one_found_first", rng, **{"backbones#dynunet#filters": [32, 64]})
    for k in (3, 9):
        write_run(tmp_path / f"m{k}", rng, renderer="anatomical", **{"network_def#points#oversample": k})
    rows = {row.name: row for row in rows_of(read_runs(tmp_path)[0])[0]}
    assert set(rows) == {"Baseline", "Baseline, filters [32, 64]", "+ IAR, oversample 3", "+ IAR, oversample 9"}
    for k in (3, 9):
        assert rows[f"+ IAR, oversample {k}"].baseline == rows["Baseline"].runs
    wide = rows["Baseline, filters [32, 64]"]  # compared with the usual one: does width alone do as well?
    assert wide.baseline == rows["Baseline"].runs and wide.difference(0).cases == 6


PLACES = {
    "width": ("network_def#mixture#width",),
    "coarse": ("network_def#coarse", "network_def#mixture#coarse"),
    "image_patch": ("network_def#image_patch", "network_def#head#image_patch"),
    "patch_norm": ("network_def#patch_norm", "network_def#head#patch_norm"),
    "read_features": ("network_def#read_features", "network_def#head#read_features"),
}


@pytest.mark.parametrize("word, places", PLACES.items())
def test_a_setting_of_the_network_is_the_same_by_its_bundles_word_and_by_its_place_of_then_and_now(word, places, tmp_path):
    rng = np.random.default_rng(0)
    morse = {"experts": "stochastic", "renderer": "anatomical"}
    for i, name in enumerate((word, *places)):
        write_run(tmp_path / f"m{i}", rng, seed=i, **{name: 1}, **morse)
        write_run(tmp_path / f"b{i}", rng, seed=i, **{name: i})  # nothing to a bare network
    write_run(tmp_path / "other", rng, **{word: 2}, **morse)
    rows = {row.name: row for row in rows_of(read_runs(tmp_path)[0])[0]}
    count = 1 + len(places)
    assert {name: len(row.runs) for name, row in rows.items()} == {"Baseline": count, "+ MORSE": count, f"+ MORSE, {word} 2": 1}
    assert all(row.difference(0) is not None for name, row in rows.items() if name != "Baseline")


@pytest.mark.parametrize("word, option", [("train_points", "num_train"), ("eval_points", "num_eval")])
def test_points_have_one_name_by_the_bundles_word_and_by_the_networks(word, option, tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate((word, f"network_def#points#{option}")):
        write_run(tmp_path / f"m{i}", rng, seed=i, renderer="anatomical", **{name: 9})
        write_run(tmp_path / f"b{i}", rng, seed=i, **{name: i})  # nothing to a bare network
    write_run(tmp_path / "other", rng, renderer="anatomical", **{word: 2})
    rows = {row.name: len(row.runs) for row in rows_of(read_runs(tmp_path)[0])[0]}
    assert rows == {"Baseline": 2, "+ IAR": 2, f"+ IAR, {option} 2": 1}


def test_what_is_said_to_the_network_itself_counts_and_not_the_bundles_word(tmp_path):
    rng = np.random.default_rng(0)
    first = {"network_def#head#patch_norm": True, "patch_norm": False}
    for i, words in enumerate((first, dict(reversed(first.items())))):
        write_run(tmp_path / f"m{i}", rng, renderer="anatomical", seed=i, **words)
    assert all(run.settings["patch_norm"] is True for run in read_runs(tmp_path)[0])


def test_what_experts_or_renderers_alone_depend_on_tells_others_not_apart(tmp_path):
    rng = np.random.default_rng(0)
    systems = {"Baseline": ("none", "none"), "+ MoE": ("dense", "none"), "+ IAR": ("none", "anatomical")}
    for seed, (name, system) in itertools.product((0, 1), systems.items()):
        words = dict(zip(("experts", "renderer"), system), seed=seed, num_experts=3 - seed)
        words |= {"network_def#mixture#gate_stride": 4 >> seed, "network_def#head#width": 64 << seed}
        words |= {"network_def#points": {"num_eval": 9 >> seed}}
        write_run(tmp_path / f"{name}{seed}", rng, **words)
    names = {row.name for row in rows_of(read_runs(tmp_path)[0])[0]}
    assert names == {
        "Baseline",
        *(f"+ MoE, num_experts {n}, gate_stride {g}" for n, g in ((3, 4), (2, 2))),
        *(f"+ IAR, num_experts {n}, width {w}, points {{'num_eval': {e}}}" for n, w, e in ((3, 64, 9), (2, 128, 4))),
    }


def test_distances_that_do_not_exist_are_left_out(tmp_path):
    values = write_run(tmp_path / "a", np.random.default_rng(0), blank=True)
    found = statistics.mean(v["hd95_mm"] for v in values.values() if v["hd95_mm"] != "")
    assert cells(report(tmp_path, metric="monai"))["Baseline"]["95HD ↓"] == f"{found:.2f}"


def test_errors_by_distance_are_of_all_voxels_of_a_rows_runs(sweep):
    folder, _ = sweep
    counts = {"m00": [(0, 1, 100, 40, 30), (1, "inf", 900, 9, 9)], "m01": [(0, 1, 300, 40, 10), (1, "inf", 700, 0, 0)]}
    counts |= {"b00": [(0, 1, 200, 50, 50), (1, "inf", 800, 8, 8)]}
    for name, rows in counts.items():
        with open(folder / name / "boundary.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [("case", "from_mm", "to_mm", "voxels", "coarse_wrong", "rendered_wrong"), *(("c", *row) for row in rows)]
            )
    text = report(folder)
    table = text.split("wrong voxels in % by distance to the true boundary**\n\n")[1].split("\n\n")[0].splitlines()
    assert table[0] == "| Method | map | 0 to 1 mm | > 1 mm |"
    assert table[2:] == [
        "| Baseline | - | 25.00 | 1.00 |",
        f"| + MORSE | coarse | {100 * 80 / 400:.2f} | {100 * 9 / 1600:.2f} |",
        f"| + MORSE | rendered | {100 * 40 / 400:.2f} | {100 * 9 / 1600:.2f} |",
        "| share of all voxels |  | 20.00 | 80.00 |",
    ]


def test_a_curve_is_read_from_the_trainings_events_and_drawn(sweep):
    from torch.utils.tensorboard import SummaryWriter

    folder, _ = sweep
    assert write_curve(folder / "b00") is None
    report(folder)
    assert not (folder / "report_curves.png").exists()
    losses = np.random.default_rng(0).uniform(size=12)
    for part in (range(1, 9), range(9, 13)):  # stopped after the second epoch, and resumed
        with SummaryWriter(str(folder / "b00")) as writer:
            for i in part:
                writer.add_scalar("train_loss", losses[i - 1], i)
                if i in (8, 12):
                    writer.add_scalar("val_mean_dice", i / 100, i // 4)
    path = write_curve(folder / "b00")
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [r["iteration"] for r in rows] == ["4", "8", "12"] and [r["val_mean_dice"] for r in rows] == [
        "",
        "0.080000",
        "0.120000",
    ]
    assert [float(r["train_loss"]) for r in rows] == pytest.approx(losses.reshape(3, 4).mean(1).tolist(), abs=1e-6)
    runs = {run.name: run for run in read_runs(folder)[0]}
    assert runs["b00"].curve == [(8, 0.08), (12, 0.12)] and runs["b01"].curve == []
    report(folder)
    assert (folder / "report_curves.png").is_file()


def test_curves_are_drawn_by_run_and_their_mean_where_all_were_validated(sweep):
    folder, _ = sweep
    for name, curve in (("b00", [(4, 0.1), (8, 0.5), (12, 0.7)]), ("b01", [(4, 0.3), (6, 0.6), (12, 0.8)]), ("b10", [(4, 1)])):
        with open(folder / name / "curve.csv", "w", newline="") as file:
            csv.writer(file).writerows([("iteration", "train_loss", "val_mean_dice"), *((i, 1, d) for i, d in curve)])
    rows, _ = rows_of(read_runs(folder)[0])
    (axis,) = curves_figure({"toy": rows, "none": rows[1:]}).axes
    assert [line.get_xydata().tolist() for line in axis.lines] == [
        [[4, 0.1], [8, 0.5], [12, 0.7]],
        [[4, 0.3], [6, 0.6], [12, 0.8]],
        [[4, pytest.approx(0.2)], [12, 0.75]],  # one point, as b10's, is no curve
    ]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["Baseline"]
    assert curves_figure({"none": rows[1:]}) is None


SETTINGS = {"none": None, "text": "a b", "a_number": 0.5, "its_text": "0.5", "a_word": "true", "true": True, "empty": ""}
SETTINGS |= {
    "quoted": 'say "no", then\ngo',
    "a_list": [1, [2, "x"]],
    "a_group": {"width": 8},
    "small": 1e-05,
    "no_text": "null",
}


@pytest.fixture
def mixed(sweep):
    """Runs with settings of all kinds in unlike orders, at two depths; one failed, one has a curve, one boundary errors."""
    folder, _ = sweep
    rng = np.random.default_rng(1)
    write_run(folder / "deep" / "all", rng, **SETTINGS)
    write_run(folder / "deep" / "back", rng, blank=True, seed=1, **dict(reversed(SETTINGS.items())), other=1)
    write_run(folder / "broken", rng, status="failed", experts="dense")
    (folder / "b00" / "curve.csv").write_text("iteration,train_loss,val_mean_dice\n4,0.7,\n8,0.5,0.6\n12,0.4,0.7\n")
    counts = "case,from_mm,to_mm,voxels,coarse_wrong,rendered_wrong\nc,0,1,100,40,30\nc,1,inf,900,9,9\n"
    (folder / "m00" / "boundary.csv").write_text(counts)
    return folder


@pytest.mark.parametrize("metric", ["paper", "monai"])
def test_a_table_of_runs_reads_and_reports_as_the_runs_themselves(metric, mixed, tmp_path, capsys):
    table, again = tmp_path / "results" / "toy.csv.gz", tmp_path / "again.csv.gz"
    words = ["--metric", metric, "--out"]
    assert main(["report", str(mixed), *words, str(tmp_path / "a"), "--save", str(table)]) == 0
    assert main(["report", str(table), *words, str(tmp_path / "b"), "--save", str(again)]) == 0
    told = capsys.readouterr().out
    assert "- broken: failed" in told and told[: len(told) // 2] == told[len(told) // 2 :]
    runs, others = read_runs(table, metric)
    for ours, theirs in zip(runs, read_runs(mixed, metric)[0], strict=True):
        assert repr(ours).replace("nan", "-") == repr(theirs).replace("nan", "-")  # nothing equals nan
    assert others == ["broken: failed"]
    for run in runs:
        if run.name.startswith("deep"):
            assert {name: run.settings[name] for name in SETTINGS} == SETTINGS
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    names = {"toy.csv.gz", "toy.curves.csv.gz", "toy.boundary.csv.gz"}
    assert {file.name for file in table.parent.iterdir()} == names
    for name in names:
        assert (table.parent / name).read_bytes() == (tmp_path / name.replace("toy", "again")).read_bytes()


def test_a_table_has_a_row_a_run_case_and_class_with_settings_and_figures(sweep, tmp_path):
    folder, values = sweep
    save_runs(folder, tmp_path / "toy.csv.gz")
    with gzip.open(tmp_path / "toy.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 6 * 2
    for row in rows:
        system = "morse" if row["settings.experts"] == "stochastic" else "none"
        found = values[system, int(row["settings.fold"]), int(row["settings.seed"])][row["case"], row["class"]]
        assert {name: float(row[name]) for name in COLUMNS} == found and json.loads(row["record"])["bundle"] == "toy"
    assert not (tmp_path / "toy.curves.csv.gz").exists()


def test_a_report_of_a_table_lies_beside_it(sweep, tmp_path):
    folder, _ = sweep
    save_runs(folder, tmp_path / "toy.csv.gz")
    report(tmp_path / "toy.csv.gz")
    assert (tmp_path / "toy" / "report.md").is_file()


def test_a_table_that_cannot_be_written_or_read_is_told(sweep, tmp_path):
    folder, _ = sweep
    table = tmp_path / "toy.csv.gz"
    with pytest.raises(InputError, match="no table .*toy.csv.gz; make it of a folder of runs: report RUNS --save"):
        read_runs(table)
    with pytest.raises(InputError, match="named NAME.csv.gz, got .*toy.csv"):
        save_runs(folder, tmp_path / "toy.csv")
    save_runs(folder, table)
    whole = table.read_bytes()
    for broken in (b"", whole[:2000], b"case,class\n", whole[:40] + b"0" + whole[41:]):
        table.write_bytes(broken)
        with pytest.raises(InputError, match=r"toy.csv.gz (cannot be read|has no rows)"):
            read_runs(table)
    (folder / "b00" / "curve.csv").write_text("iteration,train_loss,val_mean_dice\n4,0.7,0.5\n")
    save_runs(folder, table)
    with pytest.raises(InputError, match="toy.curves.csv.gz has no rows with case, class, record, run"):
        read_runs(tmp_path / "toy.curves.csv.gz")
    (folder / "b00" / "metrics.csv").write_text("case,class,dice\na,liver,0.5\n")
    before = table.read_bytes()
    with pytest.raises(
        InputError, match="metrics.csv of .*b01/metrics.csv has not the columns of the first run's, case, class, dice"
    ):
        save_runs(folder, table)
    assert table.read_bytes() == before


def test_bad_input_is_told(tmp_path, sweep):
    with pytest.raises(InputError, match="no run.json in .*empty"):
        report(tmp_path / "empty")
    with pytest.raises(InputError, match="metric must be one of"):
        report(tmp_path, metric="mine")
    (tmp_path / "b00" / "metrics.csv").write_text("case,class,dice\na,liver,0.5\n")
    with pytest.raises(InputError, match="b00/metrics.csv has no columns paper_dice"):
        report(tmp_path)
    (tmp_path / "b00" / "metrics.csv").write_text(f"case,class,{','.join(COLUMNS)}\na,liver{8 * ',good'}\n")
    with pytest.raises(InputError, match="b00/metrics.csv, or a file beside it, holds no figures of a run .*'good'"):
        report(tmp_path)
    (tmp_path / "b00" / "run.json").write_text("{")
    with pytest.raises(InputError, match="b00/run.json cannot be read"):
        report(tmp_path)


PUBLISHED = sorted(path for path in (ROOT / "results").glob("*.csv.gz") if path.name.count(".") == 2)
EXPERIMENTS = read_experiments()


def backbone_of(run):
    return run.settings["backbone"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of an experiment, each made once, and the folder of its figures."""
    folder = tmp_path_factory.mktemp("pages")
    return functools.cache(lambda name: (write_page(EXPERIMENTS[name], folder), folder))


def test_every_table_has_an_entry_and_every_entry_a_table():
    assert {path.name.removesuffix(".csv.gz") for path in PUBLISHED} == EXPERIMENTS.keys()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiments_commands_train_the_runs_of_its_table(name):
    """Cell by cell; names that no run records cannot be compared, and runs that are older than patch_norm have none."""
    left, _ = read_runs(EXPERIMENTS[name].table)
    recorded = {setting for run in left for setting in run.settings}

    def same(run, cell):
        return all(run.settings.get(n) == v or (n == "patch_norm" and not (run.settings.get(n) or v)) for n, v in cell.items())

    cells = [{n: v for n, v in _settings({"settings": c.values}).items() if n in recorded} for c in EXPERIMENTS[name].cells()]
    for cell in sorted(cells, key=len, reverse=True):  # the most special first
        found = next((run for run in left if same(run, cell)), None)
        assert found, f"no run of {cell}"
        left.remove(found)
    assert left == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiments_page_has_every_row_of_every_comparison_and_its_figures(name, page):
    text, folder = page(name)
    e = EXPERIMENTS[name]
    by_backbone = itertools.groupby(sorted(read_runs(e.table)[0], key=backbone_of), backbone_of)
    rows = [row.name for _, runs in by_backbone for row in rows_of(list(runs))[0]]
    for against in e.against:
        section = text.split(f"## Difference to {against}\n")[1].split("\n## ")[0]
        assert section.count("| runs | cases |") and all(section.count(f"| {row} |") >= rows.count(row) for row in rows)
    assert (folder / f"{name}.png").is_file() and (folder / f"{name}_curves.png").is_file()
    assert e.question in text and e.note.strip() in text and all(f"'{grid}'" in text for grid in e.grids)


@pytest.mark.parametrize("table", PUBLISHED, ids=lambda table: table.name.removesuffix(".csv.gz"))
def test_a_committed_table_is_whole_and_as_it_is_made(table, tmp_path):
    save_runs(table, tmp_path / table.name)
    for file in tmp_path.iterdir():
        assert gzip.decompress(file.read_bytes()) == gzip.decompress((table.parent / file.name).read_bytes())
    assert len(list(tmp_path.iterdir())) == 3
    runs, others = read_runs(table)
    assert not others and all(run.curve and run.boundary for run in runs)


def test_every_interval_of_the_documents_is_made_of_committed_runs(page):
    made = "\n".join([*(page(name)[0] for name in EXPERIMENTS), price.markdown(list(csv.DictReader(price.TABLE.open())))])
    told = "\n".join([*(e.note for e in EXPERIMENTS.values()), *(p.read_text() for p in (ROOT / "docs").rglob("*.md"))])
    intervals = set(re.findall(r"[+-]\d+\.\d+ \[[+-]\d+\.\d+, [+-]\d+\.\d+\]", told))
    assert len(intervals) > 8 and [i for i in intervals if i not in made] == []


def test_the_readmes_gains_are_those_of_the_overview():
    lines = {(line.setting, line.label): line.differences for line in read_lines()}
    at_2, at_3 = (lines[f"{mm} mm, volumes", "DynUNet, five folds"] for mm in (2, 3))
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"gains {at_2[0].mean:.1f} Dice points" in text
    assert f"{-percent(at_2[3]):.0f} % of the surface distance" in text
    assert f"At 3 mm it gains {at_3[0].mean:.1f} points" in text
