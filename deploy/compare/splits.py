"""Which split a document belongs to: a function of its text alone.

So a document keeps its split however the data is packed, cut into shards or ordered, and copies of
it in other files or other domains share its split: no test text is trained on.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.documents import Document

_RANGE = 1 << 64


class Split(enum.Enum):
    """What a document may be used for."""

    TRAIN = "train"
    POLICY_VALIDATION = "policy_validation"  # all that a policy may look at beside training
    TEST = "test"  # read by the comparison alone


class SplitShares(BaseModel):
    """Shares of the documents that are held out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy_validation: float = Field(default=0.02, gt=0, lt=1)
    test: float = Field(default=0.03, gt=0, lt=1)

    @model_validator(mode="after")
    def _leaves_some_to_train_on(self) -> SplitShares:
        if self.policy_validation + self.test >= 1:
            raise ValueError(
                "policy_validation and test leave nothing to train on: "
                f"{self.policy_validation:g} + {self.test:g}"
            )
        return self


def split_of(text: str, shares: SplitShares) -> Split:
    """Return the split of a document."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"headrace-split").digest()
    place = int.from_bytes(digest, "big") / _RANGE
    if place < shares.test:
        return Split.TEST
    if place < shares.test + shares.policy_validation:
        return Split.POLICY_VALIDATION
    return Split.TRAIN


@dataclass(frozen=True, slots=True)
class SplitDocuments:
    """The documents of one split of a domain, read anew each time; goes to another process."""

    documents: Iterable[Document]
    split: Split
    shares: SplitShares

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            if split_of(document.text, self.shares) is self.split:
                yield document
