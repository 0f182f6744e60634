"""Edit a model, save the edit, take it back: all in Python.

    python examples/api.py --out edited [--model smollm2] [--requests FILE] [--benign FILE]

Without --requests the shipped ones are edited on; without --benign, prompts of your own, the shipped benign ones are
held and shipped harmful ones join, as in `pke-fast edit`. Prints figures only, no answers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pke_fast
from pke_fast import shipped


def edit_and_save(
    name: str,
    requests: list[pke_fast.EditRequest],
    out: Path,
    config: pke_fast.PKEConfig,
    locality: list[pke_fast.Pair] | None,
) -> None:
    loaded = pke_fast.load_model(name)
    result = pke_fast.edit(loaded.model, loaded.tokenizer, requests, config, locality=locality, name=loaded.name)
    for warning in result.report["warnings"]:
        print(f"WARNING: {warning}")
    losses = result.report["losses"]
    print(f"loss of the safe answers: {losses['before']['edit']:.3f} -> {losses['after']['edit']:.3f}")
    print(f"hot spots by layer: {result.report['hot_spots']['by_layer']}")

    result.write(out)  # patch.safetensors, report.html, report.json
    print(f"written to {out}")

    result.revert()  # exact to the bit; the model may be edited otherwise now
    patch = pke_fast.Patch.load(out / "patch.safetensors")
    patch.apply(loaded.model)  # later, and in another process: compares every old weight first
    try:
        patch.apply(loaded.model)
    except pke_fast.PatchError as error:
        print(f"as it should be: {error.what}")
    patch.revert(loaded.model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--benign", type=Path)
    parser.add_argument("--limit", type=int, help="the first N requests")
    parser.add_argument("--k", type=int, default=pke_fast.PKEConfig.k, help="neurons to change")
    options = parser.parse_args()
    wanted = pke_fast.read_requests(options.requests) if options.requests else shipped.harmful()
    benign = pke_fast.read_pairs(options.benign) if options.benign else None  # no answer: the model's own
    edit_and_save(options.model, wanted[: options.limit], options.out, pke_fast.PKEConfig(k=options.k), benign)
