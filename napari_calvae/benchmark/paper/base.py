"""What a proof is, and what it may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from napari_calvae.recording import RecordingError

#: One row of a proof's table: column heads to words or numbers.
Row = dict[str, str | int | float]


@dataclass(frozen=True)
class Setting:
    """What a proof is run with.

    Parameters
    ----------
    cache
        Folder for checkpoints and for models that several proofs share; a proof that is run again resumes from there.
    data
        Folder of ground truth, for proofs on real recordings.
    seed
        Of every random number.
    quick
        Run the same code on so little that it ends in seconds, to see that it runs: the numbers mean nothing.
    """

    cache: Path
    data: Path | None = None
    seed: int = 0
    quick: bool = False

    def ground_truth(self) -> Path:
        """The folder of real recordings, or an error that says how to give it."""
        if self.data is None or not self.data.is_dir():
            raise RecordingError(
                f"data: expected a folder of ground truth for this proof, got {self.data}. Give it with --data FOLDER."
            )
        return self.data


@dataclass(frozen=True)
class Proof:
    """An experiment with a table for an outcome.

    Parameters
    ----------
    name
        Word on the command line and name of its record.
    title
        What the report calls it.
    claim
        What has to come out for it to hold, in a sentence or two, rivals and targets included.
    run
        Yields the rows.
    real
        Whether it needs real recordings.
    """

    name: str
    title: str
    claim: str
    run: Callable[[Setting], Iterator[Row]]
    real: bool = False
