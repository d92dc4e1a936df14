"""Every error says what it is about, and the page of errors explains it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import napari_calvae as calvae
from napari_calvae.errors import CODES, ModelError, RecordingError

ROOT = Path(__file__).parents[1]


def beginnings() -> list[tuple[str, str]]:
    """Where an error about input is made, and what its message begins with, names of files as ``{…}``."""
    found = []
    for file in sorted((ROOT / "napari_calvae").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("RecordingError", "ModelError"):
                message = node.args[0]
                parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                text = "".join(str(p.value) if isinstance(p, ast.Constant) else "{…}" for p in parts)
                found.append((f"{file.name}:{node.lineno}", text))
    return found


def test_all_messages_begin_with_a_code_or_a_file():
    messages = beginnings()
    assert len(messages) > 200
    unknown = [
        (where, text)
        for where, text in messages
        if not text.startswith("{…}") and ":" in text and RecordingError(text).code == "file"
    ]
    assert unknown == []


def test_the_page_explains_every_code_and_no_other():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \|", page, re.M)
    explained = re.findall(r"`([a-z-]+)`", " ".join(rows))
    assert sorted(explained) == sorted({*CODES, "file"})


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: calvae.Traces([[0.0, 1.0]], None), "frame-rate"),
        (lambda: calvae.Traces([["a"]], 30.0), "traces"),
        (lambda: calvae.RoiMasks.from_labels([[0]]), "label-image"),
        (lambda: calvae.infer(calvae.Traces([[0.0, 1.0] * 60], 30.0), "no such model"), "model"),
        (lambda: calvae.write(calvae.Traces([[0.0, 1.0]], 30.0), "a.docx"), "output"),
    ],
)
def test_errors_have_their_code(make, code):
    with pytest.raises((RecordingError, ModelError)) as error:
        make()
    assert error.value.code == code


def test_a_file_with_the_name_of_something_is_a_file(tmp_path):
    (tmp_path / "traces.npz").write_bytes(b"nothing")
    with pytest.raises(RecordingError) as error:
        calvae.read(tmp_path / "traces.npz", 30.0)
    assert error.value.code == "file"
