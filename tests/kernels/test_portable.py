"""The same kernels for CPUs without this machine's instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import binding
from support import ALONE

from graphopt.kernels.simd import FEATURES, LANES

HERE = Path(__file__).parent
SELECTION = [
    "test_simd.py",
    "test_elementary.py",
    "test_pointwise.py::test_broadcasting_between_guard_pages",
    "test_pointwise.py::test_conversion_of_what_no_integer_holds_is_defined",
    "test_copy.py::test_layouts",
    "test_reduction.py::test_special_values",
    "test_reduction.py::test_a_norm_is_one_kernel",
    "test_normalization.py::test_special_values",
    "test_normalization.py::test_operands_of_other_dtypes_and_strides",
    "test_convolution.py::test_shapes",
    "test_convolution.py::test_special_values_stay_where_they_belong",
    "test_convolution_chain.py::test_padded_planes",
    "test_depthwise.py::test_padded_planes",
    "test_depthwise.py::test_shapes",
    "test_direct_convolution.py::test_sizes",
    "test_row_convolution.py::test_shapes",
    "test_dynamic_matmul.py::test_sizes",
    "test_gather.py::test_rows",
    "test_integer_convolution.py::test_shapes",
    "test_integer_convolution.py::test_nothing_saturates_in_between",
    "test_integer_layout.py",
    "test_integer_convolution.py::test_halves_round_to_even",
    "test_integer_matmul.py::test_halves_round_to_even",
    "test_integer_matmul.py::test_sizes",
    "test_integer_windows.py::test_depthwise",
    "test_integer_windows.py::test_maximum",
    "test_sparse_integer_convolution.py::test_schedules",
    "test_sparse_integer_matmul.py::test_schedules",
    "test_matmul.py::test_linear",
    "test_matmul.py::test_attention",
    "test_attention.py::test_special_values",
    "test_softmax.py::test_special_values",
    "test_sparse_convolution.py::test_padded_planes",
    "test_sparse_convolution.py::test_panels_that_stay_in_the_image",
    "test_sparse_convolution.py::test_rows_that_share_their_zeros",
    "test_sparse_convolution.py::test_a_zero_weight_multiplies_nothing",
    "test_sparse_matmul.py::test_rows_that_share_their_zeros",
    "test_sparse_matmul.py::test_a_zero_weight_multiplies_nothing",
    "test_sparse_convolution.py::test_halves[places0-1-14 x 14]",
    "test_sparse_convolution.py::test_halves[places1-4-copied]",
    "test_sparse_convolution.py::test_halves[places2-1-stride 2]",
    "test_sparse_strips.py::test_halves[places0-1-14 x 14]",
    "test_sparse_strips.py::test_halves[places0-4-stride 2]",
    "test_sparse_strips.py::test_shapes[1-stride 2]",
    "test_sparse_strips.py::test_shapes[1-quarters of vectors]",
    "test_sparse_strips.py::test_shapes[4-narrow]",
    "test_shares.py::test_every_task_has_one_thread",
    "test_sparse_vector.py::test_one_row",
    "test_weight_only_matmul.py::test_sizes",
    "test_sparse_vector.py::test_a_zero_weight_multiplies_nothing",
    "test_stream.py",
    "test_strided_winograd.py::test_shapes",
    "test_winograd.py::test_shapes",
]
TARGETS = {
    "generic": (4, ""),
    "haswell": (8, "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_for_other_cpus(name: str) -> None:
    lanes, features = TARGETS[name]
    if name != "generic" and "x86_64" not in binding.get_process_triple():
        pytest.skip("an x86 CPU's name means nothing here")
    if not {feature[1:] for feature in features.split(",") if feature} <= FEATURES:
        pytest.skip(f"this CPU cannot run code for {name}")
    if lanes == LANES and "avxvnni" not in FEATURES:
        pytest.skip(f"all other tests run kernels for {name} on this CPU")
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    tests = [f"{HERE / test}" for test in SELECTION]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    script = ALONE + "from graphopt.kernels.simd import LANES; print(LANES)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == lanes
