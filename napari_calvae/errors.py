"""Errors about input that cannot be used; ``docs/errors.md`` has their codes."""

from __future__ import annotations

from typing import Any

_WORDS = """
accepted accuracy amplitude append baseline block-rois checkpoint click-benchmark concatenate data demo device
diameter early-stopping expect figure figures filter folds frame-rate frames ground-truth input interval label-image
labelled-spikes level model movie n-rounds neuropil neuropil-coefficient oasis objective onset output parquet parts
pattern positions pulses refinement repeat roi roi-id roi-ids rois sample-data save scheduler script seed shaft
simulate spikes spikevae spines stimulation targets theta tour traces trust unit valid values view wanted window
"""
#: What an error can be about, besides files.
CODES = frozenset(_WORDS.split())


class InputError(ValueError):
    """The message begins with what it is about, and a colon."""

    @property
    def code(self) -> str:
        """What it is about, one of `CODES`; ``"file"`` where the message begins with the name of one."""
        words = str(self).partition(":")[0].replace("_", " ").lower().split()
        return next((code for code in ("-".join(words[:2]), *words[:1]) if code in CODES), "file")


class RecordingError(InputError):
    """Input that cannot be what it claims to be; the message says what was expected, what came, what to do."""


def setting_error(error: Any) -> RecordingError:
    """What pydantic found wrong with settings, a ``ValidationError``, in one sentence about the first of them."""
    problem = error.errors()[0]
    expected = problem["msg"].replace("Input should be", "expected a value").replace("a value a ", "a ")
    return RecordingError(f"{'.'.join(map(str, problem['loc']))}: {expected}, got {problem['input']!r}.")


class ModelError(InputError):
    """A model that cannot be read or used; the message says what was expected, what came, what to do."""
