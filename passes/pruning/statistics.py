"""What criteria learn from data: norms of inputs, gradients of a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from graphopt import reference
from graphopt.calibration import CalibrationData, Observer, observe
from graphopt.errors import PassError
from graphopt.ir import Graph, Value
from graphopt.passes.pruning.layer_inputs import columns, from_matrix
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.pipeline import Context

Loss = Callable[[Any, Any], Tensor]
"""(output of the model, target of the batch) -> a tensor of one number."""


class Statistics:
    """Statistics of a graph's layers, each gathered for all layers in one sweep over the data
    when it is first asked for. Nothing is kept of the data itself.

    Args:
        graph: the network as it is before pruning.
        layers: those asked about.
        data: None where there is none; what needs it then raises PassError.
        loss: likewise.
        ctx: shows the progress.
    """

    def __init__(
        self,
        graph: Graph,
        layers: Iterable[PrunableLayer],
        data: CalibrationData | None,
        loss: Loss | None,
        ctx: Context,
    ) -> None:
        self._graph, self._layers, self._ctx = graph, list(layers), ctx
        self._data, self._loss = data, loss
        self._energies: dict[PrunableLayer, Tensor] | None = None
        self._products: dict[PrunableLayer, tuple[Tensor, Tensor]] | None = None

    def input_norm(self, layer: PrunableLayer) -> Tensor:
        """Euclidean norm of what each weight is multiplied with, over all data: float64,
        [groups, 1, input channels, taps]. Ones for embeddings, whose input is an index."""
        if self._energies is None:
            self._energies = self._gather_energies()
        energy = self._energies.get(layer)
        return torch.ones(1, 1, 1, 1, dtype=torch.float64) if energy is None else energy.sqrt()

    def gradient_times_weight(self, layer: PrunableLayer) -> Tensor:
        """``mean |weight * gradient|`` over the batches, in the weight's shape."""
        return self._gathered_products(layer)[0]

    def squared_gradient(self, layer: PrunableLayer) -> Tensor:
        """``mean gradient ** 2`` over the batches, in the weight's shape: the diagonal of the
        empirical Fisher information if every batch is one sample."""
        return self._gathered_products(layer)[1]

    def _gathered_products(self, layer: PrunableLayer) -> tuple[Tensor, Tensor]:
        if self._products is None:
            self._products = self._gather_products()
        return self._products[layer]

    def _required_data(self) -> CalibrationData:
        if self._data is None:
            raise PassError("the criterion needs data; give Prune(data=...) batches of inputs")
        return self._data

    def _gather_energies(self) -> dict[PrunableLayer, Tensor]:
        energies: dict[PrunableLayer, Tensor] = {}
        observers: list[tuple[Value, Observer]] = []
        for layer in self._layers:
            if not layer.products:
                continue
            taps = layer.taps(layer.weight.tensor).shape
            energies[layer] = torch.zeros(taps[0], taps[3] * taps[2], dtype=torch.float64)
            for node in layer.products:

                def add(x: Tensor, node: Any = node, layer: PrunableLayer = layer) -> None:
                    for chunk in columns(node, x, layer.kernel):
                        energies[layer] += chunk.square().sum(dim=2, dtype=torch.float64)

                observers.append((node["input"], add))
        observe(self._graph, self._required_data(), observers, self._ctx, "norms of inputs")
        shapes = {layer: layer.taps(layer.weight.tensor).shape for layer in energies}
        return {
            layer: from_matrix(energy.unsqueeze(1), torch.Size((s[0], 1, s[2], s[3])))
            for layer, energy in energies.items()
            for s in (shapes[layer],)
        }

    def _gather_products(self) -> dict[PrunableLayer, tuple[Tensor, Tensor]]:
        if self._loss is None:
            raise PassError(
                "the criterion needs a loss; give Prune(loss=...) a function of (output, target)"
            )
        weights = {layer: layer.weight.tensor.detach() for layer in self._layers}
        sums = {layer: [torch.zeros_like(w) for _ in range(2)] for layer, w in weights.items()}
        count = 0
        for batch in self._required_data().batches(self._graph, self._ctx, "gradients"):
            count += 1
            gradients = self._gradients(batch.inputs, batch.target, weights)
            for layer, gradient in gradients.items():
                sums[layer][0] += (gradient * weights[layer]).abs()
                sums[layer][1] += gradient.square()
        return {layer: (first / count, second / count) for layer, (first, second) in sums.items()}

    def _gradients(
        self, inputs: list[Tensor], target: Any, weights: dict[PrunableLayer, Tensor]
    ) -> dict[PrunableLayer, Tensor]:
        """Gradients of the loss of one batch."""
        assert self._loss is not None
        leaves = {layer: w.clone().requires_grad_() for layer, w in weights.items()}
        given: dict[Value, Any] = dict(zip(self._graph.inputs, inputs, strict=True))
        for layer, leaf in leaves.items():
            given[layer.node[layer.weight.operand]] = leaf
        with torch.enable_grad():
            outputs = evaluate_graph(self._graph, given)
            interface = self._graph.interface
            result = interface.result(outputs) if interface is not None else outputs
            loss = self._loss(result, target)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise PassError(
                    f"the loss gave {loss!r}; it must give one number that depends on the output"
                )
            found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
        missing = [layer.name for layer, g in zip(leaves, found, strict=True) if g is None]
        if missing:
            raise PassError(
                f"the loss has no gradient for {', '.join(missing[:4])}: an operator after it, "
                "such as a quantization, has none; prune before, or ignore these layers"
            )
        return dict(zip(leaves, found, strict=True))


def evaluate_graph(graph: Graph, given: dict[Value, Any]) -> list[Any]:
    """Evaluate a graph through torch, with gradients where they are enabled.

    Args:
        graph: what to evaluate.
        given: tensors of all inputs, and of any other values that are to be taken as given.
    """
    environment = {value: value.constant for value in graph.constants} | given
    for node in graph.nodes:
        if all(value in environment for value in node.outputs):
            continue
        results = reference.results_of(node, environment)
        for value, result in zip(node.outputs, results, strict=True):
            environment.setdefault(value, result)
    return [environment[out] if isinstance(out, Value) else out for out in graph.outputs]
