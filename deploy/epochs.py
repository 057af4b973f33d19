"""Do whole epochs of a domain add up to its index, token for token?

The accounting of places takes it for granted that the order visits every sample once. Here that is
checked as well: the documents of all windows that were received whole, over all lanes, must be the
documents of the domain's shards, and as many tokens must have counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from deploy.accounting import ExpectedOrder, Place
from deploy.dataset import Dataset, ShardOrder
from deploy.history import Delivery, History
from loader_workers.convert import Converter
from loader_workers.token_shard import Tokens
from loader_workers.tokenize import make_tokenize
from protos.spec import BEST_FIT
from protos.types import Lane


class Document(NamedTuple):
    """What tells a document from others."""

    sha256: str
    num_tokens: int


class Contents(ExpectedOrder, Protocol):
    """What windows and domains are made of; documents without tokens are left out."""

    @property
    def lanes(self) -> int:
        """How many lanes a domain is divided among."""

    def num_added(self, documents: Sequence[Document], num_sequences: int) -> int:
        """Return how many tokens so many sequences of a window hold beside its documents' own.

        These are end-of-text tokens, and tokens that begin a sequence after they ended another.
        """

    def documents(self, domain: str, lane: int, epoch: int, window: int) -> Sequence[Document]:
        """Return the documents that a window joins."""

    def all_documents(self, domain: str) -> Iterable[Document]:
        """Return what a domain's shards hold, read without regard to any order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochAccount:
    """A domain's epoch that every lane has come to the end of."""

    domain: str
    epoch: int
    num_documents: int
    """In the index, less what is quarantined."""

    num_tokens: int
    """In these documents."""

    tokens_delivered: int
    """That counted in what was received, separators and overlaps aside."""

    missing: int
    """Documents that were not delivered whole."""

    extra: int
    """Documents delivered that the index does not have, or not so often."""

    @property
    def exact(self) -> bool:
        """Every token of the index was delivered once."""
        return not (self.missing or self.extra) and self.tokens_delivered == self.num_tokens

    def fault(self) -> str:
        """Say what is wrong."""
        return (
            f"{self.domain}, epoch {self.epoch}: {self.missing} documents missing, {self.extra} "
            f"too many; {self.tokens_delivered} of {self.num_tokens} tokens counted"
        )


def account_for_epochs(history: History, contents: Contents) -> list[EpochAccount]:
    """Hold every epoch that is complete against the index."""
    by_domain: dict[str, dict[int, dict[Place, list[Delivery]]]] = {}
    for delivery in history.deliveries:
        lanes = by_domain.setdefault(delivery.domain, defaultdict(lambda: defaultdict(list)))
        lanes[delivery.lane][delivery.place].append(delivery)
    accounts: list[EpochAccount] = []
    for domain, lanes in sorted(by_domain.items()):
        num_epochs = _complete_epochs(contents, domain, {lane: max(lanes[lane]) for lane in lanes})
        if num_epochs:
            index = Counter(contents.all_documents(domain))
            accounts += (
                _hold(contents, domain, epoch, lanes, index) for epoch in range(num_epochs)
            )
    return accounts


def _complete_epochs(contents: Contents, domain: str, newest: Mapping[int, Place]) -> int:
    """Return how many epochs all lanes have come to the end of."""
    most = max(place[0] for place in newest.values()) + 1
    for epoch in range(most):
        for lane in range(contents.lanes):
            place = newest.get(lane, (-1, 0, 0))
            if place[0] > epoch:
                continue
            last = _last_place(contents, domain, lane, epoch)
            if last is not None and place < last:
                return epoch
    return most


def _last_place(contents: Contents, domain: str, lane: int, epoch: int) -> Place | None:
    for window in reversed(range(contents.num_windows(domain, lane, epoch))):
        num_sequences = len(contents.window(domain, lane, epoch, window))
        if num_sequences:
            return epoch, window, num_sequences - 1
    return None


def _hold(
    contents: Contents,
    domain: str,
    epoch: int,
    lanes: Mapping[int, Mapping[Place, list[Delivery]]],
    index: Counter[Document],
) -> EpochAccount:
    delivered: Counter[Document] = Counter()
    num_tokens = 0
    for lane in range(contents.lanes):
        received = lanes.get(lane, {})
        for window in range(contents.num_windows(domain, lane, epoch)):
            documents = contents.documents(domain, lane, epoch, window)
            came = [
                [one for one in received.get((epoch, window, sequence), []) if one.sha256 == sha256]
                for sequence, sha256 in enumerate(contents.window(domain, lane, epoch, window))
            ]
            for _ in range(min(map(len, came), default=0)):
                delivered.update(documents)
            each = [one.num_tokens for sequence in came for one in sequence]
            num_tokens += sum(each) - contents.num_added(documents, len(each)) if each else 0
    return EpochAccount(
        domain=domain,
        epoch=epoch,
        num_documents=index.total(),
        num_tokens=sum(one.num_tokens * count for one, count in index.items()),
        tokens_delivered=num_tokens,
        missing=(index - delivered).total(),
        extra=(delivered - index).total(),
    )


class ShardContents(ShardOrder):
    """Order and contents, computed from the raw shards."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self._dataset = dataset

    @property
    def lanes(self) -> int:
        """How many lanes a domain is divided among."""
        return self._dataset.spec.lanes

    def num_added(self, documents: Sequence[Document], num_sequences: int) -> int:
        """Return how many tokens so many sequences of a window hold beside its documents' own."""
        spec = self._dataset.spec
        if spec.packing == BEST_FIT:
            # A document's end-of-text token, and the first one of each further piece of it.
            return sum(-(-one.num_tokens // spec.sequence_length) for one in documents)
        # The first token of each sequence but the first, and an end-of-text between documents.
        return num_sequences - 1 + len(documents) - 1

    def documents(self, domain: str, lane: int, epoch: int, window: int) -> Sequence[Document]:
        """Return the documents that a window joins."""
        found = self._reference.documents(domain, Lane(lane), epoch, window)
        return [_document(tokens) for tokens in found]

    def all_documents(self, domain: str) -> Iterator[Document]:
        """Return what a domain's shards hold, in their own order."""
        spec, tokenizer = self._dataset.spec, self._dataset.tokenizer
        converter = Converter.of_run(
            spec, make_tokenize(tokenizer) if tokenizer is not None else None
        )
        for shard in self._dataset.index.shards(domain):
            if not shard.num_samples:
                continue
            converted = converter.convert(shard)
            for start, end in pairwise(converted.offsets.tolist()):
                if end > start:
                    yield _document(converted.tokens[start:end])


def _document(tokens: Tokens) -> Document:
    return Document(sha256=hashlib.sha256(tokens.tobytes()).hexdigest(), num_tokens=len(tokens))
