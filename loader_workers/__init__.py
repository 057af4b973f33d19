"""The processes that read: shard cache, order, packing, lane streams."""
