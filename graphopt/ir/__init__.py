"""The graph: values, nodes, types, text form, verifier and views."""
