"""Parquet tables (being built)."""

from __future__ import annotations

from pathlib import Path

PATTERNS: tuple[str, ...] = ()


def matches(path: Path) -> bool:
    """Tell whether this is one."""
    return False
