"""Parquet written as it comes, in row groups of bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.reading.tables import Column, Table

GROUP_ROWS = 1 << 16
"""Rows of a row group: readers skip groups whose range of steps they do not want."""

GROUP_BYTES = 32 << 20
"""Of lists in a row group, which rows do not measure."""

FILE_ROWS = 1 << 22

_Block = tuple[int, dict[str, Any]]


class TableWriter:
    """One table's folder; holds a row group in memory, and no more."""

    def __init__(self, folder: Path, table: Table, domains: list[str]) -> None:
        """Make the folder; `domains` are the run's names, in order."""
        self.num_rows = 0
        self._folder = folder / table.name
        self._folder.mkdir(parents=True)
        self._table = table
        self._schema = table.schema
        self._names = pa.array(domains, pa.string())
        self._blocks: list[_Block] = []
        self._held_rows = self._held_bytes = 0
        self._file: Any = None
        self._file_rows = self._num_files = 0

    def add(self, count: int, **columns: Any) -> None:
        """Append `count` rows.

        Args:
            count: how many.
            **columns: of each either an array with a value for each row (of domains their
                positions), or one value for all rows.
        """
        self._blocks.append((count, columns))
        self._held_rows += count
        self._held_bytes += sum(
            value.nbytes
            for value in columns.values()
            if isinstance(value, np.ndarray) and value.ndim == 2
        )
        if self._held_rows >= GROUP_ROWS or self._held_bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is held; a table without rows is a file without rows."""
        self._flush()
        if self._num_files == 0:
            self._open()
        self._close_file()

    def abandon(self) -> None:
        """Close the file that is open, whatever it holds."""
        self._blocks = []
        self._held_rows = 0
        self._close_file()

    def _flush(self) -> None:
        if not self._blocks:
            return
        columns = [self._column(column) for column in self._table.columns]
        batch = pa.Table.from_arrays(columns, schema=self._schema)
        if self._file is None or self._file_rows >= FILE_ROWS:
            self._open()
        self._file.write_table(batch, row_group_size=len(batch))
        self.num_rows += len(batch)
        self._file_rows += len(batch)
        self._blocks = []
        self._held_rows = self._held_bytes = 0

    def _column(self, column: Column) -> Any:
        parts = [(count, block[column.name]) for count, block in self._blocks]
        if pa.types.is_dictionary(column.kind):
            positions = np.concatenate([_spread(count, value) for count, value in parts])
            indices = pa.array(positions.astype(np.int32), mask=positions < 0)
            return pa.DictionaryArray.from_arrays(indices, self._names)
        if isinstance(parts[0][1], np.ndarray) and parts[0][1].ndim == 2:
            matrix = np.concatenate([value for _, value in parts])
            ends = np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1]
            return pa.ListArray.from_arrays(pa.array(ends), pa.array(matrix.ravel()))
        if pa.types.is_integer(column.kind) or pa.types.is_floating(column.kind):
            values = np.concatenate([_spread(count, value) for count, value in parts])
            mask = values == column.missing if column.missing is not None else None
            return pa.array(values, mask=mask, from_pandas=True).cast(column.kind)
        return pa.array([value for count, value in parts for _ in range(count)], column.kind)

    def _open(self) -> None:
        self._close_file()
        path = self._folder / f"part-{self._num_files:05d}.parquet"
        self._file = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._file_rows = 0
        self._num_files += 1

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _spread(count: int, value: Any) -> np.ndarray[Any, np.dtype[Any]]:
    return value if isinstance(value, np.ndarray) else np.full(count, value)
