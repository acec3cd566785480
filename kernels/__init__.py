"""Kernel families, one per file; they know problems, not graphs."""
