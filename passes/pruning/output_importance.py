"""How much the network's results depend on each output channel of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from graphopt import reference
from graphopt.ir import Graph, Node, Value
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.pipeline import Context

SAMPLES = 32
"""How many samples are enough."""
CHUNK = 2
"""Samples that are differentiated at once; their values are all kept meanwhile."""
PROBES = 2
FLOOR = 1e-3
"""Mean square that is added to that of the gradients, relative to the layer's: channels on which
nothing depends may matter for other data."""


def output_importance(
    graph: Graph,
    layers: Sequence[PrunableLayer],
    inputs: Iterable[Sequence[Tensor]],
    ctx: Context,
) -> dict[PrunableLayer, Tensor]:
    """Root of the mean square, over data, places and random projections of the network's results,
    of the gradient with respect to each channel of a layer's output.

    Its square is the importance that a second-order expansion gives to errors of the channel;
    that is too faithful to the few data that there are, and prunes channels that other data need.

    Args:
        graph: the network as it is before pruning.
        layers: with products.
        inputs: batches of one tensor per input of the graph; at most `SAMPLES` samples are used.
        ctx: shows the progress, and has the source of randomness.

    Returns:
        Per layer [groups * output channels], float64, with the mean 1; all ones where no gradient
        comes through, such as before a quantization.
    """
    squares: dict[PrunableLayer, Tensor] = {}
    for chunk in ctx.track(list(_chunks(graph, inputs)), "importance of channels"):
        outputs, results = _differentiable(graph, layers, chunk)
        for _ in range(PROBES):
            probe = _projection(results, ctx.generator)
            if not probe.requires_grad:
                break
            tensors = [tensor for _, tensor in outputs]
            found = torch.autograd.grad(probe, tensors, retain_graph=True, allow_unused=True)
            for (layer, _), gradient in zip(outputs, found, strict=True):
                if gradient is not None:
                    own = _per_channel(layer, gradient.double().square())
                    squares[layer] = squares[layer] + own if layer in squares else own
    return {layer: _relative(layer, squares.get(layer)) for layer in layers}


def _chunks(graph: Graph, inputs: Iterable[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    """The first samples, a few at a time."""
    left = SAMPLES
    for batch in inputs:
        free = [x for value, x in zip(graph.inputs, batch, strict=True) if 0 in value.free]
        size = len(free[0]) if free else 1
        for first in range(0, min(size, left), CHUNK):
            part = slice(first, min(first + CHUNK, size))
            yield [
                x[part] if 0 in value.free else x
                for value, x in zip(graph.inputs, batch, strict=True)
            ]
        left -= size
        if left <= 0:
            return


def _differentiable(
    graph: Graph, layers: Sequence[PrunableLayer], inputs: Sequence[Tensor]
) -> tuple[list[tuple[PrunableLayer, Tensor]], list[Tensor]]:
    """The outputs of layers, and the floating results of the network that depend on them."""
    owners = {node: layer for layer in layers for node in layer.products}
    outputs: list[tuple[PrunableLayer, Tensor]] = []

    def note(node: Node, results: list[Tensor]) -> None:
        if node in owners:
            if not results[0].requires_grad:  # nothing before it has a gradient either
                results[0].requires_grad_()
            outputs.append((owners[node], results[0]))

    with torch.enable_grad():
        environment = reference.every_value(graph, inputs, observe=note)
    results = [environment[value] for value in graph.outputs if isinstance(value, Value)]
    return outputs, [r for r in results if isinstance(r, Tensor) and r.is_floating_point()]


def _projection(results: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A random projection of results, all of the same weight."""
    total = torch.zeros(())
    for result in results:
        scale = result.detach().square().mean().sqrt().clamp_min(1e-30)
        noise = torch.randn(result.shape, generator=generator, dtype=result.dtype)
        total = total + (result * noise).sum() / scale
    return total


def _per_channel(layer: PrunableLayer, squares: Tensor) -> Tensor:
    """Sums over all dimensions but that of the channels."""
    channels = squares.dim() - 1 - len(layer.kernel)
    return squares.sum(dim=[d for d in range(squares.dim()) if d != channels])


def _relative(layer: PrunableLayer, squares: Tensor | None) -> Tensor:
    groups, outputs = layer.taps(layer.weight.tensor).shape[:2]
    if squares is None or not squares.isfinite().all() or not squares.any():
        return torch.ones(groups * outputs, dtype=torch.float64)
    importance = (squares / squares.mean() + FLOOR).sqrt()
    return importance / importance.mean()
