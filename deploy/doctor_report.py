"""All that `headrace doctor` looks at."""

from __future__ import annotations

from pathlib import Path

from controller.config import DEFAULT_ADDRESS, load_run_file
from deploy.doctor import Finding, examine_machine
from deploy.doctor_network import examine_clock, examine_network
from deploy.doctor_run import examine_run
from protos.errors import ConfigError


def examine(run_file: Path | None, address: str | None) -> list[Finding]:
    """Look at this machine and, where one is given, at a run file and what it names."""
    findings = [
        *examine_machine(address or _address_of(run_file)),
        examine_clock(),
        *examine_network(),
    ]
    return findings if run_file is None else findings + examine_run(run_file)


def _address_of(run_file: Path | None) -> str:
    if run_file is None:
        return DEFAULT_ADDRESS
    try:
        return load_run_file(run_file).address
    except ConfigError:
        # What is wrong with it is a finding of its own.
        return DEFAULT_ADDRESS
