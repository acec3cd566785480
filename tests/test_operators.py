"""torch's own OpInfo samples through trace, exact passes and engine, against torch.

The samples of one operator are traced as one module, a call each: tracing costs far more than
running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from agreement import bound, largest_error
from operator_skips import SKIPS
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

import graphopt
from graphopt.engine.layer_rules import LAYERS
from graphopt.engine.pointwise_rules import RULES as POINTWISE
from graphopt.engine.view_rules import _COPIES as COPIES
from graphopt.engine.view_rules import _VIEWS as VIEWS

# What seventy networks of torchvision, timm and transformers export to: ATen names without
# overloads, in-place operators under their functional names.
CENSUS = """
    linear conv2d flatten add dropout batch_norm adaptive_avg_pool2d mul relu transpose reshape cat
    layer_norm view gelu scaled_dot_product_attention unsqueeze expand permute slice mean index
    max_pool2d select _assert_tensor_metadata arange sigmoid embedding to new_ones __and__
    contiguous softmax ge avg_pool2d matmul sub unbind hardsigmoid silu alias tanh hardswish ne div
    upsample_bilinear2d cumsum pow chunk sin cos gather pad linalg_vector_norm clamp_min expand_as
    stack split diff eq le rsqrt hardtanh roll new_zeros lift_fresh_copy fill masked_fill group_norm
    reshape_as zeros neg unflatten squeeze clone zero_ clamp exp einsum swapaxes addcmul
    split_with_sizes bitwise_not leaky_relu upsample_nearest2d repeat upsample_bicubic2d im2col
    col2im max addmm type_as gt abs lt log full_like min where conv1d _weight_norm
""".split()

RENAMED = {
    "index": "__getitem__",
    "__and__": "bitwise_and",
    "linalg_vector_norm": "linalg.vector_norm",
    "upsample_bilinear2d": "nn.functional.interpolate",
    "upsample_nearest2d": "nn.functional.interpolate",
    "upsample_bicubic2d": "nn.functional.interpolate",
    "im2col": "nn.functional.unfold",
    "swapaxes": "transpose",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "log_sigmoid": "nn.functional.logsigmoid",
}

WITHOUT_OPINFO = {
    "_assert_tensor_metadata",
    "_weight_norm",
    "alias",
    "col2im",
    "lift_fresh_copy",
    "type_as",
}

# In-place forms that the networks use.
IN_PLACE = """
    add relu hardswish silu dropout hardtanh fill leaky_relu
""".split()

# Beyond the census: what the engine generates code for, and what its rewrites produce.
FURTHER = """
    mm bmm baddbmm addcdiv conv_transpose1d conv_transpose2d max_pool1d avg_pool1d
    adaptive_avg_pool1d adaptive_max_pool2d log_softmax native_layer_norm rms_norm instance_norm
    normalize sqrt square reciprocal erf elu celu selu mish softplus logsigmoid relu6 threshold
    hardshrink softshrink tanhshrink prelu glu maximum minimum rsub float_power exp2 expm1 log1p
    log2 log10 tan asin acos atan sinh cosh asinh acosh atanh atan2 floor ceil round trunc frac sign
    fmod remainder floor_divide logical_not logical_and logical_or logical_xor bitwise_or
    bitwise_xor lerp clamp_max sum amax amin prod var std argmax argmin any all pixel_shuffle
    pixel_unshuffle channel_shuffle t mT movedim narrow index_select take_along_dim isnan isinf
    isfinite nan_to_num xlogy hypot copysign logaddexp heaviside topk sort tril triu flip
    constant_pad_nd broadcast_to outer true_divide unsafe_chunk unsafe_split view_as
""".split()

# Thousands of samples that differ in one option each: an even selection of them.
CAPPED = {"nn.functional.max_pool1d": 48, "nn.functional.max_pool2d": 48}
INTEGER_SAMPLES = 12
DTYPES = (torch.float32, torch.int64, torch.bool)


@cache
def opinfos(operator: str) -> tuple[OpInfo, ...]:
    """The OpInfos, one per variant, of an ATen operator."""
    names = {RENAMED.get(operator, operator), f"nn.functional.{operator}"}
    return tuple(i for i in op_db if i.name in names and not i.dtypes.isdisjoint(DTYPES))


def distinct(operators: Iterable[str]) -> list[OpInfo]:
    infos = (info for operator in operators for info in opinfos(operator))
    return list({info.full_name: info for info in infos}.values())


@dataclass
class Case:
    """One sample: the leaves of (input, args, kwargs), and how to put them together."""

    label: str
    leaves: list[Any]
    structure: TreeSpec

    @classmethod
    def of(cls, label: str, sample: SampleInput) -> Case:
        return cls(label, *tree_flatten((sample.input, sample.args, sample.kwargs)))

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def __str__(self) -> str:
        shown = [list(v.shape) if isinstance(v, Tensor) else v for v in self.leaves]
        return f"{self.label} {shown}"


class Calls(nn.Module):
    """Applies one operator to the tensors of each case in turn, all else being fixed."""

    def __init__(self, operator: Callable[..., Any], cases: Sequence[Case]) -> None:
        super().__init__()
        self.operator = operator
        self.cases = cases

    def forward(self, tensors: list[Tensor]) -> list[Any]:
        remaining = iter(tensors)
        return [self.apply_to(case, remaining) for case in self.cases]

    def apply_to(self, case: Case, tensors: Iterator[Tensor]) -> Any:
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in case.leaves]
        first, args, kwargs = tree_unflatten(leaves, case.structure)
        return self.operator(first, *args, **kwargs)

    def inputs(self) -> list[Tensor]:
        """Fresh copies, layouts kept, so that no call sees what another one wrote.

        Where no case has a tensor, one that nobody reads: a model has inputs.
        """
        copies = [tensor.clone() for case in self.cases for tensor in case.tensors]
        return copies or [torch.zeros(2)]


def taken(call: Callable[[list[Tensor]], Any], module: Calls) -> bool:
    """Whether `call` accepts the module's inputs."""
    try:
        call(module.inputs())
    except Exception:
        return False
    return True


def compiled(module: Calls) -> Callable[[list[Tensor]], list[Any]]:
    """The module as graphopt compiles it, every size fixed."""
    return graphopt.optimize(module, (module.inputs(),), dynamic={"tensors": {}})


def rejected(module: Calls) -> bool:
    """Whether the module's inputs are refused: by the compiler, or at the call as torch does."""
    try:
        call = compiled(module)
    except graphopt.Error:
        return True
    return not taken(call, module)


def evenly(samples: Iterable[SampleInput], count: int | None) -> list[tuple[int, SampleInput]]:
    """At most `count` samples, spread over all of them, with their positions."""
    numbered = list(enumerate(samples))
    if count is None or len(numbered) <= count:
        return numbered
    return numbered[:: -(-len(numbered) // count)]


def cases_of(info: OpInfo) -> list[Case]:
    cases = []
    for dtype in DTYPES:
        if dtype not in info.dtypes:
            continue
        limit = CAPPED.get(info.name) if dtype.is_floating_point else INTEGER_SAMPLES
        name = str(dtype).removeprefix("torch.")
        samples = info.sample_inputs("cpu", dtype)
        cases += [Case.of(f"{name}[{i}]", sample) for i, sample in evenly(samples, limit)]
    return cases


def skipped(info: OpInfo, label: str) -> bool:
    return any(s.operator == info.formatted_name and label in s.samples for s in SKIPS)


def complaints(operator: Callable[..., Any], cases: Sequence[Case]) -> list[str]:
    """What is wrong with the optimized operator's answers, one line per case."""
    module = Calls(operator, cases)
    inputs, our_inputs = module.inputs(), module.inputs()
    expected = module(inputs)
    try:
        outputs = compiled(module)(our_inputs)
    except Exception as error:  # whatever it is, it is a finding; narrowed down case by case
        if len(cases) > 1:
            return [line for case in cases for line in complaints(operator, [case])]
        first_line = str(error).partition("\n")[0]
        return [f"{cases[0]}: {type(error).__name__}: {first_line}"]
    found = []
    for case, output, wanted in zip(cases, outputs, expected, strict=True):
        complaint = disagreement(operator, case, output, wanted)
        if complaint:
            found.append(f"{case}: {complaint}")
    if not found and not all(map(identical, inputs, our_inputs)):
        if len(cases) > 1:
            return [line for case in cases for line in complaints(operator, [case])]
        return [f"{cases[0]}: torch writes to the inputs, the compiled form does not"]
    return found


def identical(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def disagreement(operator: Callable[..., Any], case: Case, output: Any, wanted: Any) -> str | None:
    (ours, structure), (theirs, wanted_structure) = tree_flatten(output), tree_flatten(wanted)
    if structure != wanted_structure:
        return f"gives {structure}, torch gives {wanted_structure}"
    kinds = [(t.dtype, t.shape) for t in ours]
    wanted_kinds = [(t.dtype, t.shape) for t in theirs]
    if kinds != wanted_kinds:
        return f"gives {kinds}, torch gives {wanted_kinds}"
    if all(identical(a, b) for a, b in zip(ours, theirs, strict=True)):
        return None
    doubles = [
        leaf.to(torch.float64) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in case.leaves
    ]
    exact = Case(case.label, doubles, case.structure)
    (reference,) = Calls(operator, [exact])(exact.tensors)
    error, allowed = largest_error(output, reference), bound(wanted, reference)
    return None if error <= allowed else f"relative error {error:.1e}, allowed {allowed:.1e}"


def test_every_operator_of_the_census_is_accounted_for() -> None:
    assert {name for name in CENSUS if not opinfos(name)} == WITHOUT_OPINFO
    assert all(opinfos(name) for name in FURTHER)


def test_every_operator_with_a_kernel_is_tried() -> None:
    rules = [*LAYERS, *POINTWISE, *VIEWS, *COPIES]
    names = {name.removeprefix("aten.").partition(".")[0] for name in rules}
    tried = {info.full_name for info in distinct([*CENSUS, *FURTHER])}
    assert not {name for name in names if any(i.full_name not in tried for i in opinfos(name))}


@pytest.mark.parametrize("info", distinct([*CENSUS, *FURTHER]), ids=lambda i: i.formatted_name)
def test_samples(info: OpInfo) -> None:
    cases = [case for case in cases_of(info) if not skipped(info, case.label)]
    assert not (found := complaints(info.op, cases)), "\n".join(found)


def in_place_on_a_fresh_value(info: OpInfo) -> Callable[..., tuple[Tensor, Tensor]]:
    """The in-place form, with its effect seen through a view taken before."""
    operator = info.inplace_variant or partial(info.op, inplace=True)

    def apply(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        fresh = x + 1
        view = fresh.reshape(-1)
        return operator(fresh, *args, **kwargs), view

    return apply


def in_place_cases(info: OpInfo) -> list[Case]:
    """Those samples whose result fits in place."""
    modules = [Calls(in_place_on_a_fresh_value(info), [case]) for case in cases_of(info)]
    return [module.cases[0] for module in modules if taken(module, module)]


def error_cases(info: OpInfo) -> list[Case]:
    """The inputs of torch's table of errors, less the few that torch takes."""
    errors = info.error_inputs("cpu") if info.error_inputs_func else ()
    cases = [Case.of(f"error[{i}]", error.sample_input) for i, error in enumerate(errors)]
    modules = [Calls(info.op, [case]) for case in cases]
    return [module.cases[0] for module in modules if not taken(module, module)]


@pytest.mark.parametrize("info", distinct(IN_PLACE), ids=lambda i: i.formatted_name)
def test_in_place_form(info: OpInfo) -> None:
    cases = [c for c in in_place_cases(info) if not skipped(info, f"in-place {c.label}")]
    assert cases
    found = complaints(in_place_on_a_fresh_value(info), cases)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "info",
    [info for info in distinct([*CENSUS, *FURTHER]) if error_cases(info)],
    ids=lambda i: i.formatted_name,
)
def test_what_eager_rejects_is_rejected(info: OpInfo) -> None:
    for case in error_cases(info):
        if not skipped(info, case.label):
            assert rejected(Calls(info.op, [case])), f"{case} is taken, torch rejects it"


def test_no_skip_is_stale() -> None:
    by_name = {info.formatted_name: info for info in op_db}
    for skip in SKIPS:
        assert skip.reason
        info = by_name[skip.operator]
        samples = {case.label: case for case in cases_of(info)}
        in_place = {f"in-place {case.label}": case for case in in_place_cases(info)}
        errors = {case.label: case for case in error_cases(info)}
        for label in skip.samples:
            if label in samples:
                needed = bool(complaints(info.op, [samples[label]]))
            elif label in in_place:
                operator = in_place_on_a_fresh_value(info)
                needed = bool(complaints(operator, [in_place[label]]))
            else:
                needed = not rejected(Calls(info.op, [errors[label]]))
            assert needed, f"{skip.operator} {label} passes by now"
