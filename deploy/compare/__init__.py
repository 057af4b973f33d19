"""Several mixing policies on the same data, model and token budget, held against one another."""
