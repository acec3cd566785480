"""ONNX export: `export_onnx` writes a graph as a checked, clean and compared ONNX file."""

from graphopt.onnx.export import Exported, export_onnx
from graphopt.onnx.layers import LayerComparison, compare_layers

__all__ = ["Exported", "LayerComparison", "compare_layers", "export_onnx"]
