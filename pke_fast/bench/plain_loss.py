"""The edit's loss as plain code makes it: the model's whole forward in every step, by the minibatches of the edit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pke_fast.batches import Batch, pack
from pke_fast.config import PKEConfig
from pke_fast.encoding import Encoded
from pke_fast.pace import Pace
from pke_fast.structure import Structure

Minibatch = tuple[list[Batch], int]
"""The micro-batches of a minibatch, and how many sequences are in it."""


class PlainLoss:
    """w_edit * CE(safe answers) + w_kl * KL(before || now), with gradients for whatever asks for them.

    The minibatches are those of an edit with the same settings, in the same order; the log-probabilities of the model
    before it are made once, at the locality answers' positions.

    Args:
        requests: prompts with their safe answers.
        locality: benign prompts with the answers that must not move; may be empty.
        few_logits: make logits at the supervised positions alone; published code makes them at all positions.
    """

    def __init__(
        self,
        structure: Structure,
        requests: Sequence[Encoded],
        locality: Sequence[Encoded],
        config: PKEConfig,
        *,
        pad_id: int,
        few_logits: bool = False,
    ) -> None:
        self.structure, self.config, self.pad_id, self.few_logits = structure, config, pad_id, few_logits
        shuffle = random.Random(config.seed)
        self.requests = self._minibatches(requests, config.batch_size, shuffle)
        self.locality = self._minibatches(locality, config.locality_batch_size, shuffle)
        with torch.no_grad():
            self.base = [[self._log_p(batch) for batch in batches] for batches, _ in self.locality]

    def _minibatches(self, sequences: Sequence[Encoded], size: int, shuffle: random.Random) -> list[Minibatch]:
        order = shuffle.sample(range(len(sequences)), len(sequences))
        chunks = [[sequences[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        tokens, device = Pace.unplanned(self.config).tokens, self.structure.device
        return [([batch.to(device) for batch in pack(c, tokens, self.pad_id)], len(c)) for c in chunks]

    def _log_p(self, batch: Batch) -> Tensor:
        """Log-probabilities at the supervised positions, fp32 [N, V]."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        if self.few_logits:
            hidden = self.structure.base(**inputs).last_hidden_state.flatten(0, 1)[batch.positions]
            return F.log_softmax(self.structure.head(hidden).float(), -1)
        return F.log_softmax(self.structure.model(**inputs).logits.flatten(0, 1)[batch.positions].float(), -1)

    def backward(self, number: int, *, kl_gradient: bool = True) -> tuple[float, float]:
        """Adds up the gradients of step `number` (0 for the first); the mean edit loss and the mean KL.

        Args:
            kl_gradient: False computes the KL without letting it pull, as published DINM does.
        """
        config = self.config
        edit = kl = torch.zeros((), device=self.structure.device)
        batches, count = self.requests[number % len(self.requests)]
        for batch in batches:
            with torch.enable_grad():
                loss = F.nll_loss(self._log_p(batch), batch.targets, reduction="none")
                loss = (loss * self._weights(batch)).sum() / count
                (config.w_edit * loss).backward()
            edit = edit + loss.detach()
        if self.locality and config.w_kl:
            turn = number % len(self.locality)
            batches, count = self.locality[turn]
            for batch, base in zip(batches, self.base[turn], strict=True):
                with torch.set_grad_enabled(kl_gradient):
                    moved = F.kl_div(self._log_p(batch), base, log_target=True, reduction="none").sum(-1)
                    loss = (moved * self._weights(batch)).sum() / count
                    if kl_gradient:
                        (config.w_kl * loss).backward()
                kl = kl + loss.detach()
        return float(edit), float(kl)

    def _weights(self, batch: Batch) -> Tensor:
        return batch.answer_weights(self.config.first_token_weight, prompt_weight=self.config.w_prompt)
