"""Distil a large medical language model into a small one. For research, not for care."""

__version__ = "0.1.0"
