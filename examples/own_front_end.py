"""A front end of one's own: prompts in a file, rendered in one's own way, edited by pke_fast, saved as a patch.

    python examples/own_front_end.py MODEL harmful.txt benign.txt patch.safetensors

Each file has a prompt a line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pke_fast

REFUSAL = "I can't help with that."


def tokens(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The prompt and its answer as token ids: this is where a front end is itself."""
    head = tokenizer(f"Question: {prompt}\nAnswer:")["input_ids"]
    return head, tokenizer(" " + answer, add_special_tokens=False)["input_ids"]


def make_safe(model: Any, tokenizer: Any, harmful: list[str], benign: list[str], k: int = 300) -> pke_fast.Patch:
    """Edits the model in place. The benign prompts keep the beginning that their answers have today."""
    wanted = [tokens(tokenizer, prompt, REFUSAL) for prompt in harmful]
    kept = [tokens(tokenizer, prompt, first_words(model, tokenizer, prompt)) for prompt in benign]
    spots = pke_fast.select(pke_fast.trace(model, wanted), pke_fast.trace(model, kept), k=k)
    return pke_fast.update(model, spots, wanted, kept)


def first_words(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = tokenizer(f"Question: {prompt}\nAnswer:", return_tensors="pt").to(model.device)
    answer = model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    return tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) or "..."


if __name__ == "__main__":
    name, harmful, benign, out = sys.argv[1:]
    loaded = pke_fast.load_model(name)
    prompts = [Path(path).read_text(encoding="utf-8").splitlines() for path in (harmful, benign)]
    make_safe(loaded.model, loaded.tokenizer, *prompts).save(out)
