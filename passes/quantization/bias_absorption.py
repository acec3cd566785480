"""High-bias absorption: what a ReLU nearly always lets through moves into the next layer's bias.

Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.calibration import CalibrationData, observe
from graphopt.errors import PassError
from graphopt.ir import Graph, Node
from graphopt.passes.layers import Layer, layer_of, rewrite_layer
from graphopt.passes.quantization.channel_statistics import ChannelMoments
from graphopt.pipeline import Context
from graphopt.registry import register_pass


@register_pass("high-bias-absorption", accuracy="lossy")
@dataclass(frozen=True)
class HighBiasAbsorption:
    """Lowers biases before ReLUs whose channels are nearly always far above zero.

    A channel is lowered by its mean less three standard deviations, where that is positive; the
    layers behind the ReLU get the difference into their biases. It is exact for all numbers above
    that, which leaves the network's function as it is but for rare outliers, and makes the range
    that is to be quantized smaller. Run it after cross-layer equalisation.

    Attributes:
        data: calibration data.
        deviations: how many standard deviations are kept below the mean.
    """

    data: Any = None
    deviations: float = 3.0

    def run(self, graph: Graph, ctx: Context) -> bool:
        if self.data is None:
            raise PassError("HighBiasAbsorption needs calibration data; pass data=")
        links = [link for node in graph.nodes if (link := _link(node)) is not None]
        if not links:
            return False
        moments = [ChannelMoments(writer.output_dimension) for writer, _ in links]
        outputs = [writer.node.output for writer, _ in links]
        watched = zip(outputs, moments, strict=True)
        observe(graph, CalibrationData(self.data), watched, ctx, "moments of channels")
        changed = False
        for (writer, readers), seen in zip(links, moments, strict=True):
            changed |= self._absorb(graph, writer.node, [reader.node for reader in readers], seen)
        return changed

    def _absorb(
        self, graph: Graph, node: Node, readers: list[Node], moments: ChannelMoments
    ) -> bool:
        absorbed = moments.mean() - self.deviations * moments.variance().sqrt()
        absorbed = absorbed.clamp_min(0)
        if not absorbed.any():
            return False
        with graph.edit():
            # Layers are looked up anew: one may be a reader here and a writer elsewhere.
            for reader in map(layer_of, readers):
                assert isinstance(reader, Layer)
                offsets = reader.offsets() + reader.response(absorbed)
                rewrite_layer(graph, reader, reader.taps(), offsets)
            writer = layer_of(node)
            assert isinstance(writer, Layer)
            rewrite_layer(graph, writer, writer.taps(), writer.offsets() - absorbed)
        return True


def _link(node: Node) -> tuple[Layer, list[Layer]] | None:
    """A layer before a ReLU, and the layers that alone read that; without zero padding, which a
    shift does not reach."""
    writer = layer_of(node)
    if not isinstance(writer, Layer) or node.output.is_output:
        return None
    relu = node.output.only_user()
    if relu is None or relu.op != "aten.relu" or relu.output.is_output:
        return None
    readers = [layer_of(user) for user in relu.output.users]
    found = [r for r in readers if isinstance(r, Layer) and r.input is relu.output]
    alike = all(
        not reader.has_padding and reader.input_dimension == writer.output_dimension
        for reader in found
    )
    return (writer, found) if found and alike and len(found) == len(readers) else None
