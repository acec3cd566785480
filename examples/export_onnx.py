"""A text encoder with two free sizes becomes an ONNX file that takes any batch and any length.

python examples/export_onnx.py
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

import graphopt


class Encoder(nn.Module):
    """Token ids (batch, tokens) to one vector per text (batch, 32), padding (id 0) left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 32)
        self.layer = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        present = (ids != 0).unsqueeze(-1)
        x = self.embedding(ids)
        x = self.norm(x + self.layer(x)) * present
        return {"embedding": x.sum(1) / present.sum(1).clamp(min=1)}


def main() -> None:
    model = Encoder().eval()
    example = torch.randint(1, 1000, (2, 12))
    optimized = graphopt.optimize(model, example, dynamic={"ids": {0: "batch", 1: "tokens"}})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        optimized.export_onnx(path)  # checked, and compared with torch in onnxruntime
        session = onnxruntime.InferenceSession(path)
        for value in (*session.get_inputs(), *session.get_outputs()):
            print(value.name, value.shape, value.type)
        texts = torch.randint(1, 1000, (5, 40))
        (embedding,) = session.run(["embedding"], {"ids": texts.numpy()})
        with torch.no_grad():
            difference = (model(texts)["embedding"] - torch.from_numpy(embedding)).abs().max()
        print(f"largest difference from the model at 5 texts of 40 tokens: {difference:.1e}")


if __name__ == "__main__":
    main()
