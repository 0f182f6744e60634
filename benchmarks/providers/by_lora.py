"""LoRA of equal rank by plain torch: on the window's down projections, as many ranks a layer as hot spots come to one.

Tuned: logits at the supervised positions alone. The model's whole forward runs in every step; autograd stops at the
lowest adapter by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pke_fast.bench.plain_loss import PlainLoss
from pke_fast.module_calls import hooks
from providers.whole_job import Job

LRS = (3e-4, 1e-3, 3e-3, 1e-2)


def edit(job: Job, lr: float, after: Callable[[int], None]) -> None:
    structure, config = job.structure, job.config
    loss = PlainLoss(structure, job.requests, job.locality, config, pad_id=job.pad_id, few_logits=True)
    adapters = [_Adapter(job, max(1, config.k // len(job.layers)), layer) for layer in job.layers]
    parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
    adam = torch.optim.Adam(parameters, lr=lr, fused=True)
    downs = [structure.mlps[layer].down for layer in job.layers]
    with hooks(*(down.register_forward_hook(adapter.add) for down, adapter in zip(downs, adapters, strict=True))):
        for number in count():
            loss.backward(number)
            adam.step()
            adam.zero_grad()
            after(1)


class _Adapter(nn.Module):
    """out + B A h, B beginning at zero and A as PEFT draws it; fp32, with alpha = rank."""

    def __init__(self, job: Job, rank: int, seed: int) -> None:
        super().__init__()
        structure = job.structure
        generator = torch.Generator().manual_seed(seed)
        a = torch.empty(rank, structure.neurons)
        nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
        self.a = nn.Parameter(a.to(structure.device))
        self.b = nn.Parameter(torch.zeros(structure.hidden_size, rank, device=structure.device))

    def add(self, _module: Any, args: Any, out: Tensor) -> Tensor:
        h = args[0].to(self.a.dtype)
        return out + F.linear(F.linear(h, self.a), self.b).to(out.dtype)
