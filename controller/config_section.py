"""What all parts of a run file have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from protos.errors import ConfigError
from protos.security import split_address


class Section(BaseModel):
    """A part of the run file: unknown keys are errors, and nothing changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _checked_address(address: str) -> str:
    try:
        split_address(address)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return address


Address = Annotated[str, AfterValidator(_checked_address)]
"""`host:port`; port 0 takes any free one."""
