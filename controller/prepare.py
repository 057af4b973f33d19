"""A run before its ledger is opened: what its run file names is read and held together."""

from __future__ import annotations

import contextlib
import itertools
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from controller.bad_share import BadShare
from controller.blobs import Blobs
from controller.config import RunConfig, run_spec
from controller.guard import Guard
from controller.policy.base import Policy, PolicyContext
from controller.policy.registry import initial_mixture, make_policy, validation_of
from controller.shadows import Shadow, shadow_names
from protos.dataset_index import DatasetIndex
from protos.errors import AlreadyServing, ConfigError, IndexMismatch, TokenizerInvalid
from protos.security import split_address
from protos.server import check_guard
from protos.spec import RunSpec
from protos.tokenizer import TokenizerInfo, describe_tokenizer
from protos.types import Mixture

if TYPE_CHECKING:
    from controller.dashboard.server import PageServer


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run before its ledger is opened: all that can be wrong with it has been checked."""

    spec: RunSpec
    policy: Policy
    shadows: tuple[Shadow, ...]
    initial: Mixture
    guard: Guard
    blobs: Blobs
    bad_share: BadShare


def check_first(config: RunConfig, *, standby: bool = False) -> None:
    """Check what takes a moment, before hours go into an index that a typing error makes useless.

    The port of a `standby` may be taken: by the controller that it stands by for.

    Raises:
        AlreadyServing: the port is taken.
        ConfigError: a certificate or a token file cannot be used.
        DataError: the tokenizer cannot be used.
    """
    check_guard(config.address, config.wire_security)
    if not standby:
        check_port(config.address)
        if config.metrics.address is not None:
            check_port(config.metrics.address)
        page = take_page(config)
        if page is not None:
            page.close()
    _tokenizer(config)


def prepare(config: RunConfig) -> Prepared:
    """Read what the run file names, and check that it fits together.

    Raises:
        ConfigError: settings contradict one another or the data.
        UnknownDomain: a mixture names a domain that the run does not have.
        DataError: the index or the tokenizer cannot be used.
    """
    check_guard(config.address, config.wire_security)
    index_bytes = _read(config.data.index)
    index = DatasetIndex.from_parquet(index_bytes, source=str(config.data.index))
    tokenizer_bytes, tokenizer = _tokenizer(config)
    # The domains must be the index's before their sizes are asked for.
    spec = run_spec(config, index, tokenizer, frozenset())
    context = PolicyContext(
        domains=spec.domains,
        domain_sizes=tuple(float(index.text_bytes(domain)) for domain in spec.domains),
        num_steps=spec.num_steps,
        global_sequences=spec.global_sequences,
        seed=spec.seed,
    )
    policy = make_policy(config.policy, context)
    names = shadow_names(shadow.name for shadow in config.shadows)
    shadows = tuple(
        Shadow(name=name, policy=make_policy(shadow, context))
        for name, shadow in zip(names, config.shadows, strict=True)
    )
    needs = policy.needs.union(*(shadow.policy.needs for shadow in shadows))
    validations = [validation_of(each, context) for each in (config.policy, *config.shadows)]
    validation = tuple(dict.fromkeys(itertools.chain.from_iterable(validations)))
    return Prepared(
        spec=run_spec(config, index, tokenizer, needs, validation),
        policy=policy,
        shadows=shadows,
        initial=Mixture.from_shares(initial_mixture(config.policy, context)),
        guard=Guard(config.guard, context),
        blobs=Blobs(index=index_bytes, tokenizer=tokenizer_bytes),
        bad_share=BadShare(index, limit=config.bad_limit),
    )


def take_page(config: RunConfig) -> PageServer | None:
    """Take the page's port, if there is to be one."""
    if config.dashboard is None:
        return None
    # Where there is no page, its web server need not be installed, and costs no start.
    try:
        from controller.dashboard.server import PageServer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the page needs the package {error.name}: pip install 'headrace[server]'"
        ) from None
    return PageServer(config)


def check_port(address: str) -> None:
    """Refuse a port that is taken before anything is written."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise AlreadyServing(
                f"cannot serve {address}: {error.strerror}; stop the process that holds the port "
                "or choose another address"
            ) from error


def _tokenizer(config: RunConfig) -> tuple[bytes, TokenizerInfo | None]:
    path = config.data.tokenizer
    if path is None:
        return b"", None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerInvalid(
            f"cannot read the tokenizer {path}: {error.strerror}; check data.tokenizer"
        ) from error
    return data, describe_tokenizer(data, eot_token=config.data.eot_token, source=str(path))


def _read(path: Path) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        try:
            return path.read_bytes()
        except PermissionError as error:
            raise IndexMismatch(f"cannot read the index {path}: {error.strerror}") from error
    raise IndexMismatch(
        f"there is no dataset index at {path}; build it with `headrace index RUN_FILE`"
    )
