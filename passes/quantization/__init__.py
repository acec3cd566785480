"""Quantization: observers, schemes, and methods that keep the accuracy."""
