"""ONNX export: `export_onnx` writes a graph as a checked, clean and compared ONNX file."""

from graphopt.onnx.export import Exported, export_onnx

__all__ = ["Exported", "export_onnx"]
