"""What all processes of a run agree on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

SKIP_SAMPLE = "skip_sample"
QUARANTINE_SHARD = "quarantine_shard"
STOP = "stop"
ON_DAMAGE = (SKIP_SAMPLE, QUARANTINE_SHARD, STOP)
"""What is done about a sample that cannot be read: leave it out, leave its shard out, or stop."""

PROJECTIONS = ("sign", "gaussian", "orthonormal")
DRAWS = ("step", "run")


NORMS_ONLY = "norms"

CONCATENATE = "concatenate"
BEST_FIT = "best_fit"
PACKINGS = (CONCATENATE, BEST_FIT)
"""How a window's documents become sequences: joined and cut, or laid side by side undivided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSpec:
    """What trainers measure of gradients and weights, and how."""

    mode: str = "sketch"
    """`sketch`, `exact` (full gradients of the watched layers; small models only), or `norms`: no
    gradients, only the norms of weights and of their changes."""

    sketch_rows: int = 64
    """p: columns of the projection P of output gradients (out x p)."""

    sketch_columns: int = 64
    """q: columns of the projection Q of inputs (in x q)."""

    projection: str = "sign"
    """`sign` (random +-1), `gaussian` or `orthonormal` (random orthonormal columns); scaled."""

    draw: str = "step"
    """`step`: every step has projections of its own; `run`: one draw serves the whole run."""

    every_n_steps: int = 1
    num_layers: int = 3
    layers: tuple[str, ...] = ()
    """Name patterns (fnmatch) of linear layers; empty: `num_layers` chosen by relative depth."""

    seed: int = 0
    part_norms: bool = False
    """Measure the squared norms of the sequences' gradients as well."""

    def __post_init__(self) -> None:
        if self.mode not in ("sketch", "exact", NORMS_ONLY):
            raise ValueError(
                f"probe.mode must be 'sketch', 'exact' or {NORMS_ONLY!r}, got {self.mode!r}"
            )
        if self.projection not in PROJECTIONS:
            raise ValueError(
                f"probe.projection must be one of {', '.join(PROJECTIONS)}, got {self.projection!r}"
            )
        if self.draw not in DRAWS:
            raise ValueError(f"probe.draw must be one of {', '.join(DRAWS)}, got {self.draw!r}")
        for name in ("sketch_rows", "sketch_columns", "every_n_steps", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"probe.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSpec:
    """After which steps trainers evaluate the model on documents that only the policy may see."""

    every: int
    """Steps between evaluations, within a span."""

    period: int
    """Steps from the beginning of a span to that of the next."""

    span: int
    """Steps of each period in which evaluations are due at all."""

    def __post_init__(self) -> None:
        if not 1 <= self.every <= self.span <= self.period:
            raise ValueError(
                "validation must have 1 <= every <= span <= period, got "
                f"{self.every}, {self.span}, {self.period}"
            )

    def due(self, step: int) -> bool:
        """Say whether an evaluation is due after `step`."""
        place = step % self.period
        return place < self.span and (place + 1) % self.every == 0


_ORDER = (
    "seed domains lanes global_sequences sequence_length window_samples interleave eot_id "
    "text_field tokenizer_sha256"
)
"""What the order depends on beside the data and how it is packed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """What all processes of a run agree on; they get it in the answer to Join or Enlist."""

    run_id: str
    seed: int
    domains: tuple[str, ...]
    lanes: int
    global_sequences: int
    """Sequences in the global batch of a step."""

    sequence_length: int
    """Tokens that a sequence trains on; it holds one more."""

    window_samples: int
    interleave: int
    num_steps: int
    """Optimizer steps that the run is planned for."""

    lag: int
    """A report of step s decides the plan of step s + lag."""

    vocab_size: int
    eot_id: int
    """The end-of-text token: stands between documents, and pads."""

    text_field: str
    """Field of `.json` samples that holds the text."""

    index_sha256: str
    tokenizer_sha256: str
    """Empty: every shard holds token ids."""

    degraded_after_s: float
    """How long a worker waits for a silent controller before it goes on with the last plan."""

    data_timeout_s: float
    """How long a trainer waits for a batch before it raises."""

    on_damage: str = SKIP_SAMPLE
    """One of `ON_DAMAGE`."""

    samples_folder: str = ""
    """Where the maps of the shards' samples are, as written by `headrace index`; empty: nowhere."""

    data_sha256: str = ""
    """Of what the shards hold, wherever they lie; empty: `index_sha256` stands for it."""

    packing: str = CONCATENATE
    """One of `PACKINGS`."""

    probe: ProbeSpec | None = None
    """None: the policy needs no gradients."""

    validation: tuple[ValidationSpec, ...] = ()
    """An evaluation is due when any of these says so; empty: the policy needs none."""

    needs_reference: bool = False
    """The policy needs the losses of a reference model beside the model's own."""

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("a run must have at least one domain, got none")
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"domain names must differ from one another, got {self.domains}")
        if self.on_damage not in ("", *ON_DAMAGE):
            raise ValueError(
                f"on_damage must be one of {', '.join(ON_DAMAGE)}, got {self.on_damage!r}"
            )
        if self.packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {self.packing!r}")
        for name in (
            "lanes",
            "global_sequences",
            "sequence_length",
            "window_samples",
            "interleave",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_steps", "lag", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.global_sequences % self.lanes:
            raise ValueError(
                f"global_sequences must be a multiple of lanes, got {self.global_sequences} "
                f"and {self.lanes}"
            )
        if self.window_samples % self.interleave:
            raise ValueError(
                f"window_samples must be a multiple of interleave, got {self.window_samples} "
                f"and {self.interleave}"
            )

    @property
    def num_domains(self) -> int:
        """How many domains the run mixes."""
        return len(self.domains)

    @property
    def slots_per_lane(self) -> int:
        """How many slots of a global batch each lane fills."""
        return self.global_sequences // self.lanes

    def validation_due(self, step: int) -> bool:
        """Say whether trainers must evaluate the model after `step`."""
        return any(validation.due(step) for validation in self.validation)

    @property
    def token_dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """Little-endian uint16 if the vocabulary fits, else uint32."""
        return np.dtype("<u2") if self.vocab_size <= 1 << 16 else np.dtype("<u4")

    def order_sha256(self) -> str:
        """Hash what the order of the data depends on, the plans excepted.

        Two runs with the same hash and the same plans see the same global batches.
        """
        data = "data_sha256" if self.data_sha256 else "index_sha256"
        return self._hash_of(f"{_ORDER} {data} packing")

    def has_order(self, order_sha256: str) -> bool:
        """Say whether a hash is of this order, as this or an earlier version computed it.

        Earlier ones hashed the index itself, with the places of the shards, and knew one packing.
        """
        earlier = [self._hash_of(f"{_ORDER} index_sha256 packing")]
        if self.packing == CONCATENATE:
            earlier.append(self._hash_of(f"{_ORDER} index_sha256"))
        return order_sha256 in (self.order_sha256(), *earlier)

    def _hash_of(self, names: str) -> str:
        values = {name: getattr(self, name) for name in names.split()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
