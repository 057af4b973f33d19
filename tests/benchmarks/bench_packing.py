"""What packing costs: padding, documents that are divided, and time.

    python -m tests.benchmarks.bench_packing [CORPUS TOKENIZER [DOMAIN ...]]

For each way of packing: the share of padding and of documents divided, over an epoch of windows of
the default size, and how long a window's layout takes a document. The documents are those of the
loaders' benchmark, or of a folder as `headrace pack` takes it, tokenized on one thread.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.sources import find_domains, text_domains
from loader_workers.order import EpochOrder, NumberedShards, OrderKey
from loader_workers.packing import lay_out
from loader_workers.tokenize import make_tokenize
from protos.spec import PACKINGS
from tests.benchmarks import workload

_LANES = 8
_WINDOW_SAMPLES = 4096
_INTERLEAVE = 4
_TEXTS_AT_ONCE = 256


@dataclass(slots=True)
class Cost:
    """Of packing some documents."""

    num_places: int = 0
    num_tokens: int = 0
    num_documents: int = 0
    num_divided: int = 0
    seconds: float = 0.0

    def add(self, other: Cost) -> None:
        """Count in what others cost."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        return (
            f"padding {1 - self.num_tokens / self.num_places:7.3%}, documents divided "
            f"{self.num_divided / self.num_documents:6.1%}, "
            f"{self.seconds / self.num_documents * 1e6:5.1f} us a document"
        )


def cost(lengths: NDArray[np.int64], *, packing: str, sequence_length: int) -> Cost:
    """Pack an epoch of a domain, lane by lane and window by window."""
    found = Cost()
    for samples in _windows(len(lengths)):
        sizes = lengths[samples]
        sizes = sizes[sizes > 0]
        began = time.perf_counter()
        layout = lay_out(sizes, sequence_length=sequence_length, packing=packing)
        found.seconds += time.perf_counter() - began
        found.num_places += len(layout.num_tokens) * (sequence_length + 1)
        found.num_tokens += int(layout.num_tokens.sum(dtype=np.int64))
        found.num_documents += len(sizes)
        # Laid down in several runs, or in one that leads beyond the sequence that it begins in.
        ends = (layout.places // layout.stride) * layout.stride + sequence_length + 1
        runs = np.bincount(layout.documents, minlength=len(sizes))
        crosses = layout.places + layout.lengths > ends
        found.num_divided += len(np.union1d(layout.documents[crosses], np.flatnonzero(runs > 1)))
    return found


def _windows(num_samples: int) -> Iterator[NDArray[np.int64]]:
    numbered = NumberedShards(0, "", 0, shard_samples=np.array([num_samples]))
    for lane in range(_LANES):
        key = OrderKey(
            seed=0,
            domain="",
            lane=lane,
            lanes=_LANES,
            window_samples=_WINDOW_SAMPLES,
            interleave=_INTERLEAVE,
        )
        order = EpochOrder(key, epoch=0, numbered=numbered)
        for window in range(order.num_windows):
            yield order.window(window).samples


def _made_up() -> dict[str, NDArray[np.int64]]:
    return {
        f"domain{domain}": np.array(
            [
                len(document)
                for shard in range(workload.NUM_SHARDS)
                for document in workload.documents(domain, shard)
            ]
        )
        for domain in range(workload.NUM_DOMAINS)
    }


def _tokenized(
    corpus: Path, tokenizer: Path, names: list[str]
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenize = make_tokenize(tokenizer.read_bytes())
    for domain in text_domains(find_domains(corpus), corpus):
        if names and domain.name not in names:
            continue
        texts = [document.text for document in domain.documents(text_field="text")]
        yield (
            domain.name,
            np.array(
                [
                    len(ids)
                    for at in range(0, len(texts), _TEXTS_AT_ONCE)
                    for ids in tokenize(texts[at : at + _TEXTS_AT_ONCE])
                ]
            ),
        )


def main(arguments: list[str]) -> None:
    """Print what each domain costs, and all together."""
    domains = iter(_made_up().items())
    if arguments:
        domains = _tokenized(Path(arguments[0]), Path(arguments[1]), arguments[2:])
    totals = {(length, packing): Cost() for length in (2048, 8192) for packing in PACKINGS}
    for name, lengths in domains:
        print(f"{name}: {len(lengths)} documents, {lengths.sum():,} tokens", flush=True)
        for (length, packing), total in totals.items():
            found = cost(lengths, packing=packing, sequence_length=length)
            print(f"  {length} {packing:12} {found}", flush=True)
            total.add(found)
    print("all")
    for (length, packing), total in totals.items():
        print(f"  {length} {packing:12} {total}")


if __name__ == "__main__":
    main(sys.argv[1:])
