"""Pruning: from single weights to whole channels."""
