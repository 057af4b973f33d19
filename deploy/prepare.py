"""What a local run needs before it starts: shards, a tokenizer, an index. Made once, then kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.config import parse_run
from controller.prepare import prepare
from deploy.corpus import build_corpus, installation_folders, list_files
from deploy.dataset import ensure_index
from deploy.documents import Document
from deploy.pack import pack, partial_folder
from deploy.progress import Progress
from deploy.runfile import RUN_FILE, RunOptions, Settings, check, compose, write_run_file
from deploy.sources import Documents, ShardDomain, TextDomain, find_domains
from deploy.tokenizer import copy_tokenizer, train_tokenizer
from protos.errors import ConfigError

SHARDS = "shards"
TOKENIZER = "tokenizer.json"
INDEX = "index.parquet"

CORPUS_DOMAIN_BYTES = 2 << 20
"""Of text a domain, in the corpus that needs no data."""

_SHARD_MB = 0.5
"""Small, so that a corpus of megabytes still has several shards a domain."""

_MIN_DOCUMENTS_A_LANE = 2

_NOT_GIVEN = {
    "doremi": "a reference model's losses",
    "skillit": "losses on held-out documents",
    "aioli": "losses on held-out documents",
}
"""What policies need that deploy/examples/train.py has not."""

_FIXED_BY_RUN_FILE = (
    "data",
    "config",
    "tokenizer",
    "policy",
    "steps",
    "seed",
    "sequence_length",
    "global_sequences",
    "lanes",
    "settings",
)


def prepare_run(options: RunOptions, progress: Progress) -> Path:
    """Return the run file of a run that is ready to start; make what is missing.

    Raises:
        ConfigError: the options are impossible, or the folder holds a run already.
        DataError: the data or the tokenizer cannot be used.
    """
    run_file = options.out / RUN_FILE
    if options.resume:
        if not run_file.is_file():
            raise ConfigError(f"{options.out} holds no run to resume: there is no {RUN_FILE} in it")
        _refuse_changes(options)
        return run_file
    if run_file.exists():
        raise ConfigError(
            f"{options.out} holds a run already: --resume goes on with it, --fresh moves it aside, "
            "or name another --out"
        )
    settings = compose(options)
    check(settings)
    _refuse_what_the_trainer_lacks(str(settings["policy"]["name"]))
    with _nothing_left_behind(options.out):
        settings["data"] = _data_section(options, settings, progress)
        config = parse_run(settings, source="the run's settings")
        with progress.stage("indexing the shards") as update:
            ensure_index(
                config, progress=lambda done, total: update(f"{done:,} of {total:,} shards")
            )
        prepare(config)
        return write_run_file(settings, options.out)


def _refuse_what_the_trainer_lacks(policy: str) -> None:
    """Refuse a policy that would learn nothing from the harness's trainer."""
    if policy in _NOT_GIVEN:
        raise ConfigError(
            f"policy {policy} needs {_NOT_GIVEN[policy]}, which the trainer of `headrace run` does "
            "not give: use a trainer of your own (README, Policies)"
        )


@contextmanager
def _nothing_left_behind(out: Path) -> Iterator[None]:
    """Remove what was made, if it does not become a run."""
    endings = (".samples", ".partial.jsonl")
    beside_index = [(out / INDEX).with_suffix(ending) for ending in endings]
    made = [*(out / name for name in (SHARDS, TOKENIZER, INDEX)), *beside_index]
    held = {path for path in (out, *made) if path.exists()}
    # Nobody but a harness that was killed while packing leaves this name here.
    shutil.rmtree(partial_folder(out / SHARDS), ignore_errors=True)
    try:
        yield
    except BaseException:
        for path in set(made) - held:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if out not in held and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise


def _refuse_changes(options: RunOptions) -> None:
    given = [name for name in _FIXED_BY_RUN_FILE if getattr(options, name) not in (None, ())]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        flags = flags.replace("--settings", "--set")
        raise ConfigError(
            f"a resumed run keeps what its run.yaml says: leave out {flags} (--ranks, --workers "
            "and --until may change)"
        )


def move_aside(out: Path) -> Path | None:
    """Rename a folder that holds a run to a free name; return it, or None if there is none."""
    if not (out / RUN_FILE).exists():
        return None
    number = 1
    while (aside := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    out.rename(aside)
    return aside


def _data_section(options: RunOptions, settings: Settings, progress: Progress) -> Settings:
    given: Settings = dict(settings.get("data", {}))
    out = options.out.resolve()
    text_field = given.get("text_field", "text")
    prepared = _Prepared({}, {})
    if "domains" not in given:
        if options.data is not None:
            prepared = _from_folder(options.data, out, text_field, progress)
        else:
            prepared = _from_installation(out, settings["batch"]["lanes"], progress)
        given["domains"] = prepared.domains
    elif options.data is not None:
        raise ConfigError("the run file has data.domains already; leave out --data or those")
    given.setdefault("index", str(out / INDEX))
    tokenizer = out / TOKENIZER
    if options.tokenizer is not None:
        copy_tokenizer(options.tokenizer, tokenizer)
        given["tokenizer"] = str(tokenizer)
    elif "tokenizer" not in given and "vocab_size" not in given:
        if not prepared.texts:
            raise ConfigError("data that is packed already needs a tokenizer: give --tokenizer")
        with progress.stage("training a tokenizer"):
            train_tokenizer(prepared.texts, tokenizer)
        given["tokenizer"] = str(tokenizer)
    return given


@dataclass(frozen=True, slots=True)
class _Prepared:
    domains: dict[str, Any]
    """As the run file has them."""

    texts: Mapping[str, Iterable[Document]]
    """To train a tokenizer on; empty if there is no text at hand."""


def _from_folder(folder: Path, out: Path, text_field: str, progress: Progress) -> _Prepared:
    found = find_domains(folder)
    texts = {
        name: Documents(domain, text_field)
        for name, domain in found.items()
        if isinstance(domain, TextDomain)
    }
    shards = out / SHARDS
    if texts:
        with progress.stage(f"packing {len(texts)} domains of {folder}"):
            pack(texts, shards, shard_mb=_SHARD_MB)
    domains = {
        name: {
            "shards": [str(path.resolve()) for path in domain.shards]
            if isinstance(domain, ShardDomain)
            else [str(shards / name / "*.tar")]
        }
        for name, domain in found.items()
    }
    return _Prepared(domains, texts)


def _from_installation(out: Path, lanes: int, progress: Progress) -> _Prepared:
    min_documents = _MIN_DOCUMENTS_A_LANE * lanes
    with progress.stage("building a corpus from this Python installation"):
        files = list_files(installation_folders())
        texts = build_corpus(
            files, max_domain_bytes=CORPUS_DOMAIN_BYTES, min_documents=min_documents
        )
        if not texts:
            raise ConfigError("this Python installation holds too little text; give --data")
        pack(texts, out / SHARDS, shard_mb=_SHARD_MB)
    domains = {name: {"shards": [str(out / SHARDS / name / "*.tar")]} for name in texts}
    return _Prepared(domains, texts)
