"""Settings that outlast the session, in napari's plugin configurations; without them the defaults hold."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

PLUGIN, CATEGORY = "napari-calvae", "inference"
#: What is remembered, and what holds until the user says otherwise; the same as in the manifest.
DEFAULTS: dict[str, Any] = {
    "samples": 50,
    "neuropil_coefficient": 0.7,
    "diameter": 10,
    "snap": True,
    "device": "auto",
}


def read() -> dict[str, Any]:
    """Values as they were left, or the defaults where there are none or broken ones."""
    store = _store()
    return {name: getattr(store, name, default) for name, default in DEFAULTS.items()}


def write(name: str, value: Any) -> None:
    """Remember a value from now on; what cannot be stored is not worth an interruption."""
    store = _store()
    if store is None or getattr(store, name, value) == value:
        return
    try:
        setattr(store, name, value)
    except (ValueError, OSError):
        logger.info("%s was not stored", name, exc_info=True)


def _store() -> Any:
    """Our settings as napari keeps them, or None: napari before 0.9 keeps none."""
    try:
        from napari.settings import get_plugin_settings

        return getattr(get_plugin_settings(PLUGIN), CATEGORY)
    except Exception:
        logger.info("no stored settings", exc_info=True)
        return None
