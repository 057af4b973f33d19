"""A rank's stream from a loader worker, for tests that serve one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protos.client import DataClient, Stream
from protos.spec import RunSpec
from protos.types import Cursors, Generation, Lane, OpenStream, Rank, Step, StepBatch
from tests.fakes_loader import BlockingCredits

GENERATION = Generation(1)


class RankStream:
    """A rank's stream from one worker."""

    def __init__(
        self,
        spec: RunSpec,
        endpoint: str,
        *,
        slots: range,
        lanes: Sequence[Lane],
        credits: int = 100,
        from_step: int = 0,
        cursors: Cursors | None = None,
        cursor_step: int = 0,
        **changes: object,
    ) -> None:
        self.credits = BlockingCredits()
        self._client = DataClient(endpoint)
        zeros = np.zeros((spec.num_domains, 3), np.uint32)
        values: dict[str, object] = {
            "run_id": spec.run_id,
            "generation": GENERATION,
            "rank": Rank(0),
            "from_step": Step(from_step),
            "first_slot": slots.start,
            "end_slot": slots.stop,
            "cursors": cursors or dict.fromkeys(lanes, zeros),
            "cursor_steps": dict.fromkeys(lanes, Step(cursor_step)),
            "credits": credits,
        }
        self.stream: Stream[StepBatch] = self._client.stream_batches(
            OpenStream(**{**values, **changes}),  # type: ignore[arg-type]  # a bag of defaults
            self.credits,
            token_dtype=spec.token_dtype,
            sequence_length=spec.sequence_length,
        )

    def take(self, count: int) -> list[StepBatch]:
        return [next(self.stream) for _ in range(count)]

    def __enter__(self) -> RankStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.credits.end()
        self.stream.cancel()
        self._client.close()


def whole_stream(spec: RunSpec, endpoint: str, **options: object) -> RankStream:
    """Open all lanes with all slots."""
    slots = range(spec.global_sequences)
    lanes = [Lane(lane) for lane in range(spec.lanes)]
    return RankStream(spec, endpoint, slots=slots, lanes=lanes, **options)  # type: ignore[arg-type]
