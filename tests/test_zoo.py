"""A dozen networks of the zoo through trace, exact passes, engine and ONNX, at two batch sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from agreement import tensors
from zoo import NETWORKS, Network, ci_networks
from zoo_check import Subject

from graphopt.engine import compile_graph


def test_the_zoo_is_large_and_the_dozen_is_varied() -> None:
    assert len(NETWORKS) >= 62
    dozen = ci_networks()
    assert len(dozen) == 12
    assert {network.library for network in dozen} == {"torchvision", "timm", "transformers"}


def test_a_network_is_the_same_at_every_build() -> None:
    network = NETWORKS["mobilenet_v3_small"]
    first, second = (network.build(network.small).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batch_norms_and_biases_are_not_trivial() -> None:
    state = NETWORKS["resnet18"].build(64).state_dict()
    for name, value in state.items():
        if "num_batches_tracked" not in name:
            assert value.flatten().unique().numel() > 1, name
        if name.endswith("running_var"):
            assert (value > 0).all()


@pytest.fixture(scope="module", params=ci_networks(), ids=lambda network: network.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    network: Network = request.param
    return Subject(network, network.small)


@pytest.mark.slow
def test_outputs_depend_on_the_inputs(subject: Subject) -> None:
    other = subject.network.inputs(2, subject.size, seed=99)
    with torch.no_grad():
        changed = other.call(subject.model)
    for before, after in zip(tensors(subject.truths[0].single), tensors(changed), strict=True):
        assert (before - after).abs().max() > 0.05 * before.abs().max()


@pytest.mark.slow
def test_traced_graph_gives_the_models_numbers(subject: Subject) -> None:
    errors = subject.graph_errors(subject.optimized.source_graph)
    for truth, error in zip(subject.truths, errors, strict=True):
        assert error <= truth.allowed


@pytest.mark.slow
def test_exact_passes_keep_the_numbers(subject: Subject) -> None:
    graph = subject.optimized.graph
    assert len(graph.nodes) < len(subject.optimized.source_graph.nodes)
    for truth, error in zip(subject.truths, subject.graph_errors(graph), strict=True):
        assert error <= truth.allowed


@pytest.mark.slow
def test_engine_gives_the_models_numbers(subject: Subject) -> None:
    for truth, error in zip(subject.truths, subject.engine_errors(), strict=True):
        assert error <= truth.allowed


@pytest.mark.slow
def test_the_arena_is_hardly_larger_than_what_lives_at_one_time(subject: Subject) -> None:
    plan = compile_graph(subject.optimized.graph, threads=2).run
    assert 0 < plan.arena_lower_bound <= plan.arena_bytes <= 1.1 * plan.arena_lower_bound


@pytest.mark.slow
def test_export_gives_the_models_numbers(subject: Subject, tmp_path: Path) -> None:
    errors = subject.onnx_errors(tmp_path / "model.onnx")
    for truth, error in zip(subject.truths, errors, strict=True):
        assert error <= truth.allowed
