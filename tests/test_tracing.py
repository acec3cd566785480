"""Tracing: what comes out, what is left alone, and what is refused with which words."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphopt
from graphopt import reference
from graphopt.errors import TraceError


def call(graph: graphopt.Graph, *args: object, **kwargs: object) -> object:
    assert graph.interface is not None
    tensors = graph.interface.tensors(args, kwargs)
    return graph.interface.result(reference.run(graph, tensors))


def assert_same(actual: object, expected: object) -> None:
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        if isinstance(e, Tensor):
            torch.testing.assert_close(a, e, rtol=0, atol=0)
        else:
            assert type(a) is type(e)
            assert a == e


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.norm(self.conv(x))).mean((2, 3))


def test_batch_is_free_and_text_is_golden() -> None:
    graph = graphopt.trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.ones(3, 3, 4))
    assert graph.sizes == {"batch": 3}
    assert str(graph).replace(str(graph.value("1.bias").constant.tolist()), "[...]") == (
        "graph(%input: f32[batch=3, 3, 4]) {\n"
        "  %flatten: f32[3, 12] = aten.flatten.using_ints(%input, 1)  # 0\n"
        "  %1.weight: f32[2, 12] = parameter\n"
        "  %1.bias: f32[2] = parameter [...]\n"
        "  %linear: f32[3, 2] = aten.linear(%flatten, %1.weight, %1.bias)  # 1\n"
        "  return %linear\n"
        "}"
    )


def test_types_are_those_of_the_example_even_at_batch_one() -> None:
    graph = graphopt.trace(ConvNet(), torch.ones(1, 3, 8, 8))
    assert graph.inputs[0].shape == (1, 3, 8, 8)
    assert graph.inputs[0].free == {0: "batch"}
    x = torch.randn(5, 3, 8, 8)
    assert_same(call(graph, x), ConvNet.forward(_of(graph), x))


def _of(graph: graphopt.Graph) -> ConvNet:
    """A ConvNet with the graph's constants."""
    model = ConvNet().eval()
    state = {value.name: value.constant for value in graph.constants}
    model.load_state_dict(state, strict=False)
    return model


def test_model_is_left_as_it_was() -> None:
    model = ConvNet().train()
    model.conv.eval()
    called = []
    model.conv.register_forward_hook(lambda *_: called.append(1))
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    hooks = dict(model.conv._forward_hooks)
    versions = [tensor._version for tensor in model.state_dict().values()]
    graphopt.trace(model, torch.ones(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == flags
    assert model.conv._forward_hooks == hooks
    assert [tensor._version for tensor in model.state_dict().values()] == versions
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert called


def test_constants_alias_the_source() -> None:
    model = ConvNet()
    graph = graphopt.trace(model, torch.ones(2, 3, 8, 8))
    weight = graph.value("conv.weight")
    assert weight.trainable
    assert weight.constant.data_ptr() == model.conv.weight.data_ptr()
    assert not graph.value("norm.running_mean").trainable


def test_in_place_operators_become_functional() -> None:
    graph = graphopt.trace(ConvNet(), torch.ones(2, 3, 8, 8))
    assert "aten.relu" in {node.op for node in graph.nodes}
    assert "aten.batch_norm" in {node.op for node in graph.nodes}


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, pair, *, scale, options=None, mask=None):  # type: ignore[no-untyped-def]
        first, second = pair["a"]
        total = first * scale + second.T.contiguous().T
        if mask is not None:
            total = total.masked_fill(mask, 0.0)
        return {"total": total, "rest": [first, self.table, 7, None, (total > 0, total.shape[0])]}


def test_structures_literals_inputs_and_constants_as_outputs() -> None:
    a, b = torch.randn(2, 3), torch.randn(3, 2).T
    mask = torch.tensor([[True, False, True]] * 2)
    model = Structured()
    for kwargs in ({"scale": 2}, {"scale": 0.5, "mask": mask}, {"mask": mask, "scale": 2}):
        graph = graphopt.trace(model, (({"a": (a, b)},), kwargs))
        graph.verify()
        assert_same(call(graph, {"a": (a, b)}, **kwargs), model({"a": (a, b)}, **kwargs))


def test_keyword_and_positional_spellings_are_one_call() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - y

    x, y = torch.ones(2), torch.zeros(2)
    graph = graphopt.trace(Two(), {"y": y, "x": x})
    assert_same(call(graph, x, y), x - y)
    assert_same(call(graph, x, y=y), x - y)


def test_other_structure_or_literal_is_refused() -> None:
    a = torch.randn(2, 3)
    graph = graphopt.trace(Structured(), (({"a": (a, a)},), {"scale": 2}))
    for scale in (3, 2.0, True):
        with pytest.raises(TraceError, match="traced for other arguments"):
            call(graph, {"a": (a, a)}, scale=scale)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


torch.export.register_dataclass(Output, serialized_type_name="tests.tracing.Output")


def test_dataclass_output() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(logits=x * 2)

    x = torch.randn(2, 3)
    result = call(graphopt.trace(Model(), x), x)
    assert isinstance(result, Output)
    assert torch.equal(result.logits, x * 2)
    assert result.hidden is None


def test_tied_weights_are_one_constant() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    graph = graphopt.trace(Tied(), torch.tensor([[1, 2]]))
    assert [value.name for value in graph.constants] == ["embedding.weight"]
    assert len(graph.constants[0].users) == 2


def test_named_free_sizes() -> None:
    class Pool(nn.Module):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return (tokens * mask[..., None]).sum(1) / tokens.shape[1]

    dynamic = {"tokens": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
    model = Pool()
    graph = graphopt.trace(model, (torch.ones(1, 4, 3), torch.ones(1, 4)), dynamic=dynamic)
    assert graph.sizes == {"batch": 1, "length": 4}
    for batch, length in ((1, 1), (2, 7), (3, 4)):
        x, mask = torch.randn(batch, length, 3), torch.rand(batch, length)
        assert_same(call(graph, x, mask), model(x, mask))


def test_dynamic_can_fix_everything() -> None:
    graph = graphopt.trace(nn.ReLU(), torch.ones(2, 3), dynamic={"input": {}})
    assert graph.sizes == {}
    assert graph.inputs[0].free == {}


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"inputs": {0: "batch"}}, "did you mean 'input'"),
        ({"input": {2: "width"}}, "names dimension 2 of a tensor of shape"),
        ({"input": ["batch"]}, "maps dimensions to names"),
        ({"input": {0: "not a name"}}, "maps dimensions to names"),
    ],
)
def test_wrong_dynamic(dynamic: object, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        graphopt.trace(nn.ReLU(), torch.ones(2, 3), dynamic=dynamic)


class BranchesOnBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 1 else x * 3


def test_a_branch_on_one_is_not_traced_over() -> None:
    with pytest.warns(UserWarning, match=r"dimension 0 \('batch'\) of x is fixed"):
        one = graphopt.trace(BranchesOnBatch(), torch.ones(1, 2))
    assert one.sizes == {}
    assert_same(call(one, torch.ones(1, 2)), torch.full((1, 2), 2.0))
    many = graphopt.trace(BranchesOnBatch(), torch.ones(4, 2))
    assert any("1" in guard for guard in many.guards)
    assert_same(call(many, torch.ones(3, 2)), torch.full((3, 2), 3.0))


def test_guards_are_kept() -> None:
    class Guarded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.shape[0] <= 5 else x

    graph = graphopt.trace(Guarded(), torch.ones(3, 2))
    assert "batch <= 5" in graph.guards
    assert all(sizes["batch"] <= 5 for sizes in graph.assignments)


def test_a_size_that_the_model_fixes_gives_a_warning() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("row", torch.ones(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.row], 1)

    with pytest.warns(UserWarning, match="fixed to the example's size"):
        graph = graphopt.trace(Fixed(), torch.ones(3, 2))
    assert graph.sizes == {}


def test_no_warning_without_cause() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphopt.trace(ConvNet(), torch.ones(1, 3, 8, 8))


class WritesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


class UpdatesStatistics(nn.Module):
    """Its operator does not say that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, training=True)


class WritesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class BranchesOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Strided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.as_strided((2, 2), (1, 1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WritesBuffer(), "writes to its buffer 'count'"),
        (UpdatesStatistics(), "updates the running statistics 'mean'"),
        (WritesInput(), "writes to its input 'x'"),
        (BranchesOnData(), "data-dependent"),
        (Strided(), "as_strided"),
    ],
)
def test_refused_models(model: nn.Module, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        graphopt.trace(model, torch.ones(2, 3))
    assert all(not torch.any(buffer) for buffer in model.buffers())


def test_wrong_arguments() -> None:
    with pytest.raises(TraceError, match="forward: missing a required argument"):
        graphopt.trace(ConvNet(), ())
    with pytest.raises(TraceError, match="example_inputs is a tensor"):
        graphopt.trace(ConvNet(), 3)


class WritesThroughView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].add_(1)
        return y


class WritesThenReadsView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y.reshape(-1)
        y.add_(1)
        return view * y.sum()


class WritesAfterDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = self.drop(y)
        z.relu_()
        return y + z


class WritesNarrow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = (x * 2).to(torch.float16)
        y += x
        return y


class WritesChain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        y.relu_().mul_(2).add_(x)
        return y


@pytest.mark.parametrize(
    "model",
    [
        WritesThroughView(),
        WritesThenReadsView(),
        WritesAfterDropout(),
        WritesNarrow(),
        WritesChain(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_writes_that_others_see(model: nn.Module) -> None:
    x = torch.tensor([[-1.0, 2.0, 0.3], [0.5, -2.0, 1.5]])
    expected = model.eval()(x.clone())
    graph = graphopt.trace(model, x)
    graph.verify()
    assert_same(call(graph, x), expected)
    assert not any(node.operator.is_mutable for node in graph.nodes)


def test_make_fx_where_export_refuses() -> None:
    class Unregistered:
        def __init__(self, value: int) -> None:
            self.value = value

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.helper = Unregistered(3)

        def forward(self, x: Tensor, helper: object = None) -> Tensor:
            return self.linear(x) * (helper.value if helper else 1)

    helper = Unregistered(3)
    model, x = Odd(), torch.randn(2, 3)
    with pytest.warns(UserWarning, match="torch.export refused"):
        graph = graphopt.trace(model, ((x,), {"helper": helper}))
    assert graph.sizes == {}
    assert_same(call(graph, x, helper), model(x, helper))
    assert {value.name for value in graph.constants} >= {"linear.weight", "linear.bias"}


def test_autocast_region() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.linear(x)

    model, x = Mixed(), torch.randn(2, 3)
    result = call(graphopt.trace(model, x), x)
    assert result.dtype == torch.bfloat16
    assert_same(result, model(x).detach())


def test_sizes_of_the_call_reach_the_operators() -> None:
    class Grow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:])

    free = {"x": {0: "batch", 2: "height", 3: "width"}}
    model = Grow()
    graph = graphopt.trace(model, torch.randn(1, 2, 8, 8), dynamic=free)
    x = torch.randn(3, 2, 6, 10)
    assert_same(call(graph, x), model(x))
