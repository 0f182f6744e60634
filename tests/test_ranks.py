"""Two processes of one job find and change what one process does; where one ends, the other says so and nothing is half
written."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pke_fast import detectors
from pke_fast.columns import columns_of
from pke_fast.config import PKEConfig
from pke_fast.editing import edit_columns
from pke_fast.encoding import Encoded
from pke_fast.errors import InputError
from pke_fast.pace import Pace
from pke_fast.ranks import ALONE, Ranks, joined
from pke_fast.resume import Snapshot
from pke_fast.scoring import score
from pke_fast.stages import Stages
from pke_fast.structure import find_structure
from pke_fast.testing import LAYERS, tiny_model
from pke_fast.trainer import Trainer

WORK = """
import json, sys
import torch
import pke_fast
from pke_fast import detectors
from pke_fast.config import PKEConfig
from pke_fast.errors import PKEError
from pke_fast.ranks import joined
from pke_fast.requests import EditRequest, Pair
from pke_fast.testing import LAYERS, tiny_model, tiny_tokenizer

out, size, *_ = sys.argv[1:]
detectors.LEAST = 1  # few requests are enough for edits to begin with detectors
config = PKEConfig(k=10, num_steps=4, batch_size=5, locality_batch_size=1, window=(1, LAYERS), locality_tokens=3,
                   lr=1e-3, stop_loss=0.0, micro_batch_tokens=96)
requests = [EditRequest(f"Break {n} locks" + " now" * (n % 4), "Never do that.", "Sure") for n in range(7)]
requests += [EditRequest("Rob him")]  # its unsafe answer is generated, by one of the ranks
locality = [Pair(f"Bake cake {n}", "Take some flour") for n in range(4)] + [Pair("Sing a song")]
with joined("cpu") as ranks:
    assert ranks.size == int(size)
    found, done = {}, {}
    for steps, batch in ((4, 5), (2, 1)):  # a minibatch of one request leaves the other rank without work
        model = tiny_model("llama")
        result = pke_fast.edit(model, tiny_tokenizer(), requests, config.replace(num_steps=steps, batch_size=batch),
                               locality=locality, samples=1, ranks=ranks)
        for name in ("weight_change", "activation_path", "activation"):
            found[f"{name}-{batch}"] = getattr(result.located.unsafe, name)
        for part in result.patch.layers:
            found[f"neurons-{batch}-{part.layer}"] = part.neurons
            found[f"change-{batch}-{part.layer}"] = part.new - part.old
        done[str(batch)] = [[s[k] for k in ("loss", "edit", "kl")] for s in result.report["losses"]["steps"]]
        done[f"after-{batch}"] = [[result.report["losses"]["after"][k] for k in ("edit", "kl")]]
        done[f"answers-{batch}"] = [s["after"] for s in result.report["samples"]]
    torch.save((found, done), f"{out}/{ranks.size}-{ranks.rank}.pt")
    if ranks.size > 1:
        try:
            pke_fast.locate(tiny_model("llama"), tiny_tokenizer(), requests[ranks.rank :], config, locality=locality,
                            ranks=ranks)
        except PKEError as error:
            print(error)
"""


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(code, *arguments, rank=0, size=1, at=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if size > 1:
        env |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": at}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_ranks_send(monkeypatch):
    """Score sums once for all micro-batches; in a step two losses and the gradients of the selected columns."""
    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: sent.append(tensor.numel()))
    structure, ranks = find_structure(tiny_model("llama").requires_grad_(False)), Ranks(0, 2)
    sequences = [Encoded(tuple(range(3, 15 + n)), 9) for n in range(8)]
    score(structure, [[(sequence, 1.0)] for sequence in sequences], pad_id=0, pace=Pace(32), ranks=ranks)
    assert sent == [3 * LAYERS * structure.neurons]
    sent.clear()
    config = PKEConfig(batch_size=8, locality_batch_size=8, lr=1e-3)
    columns = columns_of(structure, {1: torch.arange(5), 2: torch.arange(2)}, config.edited)
    trainer = Trainer(structure, columns, sequences, sequences, config, 0, pace=Pace(32), ranks=ranks)
    for number in range(2):
        trainer.step(number)
        assert sum(sent) == 2 + 3 * 7 * structure.hidden_size
        sent.clear()


def test_two_ranks_do_what_one_does(tmp_path):
    at = port()
    processes = [start(WORK, tmp_path, 2, rank=rank, size=2, at=at) for rank in range(2)]
    processes.append(start(WORK, tmp_path, 1))
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    for out, _ in said[:2]:  # each of the two came with other requests at last
        assert "the ranks came with different requests" in out
        assert "rank 1 differs from rank 0" in out
    alone, *both = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for found, done in both:
        assert found.keys() == alone[0].keys()
        for name, truth in alone[0].items():
            if name.startswith("neurons"):
                assert torch.equal(found[name], truth)
            else:
                assert float((found[name] - truth).norm() / truth.norm()) < 1e-3
        for name, truth in alone[1].items():
            if name.startswith("answers"):
                assert done[name] == truth
            else:
                for ours, theirs in zip(done[name], truth, strict=True):
                    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for name, tensor in both[0][0].items():
        assert torch.equal(tensor, both[1][0][name])


class _Kept(Snapshot):
    def __init__(self, state=None):
        self.state, self.saved = state, []

    def load(self):
        return self.state

    def save(self, state, *, done=False):
        self.saved.append({name: tensor.clone() for name, tensor in state().items()})


def test_all_ranks_go_on_from_the_first_ones_steps(sequences, monkeypatch):
    """However far each had come by itself; the first one alone keeps them, and what the detectors were."""
    monkeypatch.setattr(detectors, "LEAST", 1)
    monkeypatch.setattr(detectors, "GAINS", (1.0,))

    def edited(ranks, snapshot):
        structure = find_structure(tiny_model("llama").requires_grad_(False))
        config = PKEConfig(num_steps=4, batch_size=4, locality_batch_size=2, lr=1e-2, stop_loss=0.0)
        sides, stage = (sequences(6), sequences(5, seed=1)), Stages().stage
        hot_spots = {1: torch.tensor([1, 5])}
        more = {"pad_id": 259, "stage": stage, "ranks": ranks, "snapshot": snapshot}
        return edit_columns(structure, hot_spots, *sides, config, **more)

    whole = edited(ALONE, first := _Kept())
    assert len(first.saved) == 4
    assert all(any(name.endswith(".start") for name in saved) for saved in first.saved)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _tensor: None)
    given = []
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda v: given.append(v[0]) or v.__setitem__(0, kept)
    )
    made, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, number: made.append(number) or step(self, number))
    kept, mine = first.saved[1], _Kept(first.saved[2])  # this rank had made a step more
    outcome = edited(Ranks(1, 2), mine)
    assert (made, given, mine.saved) == ([2, 3], [None], [])
    assert outcome.steps[:2] == whole.steps[:2]
    with monkeypatch.context() as patched:
        patched.setattr(torch.distributed, "broadcast_object_list", lambda values: given.append(values[0]))
        edited(Ranks(0, 2), own := _Kept(first.saved[1]))
    assert given[1] is first.saved[1]
    assert len(own.saved) == 2


@pytest.mark.parametrize(
    ("gpus", "refused"), [(["GPU-a", "GPU-b"], False), (["GPU-a", "GPU-a"], True), ([None, None], False)]
)
def test_a_rank_works_on_a_gpu_of_its_own(gpus, refused, monkeypatch):
    """Objects go by gloo, so that nothing of them is on a GPU; two ranks on one are told before anything is sent."""
    done = []

    def gather(values, mine):
        assert mine == gpus[1]
        values[:] = gpus

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(device))
    properties = SimpleNamespace(**({"uuid": gpus[1]} if gpus[1] else {}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    answers = {"get_rank": lambda: 1, "get_world_size": lambda: 2, "barrier": lambda: done.append("all are here")}
    answers |= {"init_process_group": lambda backend, timeout: done.append((backend, timeout.days))}
    answers |= {"destroy_process_group": lambda: done.append("end")}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.distributed, name, answer)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    told = pytest.raises(InputError, match=r"several ranks on one GPU[\s\S]*ranks 0, 1")
    with told if refused else nullcontext(), joined("cuda:1") as ranks:
        done.append(ranks)
    inside = [] if refused else [Ranks(1, 2), "all are here"]
    assert done == ["cuda:1", ("cpu:gloo,cuda:nccl", 7), *inside, "end"]  # a rank may measure alone for days


def test_shares_are_gathered_in_order():
    assert ALONE.first
    items = list("abcdefg")
    assert [Ranks(rank, 3).mine(items) for rank in range(3)] == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    assert ALONE.gathered(items) == items
    assert ALONE.in_turn(lambda: 3) == 3
    assert ALONE.from_first(lambda: 4) == 4
    ALONE.agree("requests", "anything")
    ALONE.wait()


@pytest.fixture
def job(tmp_path):
    from pke_fast.testing import tiny_model, tiny_tokenizer

    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lines = [{"prompt": f"Break lock {n}", "target_new": "Never.", "ground_truth": "Sure"} for n in range(5)]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "benign.jsonl").write_text('{"prompt": "Bake a cake", "answer": "Take flour"}\n{"prompt": "Sing"}\n')
    settings = ["k=10", "num_steps=4", "batch_size=3", "window=[0,3]", "locality_tokens=3"]
    files = ["--requests", tmp_path / "requests.jsonl", "--locality", tmp_path / "benign.jsonl"]
    given = ["--model", tmp_path / "model", *files, *(v for s in settings for v in ("--set", s)), "--device", "cpu"]
    return [str(value) for value in given]


@pytest.mark.slow
def test_torchrun_writes_one_whole_output(job, tmp_path):
    patches = []
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port(), "-m"]
    for name, command in (("one", []), ("two", torchrun)):
        more = ["--resume", str(tmp_path / "state"), "--out", str(tmp_path / name), "--json"]
        done = subprocess.run(
            [sys.executable, "-m", *command, "pke_fast", "edit", *job, *more],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["hot_spots"]["k"] == 10  # one rank printed
        assert done.stderr.count("Done\n") == 1
        assert not (tmp_path / "state").exists()
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files == {"patch.safetensors", "report.html", "report.json"}
        patches.append(load_file(tmp_path / name / "patch.safetensors"))
    assert patches[0].keys() == patches[1].keys()
    for name, tensor in patches[0].items():
        if name.endswith("neurons"):
            assert torch.equal(tensor, patches[1][name])


APART = """
import sys, time, torch
import pke_fast
from pke_fast import detectors, trainer
from pke_fast.config import PKEConfig
from pke_fast.errors import PKEError
from pke_fast.ranks import joined
from pke_fast.requests import EditRequest, Pair
from pke_fast.testing import LAYERS, tiny_model, tiny_tokenizer

out, stops = sys.argv[1], int(sys.argv[2])
detectors.LEAST = 1
config = PKEConfig(k=10, num_steps=5, batch_size=4, locality_batch_size=2, window=(1, LAYERS), locality_tokens=3,
                   stop_loss=0.0, micro_batch_tokens=128)
requests = [EditRequest(f"Break {n} locks", "Never do that.", "Sure") for n in range(8)]
locality = [Pair(f"Bake cake {n}", "Take some flour") for n in range(4)]
own, update, short = trainer.Trainer.gradients, trainer.Trainer.update, []

def gradients(self, number, **more):  # on the second rank memory runs out at the third step
    if self.ranks.rank and number == 2 and stops >= 0 and not short:
        short.append(number)
        raise MemoryError
    return own(self, number, **more)

def stopped(self, number):
    update(self, number)
    if number == stops:
        time.sleep(2)  # the other one has kept a step more by then
        raise KeyboardInterrupt

trainer.Trainer.gradients, trainer.Trainer.update = gradients, stopped
try:
    with joined("cpu") as ranks:
        result = pke_fast.edit(tiny_model("llama"), tiny_tokenizer(), requests, config, locality=locality, samples=0,
                               ranks=ranks, resume=None if stops > 9 else f"{out}/state", resume_minutes=0)
        torch.save([part.new for part in result.patch.layers], f"{out}/{stops}-{ranks.rank}.pt")
except (KeyboardInterrupt, PKEError) as error:
    print(type(error).__name__)
"""


@pytest.mark.slow
def test_ranks_that_stopped_at_different_steps_go_on_together(tmp_path):
    for first, second in ((3, 4), (-1, -1), (10, 10)):
        at = port()
        both = [start(APART, tmp_path, stop, rank=rank, size=2, at=at) for rank, stop in enumerate((first, second))]
        try:
            said = [process.communicate(timeout=200) for process in both]
        finally:
            for process in both:
                process.kill()
        assert [process.returncode for process in both] == [0, 0], said
    found = [torch.load(tmp_path / f"{stop}-{rank}.pt") for stop in (-1, 10) for rank in range(2)]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_job(victim, job, tmp_path):
    slowed = (
        "import sys, time, pathlib\nfrom pke_fast import trainer\nown = trainer.Trainer.step\n"
        f"at = pathlib.Path({str(tmp_path)!r})\n"
        "def step(self, number, **k):\n"
        "    (at / f'stepped-{self.ranks.rank}').write_text(str(number)); time.sleep(0.5)\n"
        "    return own(self, number, **k)\n"
        "trainer.Trainer.step = step\nfrom pke_fast.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    at = port()
    arguments = ["edit", *job, "--out", tmp_path / "out", "--set", "num_steps=100"]
    ranks = [start(slowed, *arguments, rank=rank, size=2, at=at) for rank in range(2)]
    try:
        end = time.monotonic() + 100
        while not all((tmp_path / f"stepped-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < end
            time.sleep(0.1)
        ranks[victim].send_signal(signal.SIGKILL)
        out, error = ranks[1 - victim].communicate(timeout=30)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[1 - victim].returncode == 1
    assert "another rank of the job has ended" in error
    assert "Traceback" not in error
    assert not out
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))
