"""Memory: what a forward keeps for its backward, and the most that one call holds at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.providers import Step, tensors
from efficientvit_kernels.demo import peak_mib


def saved_bytes(module: nn.Module, inputs: list[Tensor]) -> int:
    """Bytes of the storages that autograd keeps, each counted once; parameters and buffers, which exist anyway, not."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}
    kept = []  # alive until the end, or an address could come twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept += tensors(module(*leaves))
    return sum(sizes.values())


class _Call(nn.Module):
    """A step in the shape that `peak_mib` takes."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, _: Tensor) -> object:
        return self.step()


def peak_bytes(step: Step, training: bool) -> int:
    """The most that one call has allocated at once, its outputs and gradients among it; inputs and weights not."""
    with torch.set_grad_enabled(training):
        return round(2**20 * peak_mib(_Call(step), torch.empty(0)))
