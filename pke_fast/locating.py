"""Locating: from requests and benign pairs to a score map and the hot spots on it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pke_fast import dinm, hotspots
from pke_fast.columns import kinds_in
from pke_fast.config import PKEConfig
from pke_fast.errors import InputError
from pke_fast.files import atomic_write
from pke_fast.hotspots import HotSpots
from pke_fast.pace import told_once
from pke_fast.preparation import Job
from pke_fast.scoring import Example, Scores, score
from pke_fast.structure import Structure
from pke_fast.workbench import Workbench

T = TypeVar("T")

SCORING = "Scoring the requests"  # the stage whose memory a plan foretells


@dataclass(frozen=True, eq=False)
class Located:
    """Where the unsafe behaviour sits.

    Attributes:
        score_map: fp32 [L, D], what the hot spots are the highest of; NaN where a layer wasn't scored.
        hot_spots: the selected neurons.
        unsafe, locality: scores on the requests and on the benign pairs; None where the method doesn't use them.
        drift: fp32 [L, D], the weight change between two checkpoints, where one was asked for.
        layer_path: fp32 [L], the layers' path scores; for dinm the distances between safe and unsafe answers.
    """

    score_map: Tensor
    hot_spots: HotSpots
    unsafe: Scores | None = None
    locality: Scores | None = None
    drift: Tensor | None = None
    layer_path: Tensor | None = None

    def neuron(self, layer: int, neuron: int) -> dict[str, Any]:
        """One neuron's scores, as JSON values."""
        row: dict[str, Any] = {"layer": layer, "neuron": neuron, "score": float(self.score_map[layer, neuron])}
        if self.unsafe is not None:
            row["weight_change"] = float(self.unsafe.weight_change[layer, neuron])
            row["activation_path"] = float(self.unsafe.activation_path[layer, neuron])
            row["activation"] = float(self.unsafe.activation[layer, neuron])
        return row

    def top(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The hot spots, highest score first."""
        rows = [(layer, int(n)) for layer, neurons in self.hot_spots.by_layer().items() for n in neurons]
        rows.sort(key=lambda row: (-float(self.score_map[row]), row))
        return [self.neuron(*row) for row in rows[:limit]]

    def write(self, folder: Path, window: tuple[int, int], probe: dict[str, Any] | None = None) -> dict[str, str]:
        """Writes scores.safetensors, hotspots.json and heatmap.png into an existing folder; says what each is.

        Args:
            probe: how precise an edit can be; an entry of hotspots.json.
        """
        from safetensors.torch import save_file

        from pke_fast.heatmap import heatmap_png

        tensors = {"score": self.score_map}
        for name, scores in (("unsafe", self.unsafe), ("locality", self.locality)):
            if scores is not None:
                tensors[f"{name}.weight_change"] = scores.weight_change
                tensors[f"{name}.activation_path"] = scores.activation_path
                tensors[f"{name}.activation"] = scores.activation
        if self.drift is not None:
            tensors["drift"] = self.drift
        if self.layer_path is not None:
            tensors["layer_path"] = self.layer_path
        by_layer = {layer: neurons.tolist() for layer, neurons in self.hot_spots.by_layer().items()}
        listing = {"k": len(self.hot_spots), "window": list(window), "by_layer": by_layer, "probe": probe}
        listing["neurons"] = self.top()
        with atomic_write(folder / "scores.safetensors") as path:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)  # the drift is there twice
        with atomic_write(folder / "hotspots.json") as path:
            path.write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
        with atomic_write(folder / "heatmap.png") as path:
            path.write_bytes(heatmap_png(self.score_map, window, by_layer))
        return {
            "scores.safetensors": "the scores of every neuron, [layers, neurons]",
            "hotspots.json": "the hot spots, highest score first",
            "heatmap.png": "layers x neurons, the hot spots marked",
        }


def check_fits(structure: Structure, config: PKEConfig) -> None:
    """Raises InputError, before anything long is done, where k, window, cap, exclusions or projections don't fit the
    model."""
    kinds_in(structure, config.edited)
    if config.method == "pke":
        hotspots.select(torch.zeros(len(structure.layers), structure.neurons), config)


def locate_hot_spots(bench: Workbench, job: Job, *, first: int = 0, drift: Tensor | None = None) -> Located:
    """Scores the layers from `first` on and selects the hot spots as the settings say.

    Args:
        drift: the weight change between two checkpoints, [L, D]: it then takes the place of the one-step weight change.
    """
    if bench.config.method != "pke":
        if drift is not None:
            raise InputError(f"method {bench.config.method} has no use for a second checkpoint", do="use method=pke")
        return _locate_layer(bench, job)
    if drift is not None and not drift.any():
        raise InputError("the two checkpoints have the same down projections", do="compare two that differ")
    if not job.locality and bench.config.score == "contrast":
        raise InputError("score: contrast needs locality pairs", do="give --locality, or set score=toxic")
    unsafe = _score(bench, _examples(bench, job), SCORING, first)
    locality = None
    if bench.config.score == "contrast":
        chosen = _sample(job.benign(bench), bench.config.score_pairs, bench.config.seed)
        locality = _score(bench, [[(pair, 1.0)] for pair in chosen], "Scoring the benign pairs", first)
    if drift is not None:
        unsafe = replace(unsafe, weight_change=drift)
    score_map = hotspots.rank(unsafe, locality, bench.config)
    with bench.stages.stage("Selecting the hot spots", 1):
        selected = hotspots.select(score_map, bench.config, bench.structure.device)
    score_map[:first] = torch.nan
    return Located(score_map, selected, unsafe, locality, drift, unsafe.layer_path)


def _score(bench: Workbench, examples: Sequence[Example], doing: str, first: int) -> Scores:
    with bench.stages.stage(doing, len(bench.ranks.mine(examples))) as advance:
        return score(
            bench.structure,
            examples,
            pad_id=bench.pad_id,
            pace=bench.pace,
            first=first,
            ranks=bench.ranks,
            snapshot=bench.resume.part(doing.lower().replace(" ", "-")),
            advance=advance,
        )


def _examples(bench: Workbench, job: Job) -> list[Example]:
    kind = bench.config.score_loss
    chosen = _sample((*job.requests, *job.companions), bench.config.score_requests, bench.config.seed)
    if kind == "safe":
        return [[(sequence, 1.0)] for sequence in job.safe(bench, chosen)]
    if kind == "unsafe":
        return [[(sequence, 1.0)] for sequence in job.unsafe(bench, chosen)]
    both = zip(job.safe(bench, chosen), job.unsafe(bench, chosen), strict=True)
    return [[(a, 1.0), (b, -1.0)] for a, b in both]


def _sample(items: Sequence[T], most: int, seed: int) -> list[T]:
    """So many of the items, in their order."""
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), min(len(items), most)))]


def _locate_layer(bench: Workbench, job: Job) -> Located:
    """DINM's layer, all of it; the score map then holds each layer's distance, the same for all its neurons."""
    structure = bench.structure
    depth, width = len(structure.layers), structure.neurons
    answers = list(zip(job.safe(bench), job.unsafe(bench), strict=True))
    with bench.stages.stage("Comparing safe and unsafe answers", len(job.requests)) as advance:
        begin = told_once(advance)

        def compared() -> Tensor:
            tokens = bench.pace.tokens
            return dinm.answer_distances(
                structure, answers, pad_id=bench.pad_id, micro_batch_tokens=tokens, advance=begin()
            )

        distances = bench.pace.slower_if_it_must(compared, "comparing the answers")
    layer = int(distances.argmax())
    if bench.config.method == "dinm-parity":
        first = job.requests[0]
        safe, unsafe = (bench.tokenizer(text or "")["input_ids"] for text in (first.target_new, first.ground_truth))
        layer = dinm.published_layer(structure, safe, unsafe, bench.pad_id)
    selected = HotSpots.from_layers({layer: torch.arange(width)}, depth)
    return Located(distances[:, None].expand(depth, width).clone(), selected, layer_path=distances)
