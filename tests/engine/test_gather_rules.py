"""Embeddings and first-dimension indexing as kernels, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 19)
        self.table = nn.Parameter(torch.randn(7, 19))

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        picked = torch.index_select(self.table, 0, place.flatten().clamp(0, 6))
        return self.embedding(x) + self.table[place] + picked.reshape(*place.shape, 19)


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    monkeypatch.setenv("GRAPHOPT_SELECTION", "estimate")
    torch.manual_seed(0)
    return torch.randint(0, 50, (2, 9)), torch.randint(-7, 7, (2, 9))


def test_no_call_backs(arguments: tuple[Tensor, Tensor]) -> None:
    source = Lookup().eval()
    optimized = graphopt.optimize(source, arguments)
    assert "torch" not in {layer.kernel for layer in optimized.report().layers}
    with torch.no_grad():
        torch.testing.assert_close(optimized(*arguments), source(*arguments))
        more = [torch.cat([argument] * 3) for argument in arguments]
        torch.testing.assert_close(optimized(*more), source(*more))


def test_indices_out_of_range_raise(arguments: tuple[Tensor, Tensor]) -> None:
    x, place = arguments
    optimized = graphopt.optimize(Lookup().eval(), arguments)
    for wrong in (50, -1):
        bad = x.clone()
        bad[1, 3] = wrong
        with pytest.raises(IndexError, match=f"index {wrong} is out of range for the 50 rows"):
            optimized(bad, place)
    bad = place.clone()
    bad[0, 2] = -8
    with pytest.raises(IndexError, match=r"index -8 .* 7 rows that %index"):
        optimized(x, bad)
    optimized(x, place)


def test_a_single_number_keeps_its_dimension(arguments: tuple[Tensor, Tensor]) -> None:
    class Pick(nn.Module):
        def forward(self, table: Tensor, number: Tensor) -> Tensor:
            return torch.index_select(table, 0, number)

    table, number = torch.randn(5, 3), torch.tensor(2)
    optimized = graphopt.optimize(Pick(), (table, number))
    assert torch.equal(optimized(table, number), table[2:3])
