"""Tensors and launches: it knows programs, and nothing of trees or optimizers."""
