"""`headrace replay`: the batches of any steps, made again from the ledger and the dataset index.

The plans are the logged ones, no policy is run; the lanes' places come from the ledger, so that
only the windows are opened in which these steps lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.config import RunConfig, load_run_file, parse_run
from controller.history import (
    LaneCursors,
    book_from,
    counts_of_their_own,
    cursors_before,
    read_amendments,
)
from controller.ledger import reading_ledger
from controller.ledger_schema import Kind
from controller.ledger_view import LedgerView
from deploy.dataset import Dataset, open_dataset
from deploy.record import ledger_of, settings_of
from deploy.runfile import RUN_FILE
from loader_workers.cache import ShardCache
from loader_workers.composer import Composer
from loader_workers.convert import Converter
from loader_workers.source import WindowSource
from loader_workers.token_shard import Tokens
from loader_workers.tokenize import make_tokenize
from protos.errors import ConfigError, LedgerError
from protos.planbook import PlanBook
from protos.slots import lane_counts
from protos.spec import RunSpec
from protos.types import Cursors, Lane, Step


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ReplayedStep:
    """A step's global batch in the order of slots."""

    step: int
    plan_version: int
    tokens: Tokens
    """[global_sequences, sequence_length + 1]; after a sequence's last token the end-of-text one"""

    domain_ids: NDArray[np.uint16]
    """[global_sequences]: positions in the run's domains."""

    num_tokens: NDArray[np.uint32]
    """[global_sequences]: not padding."""

    places: NDArray[np.uint32]
    """[global_sequences, 3]: epoch, window and sequence of the lane that a slot belongs to."""

    def digests(self) -> list[str]:
        """Return the SHA-256 of each slot's tokens, as the trainers' logs have it."""
        return [hashlib.sha256(row.tobytes()).hexdigest() for row in self.tokens]


def parse_steps(text: str) -> tuple[int, int | None]:
    """Return the first step and the one after the last of `A:B`, `A:`, `:B` or `A`; None: all.

    Raises:
        ConfigError: it is none of these.
    """
    first, colon, end = text.partition(":")
    try:
        start = int(first) if first or not colon else 0
        stop = (int(end) if end else None) if colon else start + 1
    except ValueError:
        start, stop = -1, 0
    if start < 0 or (stop is not None and stop <= start):
        raise ConfigError(
            f"--steps is A:B, from step A up to but without step B, or one step; got {text!r}"
        )
    return start, stop


class Replay:
    """A run's steps as they were, or must have been, delivered. Use it in a `with` block."""

    def __init__(self, source: Path, *, first: int, end: int | None, cache: Path) -> None:
        """Read what the ledger says of the steps from `first` up to, without, `end`.

        Args:
            source: the ledger, or the folder of a run.
            first: first step.
            end: step after the last; None: after the last that is final.
            cache: folder for token shards, a worker's or one's own.

        Raises:
            LedgerError: the ledger is missing or damaged.
            ConfigError: it does not know the steps, or the data is not the run's any more.
            DataError: the index or the tokenizer cannot be used.
        """
        path = ledger_of(source)
        with reading_ledger(path) as database:
            view = LedgerView(database)
            self.config = _config(source, view, path)
            self.dataset = open_dataset(self.config)
            self.spec = self.dataset.spec
            _check_order(view, self.spec, path)
            seal = view.newest(Kind.SEAL)
            sealed_through = seal.step if seal is not None else -1
            last = sealed_through if end is None else end - 1
            if not first <= last <= sealed_through:
                raise ConfigError(
                    f"{path} knows the plans of steps 0 to {sealed_through}, not all of steps "
                    f"{first} to {last}"
                )
            self.steps = range(first, last + 1)
            self._known = cursors_before(view, Step(first), self.spec)
            floor = min((step for step, _ in self._whole(self._known).values()), default=Step(0))
            self._book = book_from(view, Step(floor), self.spec, through=Step(last))
            self._own = counts_of_their_own(view, self.spec, first=floor, last=last)
            self.otherwise = _otherwise(view, self.steps, self._book)
            """Steps in which ranks say that they had another plan than the ledger's."""
        self._cache = cache
        self._stack = ExitStack()
        self._source: WindowSource | None = None

    def __enter__(self) -> Replay:
        cache = self._stack.enter_context(_open_cache(self.config, self.dataset, self._cache))
        source = WindowSource(self.spec, self.dataset.index, cache)
        self._source = self._stack.enter_context(source)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[ReplayedStep]:
        """Yield the steps in order.

        Raises:
            DataError: the shards do not hold what the index says.
        """
        assert self._source is not None, "outside a `with` block"
        known = self._whole(self._known)
        cursors: Cursors = {lane: places for lane, (_, places) in known.items()}
        composer = Composer(
            self._source, cursors, first_slot=0, end_slot=self.spec.global_sequences
        )
        try:
            composer.wind(self._passed(known))
            for number in self.steps:
                step = Step(number)
                composer.prepare(self._book.plan_at(step).mixture.shares)
                yield self._compose(composer, step)
        finally:
            composer.close()

    def _compose(self, composer: Composer, step: Step) -> ReplayedStep:
        batches = composer.compose(step, self._book.counts(step), own=self._own.get(step, {}))
        return ReplayedStep(
            step=step,
            plan_version=self._book.plan_at(step).version,
            tokens=np.concatenate([batch.tokens for batch in batches]),
            domain_ids=np.concatenate([batch.domain_ids for batch in batches]),
            num_tokens=np.concatenate([batch.num_tokens for batch in batches]),
            places=np.concatenate([batch.places for batch in batches]),
        )

    def _whole(self, known: LaneCursors) -> LaneCursors:
        """Return a place for every lane; where the ledger has none, the run's beginning."""
        zeros = np.zeros((self.spec.num_domains, 3), np.uint32)
        lanes = (Lane(lane) for lane in range(self.spec.lanes))
        return {lane: known.get(lane, (Step(0), zeros)) for lane in lanes}

    def _passed(self, known: LaneCursors) -> dict[Lane, NDArray[np.int64]]:
        """Return how many sequences of each domain lie between the places and the first step."""
        spec = self.spec
        passed = {lane: np.zeros(spec.num_domains, np.int64) for lane in known}
        for step in range(min(step for step, _ in known.values()), self.steps.start):
            counts = self._book.counts(Step(step))
            dealt = lane_counts(counts, lanes=spec.lanes, seed=spec.seed, step=Step(step))
            for lane, own in self._own.get(step, {}).items():
                theirs = lane_counts(own, lanes=spec.lanes, seed=spec.seed, step=Step(step))
                dealt[lane] = theirs[lane]
            for lane, (begin, _) in known.items():
                if begin <= step:
                    passed[lane] += dealt[lane]
        return passed


def _config(source: Path, view: LedgerView, ledger: Path) -> RunConfig:
    run_file = source / RUN_FILE
    if run_file.is_file():
        return load_run_file(run_file)
    run = view.newest(Kind.RUN)
    if run is None:
        raise LedgerError(f"the ledger {ledger} names no run yet; start its controller first")
    return parse_run(settings_of(run.body), source=str(ledger))


def _check_order(view: LedgerView, spec: RunSpec, ledger: Path) -> None:
    run = view.newest(Kind.RUN)
    if run is None or not spec.has_order(run.body["order_sha256"]):
        raise ConfigError(
            f"the ledger {ledger} belongs to data of another order (seed, domains, batch, index or "
            "tokenizer differ): bring back the index and the run file that the run had"
        )


def _otherwise(view: LedgerView, steps: range, book: PlanBook) -> list[int]:
    found, amendments = set(), read_amendments(view)
    for row in view.rows(Kind.STEP, min_step=steps.start, max_step=steps.stop - 1):
        versions: list[Any] = row.body.get("executed_plan_versions", [])
        recorded = set(amendments.lanes_of_their_own(Step(row.step)).values())
        recorded.add(book.plan_at(Step(row.step)).version)
        if not recorded.issuperset(versions):
            found.add(row.step)
    return sorted(found)


def _open_cache(config: RunConfig, dataset: Dataset, folder: Path) -> ShardCache:
    spec, tokenizer = dataset.spec, dataset.tokenizer
    converter = Converter.of_run(spec, make_tokenize(tokenizer) if tokenizer is not None else None)
    return ShardCache(
        folder,
        budget_bytes=config.workers.cache_bytes,
        converter=converter,
        tokenizer_sha256=hashlib.sha256(tokenizer or b"").hexdigest(),
        threads=config.workers.threads,
    )
