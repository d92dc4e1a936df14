"""Judging cells without Qt: tables, orders, filters, verdicts, where to go next, files."""

from __future__ import annotations

import csv
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from plugin_helpers import FRAME_RATE, posterior_of

import napari_calvae as calvae
from napari_calvae._napari import answers, figure, judging, script, session
from napari_calvae._napari.contributions import sample_folder


def inferred(n_rois: int = 4) -> calvae.SpikeInference:
    values = np.random.default_rng(3).normal(size=(n_rois, 200)).cumsum(axis=1)
    return posterior_of(calvae.Traces(values, frame_rate=FRAME_RATE), n_samples=20)


@pytest.fixture
def table() -> judging.Table:
    """Three ROIs that were inferred, and one (5) that was not."""
    result = inferred(3)
    quality = np.zeros(3, [("noise_level", "f4"), ("band_coverage", "f4"), ("new_metric", "f4")])
    quality["noise_level"] = 3, 1, 2
    quality["band_coverage"] = 0.95, 0.99, 0.7
    quality["new_metric"] = 5, np.nan, 7
    result = calvae.SpikeInference(**{**vars(result), "quality": quality})
    return judging.tabulate((1, 2, 3, 5), {1: (result, 0), 2: (result, 1), 3: (result, 2)})


def test_the_columns_are_those_of_the_quality(table):
    names = [column.name for column in table.columns]
    assert names == ["noise_level", "band_coverage", "new_metric", "spikes", "spikes_uncertainty"]
    assert table.column("noise_level").help == calvae.QC["noise_level"].__doc__.strip()
    assert table.column("new_metric").title == "new metric"
    assert table.inferred == 3
    assert all(np.isnan(table.values[name][3]) for name in names)


def test_without_results_the_columns_are_those_to_come():
    empty = judging.tabulate((1, 2), {})
    assert [column.name for column in empty.columns][: len(calvae.QC)] == list(calvae.QC)
    assert empty.inferred == 0
    assert all(calvae.QC[name].__doc__.splitlines()[0] == empty.column(name).help for name in calvae.QC)


def test_spikes_are_counted_in_the_samples():
    result = inferred()
    table = judging.tabulate(result.roi_ids, {roi: (result, row) for row, roi in enumerate(result.roi_ids)})
    totals = result.samples().sum(axis=2)
    np.testing.assert_allclose(table.values["spikes"], totals.mean(axis=0))
    width = np.diff(np.quantile(totals, [0.05, 0.95], axis=0), axis=0)[0]
    np.testing.assert_allclose(table.values["spikes_uncertainty"], width / totals.mean(axis=0))


def test_decimals_go_by_the_largest_number():
    assert [judging.digits(np.array([np.nan, -n, 0.01])) for n in (0.5, 9.9, 10, 250)] == [2, 2, 1, 0]
    assert judging.digits(np.array([np.nan])) == 2


def test_a_silent_cell_has_no_relative_uncertainty():
    result = posterior_of(calvae.Traces(np.zeros((1, 50)) + np.linspace(0, 1, 50), frame_rate=FRAME_RATE), 5)
    assert not len(result.events)
    mean, width = judging.Counts().of(1, result, 0)
    assert mean == 0
    assert np.isnan(width)


@pytest.mark.parametrize(
    ("sort", "descending", "order"),
    [
        ("roi", True, (5, 3, 2, 1)),
        ("noise_level", False, (2, 3, 1, 5)),
        ("noise_level", True, (1, 3, 2, 5)),
        ("new_metric", True, (3, 1, 2, 5)),
        ("gone", False, (1, 2, 3, 5)),
    ],
)
def test_orders_are_numeric_and_unknown_comes_last(table, sort, descending, order):
    assert judging.arrange(table, judging.Judgements(), judging.View(sort, descending)) == order


def test_verdicts_and_notes_sort_and_filter(table):
    judged = judging.Judgements().judge([3], verdict=judging.ACCEPTED).judge([1], verdict=judging.REJECTED)
    judged = judged.judge([2], note="b").judge([5], note="a")
    assert judging.arrange(table, judged, judging.View("verdict")) == (3, 1, 2, 5)
    assert judging.arrange(table, judged, judging.View("note")) == (5, 2, 1, 3)
    shown = {show: judging.arrange(table, judged, judging.View(show=show)) for show in judging.SHOW}
    assert shown == {"all": (1, 2, 3, 5), "unjudged": (2, 5), "accepted": (3,), "rejected": (1,)}


@pytest.mark.parametrize(
    ("text", "rois"),
    [
        ("", (1, 2, 3, 5)),
        ("noise_level > 1", (1, 3)),
        ("noise level>=2 and Coverage < 0.9", (3,)),
        ("ν ≤ 1.5", (2,)),
        ("roi != 2", (1, 3, 5)),
        ("new metric = 7.0, roi > 1e0", (3,)),
    ],
)
def test_filters(table, text, rois):
    view = judging.View(conditions=judging.conditions(text, table))
    assert judging.arrange(table, judging.Judgements(), view) == rois


def test_a_filter_on_numbers_that_are_gone_hides_nothing(table):
    view = judging.View(conditions=(judging.Condition("old_metric", ">", 1.0),))
    assert judging.arrange(table, judging.Judgements(), view) == table.rois
    assert judging.shown_column(table, "none", "roi").name == "noise_level"
    assert judging.shown_column(judging.Table(), "none", "roi") is None


@pytest.mark.parametrize(
    "text", ["noise", "noise_level >", "nose_level > 1", "noise_level > 1-", "__import__('os') > 1", "roi > 1 and"]
)
def test_bad_filters_get_a_sentence(table, text):
    with pytest.raises(calvae.RecordingError, match=r"expected a column.*got.*Columns: roi, noise_level"):
        judging.conditions(text, table)


def test_judging_can_be_undone_and_done_again():
    judged = judging.Judgements().judge([1, 2], verdict=judging.ACCEPTED)
    again = judged.judge([2], verdict=judging.REJECTED).judge([2], note="dim")
    assert again.judge([2], note="dim") is again
    assert again.of(2) == judging.Judgement(judging.REJECTED, "dim")
    back = again.undo().undo()
    assert back.by_roi == judged.by_roi
    assert back.undo().by_roi == {}
    assert back.undo().undo().by_roi == {}
    assert back.redo().redo().by_roi == again.by_roi
    assert back.redo().redo().redo().by_roi == again.by_roi
    assert back.judge([1], note="x").undone == ()


def test_ways_through_the_table(table):
    order, judged = (2, 3, 1, 5), judging.Judgements().judge([3], verdict=judging.ACCEPTED)
    assert [judging.neighbour(order, roi, 1) for roi in (None, 2, 5, 9)] == [2, 3, 5, 2]
    assert [judging.neighbour(order, roi, -1) for roi in (None, 2, 5)] == [5, 2, 1]
    assert judging.neighbour((), 1, 1) is None
    assert [judging.next_unjudged(order, roi, judged) for roi in (None, 2, 1, 5)] == [2, 1, 5, 2]
    assert judging.next_unjudged(order, 2, judged.judge(order, verdict=judging.REJECTED)) is None


def test_the_worst_is_not_always_the_largest(table):
    judged = judging.Judgements()
    assert judging.worst(table, table.rois, judged, "noise_level") == 1
    assert judging.worst(table, table.rois, judged, "band_coverage") == 3
    judged = judged.judge([3], verdict=judging.REJECTED)
    assert judging.worst(table, table.rois, judged, "band_coverage") == 2
    assert judging.worst(table, (3,), judged, "band_coverage") == 3
    assert judging.worst(table, (5,), judged, "band_coverage") is None
    assert judging.worst(table, table.rois, judged, "note") is None
    best = judging.tabulate((1,), {}).column("reconstruction_r2")
    assert np.argmax(best.badness(np.array([0.9, 0.1, 0.5]))) == 1
    assert best.worst == "the smallest is the worst"


def test_colours_span_the_values():
    assert judging.colour_range(np.array([np.nan])) is None
    assert judging.colour_range(np.array([1, np.nan, 3.0])) == (1, 3)
    assert judging.colour_range(np.array([2.0, 2.0])) == (1.5, 2.5)
    low, high = judging.colour_range(np.append(np.linspace(0, 1, 100), 1e6))
    assert high < 1.01
    np.testing.assert_allclose(judging.shades(np.array([-1, low, high, 9]), (low, high)), [0, 0, 1, 1])


def test_the_table_as_a_file(table):
    judged = judging.Judgements().judge([2], verdict=judging.ACCEPTED, note='dim, "so"')
    rows = list(csv.DictReader(judging.csv_text(table, (2, 5), judged).splitlines()))
    assert [row["roi"] for row in rows] == ["2", "5"]
    assert (rows[0]["verdict"], rows[0]["note"], rows[0]["noise_level"]) == ("accepted", 'dim, "so"', "1")
    assert rows[0]["new_metric"] == rows[1]["noise_level"] == rows[1]["note"] == ""


@pytest.mark.parametrize("edited", [False, True])
def test_the_script_repeats_the_result(tmp_path, edited):
    folder = sample_folder()
    labels = np.array(calvae.read_labels(folder / "rois.tif"))
    if edited:
        labels[labels > 2] = 0
    settings = answers.Settings(frame_rate=10.0, neuropil_coefficient=0.5, n_samples=3, seed=4)
    text = script.script(script.Source(folder / "movie.tif", folder / "rois.tif", labels), settings, rejected=[2])
    assert ("read_labels" in text) is not edited
    text += f"\nnp = __import__('numpy')\nnp.savez({str(tmp_path / 'rate.npz')!r}, rate=rate, kept=kept)\n"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    movie, _ = calvae.read_movie(folder / "movie.tif")
    traces = calvae.extract(np.asarray(movie), labels, 10.0, neuropil_coefficient=0.5)
    expected = calvae.infer(traces, n_samples=3, seed=4)
    with np.load(tmp_path / "rate.npz") as got:
        np.testing.assert_allclose(got["rate"], expected.rate, rtol=1e-3, atol=1e-3)
        assert [traces.roi_ids[row] for row in got["kept"]] == [roi for roi in traces.roi_ids if roi != 2]


def test_a_movie_without_a_file_is_to_be_saved_first():
    text = script.script(script.Source(None, None, np.ones((4, 4), int)), answers.Settings(frame_rate=5.0))
    assert "np.save(" in text
    assert "read_movie('movie.npy')" in text
    compile(text, "script", "exec")


def test_the_script_of_a_movie_with_planes_takes_the_one_that_is_shown(tmp_path):
    stack = np.random.default_rng(0).integers(50, 200, (30, 3, 12, 14)).astype(np.uint16)
    labels = np.zeros((12, 14), np.int32)
    labels[3:6, 4:9], labels[8:10, 2:4] = 1, 2
    np.save(tmp_path / "stack.npy", stack)
    movie = SimpleNamespace(metadata={"path": tmp_path / "stack.npy"})
    drawn = SimpleNamespace(metadata={}, source=SimpleNamespace(path=None))
    settings = answers.Settings(frame_rate=10.0, neuropil_coefficient=0.0)
    source = script.source_of(movie, session.MoviePlane(stack, 2), drawn, labels)
    text = script.script(source, settings)
    names: dict = {}
    exec(text[: text.index("result =")], names)
    np.testing.assert_array_equal(
        names["traces"].values, calvae.extract(stack[:, 2], labels, 10.0, neuropil_coefficient=0.0).values
    )
    other = script.source_of(movie, session.MoviePlane(stack + 1, 2), drawn, labels)
    assert other.movie is None
    assert "movie[:, 2]" in script.script(other, settings)


def test_figures(tmp_path):
    picture = answers.one_roi(inferred(), 2)
    for name in ("a.png", "a.svg"):
        figure.save_figure(picture, (1.0, 6.0), tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    assert ">ROI 3<" in svg  # text, not outlines
    assert ">spikes/s<" in svg
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(calvae.RecordingError, match=r"ends in .png or .svg, got 'a.gif'"):
        figure.save_figure(picture, (1.0, 6.0), tmp_path / "a.gif")
