"""What an export can be asked: `python -m deploy.examples.query_export OUT`.

Uses pyarrow, which every controller has; with DuckDB installed, `--duckdb` asks the same in SQL.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as ds

BY_DOMAIN = """
SELECT domain, sum(sequences) AS sequences, sum(tokens) AS tokens,
       sum(loss_sum) / nullif(sum(tokens), 0) AS loss
FROM read_parquet('{folder}/observations/*.parquet')
WHERE NOT superseded
GROUP BY domain ORDER BY tokens DESC, domain
"""


def by_domain(folder: Path) -> list[dict[str, Any]]:
    """Return sequences, tokens and mean loss (nats a token) of each domain, most tokens first."""
    seen = ds.dataset(folder / "observations").to_table(
        columns=["domain", "sequences", "tokens", "loss_sum"], filter=~pc.field("superseded")
    )
    domain = seen["domain"].cast("string")
    sums = seen.set_column(0, "domain", domain).group_by("domain")
    table = sums.aggregate([(name, "sum") for name in ("sequences", "tokens", "loss_sum")])
    rows = [
        {
            "domain": row["domain"],
            "sequences": row["sequences_sum"],
            "tokens": row["tokens_sum"],
            "loss": row["loss_sum_sum"] / row["tokens_sum"] if row["tokens_sum"] else None,
        }
        for row in table.to_pylist()
    ]
    return sorted(rows, key=lambda row: (-row["tokens"], row["domain"]))


def by_domain_in_sql(folder: Path) -> list[dict[str, Any]]:
    """Return the same, asked of DuckDB."""
    import duckdb

    query = BY_DOMAIN.format(folder=str(folder).replace("'", "''"))
    with duckdb.connect() as connection:
        answer = connection.execute(query)
        names = [column[0] for column in answer.description or []]
        return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]


def slowest_steps(folder: Path, number: int) -> list[dict[str, Any]]:
    """Return the steps that waited longest for data, the longest wait first."""
    steps = ds.dataset(folder / "steps").to_table(
        columns=["step", "data_wait_s", "step_s", "degraded"], filter=~pc.field("superseded")
    )
    order = [("data_wait_s", "descending"), ("step", "ascending")]
    rows: list[dict[str, Any]] = steps.sort_by(order).slice(0, number).to_pylist()
    return rows


def main() -> None:
    """Print both answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what `headrace export` wrote")
    parser.add_argument("--duckdb", action="store_true", help="ask DuckDB rather than pyarrow")
    options = parser.parse_args()
    ask = by_domain_in_sql if options.duckdb else by_domain
    print(f"{'domain':24} {'sequences':>12} {'tokens':>16} {'nats/token':>10}")
    for row in ask(options.folder):
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        print(f"{row['domain']:24} {row['sequences']:12,} {row['tokens']:16,} {loss:>10}")
    print("\nsteps that waited longest for data")
    for row in slowest_steps(options.folder, 5):
        wait = "-" if row["data_wait_s"] is None else f"{row['data_wait_s']:.3f} s"
        print(f"step {row['step']}: {wait}{' (degraded)' if row['degraded'] else ''}")


if __name__ == "__main__":
    main()
