"""A model in eval mode for a while, and what comes with it; all is as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pke_fast.half_products import fast_half_products


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, each of its modules in its own mode again afterwards; attention is never cuDNN's, and
    a CPU without instructions for half precision multiplies in fp32 (`half_products`).

    On Hopper and newer torch prefers cuDNN's, which makes a plan for every new shape, where micro-batches have
    hundreds, and whose gradient was NaN for some widths beside a mask (pytorch issue 196678).
    """
    modes = [(module, module.training) for module in model.modules()]
    with_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(False)
        model.eval()
        with fast_half_products(model):
            yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(with_cudnn)
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The same without gradients."""
    with eval_mode(model), torch.no_grad():
        yield
