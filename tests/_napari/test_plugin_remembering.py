"""Settings that outlast the session: through napari's own store, broken files included."""

from __future__ import annotations

import builtins

import napari.settings
import npe2
import pytest
import yaml

from napari_calvae._napari import remembering

pytestmark = pytest.mark.usefixtures("network")
kept = pytest.mark.skipif(
    not hasattr(napari.settings, "get_plugin_settings"), reason="napari before 0.9 keeps no settings of plugins"
)


def test_the_manifest_and_the_defaults_agree():
    manifest = npe2.PluginManifest.from_distribution(remembering.PLUGIN)
    declared = manifest.contributions.configurations[remembering.CATEGORY].properties
    assert {name: entry.default for name, entry in declared.items()} == remembering.DEFAULTS
    assert all(entry.title and entry.description for entry in declared.values())


@kept
def test_what_is_changed_is_there_when_the_widget_opens_again(qtbot, open_widget, own_settings):
    from napari import settings

    widget = open_widget()
    assert not own_settings.exists()  # nothing was changed yet
    controls = widget.controls
    qtbot.keyClicks(controls.samples.lineEdit(), "")
    controls.samples.setValue(20)
    controls.neuropil.setValue(0.35)
    controls.diameter.setValue(14)
    controls.snap.click()
    controls.device.setCurrentIndex(controls.device.findData("cpu"))
    widget.close_down()
    stored = yaml.safe_load(own_settings.read_text())["inference"]
    expected = {"samples": 20, "neuropil_coefficient": 0.35, "diameter": 14, "snap": False, "device": "cpu"}
    assert stored == expected
    settings._clear_plugin_settings_cache()  # as in another session
    controls = open_widget().controls
    given = controls.settings(30.0)
    assert (given.n_samples, given.neuropil_coefficient, given.device) == (20, 0.35, "cpu")
    assert (controls.diameter.value(), controls.snap.isChecked()) == (14, False)


@kept
@pytest.mark.parametrize(
    "text",
    [
        "inference: {samples: many, neuropil_coefficient: -4, diameter: 12, device: toaster}",
        "inference: [1, 2]",
        "inference: {unheard_of: 3, diameter: 12}",
        ": : :\n\t- not yaml {",
        "",
    ],
)
def test_a_broken_file_means_the_defaults(open_widget, own_settings, text):
    own_settings.write_text(text)
    controls = open_widget().controls
    given = controls.settings(30.0)
    assert (given.n_samples, given.neuropil_coefficient, given.device) == (50, 0.7, "auto")
    assert controls.diameter.value() == (12 if "diameter" in text else 10)


def test_older_napari_remembers_nothing_and_says_nothing(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "napari.settings":
            raise ImportError("no plugin settings")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert remembering.read() == remembering.DEFAULTS
    remembering.write("samples", 7)
    assert remembering.read() == remembering.DEFAULTS


@kept
def test_a_value_out_of_range_is_not_stored(own_settings):
    remembering.write("samples", 7)
    remembering.write("samples", 70_000)
    assert remembering.read()["samples"] == 7


@kept
def test_the_preferences_show_what_is_remembered(viewer):
    remembering.write("samples", 70)
    dialog = viewer.window._open_preferences_dialog()
    pages = [dialog._list.item(k).text() for k in range(dialog._list.count())]
    assert "calvae" in pages
    assert dialog._plugin_settings[remembering.PLUGIN].inference.samples == 70
    dialog.close()
