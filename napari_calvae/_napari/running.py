"""Inferring all ROIs into a store, here or on a cluster, step by step and without Qt."""

from __future__ import annotations

import html
import logging
import queue
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import napari_calvae as calvae
from napari_calvae._napari import answers
from napari_calvae._napari.session import explain
from napari_calvae._napari.stored import FromStore

logger = logging.getLogger(__name__)

#: Time (s) after which somebody who waits looks whether he is still wanted.
_HEARTBEAT = 0.2
#: How long (s) a new run waits for a cancelled one to let go of its store.
_PATIENCE = 60.0
#: Colour of links, legible on dark and on light.
_LINK = "#6f9fd8"


@dataclass(frozen=True, eq=False)
class Order:
    """One run: what to infer, into which store, and where.

    ``scheduler`` is as in `calvae.iter_batch`; None is this process. Of ROIs from a file all that are in it are
    inferred, else those that the request wants.
    """

    request: answers.Request
    out: Path
    scheduler: str | None = None

    @property
    def place(self) -> str:
        """Where it is computed, in words."""
        return "this computer" if self.scheduler is None else self.scheduler


@dataclass(frozen=True)
class Running:
    """How far a run is; ``total`` is 0 before that is known."""

    number: int
    place: str
    out: Path
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    dashboard: str = ""
    ended: bool = False

    @property
    def fraction(self) -> float:
        """Share of the ROIs that is done."""
        return self.done / self.total if self.total else 0.0

    @property
    def words(self) -> str:
        """How far it is, in rich text, with the link to the dashboard."""
        name = html.escape(self.out.name)
        if self.ended:
            return f"All {self.total} ROIs are in {name}."
        left = "" if self.seconds_left is None else f", {time_left(self.seconds_left)}"
        far = f"{self.done} of {self.total} ROIs in {name}{left}" if self.total else "starting"
        address = html.escape(self.dashboard, quote=True)
        link = f' · <a href="{address}" style="color: {_LINK}">dashboard</a>' if self.dashboard else ""
        return f"On {html.escape(self.place)}: {far}{link}"


Message = Running | answers.Progress | answers.Found | answers.Failure


def time_left(seconds: float) -> str:
    """Time in words: “40 s left”, “3 min left”."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"


class _Engine(threading.Thread):
    """Runs `calvae.iter_batch`, which says nothing before a block is done, apart from those who wait for it.

    Its ``news`` are what the batch yields, an exception if it fails, and None at the end.
    """

    #: The one that was started last.
    newest: _Engine | None = None

    def __init__(self, source: calvae.TraceSource | calvae.Traces, out: Path, **settings: Any):
        super().__init__(daemon=True, name="calvae batch")
        self.news: queue.Queue[Any] = queue.Queue()
        self.stop = threading.Event()
        self.out = out
        self._source, self._settings = source, settings

    def run(self) -> None:
        """Called by `start`."""
        try:
            steps = calvae.iter_batch(self._source, self.out, **self._settings)
            try:
                for step in steps:
                    self.news.put(step)
                    if self.stop.is_set():
                        break
            finally:
                steps.close()
        except Exception as error:
            logger.info("batch failed", exc_info=True)
            self.news.put(error)
        finally:
            self.news.put(None)


def iter_run(order: Order) -> Iterator[Message]:
    """Run an order; to stop consuming is to cancel, what is in the store stays. Errors come as a ``Failure``."""
    number = order.request.number
    try:
        yield Running(number, order.place, order.out)
        source: calvae.TraceSource | calvae.Traces | None = answers.source_of(order.request)
        if source is None:
            source = yield from answers.iter_traces(order.request)
        yield from _iter_engine(order, source)
    except Exception as error:
        logger.info("run %d failed", number, exc_info=True)
        yield answers.Failure(number, explain(error))


def _iter_wait(state: Running) -> Iterator[Running]:
    """Wait while a run that was cancelled finishes the blocks that it has in hand: two must not write one store."""
    before, begun = _Engine.newest, time.monotonic()
    while before is not None and before.out == state.out and before.is_alive():
        if time.monotonic() - begun > _PATIENCE:
            raise calvae.RecordingError(
                f"{state.out.name}: expected the run that was cancelled to have ended, got one that still waits for "
                "its workers. Choose another name for the store, or start napari again."
            )
        yield state
        before.join(_HEARTBEAT)


def _iter_engine(order: Order, source: calvae.TraceSource | calvae.Traces) -> Generator[Message, None, None]:
    state = Running(order.request.number, order.place, order.out)
    yield from _iter_wait(state)
    settings = order.request.settings.for_inference
    engine = _Engine.newest = _Engine(source, order.out, scheduler=order.scheduler, **settings)
    engine.start()
    results: FromStore | None = None
    try:
        while True:
            try:
                news = engine.news.get(timeout=_HEARTBEAT)
            except queue.Empty:
                yield state
                continue
            if isinstance(news, Exception):
                raise news
            if news is not None or results is not None:
                results = results or FromStore(calvae.open_result(order.out))
                rows = tuple(results.news())
                if rows:
                    yield answers.Found(state.number, results, rows)
            if news is not None:
                far = (news.done, news.total, news.seconds_left, news.dashboard)
                state = Running(state.number, order.place, order.out, *far)
                yield state
            if news is None:
                yield Running(state.number, order.place, order.out, state.done, state.total, ended=True)
                return
    finally:
        engine.stop.set()
