"""Moments of layers, gathered from calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt import reference
from graphopt.calibration import CalibrationData, Observer, observe
from graphopt.ir import Graph, Node, Value
from graphopt.passes.low_rank.candidates import LayerMoments
from graphopt.passes.low_rank.moments import Moments
from graphopt.passes.low_rank.subjects import Subject
from graphopt.passes.neighbourhoods import neighbourhoods
from graphopt.pipeline import Context

POSITIONS = 1024
"""Of how many positions of an image neighbourhoods count: with more, a random sample of so many.
Neighbouring positions say much the same."""


def gather(
    graph: Graph, needs: Mapping[Subject, tuple[bool, bool]], data: CalibrationData, ctx: Context
) -> dict[Node, LayerMoments]:
    """Moments of layers, in one sweep over the data.

    Args:
        graph: the network.
        needs: the layers, and whether their inputs and their outputs are to be known.
        data: the calibration data.
        ctx: shows the progress, and gives the randomness of samples.
    """
    found: dict[Node, LayerMoments] = {}
    observers: list[tuple[Value, Observer]] = []
    for subject, (inputs, outputs) in needs.items():
        moments = found[subject.node] = empty(subject, inputs, outputs)
        if inputs:

            def see_input(x: Tensor, s: Subject = subject, m: LayerMoments = moments) -> None:
                add_inputs(s, m, x, None, ctx.generator)

            observers.append((subject.input, see_input))
        if outputs:

            def see_output(y: Tensor, s: Subject = subject, m: LayerMoments = moments) -> None:
                add_outputs(s, m, y, None)

            observers.append((subject.node.output, see_output))
    observe(graph, data, observers, ctx, "covariances")
    return found


def gather_pairs(
    original: Graph, graph: Graph, subject: Subject, inputs: bool, data: CalibrationData
) -> LayerMoments:
    """Moments of one layer in a network whose earlier layers are decomposed, together with the
    outputs that it should have.

    Args:
        original: the network as it was.
        graph: as it is now; the layer itself is still as it was.
        subject: the layer.
        inputs: whether what it sees is paired with the outputs, or else its own outputs are.
        data: the calibration data.
    """
    moments = empty(subject, inputs, not inputs, pairs=True)
    watched = subject.input if inputs else subject.node.output
    generator = torch.Generator().manual_seed(0)
    for batch in data.batches(original):
        wanted = _value_of(original, subject.node.output.name, batch.inputs)
        seen = _value_of(graph, watched.name, batch.inputs)
        if inputs:
            add_inputs(subject, moments, seen, wanted, generator)
        else:
            add_outputs(subject, moments, seen, wanted)
    return moments


def _value_of(graph: Graph, name: str, inputs: Sequence[Tensor]) -> Tensor:
    """A value of a graph; what comes after it is not computed."""
    wanted = graph.value(name)
    if wanted in graph.inputs:
        return inputs[graph.inputs.index(wanted)]

    found: list[Tensor] = []

    def keep(node: Node, results: list[Tensor]) -> None:
        if wanted.producer is node:
            found.append(results[wanted.index])

    reference.run(graph, inputs, observe=keep, until=wanted.producer)
    return found[0]


def empty(subject: Subject, inputs: bool, outputs: bool, pairs: bool = False) -> LayerMoments:
    kernels = subject.kernels()
    sizes = [(kernel[0].numel(), kernel.shape[0]) for kernel in kernels]
    return LayerMoments(
        [Moments(seen, out if pairs else 0) for seen, out in sizes] if inputs else [],
        [Moments(out, out if pairs else 0) for _, out in sizes] if outputs else [],
    )


def add_outputs(subject: Subject, moments: LayerMoments, y: Tensor, wanted: Tensor | None) -> None:
    """Results of the layer, and those that it should have."""
    offsets, groups = subject.offsets(), subject.groups
    rows = (in_samples(y, subject.spatial).double() - offsets).chunk(groups, dim=2)
    if wanted is None:
        pairs = [row.new_zeros(*row.shape[:2], 0) for row in rows]
    else:
        targets = in_samples(wanted, subject.spatial).double() - offsets
        pairs = list(targets.chunk(groups, dim=2))
    for one, x, target in zip(moments.outputs, rows, pairs, strict=True):
        one.add(x, target)


def add_inputs(
    subject: Subject,
    moments: LayerMoments,
    x: Tensor,
    wanted: Tensor | None,
    generator: torch.Generator,
) -> None:
    """What a convolution sees at every position, or at a sample of them, and the results that it
    should have there."""
    spatial, taps = subject.spatial, tuple(subject.weight.shape[2:])
    batched = x if x.dim() == spatial + 2 else x[None]
    seen = neighbourhoods(batched, taps, subject.stride, subject.paddings(), subject.dilation)
    positions = seen.shape[1 : 1 + spatial]
    images, count = torch.arange(len(seen))[:, None], positions.numel()
    if count > POSITIONS:
        order = torch.rand(len(seen), count, generator=generator).argsort(dim=1)
        chosen = order[:, :POSITIONS]
    else:
        chosen = torch.arange(count).expand(len(seen), count)
    rows = seen[(images, *torch.unravel_index(chosen, positions))]
    rows = rows.reshape(*chosen.shape, subject.groups, -1)
    targets = rows.new_zeros(*chosen.shape, 0)
    if wanted is not None:
        targets = in_samples(wanted, spatial)[images, chosen].double() - subject.offsets()
    for group, one in enumerate(moments.inputs):
        part = targets.chunk(subject.groups, dim=2)[group] if wanted is not None else targets
        one.add(rows[:, :, group], part)


def in_samples(tensor: Tensor, spatial: int) -> Tensor:
    """Values of a layer, image by image: [images, positions, channels].

    What has neither positions nor a dimension of tokens has a position per image.

    Args:
        tensor: [images, channels, *positions], or without images; if the layer has no spatial
            dimensions [images, ..., channels], or [channels].
        spatial: how many spatial dimensions the layer has.
    """
    if spatial:
        batched = tensor if tensor.dim() == spatial + 2 else tensor[None]
        return batched.flatten(2).mT
    if tensor.dim() == 1:
        return tensor[None, None]
    return tensor.flatten(1, -2) if tensor.dim() > 2 else tensor[:, None]
