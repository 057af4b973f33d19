"""Programs to start from: a trainer, its models and its checkpoints."""
