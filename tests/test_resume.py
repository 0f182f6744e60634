"""An interrupted job, started again with the same folder, ends with the bytes of one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor

import pke_fast
from pke_fast import detectors, resume
from pke_fast.config import PKEConfig
from pke_fast.engine import EditResult
from pke_fast.errors import InputError
from pke_fast.requests import EditRequest, Pair
from pke_fast.resume import Resume
from pke_fast.stages import Stages
from pke_fast.tape import Tape
from pke_fast.testing import LAYERS, tiny_model, tiny_tokenizer
from pke_fast.trainer import Trainer

CONFIG = PKEConfig(
    k=10,
    num_steps=6,
    batch_size=3,
    locality_batch_size=2,
    window=(1, LAYERS),
    locality_tokens=3,
    stop_loss=0.0,
    micro_batch_tokens=128,
)
REQUESTS = [EditRequest(f"Break the lock {n}", "Never do that.", "Sure") for n in range(6)] + [EditRequest("Rob him")]
LOCALITY = [Pair(f"Bake cake {n}", "Take some flour") for n in range(4)] + [Pair("Sing a song")]


@pytest.fixture(autouse=True)
def often(tmp_path, monkeypatch):
    """The state is kept at every turn."""
    monkeypatch.setattr(resume, "EVERY_MINUTES", 0.0)
    monkeypatch.setattr(detectors, "LEAST", 1)
    monkeypatch.setattr(detectors, "GAINS", (1.0,))  # a tiny model's loss might choose none
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path / "cache"))


def edit(folder=None, *, dtype="fp32", config=CONFIG, model=None, requests=REQUESTS, **more):
    model, more = model or tiny_model("llama", dtype=dtype), {"locality": LOCALITY, "samples": 1, **more}
    return pke_fast.edit(model, tiny_tokenizer(), requests, config, resume=folder, **more)


def weights(result):
    return [(part.layer, part.neurons, part.old, part.new) for part in result.patch.layers]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for (a, *one), (b, *other) in zip(ours, theirs, strict=True):
        assert a == b
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


class Interrupting(Stages):
    """Ctrl-C at the n-th time that a stage advances, or begins."""

    def __init__(self, at):
        super().__init__()
        self.left, self.seen = at, []

    def stage(self, name, total=None):
        from contextlib import contextmanager

        @contextmanager
        def within():
            self.tick(name)
            with super(Interrupting, self).stage(name, total) as advance:

                def counted(n):
                    advance(n)
                    self.tick(name)

                yield counted

        return within()

    def tick(self, name):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt(name)


@pytest.mark.parametrize(("method", "dtype"), [("pke", "fp32"), ("pke", "bf16"), ("dinm", "fp32")])
def test_an_edit_that_is_interrupted_anywhere_ends_with_the_same_bytes(method, dtype, tmp_path):
    config = CONFIG if method == "pke" else CONFIG.replace(method="dinm", num_steps=4)
    whole = edit(dtype=dtype, config=config)
    stages, at = set(), 1
    while True:
        folder, model = tmp_path / f"at-{at}", tiny_model("llama", dtype=dtype)
        try:
            edit(folder, config=config, model=model, stages=Interrupting(at))
        except KeyboardInterrupt as stop:
            stages.add(str(stop))
        else:
            break
        for ours, own in zip(model.parameters(), tiny_model("llama", dtype=dtype).parameters(), strict=True):
            assert torch.equal(ours, own)
        again = edit(folder, config=config, model=model)
        same(weights(again), weights(whole))
        assert again.report["losses"]["steps"] == whole.report["losses"]["steps"]
        assert again.report["losses"]["stopped"] == whole.report["losses"]["stopped"]
        at += 5 if (method, dtype) == ("pke", "fp32") else 7
    assert at > 10
    assert "Editing the hot spots" in stages
    assert ("Beginning with detectors" in stages) == (method == "pke")


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    made = []
    own = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, n, **k: made.append(n) or own(self, n, **k))

    def stop(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return update(self, number)

    update = Trainer.update
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            edit(tmp_path / "state")
    kept = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert "edit.0.safetensors" in kept
    assert "scoring-the-requests.0.safetensors" in kept
    made.clear()
    scored = []
    score_batch = pke_fast.scoring.score_batch
    monkeypatch.setattr("pke_fast.scoring.score_batch", lambda *a: scored.append(1) or score_batch(*a))
    result = edit(tmp_path / "state")
    assert made == [3, 4, 5]
    assert not scored
    result.write(tmp_path / "out")
    assert not (tmp_path / "state").exists()


def test_an_edit_that_had_stopped_early_makes_no_more_steps(tmp_path, monkeypatch):
    config = CONFIG.replace(stop_loss=1e9, stop_kl=1e9)
    whole = edit(config=config)
    assert len(whole.report["losses"]["steps"]) == 4
    with monkeypatch.context() as patched:

        def interrupt(*_args):
            raise KeyboardInterrupt

        patched.setattr(Trainer, "final_losses", interrupt)
        with pytest.raises(KeyboardInterrupt):
            edit(tmp_path / "state", config=config)
    again = edit(tmp_path / "state", config=config)
    same(weights(again), weights(whole))
    assert again.report["losses"]["stopped"] == whole.report["losses"]["stopped"]


def locate(folder=None, **more):
    config = CONFIG.replace(micro_batch_tokens=64)
    return pke_fast.locate(
        tiny_model("llama"), tiny_tokenizer(), REQUESTS, config, locality=LOCALITY, resume=folder, **more
    )


def test_locating_goes_on_to_the_same_bytes(tmp_path):
    whole, at = locate(), 1
    while True:
        folder = tmp_path / f"at-{at}"
        try:
            locate(folder, stages=Interrupting(at))
        except KeyboardInterrupt:
            pass
        else:
            break
        again = locate(folder)
        assert torch.equal(again.score_map, whole.score_map)
        assert torch.equal(again.located.unsafe.activation, whole.located.unsafe.activation)
        again.write(tmp_path / f"out-{at}")
        assert not folder.exists()
        at += 5
    assert at > 10


@pytest.mark.parametrize("where", ["scoring", "editing"])
def test_a_pace_that_was_halved_stays_halved(where, tmp_path, monkeypatch):
    """Out of memory, then killed: the run that goes on has the halved micro-batches, hence the same bytes."""
    from pke_fast import scoring

    config = CONFIG.replace(micro_batch_tokens=512, batch_size=7)
    own_pass, state = Tape.there_and_back, {"room": 10_000, "steps": 0}

    def there_and_back(self, loss_of, *args, **kwargs):
        if self.batch.input_ids.numel() > state["room"] and not isinstance(self.entered, FakeTensor):
            raise MemoryError
        return own_pass(self, loss_of, *args, **kwargs)

    def begin():
        state.update(room=10_000 if where == "editing" else 128, steps=0)

    own_step, own_scores = Trainer.step, scoring.score_batch

    def step(self, number, **kwargs):
        state["room"] = 128 if number >= 1 else state["room"]
        return own_step(self, number, **kwargs)

    monkeypatch.setattr(Tape, "there_and_back", there_and_back)
    monkeypatch.setattr(Trainer, "step", step)
    begin()
    whole = edit(config=config)
    assert whole.report["plan"]["notes"]
    with monkeypatch.context() as patched:

        def stop(*args, **kwargs):
            state["steps"] += 1
            if state["steps"] == (4 if where == "scoring" else 3):
                raise KeyboardInterrupt
            return own_scores(*args, **kwargs) if where == "scoring" else step(*args, **kwargs)

        patched.setattr(*((scoring, "score_batch", stop) if where == "scoring" else (Trainer, "step", stop)))
        begin()
        with pytest.raises(KeyboardInterrupt):
            edit(tmp_path / "state", config=config)
    monkeypatch.setattr(Tape, "there_and_back", own_pass)  # there is memory enough by now
    again = edit(tmp_path / "state", config=config)
    same(weights(again), weights(whole))
    assert any("before the interruption" in note for note in again.report["plan"]["notes"])


@pytest.mark.parametrize("minutes", [0, 60])
@pytest.mark.parametrize(
    ("doing", "nth", "times"),
    [
        ("running the layers below", 3, 1),  # midway through the unedited states
        ("measuring the losses", 1, 1),
        ("beginning with detectors", 2, 1),
        ("running what is held", 1, 1),
        ("making step 3", 1, 1),
        ("making step 3", 1, 2),
    ],
)
def test_a_run_is_as_slow_again_from_where_it_was(doing, nth, times, minutes, tmp_path, monkeypatch):
    """Memory ran out anywhere, and the run was killed at once or later: the same bytes, with memory enough by then."""
    config = CONFIG.replace(micro_batch_tokens=256, batch_size=7, locality_batch_size=6, num_steps=4)
    locality = [Pair(f"Bake the cake {n}", "Take some flour") for n in range(12)]
    own, left = Trainer._slower_if_it_must, {}

    def slower(self, work, now):
        left["until"] -= now == doing

        def short():
            made = work()
            if now == doing and not left["until"] and left["times"]:
                left["times"] -= 1
                raise MemoryError
            left["passes"] -= not left["times"]
            if not left["passes"]:
                raise KeyboardInterrupt
            return made

        return own(self, short, now)

    def run(folder=None, passes=-1, tokens=256):
        left.update(until=nth, times=times, passes=passes)
        now = config.replace(micro_batch_tokens=tokens)
        return edit(folder, config=now, locality=locality, resume_minutes=minutes)

    others = [run(tokens=tokens) for tokens in ((256, 128) if "step" in doing else (256,))]
    monkeypatch.setattr(Trainer, "_slower_if_it_must", slower)
    whole = run()
    for other in others:  # that it was slower, and from where on, decides the bytes
        assert any(not torch.equal(a[-1], b[-1]) for a, b in zip(weights(other), weights(whole), strict=True))
    for passes in (1, 2, 5):
        folder = tmp_path / f"after-{passes}"
        monkeypatch.setattr(Trainer, "_slower_if_it_must", slower)
        with pytest.raises(KeyboardInterrupt):
            run(folder, passes)
        monkeypatch.setattr(Trainer, "_slower_if_it_must", own)
        again = run(folder)
        same(weights(again), weights(whole))
        assert again.report["losses"] == whole.report["losses"]


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A folder with the state of a run that was interrupted after its steps."""
    with monkeypatch.context() as patched:

        def interrupt(*_args):
            raise KeyboardInterrupt

        patched.setattr(Trainer, "final_losses", interrupt)
        with pytest.raises(KeyboardInterrupt):
            edit(tmp_path / "state")
    return tmp_path / "state"


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_of_another_job_is_refused_and_kept(interrupted):
    before = listing(interrupted)
    with pytest.raises(InputError, match="of another job") as told:
        edit(interrupted, config=CONFIG.replace(seed=1))
    assert "setting seed 0" in str(told.value)
    assert "got: setting seed 1" in str(told.value)
    with pytest.raises(InputError, match="requests"):
        edit(interrupted, requests=REQUESTS[:-1])
    with pytest.raises(InputError, match="model"):
        edit(interrupted, model=tiny_model("llama", seed=1))
    with pytest.raises(InputError, match="work"):
        pke_fast.locate(tiny_model("llama"), tiny_tokenizer(), REQUESTS, CONFIG, locality=LOCALITY, resume=interrupted)
    with pytest.raises(InputError, match="memory budget"):
        edit(interrupted, memory_budget=10**11)
    with pytest.raises(InputError, match=r"samples 1[\s\S]*samples 3"):  # as many answers before as after
        edit(interrupted, samples=3)
    assert json.loads(before["job.json"])["job"]["device"] == "cpu"
    assert listing(interrupted) == before


@pytest.mark.parametrize("name", ["edit.0.safetensors", "scoring-the-requests.0.safetensors", "job.json"])
@pytest.mark.parametrize("how", ["short", "flipped", "another"])
def test_spoilt_state_is_told_and_nothing_is_lost(name, how, interrupted):
    content = (interrupted / name).read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    (interrupted / name).write_bytes({"short": content[:-5], "flipped": flipped, "another": b"[1]"}[how])
    before, model = listing(interrupted), tiny_model("llama")
    with pytest.raises(InputError, match=name):
        edit(interrupted, model=model)
    assert listing(interrupted) == before
    for ours, own in zip(model.parameters(), tiny_model("llama").parameters(), strict=True):
        assert torch.equal(ours, own)
    if name != "job.json":  # what the error says to do
        (interrupted / name).unlink()
        same(weights(edit(interrupted)), weights(edit()))


def test_a_state_with_other_tensors_is_told(interrupted):
    path = interrupted / "edit.0.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "steps"}, path)
    with pytest.raises(InputError, match="other bytes"):
        edit(interrupted)


def test_foreign_files_are_refused_or_kept(interrupted, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.json").write_text("{}")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="other files"):
        edit(tmp_path / "mine")
    with pytest.raises(InputError, match="a file"):
        edit(tmp_path / "file")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.json"]
    for name in ("mine.safetensors", "mine.json"):
        (interrupted / name).write_text("precious")
    edit(interrupted).write(tmp_path / "out")
    assert listing(interrupted) == {"mine.safetensors": b"precious", "mine.json": b"precious"}


def test_what_an_earlier_run_kept_is_removed_too(tmp_path):
    """Answers that later runs have no need of, since they are in the cache by then; a file that was half written."""
    config, folder = CONFIG.replace(shipped_pairs=4, companions=0), tmp_path / "state"
    stages = Interrupting(10**6)
    with pytest.raises(KeyboardInterrupt):
        stages.stage, own = (lambda name, total=None: stop(name) or own(name, total)), stages.stage

        def stop(name):
            if name == "Scoring the requests":
                raise KeyboardInterrupt

        edit(folder, config=config, locality=None, stages=stages)
    assert (folder / "asking-for-benign-answers.json").exists()
    (folder / ".tmp-0123abcd-edit.0.safetensors").write_bytes(b"half")
    edit(folder, config=config, locality=None).write(tmp_path / "out")
    assert not folder.exists()


def test_a_run_that_was_killed_at_its_very_beginning(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".tmp-0123abcd-job.json").write_text("{")
    edit(tmp_path / "state").write(tmp_path / "out")
    assert not (tmp_path / "state").exists()


def test_the_state_outlives_a_write_that_fails(interrupted, tmp_path):
    result = edit(interrupted)
    assert isinstance(result, EditResult)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(InputError):
        result.write(tmp_path / "out")
    assert (interrupted / "edit.0.safetensors").exists()
    result.write(tmp_path / "elsewhere")
    assert not interrupted.exists()


def test_parts_are_kept_every_so_often(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    part = Resume(tmp_path / "state", {"a": "1"}, minutes=1 / 6).part("work")
    value = torch.zeros(3, dtype=torch.bfloat16)

    def state():
        return {"value": value}

    for second in range(25):
        now[0] = float(second)
        value += 1
        part.save(state)
    assert part.load()["value"].tolist() == [21.0] * 3
    part.save(state, done=True)
    assert part.load()["value"].tolist() == [25.0] * 3


@pytest.mark.parametrize("minutes", [-1.0, float("nan")])
def test_no_time_between_two_states(tmp_path, minutes):
    with pytest.raises(InputError, match="0 or more"):
        edit(tmp_path / "state", resume_minutes=minutes)
    assert not (tmp_path / "state").exists()


@pytest.mark.slow
def test_a_command_that_is_killed_at_any_moment_goes_on(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lines = [{"prompt": r.prompt, "target_new": "Never.", "ground_truth": "Sure"} for r in REQUESTS]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [{"prompt": p.prompt, "answer": "Take flour"} for p in LOCALITY]
    (tmp_path / "benign.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    code = (
        "import sys, time\nfrom pke_fast import trainer\n"
        "own = trainer.Trainer.step\n"
        "trainer.Trainer.step = lambda *a, **k: time.sleep(0.05) or own(*a, **k)\n"
        "from pke_fast.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    settings = ["k=10", "num_steps=40", "batch_size=3", "window=[0,3]", "stop_loss=0.0", "lr=0.001"]

    def start(out, *more):
        files = ["--requests", tmp_path / "requests.jsonl", "--locality", tmp_path / "benign.jsonl"]
        given = [sys.executable, "-c", code, "edit", "--model", tmp_path / "model", *files, "--out", out]
        given += ["--resume-minutes", 0]
        return subprocess.Popen(
            [str(value) for value in (*given, *(v for s in settings for v in ("--set", s)), *more)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    assert start(tmp_path / "whole").wait() == 0
    state, draw, kills = tmp_path / "state", random.Random(0), 0
    while True:
        process = start(tmp_path / "out", "--resume", state)
        if kills < 4:
            while process.poll() is None and not (state / "pace.0.safetensors").exists():
                time.sleep(0.01)
            # The steps alone take 2 s; a later start needs some seconds before it goes on with them.
            time.sleep(draw.uniform(0.0, 0.8) if not kills else draw.uniform(2.0, 7.0))
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.communicate()
            if (tmp_path / "out").exists():  # whole, or not there
                break
            continue
        _, error = process.communicate()
        assert process.returncode == 0, error.decode()
        break
    assert kills
    assert process.returncode or not state.exists()
    whole, ours = (load_file(tmp_path / name / "patch.safetensors") for name in ("whole", "out"))
    assert whole.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in whole.items())
