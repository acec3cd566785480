"""How much each weight matters: the criteria by name, and what a user's own one is given.

A criterion is a function ``(weight, context) -> scores`` of the weight's shape; the weights with
the lowest scores are pruned. Scores of a block are averaged, scores of a channel are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import PassError
from graphopt.passes.batch_norm_folding import BATCH_NORMS
from graphopt.passes.pruning.layers_to_prune import PrunableLayer
from graphopt.passes.pruning.statistics import Statistics


@dataclass(frozen=True)
class CriterionContext:
    """What a criterion may ask beside the weight.

    Attributes:
        layer: whose weight it is; ``layer.taps(tensor)`` arranges a tensor of its shape as
            [groups, output channels, input channels, taps], ``layer.stored(taps)`` undoes it.
        statistics: what is known from data: norms of inputs and gradients, gathered on demand.
        generator: the source of randomness.
    """

    layer: PrunableLayer
    statistics: Statistics
    generator: torch.Generator


ScoreFunction = Callable[[Tensor, CriterionContext], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A criterion.

    Attributes:
        name: what reports call it.
        score: see the head of this file.
        needs_data: whether it needs calibration data,
        needs_loss: and a loss.
        normalize: applied to the scores of all blocks of a layer, or None.
        updates: whether pruning changes the weights that are kept, too.
    """

    name: str
    score: ScoreFunction
    needs_data: bool = False
    needs_loss: bool = False
    normalize: Callable[[Tensor], Tensor] | None = None
    updates: bool = False

    def scores(self, context: CriterionContext) -> Tensor:
        """Scores of a layer's weight as it is now.

        Raises:
            PassError: a user's function gives none, or NaN.
        """
        weight = context.layer.weight.tensor
        scores = self.score(weight, context)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            raise PassError(
                f"the criterion '{self.name}' gave {_describe(scores)} for the weight of "
                f"{context.layer.name}, which is {_describe(weight)}; scores have its shape"
            )
        if scores.isnan().any():
            raise PassError(
                f"the criterion '{self.name}' gave scores for {context.layer.name} that are not "
                "numbers"
            )
        return scores.detach()


def magnitude(weight: Tensor, context: CriterionContext) -> Tensor:
    """Absolute value; blocks and channels by their L1 norm (Han et al., 2015; Li et al., 2017)."""
    return weight.abs()


def squared_magnitude(weight: Tensor, context: CriterionContext) -> Tensor:
    """Square; blocks and channels by their L2 norm."""
    return weight.square()


def random(weight: Tensor, context: CriterionContext) -> Tensor:
    """Chance: what any criterion has to beat."""
    return torch.rand(weight.shape, generator=context.generator)


def lamp_normalization(scores: Tensor) -> Tensor:
    """Each score relative to the sum of itself and those above it (Lee et al., Layer-Adaptive
    Sparsity for the Magnitude-based Pruning, 2021): what makes layers comparable."""
    flat = scores.flatten().double()
    order = flat.argsort(descending=True, stable=True)
    ranked = flat[order]
    result = torch.empty_like(flat)
    result[order] = ranked / ranked.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return result.reshape(scores.shape)


def batch_norm(weight: Tensor, context: CriterionContext) -> Tensor:
    """|gamma| of the batch norm after the layer, shared evenly by an output channel's weights, so
    that they sum up to it (Liu et al., Network Slimming, 2017).

    Raises:
        PassError: no batch norm follows: the exact passes fold them. Run a pipeline of this
            pass alone over the traced graph, and optimize afterwards.
    """
    layer = context.layer
    taps = layer.taps(weight)
    gammas = torch.zeros(taps.shape[0] * taps.shape[1], dtype=torch.float64)
    for node in layer.nodes:
        users = [user for user in node.output.users if user.op in BATCH_NORMS]
        gamma = users[0]["weight"] if users else None
        if gamma is None or gamma.constant is None or len(gamma.constant) != len(gammas):
            raise PassError(
                f"the criterion 'batch-norm' finds no batch norm with a scale after {layer.name}; "
                "where they are folded already, prune the traced graph by "
                "Pipeline([Prune(...)]).run(graph) first, or ignore the layer"
            )
        gammas += gamma.constant.double().abs()
    per_weight = gammas.reshape(*taps.shape[:2], 1, 1) / (taps.shape[2] * taps.shape[3])
    return layer.stored(per_weight.expand(taps.shape))


def geometric_median(weight: Tensor, context: CriterionContext) -> Tensor:
    """Sum of an output channel's distances to all others, shared evenly by its weights: channels
    near the geometric median can be replaced by others (He et al., FPGM, 2019)."""
    layer = context.layer
    taps = layer.taps(weight)
    rows = taps.double().flatten(2).flatten(0, 1)
    distances = torch.cdist(rows, rows).sum(dim=1)
    per_weight = distances.reshape(*taps.shape[:2], 1, 1) / (taps.shape[2] * taps.shape[3])
    return layer.stored(per_weight.expand(taps.shape))


def taylor(weight: Tensor, context: CriterionContext) -> Tensor:
    """``mean |weight * gradient|`` over the batches: to first order, what the loss changes by when
    the weight becomes zero (Molchanov et al., 2019)."""
    return context.statistics.gradient_times_weight(context.layer)


def fisher(weight: Tensor, context: CriterionContext) -> Tensor:
    """``weight ** 2 * mean gradient ** 2 / 2``: to second order, with the diagonal of the empirical
    Fisher information for the Hessian (LeCun et al., Optimal Brain Damage, 1989; Theis et al.,
    2018). Every batch counts as one sample."""
    return weight.square() * context.statistics.squared_gradient(context.layer) / 2


def wanda(weight: Tensor, context: CriterionContext) -> Tensor:
    """Magnitude times the norm of the input that the weight is multiplied with (Sun et al., A
    Simple and Effective Pruning Approach for Large Language Models, 2023). Weights are compared
    within a layer, not within an output channel."""
    layer = context.layer
    scores = layer.taps(weight).abs().double() * context.statistics.input_norm(layer)
    return layer.stored(scores)


def output_error(weight: Tensor, context: CriterionContext) -> Tensor:
    """Squared error that removing a weight alone brings to the layer's output. It ranks weights of
    different layers; within a layer the Hessian method, see `hessian`, finds better masks."""
    return wanda(weight, context).square()


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("magnitude", magnitude),
        Criterion("l1", magnitude),
        Criterion("l2", squared_magnitude),
        Criterion("random", random),
        Criterion("batch-norm", batch_norm),
        Criterion("lamp", squared_magnitude, normalize=lamp_normalization),
        Criterion("geometric-median", geometric_median),
        Criterion("taylor", taylor, needs_data=True, needs_loss=True),
        Criterion("fisher", fisher, needs_data=True, needs_loss=True),
        Criterion("wanda", wanda, needs_data=True),
        Criterion("hessian", output_error, needs_data=True, updates=True),
    )
}


def _influence(weight: Tensor, context: CriterionContext) -> Tensor:
    raise PassError("the criterion 'influence' ranks residual blocks, not weights")


INFLUENCE = Criterion("influence", _influence, needs_data=True)
"""Ranks residual blocks by how much they change what flows through; see `residual_blocks`."""


def find_criterion(given: str | ScoreFunction) -> Criterion:
    """A criterion by name, or a user's own function.

    Raises:
        PassError: the name is unknown, or it is neither.
    """
    if callable(given):
        return Criterion(getattr(given, "__name__", type(given).__name__), given)
    if given == INFLUENCE.name:
        return INFLUENCE
    if given in CRITERIA:
        return CRITERIA[given]
    raise PassError(
        f"the criterion {given!r} is unknown; there are {', '.join(CRITERIA)}, or a function "
        "(weight, context) -> scores"
    )


def _describe(scores: object) -> str:
    return str(list(scores.shape)) if isinstance(scores, Tensor) else repr(scores)
