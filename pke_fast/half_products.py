"""A model's linear layers in half precision, fast on a CPU without instructions for it while it is worked with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pke_fast.kernels import products
from pke_fast.module_calls import replaced_forward
from pke_fast.structure import transposed

LEAST_ROWS = 8  # from which torch's own product of bf16 rows with a weight's rows is the slower one


class _Product(torch.autograd.Function):
    """x times a frozen weight [out, in], or [in, out] as Conv1D has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, across: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.across = across
        return (products.matmul if across else products.linear)(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return (products.linear if ctx.across else products.matmul)(grads[0], weight), None, None, None


@contextmanager
def fast_half_products(model: nn.Module) -> Iterator[None]:
    """For the length of a block, linear layers multiply by `products`, where that is faster than torch.

    Those that somebody has given another forward, as accelerate's hooks do, are left as they are.
    """
    with ExitStack() as stack:
        for module in model.modules():
            known = type(module) is nn.Linear or transposed(module)
            if known and "forward" not in vars(module) and _by_parts(module):
                stack.enter_context(replaced_forward(module, partial(_forward, module, module.forward)))
        yield


def _by_parts(module: Any) -> bool:
    return products.by_parts(module.weight)


def _forward(module: Any, own: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    few = not transposed(module) and input.shape[:-1].numel() < LEAST_ROWS  # but slow on the way back
    if not _by_parts(module) or (learns if torch.is_grad_enabled() else few):
        return own(input)
    return _Product.apply(input, weight, bias, transposed(module))
