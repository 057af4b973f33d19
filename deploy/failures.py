"""How a local run can end other than well."""

from __future__ import annotations

from protos.errors import HeadraceError


class TrainerFailed(HeadraceError):
    """The training script ended with an error."""


class Stopped(HeadraceError):
    """A signal ended the run early; all that it made so far is on disk."""
