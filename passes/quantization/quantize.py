"""Quantize: weights and activations as 8-bit integers, or weights alone with 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.calibration import CalibrationData, Observer, observe
from graphopt.errors import PassError
from graphopt.ir import Graph, Node, Value
from graphopt.pass_report import PassReport
from graphopt.passes.layer_choice import LayerPattern, as_patterns, chosen
from graphopt.passes.layers import LAYERS, LINEAR
from graphopt.passes.quantization import mixed_precision
from graphopt.passes.quantization.equalisation import channel_groups, equalise_activations
from graphopt.passes.quantization.insertion import (
    RoundedWeight,
    quantize_activations,
    quantize_dynamically,
    quantize_layer,
)
from graphopt.passes.quantization.layer_rounding import (
    METHODS,
    round_nearest,
    round_with_data,
)
from graphopt.passes.quantization.observers import OBSERVERS, Range
from graphopt.passes.quantization.scheme import Scheme, find_scheme, is_candidate
from graphopt.passes.quantization.weights import ActivationFormat, WeightFormat
from graphopt.pipeline import Context
from graphopt.registry import register_pass

Activations = Literal["uint8", "int8", "dynamic"] | None
_DTYPES = {"uint8": torch.uint8, "int8": torch.int8}
_BITS = {"int8": 8, "int4": 4}


@register_pass("quantize", accuracy="lossy")
@dataclass(frozen=True)
class Quantize:
    """Computes convolutions and linear layers with 8-bit integers.

    Weights are symmetric, per output channel. Static activations are affine, per tensor, with
    ranges from calibration data; values between integer operators stay quantized. Zeros of
    weights stay zeros.

    Attributes:
        data: calibration data, an iterable of batches in the form of ``example_inputs``. Needed
            for static activations, for any method but "nearest" and for targets.
        activations: "uint8" or "int8": static. "dynamic": linear layers only, each row scaled by
            its largest magnitude while the network runs. None: only the weights of linear layers
            are quantized.
        weights: "int8" or "int4"; the latter without static activations only.
        group_size: with activations None, a scale for each run of so many inputs.
        per_channel: a scale per output channel, or one per weight.
        observer: how ranges are found: "mse", "min-max", "moving-average", "percentile" or
            "entropy".
        method: how weights are rounded: "nearest", "gptq", or "reconstruction", which improves
            on GPTQ's solution; by default "gptq" with data and "nearest" without.
        equalise: from 0 to 1, how far channels between layers are scaled to one range beforehand;
            for networks whose activations have channels with outliers.
        correct_bias: keep the mean of every output channel; with data.
        fuse_additions: a residual addition is part of the layer before it, and the sum alone is
            quantized. False also quantizes what is added, which onnxruntime's integer kernels
            need, and costs accuracy.
        ignore: layers that stay in floats: module paths, regular expressions, module types. An
            image whose colours are normalised differently may lose most where it is quantized
            with one scale: then the first layer is worth it.
        target_sqnr: leave as few layers in floats as give the outputs this ratio of signal to
            quantization noise, in decibels.
        max_drop: the same for how much of ``evaluate`` may be lost.
        evaluate: a figure of merit of a graph, the more the better, such as its accuracy.
        batches: use only so many batches of the data.
    """

    data: Any = None
    activations: Activations = "uint8"
    weights: Literal["int8", "int4"] = "int8"
    group_size: int | None = None
    per_channel: bool = True
    observer: str = "mse"
    method: str | None = None
    equalise: float = 0.0
    correct_bias: bool = True
    fuse_additions: bool = True
    ignore: Sequence[LayerPattern] | LayerPattern = ()
    target_sqnr: float | None = None
    max_drop: float | None = None
    evaluate: Callable[[Graph], float] | None = None
    batches: int | None = None

    def __post_init__(self) -> None:
        _check_choice("activations", self.activations, (*_DTYPES, "dynamic", None))
        _check_choice("weights", self.weights, tuple(_BITS))
        _check_choice("observer", self.observer, tuple(OBSERVERS))
        _check_choice("method", self.method, (None, "nearest", *METHODS))
        as_patterns(self.ignore)
        static = self.activations in _DTYPES
        if self.data is None:
            for given, what in (
                (static, f"activations={self.activations!r}"),
                (self.method not in (None, "nearest"), f"method={self.method!r}"),
                (self.target_sqnr is not None, "target_sqnr"),
                (self.max_drop is not None, "max_drop"),
            ):
                if given:
                    raise PassError(
                        f"Quantize with {what} needs calibration data; pass data=, or "
                        "activations='dynamic' or None, which do without"
                    )
        if self.weights == "int4" and self.activations is not None:
            raise PassError("int4 weights go with activations=None only")
        if self.group_size is not None and (self.activations is not None or self.group_size < 2):
            raise PassError("group_size goes with activations=None only, and is at least 2")
        if self.group_size is not None and not self.per_channel:
            raise PassError("group_size divides the scales of a channel; leave per_channel on")
        if not 0 <= self.equalise <= 1:
            raise PassError(f"equalise is from 0 to 1, not {self.equalise}")
        if (self.max_drop is None) != (self.evaluate is None):
            raise PassError("max_drop and evaluate go together")

    def run(self, graph: Graph, ctx: Context) -> bool:
        version = graph.version
        layers, skipped = self._choose(graph)
        if not layers:
            return False
        data = None if self.data is None else CalibrationData(self.data, self.batches)
        if data is not None and self.equalise and self.activations in _DTYPES:
            equalise_activations(graph, channel_groups(graph), data, self.equalise, ctx)
        work = _Work(self, graph, layers, data, ctx)
        work.calibrate()
        work.round_weights()
        kept, notes, hurts = work.choose_floats()
        work.apply(graph, work.layers)
        ctx.report(_report(self, graph, layers, skipped, kept, notes, hurts))
        return graph.version != version

    @property
    def weight_format(self) -> WeightFormat:
        return WeightFormat(_BITS[self.weights], self.per_channel, self.group_size)

    @property
    def rounding(self) -> str:
        return self.method or ("nearest" if self.data is None else "gptq")

    def _choose(self, graph: Graph) -> tuple[list[str], dict[str, str]]:
        """The layers that can be quantized, and why others cannot, by name."""
        ignored = chosen(graph, as_patterns(self.ignore))
        layers: list[str] = []
        skipped: dict[str, str] = {}
        for node in graph.nodes:
            if node.op not in LAYERS:
                continue
            reason = "ignored" if node in ignored else is_candidate(node)
            if reason is None and self.activations not in _DTYPES and node.op != LINEAR:
                reason = "only linear layers are quantized without static activations"
            if reason is None:
                layers.append(node.name)
            else:
                skipped[node.name] = reason
        return layers, skipped


class _Work:
    """What one run of the pass finds out, by names of values and layers."""

    def __init__(
        self,
        options: Quantize,
        graph: Graph,
        layers: list[str],
        data: CalibrationData | None,
        ctx: Context,
    ) -> None:
        self.options = options
        self.source = graph.clone()
        self.layers = layers
        self.data = data
        self.ctx = ctx
        self.ranges: dict[str, Range] = {}
        self.rounded: dict[str, RoundedWeight] = {}

    @property
    def _static(self) -> torch.dtype | None:
        return _DTYPES.get(self.options.activations or "")

    def calibrate(self) -> None:
        """Find the ranges of values, in one sweep over the data."""
        if self._static is not None:
            nodes = self._nodes(self.source, self.layers)
            self._complete_ranges(self._scheme(self.source, nodes))

    def round_weights(self) -> None:
        options, format = self.options, self.options.weight_format
        if options.rounding == "nearest" and not (options.correct_bias and self.data):
            nodes = self._nodes(self.source, self.layers)
            self.rounded = {node.name: round_nearest(node, format) for node in nodes}
            return
        assert self.data is not None
        quantized = self.source.clone()
        self._quantize_inputs(quantized, self.layers)
        self.rounded = round_with_data(
            self.source,
            quantized,
            self.layers,
            format,
            options.rounding,
            options.correct_bias,
            self.data,
            self.ctx,
        )

    def choose_floats(self) -> tuple[set[str], list[str], dict[str, float]]:
        """The layers that must stay in floats, what is to be told, and all sensitivities.

        The weights of the others are then rounded anew, for what these layers give in floats.
        """
        options = self.options
        if options.target_sqnr is None and options.max_drop is None:
            return set(), [], {}
        assert self.data is not None
        found = mixed_precision.sensitivities(
            self.source, self._build, self.layers, self.data, self.ctx
        )
        order = sorted(self.layers, key=lambda name: found[name])

        @cache
        def quality(count: int) -> float:
            """With so many layers in floats."""
            floats = set(order[:count])
            return self._quality(self._build([n for n in self.layers if n not in floats]))

        target = self._target()
        kept = mixed_precision.fewest_in_floats(order, lambda some: quality(len(some)) >= target)
        final = quality(len(kept))
        self.layers = [name for name in self.layers if name not in kept]
        if kept and self.layers:
            before = self.rounded
            self.round_weights()
            anew = self._quality(self._build(self.layers))
            if anew < final:
                self.rounded = before
            final = max(anew, final)
        unit = "SQNR in dB" if options.target_sqnr is not None else "figure of merit"
        note = f"{unit}: {final:.4g} with {len(kept)} layers in floats, {target:.4g} was asked for."
        return set(kept), [note], found

    def _target(self) -> float:
        options = self.options
        if options.target_sqnr is not None:
            return options.target_sqnr
        assert options.evaluate is not None
        assert options.max_drop is not None
        return options.evaluate(self.source) - options.max_drop

    def _quality(self, graph: Graph) -> float:
        assert self.data is not None
        if self.options.evaluate is not None:
            return self.options.evaluate(graph)
        what = "SQNR of the network"
        return mixed_precision.signal_to_noise(self.source, [graph], self.data, self.ctx, what)[0]

    def _build(self, names: Sequence[str]) -> Graph:
        graph = self.source.clone()
        self.apply(graph, names)
        return graph

    def apply(self, graph: Graph, names: Sequence[str]) -> None:
        """Quantize some layers of a graph that is like the source, in place."""
        self._quantize_inputs(graph, names)
        for node in self._nodes(graph, names):
            rounded, format = self.rounded[node.name], self.options.weight_format
            quantize_layer(graph, node, rounded, format, static=self._static is not None)

    def _quantize_inputs(self, graph: Graph, names: Sequence[str]) -> None:
        nodes = self._nodes(graph, names)
        if self._static is not None:
            scheme = self._scheme(graph, nodes)
            self._complete_ranges(scheme)
            quantize_activations(graph, scheme, self.ranges, ActivationFormat(self._static))
        elif self.options.activations == "dynamic":
            readers: dict[Any, list[Node]] = {}
            for node in nodes:
                readers.setdefault(node["input"], []).append(node)
            for value, users in readers.items():
                quantize_dynamically(graph, value, users)

    def _scheme(self, graph: Graph, nodes: Sequence[Node]) -> Scheme:
        fuses = self.options.fuse_additions
        return find_scheme(graph, frozenset(nodes), fuses_additions=fuses)

    def _complete_ranges(self, scheme: Scheme) -> None:
        """Observe the values whose range is not known yet. With fewer layers in integers, some
        may be quantized that were not before."""
        missing = [value.name for value in scheme.root if value.name not in self.ranges]
        if not missing:
            return
        assert self.data is not None
        observers = {
            self.source.value(name): OBSERVERS[self.options.observer]() for name in missing
        }
        watches = [(value, _finite(value, observer)) for value, observer in observers.items()]
        observe(self.source, self.data, watches, self.ctx, "ranges of activations")
        self.ranges.update({value.name: o.range() for value, o in observers.items()})

    @staticmethod
    def _nodes(graph: Graph, names: Sequence[str]) -> list[Node]:
        wanted = set(names)
        return [node for node in graph.nodes if node.name in wanted]


def _finite(value: Value, observer: Observer) -> Observer:
    """The observer, for a value whose infinities and NaNs are errors."""

    def watch(x: Tensor) -> None:
        if not x.isfinite().all():
            raise PassError(
                f"%{value.name} has infinities or NaNs on the calibration data; ignore the layers "
                "that read it"
            )
        observer(x)

    return watch


def _check_choice(name: str, given: object, choices: Sequence[object]) -> None:
    if given not in choices:
        known = ", ".join(map(repr, choices))
        raise PassError(f"{name}={given!r} is unknown to Quantize; it is one of {known}")


def _report(
    options: Quantize,
    graph: Graph,
    layers: Sequence[str],
    skipped: dict[str, str],
    kept: set[str],
    notes: Sequence[str],
    hurts: dict[str, float],
) -> PassReport:
    """One row per layer: where it is, how it computes, and what quantizing it alone costs."""
    activations = options.activations or "floats"
    rows: list[tuple[str | float | None, ...]] = []
    for node in graph.nodes:
        if node.name not in skipped and node.name not in layers:
            continue
        reason = skipped.get(node.name) or ("hurts too much" if node.name in kept else "")
        form = "floats" if reason else f"{options.weights} x {activations}"
        row: tuple[str | float | None, ...] = (node.origin.module or node.name, form, reason)
        rows.append((*row, hurts.get(node.name)) if hurts else row)
    columns = ("layer", "computes with", "why") + (("SQNR alone [dB]",) if hurts else ())
    count = len(layers) - len(kept)
    title = f"quantize: {count} of {len(layers) + len(skipped)} layers, rounded by "
    return PassReport(title + options.rounding, columns, tuple(rows), tuple(notes))
