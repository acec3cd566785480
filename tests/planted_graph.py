"""Faults in the graph itself."""

from __future__ import annotations

from planted import changed, fault, test_of

from graphopt.ir import quantization, sizes, text, verifier
from graphopt.ir.graph import Graph
from graphopt.ir.storage import Storage

GRAPH, TEXT = "ir/test_graph.py", "ir/test_text.py"

fault(
    "a value that is used no more keeps its user",
    test_of(GRAPH, "test_replacing"),
    changed(Storage._relink, "value.users.pop(node, None)", "pass"),
)
fault(
    "an edit forgets to restore constants",
    test_of(GRAPH, "test_an_edit_is_undone_by_the_callers_own_error"),
    changed(Graph.set_constant, 'self._record(lambda: setattr(value, "constant", old))', "pass"),
)
fault(
    "types stop moving on after one node",
    test_of(GRAPH, "test_setting_an_operand_moves_types_on"),
    changed(Storage._settle, "for user in value.users:", "for user in ():"),
    changed(Storage._set_types, "for user in value.users:", "for user in ():"),
)
fault(
    "types are inferred under the example's sizes only",
    test_of(GRAPH, "test_equal_shapes_of_the_example_are_not_equal_types"),
    changed(Graph.replace, "old.types != new.types", "old.type != new.type"),
)
fault(
    "the verifier does not look at use-lists",
    test_of("ir/test_verifier.py", "test_damage_is_noticed", "missing_user"),
    changed(verifier._verify_uses, "set(value.users) != set(users)", "False"),
)
fault(
    "the verifier infers under one assignment",
    test_of("ir/test_verifier.py", "test_damage_is_noticed",
            "wrong_shape_under_the_other_sizes_only"),
    changed(
        verifier._verify_types,
        "[value.types for value in node.outputs] != types",
        "[value.types[0] for value in node.outputs] != [t[0] for t in types]",
    ),
)  # fmt: skip
fault(
    "a guard always holds",
    test_of("test_model.py", "test_a_guard_that_fails_is_traced_again"),
    changed(sizes.violated, "not evaluate(guard, sizes)", "False"),
)
fault(
    "the second assignment ignores the guards",
    test_of("ir/test_sizes.py", "test_another_assignment_satisfies_the_guards",
            {"batch": 4}, ["batch % 4 == 0"]),
    changed(sizes._hold, "violated(guards, sizes) is None", "True"),
)  # fmt: skip
fault(
    "numbers lose their sign in the text",
    test_of(TEXT, "test_literals", -0.0),
    changed(text.format_operand, "return repr(operand)", "return repr(operand).lstrip('-')"),
)
fault(
    "halves round away from zero",
    test_of("ir/test_quantization.py", "test_halves_round_to_even"),
    changed(
        quantization.quantize,
        "torch.round(x / _along(scale, x, axis, block_size))",
        "torch.floor(x / _along(scale, x, axis, block_size) + 0.5)",
    ),
)
