"""Masks of layers from a criterion's scores, at any sparsity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from graphopt.passes.pruning.criteria import Criterion, CriterionContext
from graphopt.passes.pruning.granularity import Blocks, Granularity
from graphopt.passes.pruning.layers_to_prune import PrunableLayer, masked
from graphopt.passes.pruning.statistics import Statistics


class ScoredLayers:
    """Layers with the scores of their weights as they are at the start, and their masks. Scores
    are computed when they are first needed.

    Args:
        layers: whose.
        granularity: shape of the zeros.
        criterion: what gives the scores.
        statistics: what the criterion may ask.
        generator: the source of randomness.
    """

    def __init__(
        self,
        layers: Iterable[PrunableLayer],
        granularity: Granularity,
        criterion: Criterion,
        statistics: Statistics,
        generator: torch.Generator,
    ) -> None:
        self.layers = list(layers)
        self.granularity = granularity
        self.criterion = criterion
        self._weights = {layer: layer.weight.tensor for layer in self.layers}
        self._contexts = {
            layer: CriterionContext(layer, statistics, generator) for layer in self.layers
        }
        self._known: dict[PrunableLayer, Tensor] = {}

    def remaining(self, layer: PrunableLayer) -> int:
        """How many weights count as not zero: all those of blocks that are not zero altogether."""
        return int(self.granularity.counted(self._taps(layer) != 0).sum())

    def block_scores(self, layer: PrunableLayer) -> tuple[Tensor, Tensor]:
        """Scores of a layer's blocks, and how many weights they have, 0 for blocks of zeros."""
        scores = self._scores(layer)
        if isinstance(self.granularity, Blocks):
            scores = self.granularity.scores(scores)
        if self.criterion.normalize is not None:
            scores = self.criterion.normalize(scores)
        return scores, self._sizes(layer)

    def mask(self, layer: PrunableLayer, sparsity: float) -> Tensor:
        """[groups, output channels, input channels, taps], True where a weight is kept.

        Args:
            layer: one of the layers.
            sparsity: fraction of the remaining weights to prune.
        """
        remaining = self._taps(layer) != 0
        return self.granularity.mask(self._scores(layer), remaining, sparsity)

    def pruned(self, layer: PrunableLayer, sparsity: float) -> Tensor:
        """The layer's weight with zeros for what is pruned."""
        return layer.stored(masked(self._taps(layer), self.mask(layer, sparsity)))

    def losses(self, layer: PrunableLayer, levels: Sequence[float]) -> list[float]:
        """The fraction of a layer's scores, negative ones left out, that each sparsity prunes."""
        scores = self._scores(layer).double().clamp_min(0) * (self._taps(layer) != 0)
        total = max(float(scores.sum()), 1e-30)
        return [float(scores[~self.mask(layer, level)].sum()) / total for level in levels]

    def below(self, layer: PrunableLayer, threshold: float) -> float:
        """The sparsity that prunes the blocks whose scores are below a threshold."""
        scores, sizes = self.block_scores(layer)
        return float(sizes[scores < threshold].sum()) / max(1.0, float(sizes.sum()))

    def _taps(self, layer: PrunableLayer) -> Tensor:
        return layer.taps(self._weights[layer])

    def _scores(self, layer: PrunableLayer) -> Tensor:
        if layer not in self._known:
            self._known[layer] = layer.taps(self.criterion.scores(self._contexts[layer]))
        return self._known[layer]

    def _sizes(self, layer: PrunableLayer) -> Tensor:
        remaining = (self._taps(layer) != 0).double()
        if not isinstance(self.granularity, Blocks):
            return remaining
        alive = self.granularity.sums(remaining) > 0
        return self.granularity.sizes(remaining.shape) * alive
