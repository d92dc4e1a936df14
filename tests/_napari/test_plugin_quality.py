"""The quality table on a real viewer: rows, keys, colours, verdicts, files; the network is a stand-in."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from napari.utils.colormaps import DirectLabelColormap
from plugin_helpers import CENTRES, FRAME_RATE, hide_as_if_closed
from qtpy.QtCore import Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication, QFileDialog

import napari_calvae as calvae
from napari_calvae._napari import judging

pytestmark = pytest.mark.usefixtures("network")
BUTTON = Qt.MouseButton.LeftButton


@pytest.fixture
def network(network, monkeypatch):
    """Stand-in whose quality has columns that differ between the ROIs."""
    plain = network.iter_infer
    noise = {1: 2.0, 2: 10.0, 3: 9.0}

    def iter_infer(*arguments, **settings):
        for part in plain(*arguments, **settings):
            quality = np.zeros(len(part.roi_ids), [("noise_level", "f4"), ("unfamiliarity", "f4")])
            quality["noise_level"] = [noise.get(roi, 5) for roi in part.roi_ids]
            quality["unfamiliarity"] = 1 / quality["noise_level"]
            yield calvae.SpikeInference(**{**vars(part), "quality": quality})

    monkeypatch.setitem(vars(calvae), "iter_infer", iter_infer)
    return network


@pytest.fixture
def open_table(viewer, open_widget):
    """Open the inference widget and the quality table beside it; both are closed in the end."""
    from napari_calvae._napari.quality_widget import QualityWidget

    opened = []

    def open_both():
        inference = open_widget()
        widget = QualityWidget(viewer)
        viewer.window.add_dock_widget(widget, name="quality table", area="right")
        viewer.reset_view()
        QApplication.processEvents()
        opened.append(widget)
        return inference, widget

    yield open_both
    for widget in opened:
        if widget._attached:
            widget.close_down()


def cells(widget, name):
    """Texts of a column, from top to bottom."""
    model, column = widget.model, widget.model.names.index(name)
    return [model.data(model.index(row, column)) for row in range(model.rowCount())]


def infer_all(qtbot, widget):
    qtbot.mouseClick(widget.form.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: widget.table.inferred == 3, timeout=20_000)


def click_row(widget, roi, name="roi"):
    """Click a cell in the row of a ROI."""
    table = widget.form.table
    index = widget.model.index(widget.model.order.index(roi), widget.model.names.index(name))
    table.scrollTo(index)
    QTest.mouseClick(table.viewport(), Qt.MouseButton.LeftButton, pos=table.visualRect(index).center())


def click_head(widget, name):
    table = widget.form.table
    section = widget.model.names.index(name)
    table.scrollTo(widget.model.index(0, section))
    heads = table.horizontalHeader()
    x = heads.sectionViewportPosition(section) + heads.sectionSize(section) // 2
    QTest.mouseClick(heads.viewport(), Qt.MouseButton.LeftButton, pos=heads.viewport().rect().center().__class__(x, 8))


def press(viewer, key, modifier=Qt.KeyboardModifier.NoModifier):
    """Press a key over the canvas."""
    QTest.keyClick(viewer.window._qt_viewer.canvas.native, key, modifier)


def choose(box, name):
    box.setCurrentIndex(box.findData(name))


def test_all_rois_are_listed_and_filled_in_when_inferred(qtbot, show_movie, open_table):
    show_movie()
    inference, widget = open_table()
    assert cells(widget, "roi") == ["1", "2", "3"]
    assert cells(widget, "noise_level") == ["", "", ""]
    assert widget.form.infer_all.isEnabled()
    infer_all(qtbot, widget)
    assert cells(widget, "noise_level") == ["2.0", "10.0", "9.0"]
    assert "spike_rate" not in widget.model.names  # the columns are those of the result
    expected = [f"{(inference.results.rows[roi][0].samples().sum() / 50):.1f}" for roi in CENTRES]
    assert cells(widget, "spikes") == expected
    assert not widget.form.infer_all.isEnabled()
    assert "3 of 3 ROIs inferred" in widget.form.status.text()
    column = widget.model.names.index("noise_level")
    tip = widget.model.headerData(column, Qt.Orientation.Horizontal, Qt.ItemDataRole.ToolTipRole)
    assert "%/√Hz" in tip
    assert "largest is the worst" in tip
    alignment = widget.model.data(widget.model.index(0, column), Qt.ItemDataRole.TextAlignmentRole)
    assert alignment & Qt.AlignmentFlag.AlignRight


def test_heads_sort_by_number(qtbot, show_movie, open_table):
    show_movie()
    _, widget = open_table()
    infer_all(qtbot, widget)
    click_head(widget, "noise_level")
    assert cells(widget, "noise_level") == ["2.0", "9.0", "10.0"]
    click_head(widget, "noise_level")
    assert cells(widget, "noise_level") == ["10.0", "9.0", "2.0"]


def test_rows_and_clicks_in_the_movie_choose_the_same_cell(qtbot, show_movie, open_table, canvas, viewer, network):
    show_movie()
    inference, widget = open_table()
    click_row(widget, 2)
    qtbot.waitUntil(lambda: inference.plots.picture is not None and inference.plots.picture.roi_ids == (2,))
    assert viewer.layers["ROIs"].selected_label == 2
    canvas.click(*CENTRES[3])
    qtbot.waitUntil(lambda: widget._chosen() == [3], timeout=20_000)
    assert network.calls == [(2,), (3,)]  # each asked once: no loop
    qtbot.waitUntil(lambda: widget.table.inferred == 2)
    assert cells(widget, "noise_level") == ["", "10.0", "9.0"]
    assert widget._chosen() == [3]
    assert network.calls == [(2,), (3,)]


def test_keys_go_through_the_cells_and_judge_them(qtbot, show_movie, open_table, viewer):
    show_movie()
    inference, widget = open_table()
    infer_all(qtbot, widget)
    click_head(widget, "noise_level")  # 1, 3, 2
    chosen = []
    for key in (Qt.Key.Key_Down, Qt.Key.Key_Down, Qt.Key.Key_Down, Qt.Key.Key_Down, Qt.Key.Key_Up):
        press(viewer, key)
        chosen += widget._chosen()
    assert chosen == [1, 3, 2, 2, 3]
    assert inference.picked_roi == 3
    assert inference.plots.picture.roi_ids == (3,)
    press(viewer, Qt.Key.Key_K)
    press(viewer, Qt.Key.Key_N)
    assert widget._chosen() == [2]
    press(viewer, Qt.Key.Key_J)
    assert cells(widget, "verdict") == ["", "✓", "✗"]
    press(viewer, Qt.Key.Key_U)
    assert cells(widget, "verdict") == ["", "✓", ""]
    press(viewer, Qt.Key.Key_U, Qt.KeyboardModifier.ShiftModifier)
    assert cells(widget, "verdict") == ["", "✓", "✗"]
    press(viewer, Qt.Key.Key_W)
    assert widget._chosen() == [1]  # the others are judged
    press(viewer, Qt.Key.Key_K)
    press(viewer, Qt.Key.Key_W)
    assert widget._chosen() == [2]
    press(viewer, Qt.Key.Key_N)
    assert "All listed cells are judged" in widget.form.status.text()
    assert "N: next unjudged" in widget.form.keys.toolTip()


def test_letters_work_in_the_table_too(qtbot, show_movie, open_table):
    show_movie()
    _, widget = open_table()
    infer_all(qtbot, widget)
    click_row(widget, 1)
    QTest.keyClick(widget.form.table, Qt.Key.Key_K)
    QTest.keyClick(widget.form.table, Qt.Key.Key_Down)
    QTest.keyClick(widget.form.table, Qt.Key.Key_J)
    assert widget._chosen() == [2]
    assert cells(widget, "verdict") == ["✓", "✗", ""]
    QTest.keyClick(widget.form.note, Qt.Key.Key_U)
    assert widget.form.note.text() == "u"


def test_the_worst_needs_a_number(qtbot, show_movie, open_table):
    show_movie()
    _, widget = open_table()
    qtbot.mouseClick(widget.form.worst, Qt.MouseButton.LeftButton)
    assert "Sort by a number first" in widget.form.status.text()
    click_head(widget, "noise_level")
    qtbot.mouseClick(widget.form.worst, Qt.MouseButton.LeftButton)
    assert "press “Infer all”" in widget.form.status.text()


def test_verdicts_and_notes_live_in_the_layer(qtbot, show_movie, open_table, viewer, canvas):
    show_movie()
    layer = viewer.layers["ROIs"]
    layer.features = {"index": [0, 2, 3], "kind": ["", "PV", "SST"]}
    inference, widget = open_table()
    click_row(widget, 2)
    qtbot.mouseClick(widget.form.accept, Qt.MouseButton.LeftButton)
    qtbot.keyClicks(widget.form.note, "at the edge")
    qtbot.keyClick(widget.form.note, Qt.Key.Key_Return)
    assert cells(widget, "note") == ["", "at the edge", ""]
    rows = layer.features.set_index("index")
    assert rows.loc[2].to_dict() == {"kind": "PV", "verdict": "accepted", "note": "at the edge"}
    assert rows.loc[3, "kind"] == "SST"
    assert rows.loc[1, "verdict"] == ""
    shown = layer.get_status(np.array(CENTRES[2], float), world=True)
    assert "verdict: accepted" in str(shown)
    inference.controls.samples.setValue(12)  # all is inferred again
    qtbot.waitUntil(lambda: inference.plots.picture is not None and inference.plots.picture.n_samples == 12)
    qtbot.waitUntil(lambda: widget.table.inferred == 1)
    assert cells(widget, "verdict") == ["", "✓", ""]
    qtbot.mouseClick(widget.form.undo, Qt.MouseButton.LeftButton)
    assert cells(widget, "note") == ["", "", ""]
    qtbot.mouseClick(widget.form.clear, Qt.MouseButton.LeftButton)
    assert set(layer.features["verdict"]) == {""}
    layer.features = {"index": [1], "verdict": ["rejected"], "note": ["by hand"]}
    qtbot.waitUntil(lambda: cells(widget, "verdict") == ["✗", "", ""])


def test_several_cells_are_judged_at_once(qtbot, show_movie, open_table):
    show_movie()
    _, widget = open_table()
    infer_all(qtbot, widget)
    click_row(widget, 1)
    QTest.keyClick(widget.form.table, Qt.Key.Key_Down, Qt.KeyboardModifier.ShiftModifier)
    assert widget._chosen() == [1, 2]
    qtbot.mouseClick(widget.form.reject, Qt.MouseButton.LeftButton)
    assert cells(widget, "verdict") == ["✗", "✗", ""]
    qtbot.mouseClick(widget.form.undo, Qt.MouseButton.LeftButton)
    assert cells(widget, "verdict") == ["", "", ""]


def test_numbers_of_other_settings_are_not_shown(qtbot, show_movie, open_table, viewer):
    show_movie()
    inference, widget = open_table()
    infer_all(qtbot, widget)
    inference.controls.neuropil.setValue(0.3)
    qtbot.waitUntil(lambda: widget.table.inferred == 0)
    assert cells(widget, "noise_level") == ["", "", ""]
    infer_all(qtbot, widget)
    viewer.layers["ROIs"].data_setitem((np.array([36]), np.array([36])), 4)
    qtbot.waitUntil(lambda: cells(widget, "roi") == ["1", "2", "3", "4"])
    assert widget.table.inferred == 0


def test_filters(qtbot, show_movie, open_table):
    show_movie()
    _, widget = open_table()
    infer_all(qtbot, widget)

    def type_filter(text):
        widget.form.filter.clear()
        qtbot.keyClicks(widget.form.filter, text)
        qtbot.keyClick(widget.form.filter, Qt.Key.Key_Return)

    type_filter("noise_level > 5")
    assert cells(widget, "roi") == ["2", "3"]
    assert "The filter hides 1" in widget.form.status.text()
    type_filter("nose > 5")
    assert "expected a column, a sign and a number" in widget.form.status.text()
    assert cells(widget, "roi") == ["1", "2", "3"]
    widget.form.filter.clear()
    click_row(widget, 2)
    qtbot.mouseClick(widget.form.accept, Qt.MouseButton.LeftButton)
    choose(widget.form.listed, "unjudged")
    assert cells(widget, "roi") == ["1", "3"]
    choose(widget.form.listed, "accepted")
    assert cells(widget, "roi") == ["2"]
    choose(widget.form.listed, "rejected")
    assert cells(widget, "roi") == []


def test_rois_are_coloured_by_any_column(qtbot, show_movie, open_table, viewer):
    show_movie()
    layer = viewer.layers["ROIs"]
    before, opacity = layer.colormap, layer.opacity
    _, widget = open_table()
    infer_all(qtbot, widget)
    click_row(widget, 3)
    choose(widget.form.colour, "noise_level")
    assert isinstance(layer.colormap, DirectLabelColormap)
    quiet, loud = (layer.get_color(roi)[:3] for roi in (1, 2))
    np.testing.assert_allclose(quiet, (0.267, 0.005, 0.329), atol=0.01)  # the ends of viridis
    np.testing.assert_allclose(loud, (0.993, 0.906, 0.144), atol=0.01)
    drawn = widget.form.distribution
    assert drawn.counts.sum() == 3
    assert (drawn.edges[0], drawn.edges[-1]) == (2, 10)
    assert drawn.mark.value() == pytest.approx(9)
    assert "noise level" in drawn.toolTip()
    assert drawn.axis.labelText == "noise level"
    assert drawn.axis.label.isVisible()
    choose(widget.form.colour, "verdict")
    qtbot.mouseClick(widget.form.reject, Qt.MouseButton.LeftButton)
    assert not np.allclose(layer.get_color(3), layer.get_color(1))
    np.testing.assert_allclose(layer.get_color(2), layer.get_color(1))
    choose(widget.form.colour, "none")
    assert layer.colormap is before
    assert layer.opacity == opacity


def test_shapes_are_judged_in_the_widget(qtbot, show_movie, open_table, viewer):
    show_movie(rois=None)
    square = np.array([(6, 6), (6, 14), (14, 14), (14, 6)])
    viewer.add_shapes([square, square + np.array((0, 18))], shape_type="polygon")
    viewer.layers["Shapes"].mode = "pan_zoom"
    inference, widget = open_table()
    assert cells(widget, "roi") == ["1", "2"]
    click_row(widget, 2)
    qtbot.mouseClick(widget.form.accept, Qt.MouseButton.LeftButton)
    choose(widget.form.colour, "verdict")
    assert cells(widget, "verdict") == ["", "✓"]
    viewer.add_labels(np.pad(np.ones((3, 3), int), (10, 27)), name="other")  # chosen in its place, and back
    choose_layer(inference.controls.rois, viewer.layers["other"])
    qtbot.waitUntil(lambda: cells(widget, "verdict") == [""])
    choose_layer(inference.controls.rois, viewer.layers["Shapes"])
    qtbot.waitUntil(lambda: cells(widget, "verdict") == ["", "✓"])
    assert not viewer.layers["other"].features.size


@pytest.mark.parametrize("kind", ["points", "shapes"])
def test_a_verdict_stays_with_its_point_or_shape(qtbot, show_movie, open_table, viewer, kind, tmp_path):
    show_movie(rois=None)
    if kind == "points":
        layer = viewer.add_points([CENTRES[1], CENTRES[2], CENTRES[3]], features={"index": [7, 8, 9]})
    else:
        square = np.array([(-4, -4), (-4, 4), (4, 4), (4, -4)])
        layer = viewer.add_shapes([square + CENTRES[roi] for roi in CENTRES], shape_type="polygon")
    inference, widget = open_table()
    click_row(widget, 2)
    qtbot.mouseClick(widget.form.reject, Qt.MouseButton.LeftButton)
    assert widget.form.undo.isEnabled()
    layer.selected_data = {0}
    layer.remove_selected()
    qtbot.waitUntil(lambda: cells(widget, "verdict") == ["✗", ""])
    assert not widget.form.undo.isEnabled()  # it would speak of another cell
    layer.selected_data = {0}  # what is added would get the verdict of what is selected
    layer.add(np.array([CENTRES[1]]) if kind == "points" else square + CENTRES[1])
    qtbot.waitUntil(lambda: cells(widget, "verdict") == ["✗", "", ""])
    widget.close_down()
    inference.infer_all()
    qtbot.waitUntil(lambda: len(inference.results.rows) == 3 and not inference._batch.busy, timeout=20_000)
    layer.save(str(tmp_path / "spikes.zarr"), plugin="napari-calvae")
    assert calvae.open_result(tmp_path / "spikes.zarr").accepted.tolist() == [False, True, True]
    _, again = open_table()
    assert cells(again, "verdict") == ["✗", "", ""]


def test_a_disc_does_not_begin_with_the_verdict_of_an_erased_cell(qtbot, show_movie, open_table, viewer, canvas):
    show_movie()
    inference, widget = open_table()
    layer = viewer.layers["ROIs"]
    click_row(widget, 3)
    qtbot.mouseClick(widget.form.reject, Qt.MouseButton.LeftButton)
    layer.fill(CENTRES[3], 0)
    qtbot.waitUntil(lambda: cells(widget, "roi") == ["1", "2"])
    layer.undo()
    qtbot.waitUntil(lambda: cells(widget, "verdict") == ["", "", "✗"])
    layer.fill(CENTRES[3], 0)
    inference.controls.place.setChecked(True)
    inference.pick(np.array((0, 30, 30), float))
    qtbot.waitUntil(lambda: inference.picked_roi == 3, timeout=20_000)
    qtbot.waitUntil(lambda: cells(widget, "verdict") == ["", "", ""])
    assert layer.features.set_index("index").loc[3, "verdict"] == ""


def choose_layer(box, layer):
    box.setCurrentIndex(next(i for i in range(box.count()) if box.itemData(i) is layer))


def test_a_window_that_is_shown_again_is_still_served(qtbot, show_movie, open_table, viewer, canvas):
    show_movie()
    inference, widget = open_table()
    click_row(widget, 2)
    press(viewer, Qt.Key.Key_K)
    choose(widget.form.colour, "verdict")
    before = viewer.layers["ROIs"].colormap
    hide_as_if_closed(viewer.window._qt_window, inference, widget)
    assert not widget._attached
    assert viewer.layers["ROIs"].colormap is not before
    viewer.window._qt_window.show()
    assert widget._attached
    assert cells(widget, "verdict") == ["", "✓", ""]
    press(viewer, Qt.Key.Key_U)
    assert cells(widget, "verdict") == ["", "", ""]
    canvas.click(*CENTRES[3])
    qtbot.waitUntil(lambda: widget._chosen() == [3], timeout=20_000)


def test_the_table_is_saved(qtbot, show_movie, open_table, monkeypatch, tmp_path):
    show_movie()
    _, widget = open_table()
    infer_all(qtbot, widget)
    click_row(widget, 3)
    qtbot.mouseClick(widget.form.accept, Qt.MouseButton.LeftButton)
    target = tmp_path / "cells.csv"
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(target), ""))
    qtbot.mouseClick(widget.form.csv, Qt.MouseButton.LeftButton)
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert [(row["roi"], row["verdict"], float(row["noise_level"])) for row in rows] == [
        ("1", "", 2),
        ("2", "", 10),
        ("3", "accepted", 9),
    ]
    assert list(tmp_path.iterdir()) == [target]
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(tmp_path / "no" / "cells.csv"), ""))
    qtbot.mouseClick(widget.form.csv, Qt.MouseButton.LeftButton)
    assert "No such file" in widget.form.status.text()


def test_the_figure_is_saved(qtbot, show_movie, open_table, monkeypatch, tmp_path):
    show_movie()
    _, widget = open_table()
    assert not widget.form.figure.isEnabled()
    click_row(widget, 2)
    qtbot.waitUntil(widget.form.figure.isEnabled)
    target = tmp_path / "cell.svg"
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(target), ""))
    qtbot.mouseClick(widget.form.figure, Qt.MouseButton.LeftButton)
    assert ">ROI 2<" in target.read_text()
    assert "cell.svg" in widget.form.status.text()


def test_a_figure_is_that_of_the_picked_roi_and_named_after_it(
    qtbot, show_movie, open_table, canvas, network, monkeypatch, tmp_path
):
    show_movie()
    inference, widget = open_table()
    named = []
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *asked: (named.append(asked[2]), ("", ""))[1])
    click_row(widget, 1)
    qtbot.waitUntil(widget.form.figure.isEnabled)
    network.broken.add(2)
    with qtbot.waitSignal(inference.failed, timeout=20_000):
        click_row(widget, 2)
        assert not widget.form.figure.isEnabled()
    assert not widget.form.figure.isEnabled()
    with pytest.raises(calvae.RecordingError, match="expected a picked ROI"):
        widget.save_figure(tmp_path / "roi_2.svg")
    canvas.click(*CENTRES[3])
    qtbot.waitUntil(widget.form.figure.isEnabled, timeout=20_000)
    widget.current = 2  # whatever row is chosen
    qtbot.mouseClick(widget.form.figure, Qt.MouseButton.LeftButton)
    assert named == ["roi_3.svg"]


def test_the_script_goes_to_the_clipboard(qtbot, show_movie, open_table, viewer):
    show_movie()
    inference, widget = open_table()
    inference.controls.neuropil.setValue(0.4)
    click_row(widget, 2)
    qtbot.mouseClick(widget.form.reject, Qt.MouseButton.LeftButton)
    qtbot.mouseClick(widget.form.python, Qt.MouseButton.LeftButton)
    text = QApplication.clipboard().text()
    compile(text, "script", "exec")
    assert f"frame_rate={FRAME_RATE}, neuropil_coefficient=0.4" in text
    assert "rejected = [2]" in text
    names: dict = {}
    exec(text[text.index("packed = (") : text.index("traces =")], _imports(), names)
    np.testing.assert_array_equal(names["labels"], viewer.layers["ROIs"].data)


def _imports():
    import base64
    import zlib

    return {"np": np, "base64": base64, "zlib": zlib}


def test_the_sample_is_found_by_its_script(qtbot, viewer, open_table):
    from napari_calvae._napari.contributions import open_sample, sample_folder

    for data, options, kind in open_sample():
        getattr(viewer, f"add_{kind}")(data, **options)
    _, widget = open_table()
    text = widget.script()
    assert f"calvae.read_movie({str(sample_folder() / 'movie.tif')!r})" in text
    assert "calvae.read_labels(" in text


def test_alone_it_opens_the_inference_widget(qtbot, show_movie, viewer):
    from napari_calvae._napari.inference_widget import InferenceWidget

    show_movie()
    dock, widget = viewer.window.add_plugin_dock_widget("napari-calvae", "quality table")
    inference = InferenceWidget.of(viewer)
    assert widget._inference is inference
    qtbot.waitUntil(lambda: not inference._clicked.busy, timeout=60_000)
    infer_all(qtbot, widget)
    viewer.window._wrapped_dock_widgets["spike inference (napari-calvae)"].destroyOnClose()
    qtbot.waitUntil(lambda: widget._inference is None)
    assert cells(widget, "roi") == []
    assert "opens it again" in widget.form.status.text()
    qtbot.mouseClick(widget.form.infer_all, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: widget.table.inferred == 3, timeout=20_000)
    again = InferenceWidget.of(viewer)
    assert again is not inference
    qtbot.waitUntil(lambda: not again._clicked.busy and not again._batch.busy, timeout=60_000)
    dock.destroyOnClose()
    qtbot.waitUntil(lambda: widget._closed)
    again.close_down()


def test_docks_at_the_right_share_a_place(qtbot, show_movie, viewer, open_table):
    from napari_calvae._napari.quality_widget import QualityWidget

    show_movie()
    _, widget = open_table()
    other = QualityWidget(viewer)  # any other widget of ours would do
    dock = viewer.window.add_dock_widget(other, name="another", area="right")
    first = viewer.window._wrapped_dock_widgets["quality table"]
    window = viewer.window._qt_window
    qtbot.waitUntil(lambda: window.tabifiedDockWidgets(first) == [dock])
    dock.destroyOnClose()
    qtbot.waitUntil(lambda: other._closed)
    assert widget._attached


@pytest.mark.parametrize("how", ["dock", "window"])
def test_closing_leaves_nothing(qtbot, show_movie, open_table, viewer, how):
    show_movie()
    layer = viewer.layers["ROIs"]
    before = dict(viewer.keymap), layer.colormap, layer.contour
    listeners = {name: len(getattr(layer.events, name).callbacks) for name in ("data", "paint", "features")}
    inference, widget = open_table()
    infer_all(qtbot, widget)
    choose(widget.form.colour, "noise_level")
    assert len(viewer.keymap) == len(before[0]) + 8
    if how == "dock":
        viewer.window._wrapped_dock_widgets["quality table"].destroyOnClose()
    else:
        viewer.close()
    qtbot.waitUntil(lambda: not widget._attached, timeout=10_000)
    assert (dict(viewer.keymap), layer.colormap, layer.contour) == before
    if how == "dock":
        inference.ask(2)  # nobody listens any more
        qtbot.waitUntil(lambda: inference.plots.picture is not None)
        inference.close_down()
    assert {name: len(getattr(layer.events, name).callbacks) for name in listeners} == listeners or how == "window"


def test_keys_that_are_taken_are_left_alone(qtbot, show_movie, open_table, viewer):
    show_movie()
    pressed = []
    viewer.bind_key("N", lambda _: pressed.append("N"))
    _, widget = open_table()
    press(viewer, Qt.Key.Key_N)
    assert pressed == ["N"]
    assert "N: next" not in widget.form.keys.toolTip()
    widget.close_down()
    press(viewer, Qt.Key.Key_N)
    assert pressed == ["N", "N"]
    viewer.bind_key("N", None)


def test_the_keys_are_free_in_napari():
    from app_model.types import KeyBinding
    from napari.layers import Image, Labels, Points, Shapes
    from napari.viewer import Viewer

    from napari_calvae._napari.keys import KEYS

    for owner in (Viewer, Image, Labels, Points, Shapes):
        taken = {key for cls in owner.__mro__ for key in getattr(cls, "class_keymap", {})}
        assert not taken & {KeyBinding.from_str(key) for key, _, _ in KEYS}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes(qtbot, show_movie, open_table, viewer, theme):
    show_movie()
    _, widget = open_table()
    viewer.theme = theme
    assert widget.model.verdict_colours[judging.REJECTED] == {"light": "#d55e00", "dark": "#ffa23a"}[theme]


def test_everything_says_what_it_is_and_fits(qtbot, show_movie, open_table, viewer):
    from qtpy.QtWidgets import QComboBox, QLineEdit, QPushButton, QToolButton

    show_movie()
    _, widget = open_table()
    assert widget.minimumSizeHint().width() <= 340
    for kind in (QPushButton, QToolButton, QComboBox, QLineEdit):
        for control in widget.form.findChildren(kind):
            inner = control.objectName().startswith("qt_") or isinstance(control.parent(), QLineEdit | QComboBox)
            assert inner or control.toolTip() or control is widget.form.table, control.text()


@pytest.mark.parametrize("n_actions", [80, pytest.param(300, marks=pytest.mark.slow)])
def test_random_actions(n_actions, qtbot, show_movie, open_table, canvas, viewer):
    """Whatever is pressed in whatever order: no error, and what is shown holds."""
    show_movie()
    viewer.layers["ROIs"].metadata["spike_times"] = {1: np.array([2.0, 5.5])}
    inference, widget = open_table()
    plots, controls = inference.plots, inference.controls
    form, rng = widget.form, np.random.default_rng(5)
    layer = viewer.layers["ROIs"]
    keys = [*"NWKJU", "Down", "Up"]

    def any_row():
        if widget.model.order:
            click_row(widget, int(rng.choice(widget.model.order)))

    def any_filter():
        form.filter.setText(str(rng.choice(["", "roi > 1", "noise_level < 9", "bad"])))
        qtbot.keyClick(form.filter, Qt.Key.Key_Return)

    def paint():
        y, x = rng.integers(0, 40, 2)
        layer.data_setitem((np.array([y]), np.array([x])), int(rng.integers(0, 6)))

    def hide_and_seek():
        viewer.layers.remove(layer)
        # A click may have made a layer of its own.
        qtbot.waitUntil(lambda: cells(widget, "roi") == [] or controls.rois.count() > 0)
        viewer.add_layer(layer)

    def zoom():
        left = rng.uniform(0, 18)
        plots.trace_row.view.setXRange(left, left + rng.uniform(0.5, 2), padding=0)

    def unpin():
        if plots.pinned.cells:
            qtbot.mouseClick(plots.pinned.cells[rng.choice(list(plots.pinned.cells))].close_button, BUTTON)

    buttons = [plots.pin_button, plots.truth_button, plots.rival_button, plots.activity_button]
    actions = [
        zoom,
        unpin,
        lambda: qtbot.mouseClick(rng.choice(buttons), BUTTON),
        lambda: qtbot.mouseClick(rng.choice(buttons), BUTTON),
        lambda: canvas.click(*rng.integers(1, 39, 2)),
        lambda: viewer.dims.set_current_step(0, int(rng.integers(400))),
        lambda: setattr(viewer, "theme", str(rng.choice(["light", "dark"]))),
        lambda: controls.neuropil.setValue(float(rng.choice([0.0, 0.7]))),
        lambda: controls.place.setChecked(bool(rng.integers(2))),
        any_row,
        any_filter,
        paint,
        hide_and_seek,
        inference.infer_all,
        inference.cancel,
        lambda: press(viewer, getattr(Qt.Key, f"Key_{rng.choice(keys)}")),
        lambda: click_head(widget, str(rng.choice(widget.model.names))),
        lambda: canvas.click(*CENTRES[int(rng.integers(1, 4))]),
        lambda: form.colour.setCurrentIndex(int(rng.integers(form.colour.count()))),
        lambda: form.listed.setCurrentIndex(int(rng.integers(form.listed.count()))),
        lambda: inference.controls.samples.setValue(int(rng.choice([10, 20]))),
        lambda: qtbot.mouseClick(rng.choice([form.accept, form.reject, form.clear, form.undo]), BUTTON),
        lambda: QTest.qWait(int(rng.integers(0, 200))),
    ]
    for number in rng.integers(0, len(actions), n_actions):
        actions[number]()
    choose(form.listed, "all")
    form.filter.clear()
    choose(form.colour, "none")
    controls.choose_rois(layer)
    qtbot.waitUntil(lambda: not inference._clicked.busy and not inference._batch.busy, timeout=20_000)
    inference.infer_all()
    rois = sorted(np.unique(layer.data[layer.data > 0]).tolist())
    qtbot.waitUntil(lambda: sorted(widget.model.order) == rois and widget.table.inferred == len(rois), timeout=20_000)
    key = inference.choices.rois()[0]
    for roi, note in zip(widget.model.order, cells(widget, "noise_level"), strict=True):
        assert float(note) == pytest.approx(inference.results.get(key, roi).quality["noise_level"][0], abs=0.06)
    written = layer.features.set_index("index")["verdict"] if len(layer.features) else {}
    assert all(written.get(roi, "") == widget.judged.of(roi).verdict for roi in rois)
    canvas.click(*np.argwhere(layer.data == rois[-1])[0])
    qtbot.waitUntil(lambda: plots.picture is not None and plots.picture.roi_ids == (rois[-1],), timeout=20_000)
    np.testing.assert_array_equal(plots.picture.rate, inference.results.get(key, rois[-1]).rate)


def test_a_roi_in_parts_is_outlined_in_parts(qtbot, show_movie, open_table, viewer):
    show_movie()
    inference, widget = open_table()
    layer = viewer.layers["ROIs"]
    click_row(widget, 1)
    qtbot.waitUntil(lambda: "picked ROI" in viewer.layers)
    outline = viewer.layers["picked ROI"]
    assert outline.nshapes == 1
    layer.data_setitem((np.array([2, 2, 38]), np.array([37, 38, 2])), 1)
    inference.ask(1)
    qtbot.waitUntil(lambda: outline.nshapes == 3)
    np.testing.assert_allclose(outline.edge_color, outline.edge_color[:1].repeat(3, axis=0))
    layer.data_setitem((np.array([2, 2, 38]), np.array([37, 38, 2])), 0)
    inference.ask(1)
    qtbot.waitUntil(lambda: outline.nshapes == 1)
    inference._outline.show(np.zeros((40, 40), bool), viewer.layers["movie"])
    inference._outline.show(np.zeros((40, 40), bool), viewer.layers["movie"])
    assert outline.nshapes == 0
    inference.ask(2)
    qtbot.waitUntil(lambda: outline.nshapes == 1)
    qtbot.waitUntil(lambda: not inference._clicked.busy)


def test_the_question_mark_lists_the_keys(qtbot, show_movie, open_table):
    from qtpy.QtWidgets import QToolTip

    show_movie()
    _, widget = open_table()
    qtbot.mouseClick(widget.form.keys, BUTTON)
    assert "W: worst cell by the sorted column" in QToolTip.text()
    QToolTip.hideText()
    qtbot.waitUntil(lambda: not QToolTip.isVisible())


def test_the_amortization_gap_of_chosen_cells_on_request(qtbot, show_movie, open_table, monkeypatch):
    from types import SimpleNamespace

    asked = []

    def diagnose(traces, model, amplitude):
        asked.append((traces.roi_ids, traces.duration, model, amplitude))
        return SimpleNamespace(amortization_gap=np.array([0.5 + traces.roi_ids[0]]))

    monkeypatch.setitem(vars(calvae), "diagnose", diagnose)
    show_movie()
    inference, widget = open_table()
    qtbot.mouseClick(widget.form.gap, BUTTON)
    assert "rows of inferred cells first" in widget.form.status.text()
    infer_all(qtbot, widget)
    assert "amortization_gap" not in widget.model.names
    click_row(widget, 2)
    qtbot.mouseClick(widget.form.gap, BUTTON)
    qtbot.waitUntil(lambda: "amortization_gap" in widget.model.names, timeout=10_000)
    assert asked == [((2,), 20.0, "universal", None)]
    shown = dict(zip(widget.model.order, cells(widget, "amortization_gap"), strict=True))
    assert float(shown[2]) == 2.5
    assert shown[1] == shown[3] == ""
    assert "refining gains 2.50 nats/s" in widget.form.status.text()
    inference.controls.samples.setValue(20)  # another result: its gap is not known
    qtbot.waitUntil(lambda: "amortization_gap" not in widget.model.names, timeout=10_000)


def test_refining_without_a_frame_rate_gets_a_sentence(qtbot, show_movie, open_table):
    show_movie(metadata={}, scale=(1, 1, 1))
    _, widget = open_table()
    widget.form.say("")
    qtbot.mouseClick(widget.form.gap, BUTTON)
    assert "Frame rate: expected" in widget.form.status.text()


def test_all_distributions_in_a_window_of_their_own(qtbot, show_movie, open_table):
    show_movie()
    _, widget = open_table()
    infer_all(qtbot, widget)
    click_row(widget, 2)
    qtbot.mouseClick(widget.form.every, BUTTON)
    dashboard = widget.dashboard
    assert dashboard.isVisible()
    assert list(dashboard.distributions) == [column.name for column in widget.table.columns]
    shown = dashboard.distributions["noise_level"]
    assert shown.counts.sum() == 3
    assert shown.mark.value() == pytest.approx(10.0)
    assert dashboard.distributions["spikes"].toolTip().startswith("Number of spikes in the recording")
    click_row(widget, 1)
    qtbot.waitUntil(lambda: shown.mark.value() == pytest.approx(2.0), timeout=5000)
    dashboard.close()
    assert not dashboard.isVisible()
