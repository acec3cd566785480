"""The engine: lowering, selection, memory plan and execution of a graph."""
