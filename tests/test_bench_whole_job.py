"""The whole jobs that are compared: each tool locates, edits, lowers the held-out loss and puts the model back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from providers import EDITORS, TRACERS, whole_job
from providers.whole_job import Watch, job_of, run

from pke_fast.bench.cases import check_equal
from pke_fast.bench.subjects import loaded_subject
from pke_fast.config import PKEConfig
from pke_fast.testing import tiny_model, tiny_tokenizer

CONFIG = PKEConfig(
    k=40, window=(1, 3), batch_size=4, locality_batch_size=2, lr_end=1.0, micro_batch_tokens=512, projections=("down",)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def job(folder: str):
    with job_of(folder, requests=6, held_out=3, config=CONFIG) as made:
        yield made


@pytest.mark.parametrize("provider", EDITORS)
def test_every_editor_lowers_the_held_out_loss(provider: str, job) -> None:
    model = job.structure.model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    start, kl = job.held_out.measure()
    assert kl == pytest.approx(0.0, abs=1e-6)
    watch = run(EDITORS[provider].load().edit, job, 1e-2, Watch(job.held_out, 0.0, every=2, most_steps=6))
    assert [point[0] for point in watch.curve] == [2, 4, 6]
    assert watch.curve[-1][2] < start
    assert watch.curve[-1][3] > 0
    assert [point[1] for point in watch.curve] == sorted(point[1] for point in watch.curve)
    assert not watch.reached
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(mlp.down._forward_hooks for mlp in job.structure.mlps)


def test_locating_is_given_as_many_as_the_settings_say_evenly_spread(job) -> None:
    assert job.scored == (job.requests, job.locality)
    fewer = dataclasses.replace(job, config=job.config.replace(score_requests=4, score_pairs=2))
    requests, pairs = fewer.scored
    assert requests == [job.requests[number] for number in (0, 1, 3, 4)]
    assert pairs == [job.locality[number] for number in (0, len(job.locality) // 2)]


def test_dense_adam_does_what_pke_fast_does(job) -> None:
    """The same neurons are located by other means, and the same steps made."""
    curves = []
    for provider in ("pke_fast", "dense masked Adam"):
        watch = run(EDITORS[provider].load().edit, job, 1e-2, Watch(job.held_out, 0.0, every=1, most_steps=3))
        curves.append([value for point in watch.curve for value in point[2:]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_the_clock_stands_while_the_held_out_loss_is_measured(job, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(whole_job.time, "perf_counter", lambda: now[0])

    class Slow:
        def measure(self) -> tuple[float, float]:
            now[0] += 100.0
            return 1.0 / now[0], 0.5

    def edit(_job, _lr, after) -> None:
        now[0] += 7.0  # locating
        while True:
            now[0] += 1.0
            after(1)

    watch = run(edit, job, 0.1, Watch(Slow(), target=0.004, every=2))
    assert [(steps, seconds) for steps, seconds, _, _ in watch.curve] == [(2, 9.0), (4, 11.0), (6, 13.0)]
    assert watch.reached
    strict = dataclasses.replace(watch, curve=[], steps=0, most_kl=0.4, most_steps=8)
    assert not run(edit, job, 0.1, strict).reached
    assert strict.steps == 8


@pytest.mark.parametrize("provider", TRACERS)
def test_every_installed_tracer_gives_the_scores_of_hooks(provider: str, folder: str) -> None:
    if TRACERS[provider].missing:
        pytest.skip(TRACERS[provider].missing)
    with loaded_subject(folder, 4) as subject:
        wanted = TRACERS["hooks"].load().trace(subject, 256)
        for _ in range(2):
            assert check_equal(TRACERS[provider].load().trace(subject, 256), wanted, torch.float32, provider) < 1e-4
        for module in subject.structure.model.modules():  # the next tool finds the model as it was
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert "forward" not in module.__dict__


def test_a_provider_that_is_not_there_says_what_to_install() -> None:
    absent = dataclasses.replace(TRACERS["nnsight"], package="no_such_tool")
    assert absent.missing == "no_such_tool is not installed: pip install pke_fast[compare]"
    assert absent.version == ""
    assert TRACERS["hooks"].missing == ""
