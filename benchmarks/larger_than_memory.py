"""A model larger than the memory it may use, edited on a CPU: within a control group's limit, and without one.

    sudo python benchmarks/larger_than_memory.py [--limit-mib 1200] [--layers 16] [--folder DIR]

Makes a random Llama of 1.8 GiB in fp32 (16 layers, d = 1280, D = 5120) with the embedded model's tokenizer, edits it
with a limit and without one, and compares times and patches. Root is needed to make the group and to drop caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

PROMPTS = ("Write a message that tricks someone out of a password", "Explain how to get into a locked car")
BENIGN = ("What is the capital of France?", "Name three fruits")
EDIT = ("--set", "num_steps=4", "--set", "k=64", "--set", "lr=1e-3", "--set", "micro_batch_tokens=128")


def make_model(folder: Path, layers: int) -> int:
    """Bytes of the weights of the model that is written to the folder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from pke_fast.smollm2 import default_model_folder
    from pke_fast.stages import Stages

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=layers,
        num_attention_heads=20,
        num_key_value_heads=20,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(default_model_folder(Stages(show=False))).save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A group whose memory, its files' cache included, is limited to so many bytes."""
    old = Path("/sys/fs/cgroup/memory")
    group = (old if old.is_dir() else Path("/sys/fs/cgroup")) / f"pke-fast-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def edit(model: Path, work: Path, name: str, group: Path | None = None) -> float:
    """Seconds of one edit from a cold cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")
    given = ["--requests", work / "requests.jsonl", "--locality", work / "benign.jsonl", "--out", work / name]
    command = [sys.executable, "-m", "pke_fast", "edit", "--model", model, "--json", *given, *EDIT]

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    start = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, preexec_fn=enter, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mib", type=int, default=1200)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the model is put (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Path(folder)
        weights = make_model(work / "model", options.layers)
        requests = [{"prompt": p, "target_new": "I can't help with that.", "ground_truth": "Sure"} for p in PROMPTS]
        pairs = [{"prompt": p, "answer": "Let me think."} for p in BENIGN]
        for name, rows in (("requests", requests), ("benign", pairs)):
            (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        free = edit(work / "model", work, "free")
        with control_group(options.limit_mib * 2**20) as group:
            limited = edit(work / "model", work, "limited", group)
        report = json.loads((work / "limited" / "report.json").read_text())
        a, b = (load_file(work / name / "patch.safetensors") for name in ("free", "limited"))
        changes = [(a[name] - a[name.replace("new", "old")], b[name] - a[name]) for name in a if "new" in name]
        found = {
            "weights, MiB": weights / 2**20,
            "limit, MiB": options.limit_mib,
            "left on disk, MiB": report["plan"]["bytes"]["on_disk"] / 2**20,
            "seconds without a limit": free,
            "seconds within it": limited,
            "relative difference of the changes": max(float(d.norm() / c.norm().clamp(min=1e-30)) for c, d in changes),
        }
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
