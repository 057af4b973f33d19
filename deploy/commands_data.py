"""`headrace pack`, `headrace index` and `headrace verify`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from controller.config import load_run_file
from deploy.exits import stderr, told
from deploy.progress import working
from protos.dataset_index import DatasetIndex

_FAULTY = 4

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
ProcessesOption = Annotated[
    int, typer.Option(min=0, help="Processes to work in; 0: one a core, 1: this one alone.")
]
RayOption = Annotated[
    str | None, typer.Option("--ray", help="Work on the Ray cluster at this address, or `auto`.")
]


@told
def pack(
    src: Annotated[Path, typer.Argument(help="Folder of domains.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; must not be there yet.")],
    shard_mb: Annotated[float, typer.Option(help="Text in a shard, in MiB.")] = 64.0,
    text_field: Annotated[str, typer.Option(help="Field of a JSON line with the text.")] = "text",
    processes: ProcessesOption = 0,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack text into webdataset shards: OUT/domain/domain-000000.tar and so on.

    A domain of SRC is a folder of .txt files (a document each), a folder of .jsonl or .jsonl.zst
    files (a document a line), or one such file. Empty documents and exact duplicates are left out.
    OUT gets its name when it is complete; nothing is overwritten. Domains are packed in parallel;
    on Ray, SRC and OUT must be folders that all of its machines share.
    """
    from deploy.last_resort import stoppable
    from deploy.pack import pack as pack_domains
    from deploy.parallel import choose
    from deploy.sources import Documents, find_domains, text_domains

    domains = text_domains(find_domains(src.absolute()), src)
    documents = {domain.name: Documents(domain, text_field) for domain in domains}
    with stoppable(), working(stderr, "packing") as update:
        packed = pack_domains(
            documents,
            out.absolute(),
            shard_mb=shard_mb,
            mapper=choose(len(documents), processes=processes, ray_address=ray),
            progress=lambda name, num_documents, num_bytes: update(
                f"{name}: {num_documents:,} documents, {num_bytes / 2**20:,.1f} MiB"
            ),
        )
    if as_json:
        print(json.dumps({name: asdict(domain) for name, domain in packed.items()}, indent=2))
        return
    table = Table("domain", "documents", "MiB", "shards", "left out")
    for name, domain in packed.items():
        left_out = domain.num_short + domain.num_duplicates
        size = f"{domain.num_bytes / 2**20:,.1f}"
        table.add_row(
            name, f"{domain.num_documents:,}", size, str(domain.num_shards), str(left_out)
        )
    Console().print(table)


@told
def index(
    run_file: Annotated[Path, typer.Argument(help="The run file; its data.index is written.")],
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Read every shard again though there is an index.")
    ] = False,
    processes: ProcessesOption = 0,
    ray: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build the dataset index of a run: every shard read once, its samples counted and hashed.

    Of a damaged shard what is whole is kept; what is left out is said. An index that is there
    already is kept, unless --rebuild: where shards hold something else than before, the data has
    another order, and a run that began with the old one cannot go on. An indexing that was
    interrupted goes on where it was. On Ray, local shards and the index's folder must be shared.
    """
    from deploy.dataset import ensure_index
    from deploy.last_resort import stoppable
    from deploy.parallel import choose

    config = load_run_file(run_file)
    with stoppable(), working(stderr, "indexing") as update:
        found = ensure_index(
            config,
            rebuild=rebuild,
            mapper=choose(None, processes=processes, ray_address=ray),
            progress=lambda done, total: update(
                f"{done:,} of {total:,} shards ({done / max(total, 1):.0%})"
            ),
        )
    rows = {name: _domain_row(found, name) for name in found.domains}
    if as_json:
        print(json.dumps({"sha256": found.sha256, "domains": rows}, indent=2))
        return
    table = Table("domain", "shards", "samples", "left out", "MiB of text", "quarantined shards")
    for name, row in rows.items():
        size = f"{row['text_bytes'] / 2**20:,.1f}"
        samples = f"{row['num_samples']:,}"
        left_out, quarantined = f"{row['num_unreadable']:,}", str(row["num_quarantined"])
        table.add_row(name, str(row["num_shards"]), samples, left_out, size, quarantined)
    console = Console()
    console.print(table)
    for line in _losses(found):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"{config.data.index}  sha256 {found.sha256}", soft_wrap=True, highlight=False)


def _domain_row(found: DatasetIndex, name: str) -> dict[str, int]:
    shards = found.shards(name)
    return {
        "num_shards": len(shards),
        "num_samples": found.num_samples(name),
        "text_bytes": found.text_bytes(name),
        "num_unreadable": sum(shard.num_unreadable for shard in shards),
        "num_quarantined": sum(bool(shard.quarantined) for shard in shards),
    }


def _losses(found: DatasetIndex) -> Iterator[str]:
    """Yield a line for each shard of which something is left out."""
    for name in found.domains:
        for shard in found.shards(name):
            if shard.quarantined:
                yield f"quarantined ({name}): {shard.quarantined}"
            elif shard.num_unreadable:
                yield (
                    f"left out ({name}): {shard.num_unreadable} of {shard.num_samples} samples of "
                    f"{shard.url}: {shard.damage}"
                )


@told
def verify(
    out: Annotated[Path, typer.Argument(help="Folder of a finished run, with its ledger.")],
    head: Annotated[
        str | None,
        typer.Option(
            metavar="ROW:HASH",
            help="`ledger_head` of a checkpoint's data state, or of a report.json kept elsewhere: "
            "the ledger must still have that row.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a finished run: ledger intact, plans obeyed, nothing lost, doubled or changed.

    The sequences that should have come are cut anew from the raw shards and held against what the
    trainers received. Exit code 4 if they differ, 5 if the ledger is damaged or was rolled back.
    """
    from controller.ledger import reading_ledger
    from controller.ledger_head import hold_against_head
    from deploy.record import ledger_of
    from deploy.report import checks, examine

    if head is not None:
        ledger = ledger_of(out)
        with reading_ledger(ledger) as database:
            hold_against_head(database, ledger, head)
    findings = examine(out)
    result = checks(findings)
    if as_json:
        summary = {"clean": findings.clean, "ledger_head": findings.record.head}
        print(json.dumps({**summary, **result}, indent=2))
    else:
        console = Console(highlight=False)
        console.print(f"ledger: {findings.record.num_rows:,} rows, chain of hashes intact")
        console.print(f"ledger head: {findings.record.head}", soft_wrap=True)
        for name, value in result.items():
            console.print(f"{name.replace('_', ' ')}: {value}", soft_wrap=True, markup=False)
        console.print("clean" if findings.clean else "NOT CLEAN", style="bold")
    if not findings.clean:
        raise typer.Exit(_FAULTY)
