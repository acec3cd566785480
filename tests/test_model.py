"""The optimized model as its users meet it: calls, sizes, copies, threads, forks, refusals."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt import model as model_module
from graphopt.errors import Error, TraceError
from graphopt.ir import Graph


@pytest.fixture(autouse=True)
def _estimated_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_SELECTION", "estimate")


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


@pytest.fixture
def net() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet().eval()


def assert_close_to_source(optimized: nn.Module, source: nn.Module, *args: object) -> None:
    with torch.no_grad():
        exact = copy.deepcopy(source).double()(
            *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        )
        own = (source(*args).double() - exact).abs().max().item()
    result = optimized(*args)
    scale = exact.abs().max().item()
    assert (result.double() - exact).abs().max().item() <= 4 * own + 1e-6 * scale


def test_same_numbers_at_any_batch(net: ConvNet) -> None:
    optimized = graphopt.optimize(net, torch.randn(1, 3, 8, 8))
    for batch in (1, 2, 5, 1):
        assert_close_to_source(optimized, net, torch.randn(batch, 3, 8, 8))
    assert len(optimized._traces) == 1


def test_traced_at_the_first_call(net: ConvNet) -> None:
    optimized = graphopt.optimize(net)
    with pytest.raises(TraceError, match="call it once"):
        _ = optimized.graph
    assert_close_to_source(optimized, net, torch.randn(2, 3, 8, 8))
    assert optimized.graph.sizes == {"batch": 2}


def test_other_fixed_size_or_dtype_is_traced_again() -> None:
    class Interpolate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:])

    source = Interpolate()
    optimized = graphopt.optimize(source, torch.randn(1, 3, 8, 8))
    for shape in ((1, 3, 8, 8), (2, 3, 12, 6), (1, 3, 8, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(optimized(x), source(x))
    assert len(optimized._traces) == 2
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    assert optimized(x).dtype == torch.float64


def test_a_guard_that_fails_is_traced_again() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] > 3 else x * 3

    optimized = graphopt.optimize(Branches(), torch.ones(2, 2))
    for batch in (2, 3, 4, 7, 1, 3):
        x = torch.randn(batch, 2)
        assert torch.equal(optimized(x), Branches()(x))


def test_plans_and_traces_are_bounded(net: ConvNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "PLANS_PER_TRACE", 3)
    monkeypatch.setattr(model_module, "TRACES", 2)
    optimized = graphopt.optimize(nn.ReLU())
    for batch in range(1, 8):
        assert optimized(-torch.ones(batch, 2)).shape == (batch, 2)
    assert len(optimized._traces[0].plans) == 3
    for width in range(1, 5):
        optimized(torch.ones(2, width))
    assert len(optimized._traces) == 2


def test_structures_and_literals() -> None:
    class Structured(nn.Module):
        def forward(self, x, *, scale, extra=None):  # type: ignore[no-untyped-def]
            return {"y": x * scale, "rest": (x, 3, None, [x.shape[0]]), "extra": extra}

    source = Structured()
    optimized = graphopt.optimize(source)
    x = torch.randn(2, 3)
    for kwargs in ({"scale": 2}, {"scale": 0.5}, {"extra": x, "scale": 2}):
        result, expected = optimized(x, **kwargs), source(x, **kwargs)
        assert torch.equal(result["y"], expected["y"])
        assert torch.equal(result["rest"][0], x)
        assert result["rest"][1:] == expected["rest"][1:]
        assert (result["extra"] is None) == (expected["extra"] is None)


def test_results_own_their_memory_and_carry_no_gradient(net: ConvNet) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = x * 2
            return x, y, y

    x = torch.randn(2, 3, requires_grad=True)
    results = graphopt.optimize(Same(), x)(x)
    assert len({result.data_ptr() for result in results} | {x.data_ptr()}) == 4
    assert not any(result.requires_grad for result in results)
    optimized = graphopt.optimize(net)
    x = torch.randn(1, 3, 8, 8)
    first = optimized(x)
    kept = first.clone()
    optimized(torch.randn(1, 3, 8, 8))
    assert torch.equal(first, kept)


def test_inputs_of_any_strides(net: ConvNet) -> None:
    optimized = graphopt.optimize(net, torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    expected = optimized(x)
    assert torch.equal(optimized(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(optimized(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    unaligned = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert torch.equal(optimized(unaligned), expected)


def test_sixteen_threads(net: ConvNet) -> None:
    optimized = graphopt.optimize(net)
    inputs = [torch.randn(1 + k % 3, 3, 8, 8) for k in range(48)]
    expected = [optimized(x) for x in inputs]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(5):
            for result, correct in zip(pool.map(optimized, inputs), expected, strict=True):
                assert torch.equal(result, correct)


def test_sixteen_threads_at_the_first_call(net: ConvNet) -> None:
    optimized = graphopt.optimize(net)
    x = torch.randn(2, 3, 8, 8)
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(optimized, [x] * 16))
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(optimized._traces) == 1


def _in_child(optimized: nn.Module, x: Tensor, queue: multiprocessing.SimpleQueue) -> None:
    queue.put(optimized(x).numpy())


def test_works_after_fork(net: ConvNet) -> None:
    optimized = graphopt.optimize(net)
    x = torch.randn(2, 3, 8, 8)
    expected = optimized(x)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(optimized, x, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    torch.testing.assert_close(torch.from_numpy(queue.get()), expected)
    assert torch.equal(optimized(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(net: ConvNet, copied: object) -> None:
    x = torch.randn(2, 3, 8, 8)
    optimized = graphopt.optimize(net, x)
    expected = optimized(x)
    twin = copied(optimized)  # type: ignore[operator]
    assert torch.equal(twin(x), expected)
    assert twin(torch.randn(3, 3, 8, 8)).shape == (3, 5)
    assert str(twin.graph) == str(optimized.graph)
    assert [node.origin for node in twin.graph.nodes] == [
        node.origin for node in optimized.graph.nodes
    ]
    with pytest.raises(TraceError, match="no source to trace again"):
        twin(torch.randn(2, 3, 9, 9))


def test_a_changed_source_is_noticed(net: ConvNet) -> None:
    optimized = graphopt.optimize(net, torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        net.conv.weight.mul_(2)
    with pytest.raises(TraceError, match=r"'conv\.weight' of the source model was changed"):
        optimized(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("inside", [False, True])
def test_inference_mode(inside: bool) -> None:
    with torch.inference_mode(inside):
        net = ConvNet().eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        expected = net(x)
        optimized = graphopt.optimize(net, x)
        torch.testing.assert_close(optimized(x), expected)
    torch.testing.assert_close(optimized(x), expected)
    with torch.inference_mode(inside), torch.no_grad():
        net.conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(TraceError, match=r"'conv\.weight' of the source model was changed"):
        optimized(x[:1])


def test_is_for_inference_on_the_cpu(net: ConvNet) -> None:
    optimized = graphopt.optimize(net, torch.randn(2, 3, 8, 8))
    assert optimized.eval() is optimized
    assert not optimized.training
    assert optimized.to("cpu") is optimized
    for change in (optimized.train, optimized.double, optimized.half):
        with pytest.raises(Error):
            change()
    with pytest.raises(Error, match="move or convert the source"):
        optimized.to("meta")
    with pytest.raises(Error, match="runs on the CPU"):
        optimized(torch.randn(2, 3, 8, 8, device="meta"))
    assert list(optimized.parameters()) == []


def test_source_is_not_changed(net: ConvNet) -> None:
    net.train()
    before = copy.deepcopy(net.state_dict())
    graphopt.optimize(net, torch.randn(2, 3, 8, 8))(torch.randn(2, 3, 8, 8))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_source(net: ConvNet, dtype: torch.dtype) -> None:
    half = copy.deepcopy(net).to(dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    optimized = graphopt.optimize(half, x)
    result = optimized(x)
    assert result.dtype == dtype
    exact = copy.deepcopy(half).double()(x.double())
    assert (result - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    assert half.conv.weight.dtype == dtype


def test_half_precision_source_that_returns_float32() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.linear(x)
            return y, y.float()

    source = Head().to(torch.bfloat16)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    dtypes = [result.dtype for result in graphopt.optimize(source)(x)]
    assert dtypes == [torch.bfloat16, torch.float32]


def test_custom_pass(net: ConvNet) -> None:
    seen = []

    def count(graph: Graph, ctx: graphopt.Context) -> bool:
        seen.append(len(graph))
        return False

    graphopt.optimize(net, torch.randn(2, 3, 8, 8), passes=[count])
    assert len(seen) == 1


def test_arguments_of_optimize_are_checked(net: ConvNet) -> None:
    with pytest.raises(Error, match=r"takes an nn\.Module"):
        graphopt.optimize(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(Error, match="optimized already"):
        graphopt.optimize(graphopt.optimize(net))
    with pytest.raises(graphopt.PassError, match="dead-code"):
        graphopt.optimize(net, passes=["dead-cod"])


def test_compare(net: ConvNet) -> None:
    x = torch.randn(2, 3, 8, 8)
    comparison = graphopt.optimize(net, x).compare(x)
    assert comparison.first_difference is None
    assert len(comparison.outputs) == 1
    assert comparison.outputs[0].relative < 1e-5


def test_compare_finds_the_first_layer_that_parts(net: ConvNet) -> None:
    def spoil(graph: Graph, ctx: graphopt.Context) -> bool:
        bias = graph.value("head.bias")
        graph.set_constant(bias, bias.constant + 1)
        return True

    x = torch.randn(2, 3, 8, 8)
    comparison = graphopt.optimize(net, x, passes=[spoil]).compare(x)
    assert comparison.first_difference is not None
    assert comparison.first_difference.module == "head"
    assert "first to part" in str(comparison)


def test_threads_are_honoured(net: ConvNet) -> None:
    x = torch.randn(2, 3, 8, 8)
    results = [graphopt.optimize(net, threads=threads)(x) for threads in (1, 2, 3)]
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)
