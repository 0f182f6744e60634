"""An 8B model edited in bf16 within a memory budget: what a card with 24 GB has room for, or one with 12 or 8.

    python examples/edit_8b_on_24gb.py --requests requests.jsonl --out edited \
        [--model meta-llama/Meta-Llama-3-8B-Instruct] [--budget 21GiB]

The weights take 15 GiB. The rest is gradient and optimiser state of the hot spots alone (300 neurons in three
projections: 74 MB), the cached output of the layers below the hot spots, and one micro-batch: how many tokens it has,
and how many layers keep their graph, follow from the budget.

The model is loaded in the host's memory and brought to the card for the edit. Within 10 GiB (a card with 12 GB) or
7 GiB (8 GB) the lowest layers stay with the host and come to the card when they are used; the patch is as exact.
"""

from __future__ import annotations

import argparse

import pke_fast
from pke_fast.budget import parse_bytes
from pke_fast.loading import resolve_device
from pke_fast.stages import Stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Meta-Llama-3-8B-Instruct", help="a hub id or a folder")
    parser.add_argument("--requests", required=True, help="harmful requests, in any format that pke-fast reads")
    parser.add_argument("--locality", help="benign pairs (default: the shipped prompts, answered by the model)")
    parser.add_argument("--budget", default="21GiB", help="memory for weights and edit together")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--k", type=int, default=pke_fast.PKEConfig().k, help="neurons to change")
    parser.add_argument("--steps", type=int, default=pke_fast.PKEConfig().num_steps)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    requests = pke_fast.read_requests(options.requests)  # read first: a bad file is found before 16 GB are loaded
    locality = pke_fast.read_pairs(options.locality) if options.locality else None
    loaded = pke_fast.load_model(options.model, "cpu", "bf16")
    device = resolve_device(options.device)
    config = pke_fast.PKEConfig(k=options.k, num_steps=options.steps)
    stages = Stages(device=device)
    result = pke_fast.edit(
        loaded.model,
        loaded.tokenizer,
        requests,
        config,
        locality=locality,
        stages=stages,
        name=loaded.name,
        memory_budget=parse_bytes(options.budget),
        device=device,
    )
    result.write(options.out)
    plan = result.report["plan"]
    print(f"{plan['micro_batch_tokens']:,} tokens in flight at once, {plan['bytes']['peak'] / 2**30:.2f} GiB foretold")
    print(f"{sum(plan['layers offloaded'].values())} layers offloaded, {plan['bytes']['offloaded'] / 2**30:.2f} GiB")
    for stage in stages.done:
        peak = "" if stage.peak_bytes is None else f", peak {stage.peak_bytes / 2**30:.2f} GiB"
        print(f"{stage.name}: {stage.seconds:.1f} s{peak}")
    losses = result.report["losses"]
    print(f"loss of the safe answers: {losses['before']['edit']:.3f} -> {losses['after']['edit']:.3f}")
    print(f"serve it: pke-fast apply --model FOLDER --patch {options.out}/patch.safetensors --out merged")


if __name__ == "__main__":
    main()
