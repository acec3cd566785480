"""Types of results, from fake tensors."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from graphopt.errors import GraphError
from graphopt.ir import ScalarType, TensorType
from graphopt.ir.inference import flatten_results, infer, map_operand, may_alias
from graphopt.ir.operators import resolve


def f32(*shape: int) -> TensorType:
    return TensorType(torch.float32, shape)


def test_a_layer():
    operands = {"input": f32(2, 3, 8, 8), "weight": f32(4, 3, 3, 3), "stride": [2, 2]}
    assert infer(resolve("aten.conv2d"), operands) == (f32(2, 4, 3, 3),)


def test_promotion_follows_the_kind_of_number():
    integers = TensorType(torch.int64, (3,))
    add = resolve("aten.add.Tensor")
    assert infer(add, {"self": integers, "other": 1}) == (integers,)
    assert infer(add, {"self": integers, "other": 1.0}) == (f32(3),)
    masks = TensorType(torch.bool, (3,))
    assert infer(add, {"self": masks, "other": True}) == (masks,)
    assert infer(add, {"self": masks, "other": 1}) == (integers,)
    # A tensor without dimensions does not promote within its category, one with them does.
    half, single = TensorType(torch.float16, (3,)), f32()
    assert infer(add, {"self": half, "other": single}) == (half,)
    assert infer(add, {"self": half, "other": f32(1)}) == (f32(3),)


def test_scalars_are_results_and_operands():
    sizes = infer(resolve("aten.sym_size.int"), {"self": f32(5, 2), "dim": 0})
    assert sizes == (ScalarType(5),)
    assert infer(resolve("operator.mul"), {"a": sizes[0], "b": 2}) == (ScalarType(10),)
    assert infer(resolve("operator.truediv"), {"a": sizes[0], "b": 2}) == (ScalarType(2.5),)
    shaped = infer(resolve("aten.reshape"), {"self": f32(5, 2), "shape": [sizes[0], 2, 1]})
    assert shaped == (f32(5, 2, 1),)


def test_several_results():
    split = infer(resolve("aten.split.Tensor"), {"self": f32(7, 2), "split_size": 3})
    assert split == (f32(3, 2), f32(3, 2), f32(1, 2))
    values, indices = infer(resolve("aten.max.dim"), {"self": f32(4, 3), "dim": 0})
    assert (values, indices) == (f32(3), TensorType(torch.int64, (3,)))


def test_nothing_depends_on_the_default_device_or_on_gradients():
    with torch.device("meta"), torch.enable_grad():
        assert infer(resolve("aten.arange"), {"end": 11}) == (TensorType(torch.int64, (11,)),)


@pytest.mark.parametrize(
    ("op", "operands", "reason"),
    [
        ("aten.linear", {"input": f32(2, 3), "weight": f32(4, 5)}, "aten.linear.*f32.2, 3."),
        ("aten.nonzero", {"self": f32(3)}, "depends on the data"),
        ("aten.item", {"self": f32()}, "depends on the data"),
        ("aten.to_sparse", {"self": f32(3)}, "only dense"),
        ("aten.cat", {"tensors": [f32(2, 3), f32(2, 4)]}, "aten.cat"),
    ],
)
def test_refusals(op, operands, reason):
    with pytest.raises(GraphError, match=reason):
        infer(resolve(op), operands)


def test_a_refusal_is_quiet(caplog: pytest.LogCaptureFixture):
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with caplog.at_level(logging.DEBUG), pytest.raises(GraphError):
        infer(resolve("aten.pixel_shuffle"), {"self": f32(3, 3), "upscale_factor": 2})
    assert not caplog.records
    assert not log.disabled


def test_answers_are_remembered(monkeypatch: pytest.MonkeyPatch):
    operands = {"self": f32(123, 7), "other": 0.125}
    first = infer(resolve("aten.mul.Tensor"), operands)
    monkeypatch.setattr(
        "graphopt.ir.inference._run", lambda *_: pytest.fail("the answer was known")
    )
    assert infer(resolve("aten.mul.Tensor"), operands) == first


def test_a_memo_tells_kinds_of_numbers_apart():
    integers = TensorType(torch.int64, (31,))
    add = resolve("aten.add.Tensor")
    kinds = [infer(add, {"self": integers, "other": n})[0] for n in (1, 1.0, True)]
    assert [kind.dtype for kind in kinds] == [torch.int64, torch.float32, torch.int64]


def test_threads_may_infer_at_once():
    results: dict[int, tuple] = {}

    def work(n: int) -> None:
        for k in range(20):
            results[n, k] = infer(resolve("aten.add.Tensor"), {"self": f32(n + 2, k), "other": 1})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {(n, k): (f32(n + 2, k),) for n in range(4) for k in range(20)}


def test_aliases():
    x = f32(2, 6)
    assert may_alias(resolve("aten.reshape"), {"self": x, "shape": [3, 4]})
    assert may_alias(resolve("aten.transpose.int"), {"self": x, "dim0": 0, "dim1": 1})
    assert may_alias(resolve("aten.split.Tensor"), {"self": x, "split_size": 1})
    assert may_alias(resolve("aten.contiguous"), {"self": x})
    assert not may_alias(resolve("aten.relu"), {"self": x})
    assert not may_alias(resolve("aten.clone"), {"self": x})


def test_helpers():
    assert flatten_results((1, [2, (3,)], None)) == [1, 2, 3]
    assert flatten_results(None) == []
    assert map_operand([1, [2, 3]], lambda n: n + 1) == [2, [3, 4]]
    assert map_operand((1,), lambda n: n) == [1]
