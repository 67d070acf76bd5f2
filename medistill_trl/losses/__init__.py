"""Losses as pure functions on tensors: no trainer, no files, no global state."""
