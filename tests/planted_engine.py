"""Faults in the engine."""

from __future__ import annotations

from planted import changed, engine_on_random_graphs, fault, test_of

from graphopt.engine import layer_rules, lowering, plan, storage, tape, view_rules

LOWERING, PROGRAM = "engine/test_lowering.py", "engine/test_program.py"

fault(
    "buffers overlap in the arena, and the plan's own verification says so",
    test_of("engine/test_plan.py", "test_same_lifetime_packs_without_gaps"),
    changed(plan._best_gap, "return int(reached[-1])", "return int(reached[-1]) - 64"),
)
fault(
    "buffers overlap, and nobody verifies",
    test_of("engine/test_plan.py", "test_no_byte_has_two_owners"),
    changed(plan._best_gap, "return int(reached[-1])", "return int(reached[-1]) - 64"),
    changed(plan.plan_memory, "verify_plan(lifetimes, plan)", "pass"),
)
fault(
    "buffers die a step too early",
    test_of(PROGRAM, "test_threads_agree", 64, 2),
    changed(
        storage.Storage._plan,
        "Lifetime(size, min(touches), max(touches))",
        "Lifetime(size, min(touches), max(min(touches), max(touches) - 1))",
    ),
)
fault(
    "a fusion drops the second user of what it swallows",
    test_of(LOWERING, "test_a_result_with_two_users_is_written"),
    changed(lowering._Fusion.is_private, "home is user", "True"),
)
fault(
    "a fusion closes a circle",
    test_of(LOWERING, "test_a_circle_through_another_fused_loop_is_avoided"),
    changed(lowering._Fusion.reaches, "if unit is target:", "if False:"),
)
fault(
    "an epilogue comes before the bias",
    test_of(LOWERING, "test_a_convolution_takes_bias_residual_and_activation"),
    changed(layer_rules._after_bias, "return Ref(biased)", "return Ref(0)"),
)
fault(
    "epilogues run in the opposite order",
    test_of(LOWERING, "test_a_chain_is_one_loop"),
    changed(lowering._Fusion.join, "drafts = [*into.drafts, *unit.drafts]",
            "drafts = [*into.drafts, *unit.drafts]; order = {n: -p for n, p in order.items()}"),
)  # fmt: skip
fault(
    "a view begins one element too late",
    engine_on_random_graphs("slice", "select", "split"),
    changed(view_rules._strided, "indices.start * strides[dimension]",
            "indices.start * strides[dimension] + (indices.start > 0)"),
)  # fmt: skip
fault(
    "threads do not wait for each other between steps",
    test_of(PROGRAM, "test_a_step_waits_for_all_threads"),
    changed(tape.TapeWriter.finish, "flags | walker.BARRIER", "flags"),
)
fault(
    "scratch memory is laid over a live buffer",
    test_of("engine/test_team.py", "test_workers_that_sleep_wake_again"),
    changed(
        storage.Storage._plan,
        "plan.offsets[len(lifetimes) :]",
        "[plan.offsets[len(lifetimes) - 1] for _ in scratch]",
    ),
)
