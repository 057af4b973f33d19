"""Every error that crosses a process boundary or reaches a user.

* HeadraceError
  + Retryable                   the same call may be made again
    - ControllerUnreachable
    - WorkerUnreachable
    - NotReady                  the other side is there but cannot answer yet
    - JoinTimeout               not all ranks came in time
  + Rejected                    the call was wrong and will be wrong again
    - InvalidMessage
    - UnknownDomain
    - Disagreement              ranks, or a rank and the run, differ in a setting
    - WrongRun
    - StaleGeneration           another membership of ranks has begun since
    - NotAuthenticated          no token came with the call, or none that is known
    - AccessRefused             the token is known, but for other calls
  + ConfigError                 run file, command line, environment
  + AlreadyServing              another controller holds the ledger or the port
  + DataError
    - ShardUnreadable
    - IndexMismatch
    - TokenizerInvalid
    - DomainEmpty
    - TooMuchLost
  + LedgerError                 the ledger is damaged or cannot be written
"""

from __future__ import annotations

from collections.abc import Iterator


class HeadraceError(Exception):
    """Something went wrong that one sentence can explain."""


class Retryable(HeadraceError):
    """The same call may be made again."""


class ControllerUnreachable(Retryable):
    """No answer from the controller."""


class WorkerUnreachable(Retryable):
    """No answer from a loader worker."""


class NotReady(Retryable):
    """The other side is there but cannot answer yet."""


class JoinTimeout(Retryable):
    """Not all ranks joined in time."""


class Rejected(HeadraceError):
    """The call was wrong and will be wrong again."""


class InvalidMessage(Rejected):
    """A field is missing, out of bounds or not finite."""


class UnknownDomain(Rejected):
    """A domain is named that the run does not have."""


class Disagreement(Rejected):
    """Ranks, or a rank and the run, differ in a setting; the message holds both values."""


class WrongRun(Rejected):
    """The call is meant for another run."""


class StaleGeneration(Rejected):
    """Another membership of ranks has begun since the caller joined."""


class NotAuthenticated(Rejected):
    """No token came with the call, or one that is not known; right once the token is renewed."""


class AccessRefused(Rejected):
    """The caller's token is known, but does not allow this."""


class ConfigError(HeadraceError):
    """The run file, the command line or the environment asks for something impossible."""


class AlreadyServing(HeadraceError):
    """Another controller holds the ledger or the port."""


class DataError(HeadraceError):
    """The data, its index or the tokenizer cannot be used."""


class ShardUnreadable(DataError):
    """A shard is damaged, missing, or not what its index says."""


class IndexMismatch(DataError):
    """The dataset index and the run do not belong together."""


class TokenizerInvalid(DataError):
    """The tokenizer file is not one, or does not fit the run."""


class DomainEmpty(DataError):
    """A domain has no shard, or too few samples to give every lane one."""


class TooMuchLost(DataError):
    """More of the data is unreadable than the run allows."""


class LedgerError(HeadraceError):
    """The ledger is damaged or cannot be written."""


STATUS_OF: dict[type[HeadraceError], str] = {
    ControllerUnreachable: "UNAVAILABLE",
    WorkerUnreachable: "UNAVAILABLE",
    NotReady: "UNAVAILABLE",
    JoinTimeout: "DEADLINE_EXCEEDED",
    InvalidMessage: "INVALID_ARGUMENT",
    UnknownDomain: "INVALID_ARGUMENT",
    Disagreement: "FAILED_PRECONDITION",
    WrongRun: "FAILED_PRECONDITION",
    StaleGeneration: "ABORTED",
    NotAuthenticated: "UNAUTHENTICATED",
    AccessRefused: "PERMISSION_DENIED",
    ConfigError: "FAILED_PRECONDITION",
    AlreadyServing: "ALREADY_EXISTS",
    ShardUnreadable: "DATA_LOSS",
    IndexMismatch: "FAILED_PRECONDITION",
    TokenizerInvalid: "FAILED_PRECONDITION",
    DomainEmpty: "FAILED_PRECONDITION",
    TooMuchLost: "DATA_LOSS",
    LedgerError: "INTERNAL",
}
"""The gRPC status of each error; the error's own name travels in the trailing metadata."""


def leaves(base: type[HeadraceError] = HeadraceError) -> Iterator[type[HeadraceError]]:
    """Yield every error class of this module below `base` that has none below itself."""
    for child in base.__subclasses__():
        if child.__module__ != __name__:
            continue  # a process may have errors of its own, which it keeps to itself
        below = list(leaves(child))
        yield from below or [child]
