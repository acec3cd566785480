"""Networks of the zoo without a third of their channels and heads, against their masked selves.

`python benchmarks/channel_pruning.py --zoo` does the same for all networks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from channel_pruning_check import Pruned
from zoo import NETWORKS

NAMES = (
    "resnet18",
    "regnet_y_400mf",
    "mobilenet_v3_small",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "timm/lcnet_050",
    "timm/mobilevit_xxs",
    "transformers/bert",
    "transformers/llama",
    "transformers/wav2vec2",
)
EXPORTED = ("mobilenet_v3_small", "timm/mobilevit_xxs", "transformers/llama")


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> tuple[str, Pruned]:
    network = NETWORKS[request.param]
    return request.param, Pruned(network, network.small)


@pytest.mark.slow
def test_pruned_is_masked_in_float64(subject: tuple[str, Pruned]) -> None:
    _, pruned = subject
    assert pruned.groups
    assert pruned.kept < 0.9
    assert pruned.torch_error() < 1e-9


@pytest.mark.slow
def test_pruned_is_masked_in_the_engine(subject: tuple[str, Pruned]) -> None:
    _, pruned = subject
    assert pruned.engine_error() <= pruned.allowed


@pytest.mark.slow
def test_pruned_is_masked_in_onnxruntime(subject: tuple[str, Pruned], tmp_path: Path) -> None:
    name, pruned = subject
    if name not in EXPORTED:
        pytest.skip("export takes seconds; the benchmark exports all")
    assert pruned.onnx_error(tmp_path / "model.onnx") <= pruned.allowed
