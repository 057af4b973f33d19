"""What would stop the run of a run file: its files, data, folders and ports."""

from __future__ import annotations

import glob
import itertools
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from controller.config import RunConfig, load_run_file
from deploy.certificates import validity
from deploy.doctor import Finding, examine_port, say_size, verdict
from loader_workers.location import expand_numbers, has_glob, parse_location
from protos.errors import ConfigError, HeadraceError
from protos.tls import Identity, authorities
from protos.tokens import token_file

_SOON = timedelta(days=7)
_MIN_OUT_BYTES = 1 << 30
_LOOKED_AT = 1000
"""Files of a domain that are looked at; the index reads them all."""


def examine_run(path: Path) -> list[Finding]:
    """Look at all that a run file names."""
    try:
        config = load_run_file(path)
    except ConfigError as error:
        return [verdict("run file", str(error), ok=False, remedy="mend it")]
    return [
        verdict("run file", f"{path}: run {config.run!r}", ok=True, remedy=""),
        *(
            examine_port("metrics port", address)
            for address in (config.metrics.address,)
            if address is not None
        ),
        *_secrets(config),
        *_certificates(config),
        *_data(config),
        *_folders(config),
    ]


def _secrets(config: RunConfig) -> Iterator[Finding]:
    files = {
        "join token": config.security.join_token_file,
        "admin token": config.security.admin_token_file,
        "metrics token": config.metrics.token_file,
    }
    for what, path in files.items():
        if path is None:
            continue
        try:
            token_file(path)
        except ConfigError as error:
            remedy = f"(umask 077; openssl rand -hex 32 > {path}), or chmod 600 {path}"
            yield verdict(what, str(error), ok=False, remedy=remedy)
        else:
            yield verdict(what, f"{path}, closed to others", ok=True, remedy="")


def _certificates(config: RunConfig) -> Iterator[Finding]:
    tls = config.security.tls
    if tls is None:
        return
    try:
        Identity(tls.cert, tls.key)
        for path in (tls.ca, tls.client_ca):
            if path is not None:
                authorities(path)
    except ConfigError as error:
        remedy = "give a certificate, its own key (chmod 600) and its authority, as PEM"
        yield verdict("TLS files", str(error), ok=False, remedy=remedy)
        return
    for path in dict.fromkeys(each for each in (tls.cert, tls.ca, tls.client_ca) if each):
        yield from _held(path)


def _held(path: Path) -> Iterator[Finding]:
    """Say until when a file's certificates hold: the one that ends first."""
    try:
        times = validity(path.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        yield verdict("certificate", f"{path} {error}", ok=False, remedy="replace it")
        return
    now, first, last = datetime.now(UTC), max(t[0] for t in times), min(t[1] for t in times)
    if first > now:
        found = f"{path} holds from {first:%Y-%m-%d %H:%M} UTC on"
        yield verdict("certificate", found, ok=False, remedy="set the clock, or replace it")
    elif last <= now:
        found = f"{path} has expired on {last:%Y-%m-%d %H:%M} UTC"
        yield verdict("certificate", found, ok=False, remedy="replace it; no restart is needed")
    else:
        found = f"{path} holds until {last:%Y-%m-%d %H:%M} UTC"
        remedy = "replace it in time; it is read again when it changes"
        yield verdict("certificate", found, ok=last - now > _SOON, remedy=remedy, stops=False)


def _data(config: RunConfig) -> Iterator[Finding]:
    yield _index(config)
    for name, domain in config.data.domains.items():
        what = f"domain {name}"
        try:
            local, elsewhere = _shards(domain.shards)
        except ConfigError as error:
            yield verdict(what, str(error), ok=False, remedy="name its shards otherwise")
            continue
        missing = [path for path in local if not os.access(path, os.R_OK)]
        found = f"{len(local)} files" if local else "no file"
        if elsewhere:
            found = f"{found if local else ''} {len(elsewhere)} patterns elsewhere, not looked at"
        if missing:
            found = f"{missing[0]} cannot be read, nor can {len(missing) - 1} others"
        remedy = "name shards that are there, looked up from where the command is started"
        yield verdict(
            what, found.strip(), ok=not missing and bool(local or elsewhere), remedy=remedy
        )


def _shards(patterns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the local files that patterns name, and the patterns of other stores."""
    local: list[str] = []
    elsewhere: list[str] = []
    for pattern in patterns:
        for each in itertools.islice(expand_numbers(pattern), _LOOKED_AT):
            location = parse_location(each)
            if not location.is_local:
                elsewhere.append(pattern)
                break
            if has_glob(location.path):
                # `Path.glob` takes no absolute pattern.
                there = glob.iglob(location.path, recursive=True)  # noqa: PTH207
                local += itertools.islice(there, _LOOKED_AT)
            else:
                local.append(location.path)
    return local, elsewhere


def _index(config: RunConfig) -> Finding:
    # Reading an index brings in pyarrow.
    from deploy.dataset import open_dataset
    from protos.tokenizer import describe_tokenizer

    data, remedy = config.data, "headrace index RUN_FILE"
    try:
        if data.index.exists():
            spec = open_dataset(config).spec
            return verdict(
                "index", f"{data.index}: {len(spec.domains)} domains", ok=True, remedy=""
            )
        if data.tokenizer is not None:
            remedy = "give data.tokenizer a tokenizer.json that can be read"
            blob = data.tokenizer.read_bytes()
            describe_tokenizer(blob, eot_token=data.eot_token, source=str(data.tokenizer))
    except (HeadraceError, OSError) as error:
        return verdict("index and tokenizer", str(error), ok=False, remedy=remedy)
    found = f"{data.index} is not there yet and will be built"
    return verdict("index", found, ok=True, remedy="")


def _folders(config: RunConfig) -> Iterator[Finding]:
    wanted = {"out": (config.out, _MIN_OUT_BYTES)}
    if config.workers.cache_dir is not None:
        wanted["cache"] = (config.workers.cache_dir, config.workers.cache_bytes)
    for what, (folder, num_bytes) in wanted.items():
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            found = f"{there} cannot be written to"
            yield verdict(what, found, ok=False, remedy="give another folder, or its rights")
            continue
        free = shutil.disk_usage(there).free
        remedy = f"{say_size(num_bytes)} may be needed: give another folder, or lower cache_bytes"
        found = f"{say_size(free)} free in {there}"
        yield verdict(what, found, ok=free >= num_bytes, remedy=remedy, stops=False)
