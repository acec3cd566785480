"""Training that leaves pruned weights at zero."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graphopt.errors import PassError
from graphopt.passes.pruning.layers_to_prune import masked


def keep_zeros(module: nn.Module) -> list[RemovableHandle]:
    """From now on weights of a module that are zero get no gradient, so that training does not
    bring them back.

    That holds for optimizers that leave a weight of zero alone while its gradient is zero, with
    momentum and weight decay too: torch.optim's SGD and Adam and their relatives. Hooks are lost
    in copies of the module: call it for the copy.

    Args:
        module: such as ``graph.to_torch()`` of a pruned graph. Its parameters of two dimensions
            and more count as weights; those that are zero altogether, as some are at the start
            of training, are left alone.

    Returns:
        One handle per weight with zeros; ``handle.remove()`` lets it change again.

    Raises:
        PassError: no weight has a zero.
    """
    handles = []
    for parameter in module.parameters():
        mask = parameter.detach() != 0
        if parameter.dim() > 1 and parameter.requires_grad and mask.any() and not mask.all():
            handles.append(parameter.register_hook(_masking(mask)))
    if not handles:
        raise PassError("no trainable weight of the module has a zero to keep; prune it first")
    return handles


def _masking(mask: Tensor) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        return masked(gradient, mask.to(gradient.device))

    return hook
