"""The library inside the trainer: session, batches, gradient probe."""
