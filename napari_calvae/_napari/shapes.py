"""Pixels inside drawn shapes, without Qt: those whose centre is inside the outline."""

from __future__ import annotations

import numpy as np

#: Shapes that have an inside, by napari's names.
AREAS = ("ellipse", "polygon", "rectangle")


def pixels_inside(kind: str, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Flat indices of the pixels inside a shape, in an image of ``size`` (y, x).

    Parameters
    ----------
    kind
        One of ``AREAS``.
    corners
        (corner, 2) positions (y, x) in pixels; of an ellipse the four corners of the box around it, in turn.
    size
        (y, x) of the image.
    """
    if kind == "ellipse":
        return _inside_ellipse(corners, size)
    from skimage.draw import polygon  # napari brings it

    y, x = polygon(corners[:, 0], corners[:, 1], size)
    return y * size[1] + x


def _inside_ellipse(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels that the map from the box to a unit square brings within the unit circle."""
    centre = corners.mean(axis=0)
    axes = np.stack([corners[1] - corners[0], corners[3] - corners[0]], axis=1) / 2
    if abs(np.linalg.det(axes)) < 1e-9:
        return np.empty(0, np.int64)
    low = np.clip(np.floor(corners.min(axis=0)), 0, size).astype(int)
    high = np.clip(np.ceil(corners.max(axis=0)) + 1, low, size).astype(int)
    y, x = np.mgrid[low[0] : high[0], low[1] : high[1]]
    place = np.linalg.inv(axes) @ np.stack([y.ravel() - centre[0], x.ravel() - centre[1]])
    return (y * size[1] + x).ravel()[(place**2).sum(axis=0) <= 1]
