"""A ledger read: exported to Parquet, its batches made again, its pictures on one page."""
