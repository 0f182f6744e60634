"""Of many requests a job comes to some, drawn in one pass; the others are neither kept nor asked about."""

from __future__ import annotations

import json
import weakref
from collections import Counter

import pytest
import torch

import pke_fast
from pke_fast.cli import main
from pke_fast.cli.unseen import hold_out
from pke_fast.config import PKEConfig
from pke_fast.drawn import PROBED, RESERVES, Drawn, draw, draw_for, drawn_of, reserves_of
from pke_fast.errors import InputError
from pke_fast.preparation import prepare
from pke_fast.requests import EditRequest, Pair
from pke_fast.testing import LAYERS, tiny_model, tiny_tokenizer
from pke_fast.workbench import Workbench, workbench

pytestmark = pytest.mark.usefixtures("own_cache")

CONFIG = PKEConfig(
    k=10,
    num_steps=2,
    batch_size=2,
    locality_batch_size=2,
    window=(0, LAYERS),
    locality_tokens=3,
    unsafe_tokens=3,
    score_requests=3,
    score_pairs=3,
    prompt_tokens=0,
    detectors=False,
)
MANY = 40


@pytest.fixture
def four(monkeypatch):
    """An edit comes to four requests and four pairs: two steps of two."""
    monkeypatch.setattr("pke_fast.trainer.SAMPLE", 1)


def many():
    return (EditRequest(f"Break lock {n}", "Never.") for n in range(MANY))


def pairs():
    return (Pair(f"Bake cake {n}") for n in range(MANY))


def test_no_more_than_there_are_come_as_they_came():
    assert draw("abc", 3, 0) == draw("abc", 9, 0) == draw("abc", None, 0) == ["a", "b", "c"]
    assert draw([], 3, 0) == []


def test_a_drawing_keeps_the_order_and_depends_on_the_seed_alone():
    drawn = draw(range(1000), 10, 0)
    assert (len(drawn), drawn) == (10, sorted(set(drawn)))
    assert drawn == draw(iter(range(1000)), 10, 0) != draw(range(1000), 10, 1)


@pytest.mark.parametrize("drawing", ["once", "twice", "first of the reserves"])
def test_every_item_is_as_likely_as_any_other(drawing):
    drawings, count, of = 4000, 5, 40

    def drawn(seed):
        if drawing == "twice":
            return draw(draw(range(of), 7, seed), count, seed)
        found = draw(range(of), count, seed)
        return found if drawing == "once" else found.reserves[:count]

    found = Counter(item for seed in range(drawings) for item in drawn(seed))
    share = count / of
    expected, deviation = drawings * share, (drawings * share * (1 - share)) ** 0.5
    assert set(found) == set(range(of))
    assert all(abs(times - expected) < 4.5 * deviation for times in found.values())


def test_it_is_remembered_how_many_there_were():
    drawn = draw(range(1000), 10, 0)
    again = draw(drawn, 4, 0)
    assert (drawn.of, again.of, drawn_of(again), drawn_of([1, 2])) == (1000, 1000, 1000, 2)
    assert set(again) < set(drawn)
    assert set(again.reserves) == {*drawn, *drawn.reserves} - set(again)
    assert again.reserves[-len(drawn.reserves) :] == drawn.reserves
    assert not set(drawn) & set(drawn.reserves)
    assert (len(drawn.reserves), reserves_of([1, 2])) == (10 * RESERVES, [])


def test_a_drawing_holds_no_more_than_it_keeps():
    class Item:
        pass

    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def stream():
        nonlocal most
        for _ in range(1000):
            item = Item()
            alive.add(item)
            yield item
            del item
            most = max(most, len(alive))

    assert len(draw(stream(), 5, 0)) == 5
    assert most <= 5 * (1 + RESERVES) + 1  # the one that came last too


def test_what_a_job_comes_to_follows_from_its_settings():
    def counts(config, edits):
        requests, locality = draw_for(config, range(9999), range(9999), edits=edits)
        return len(requests), len(locality)

    assert counts(PKEConfig(), True) == (2064, 2064)  # 2,048 that detectors are made from, in whole minibatches
    assert counts(PKEConfig(), False) == (PROBED, PROBED)
    assert counts(PKEConfig(detectors=False), True) == (16 * 24, 16 * 48)
    assert counts(PKEConfig(batch_size=100, num_steps=60), True)[0] == 6000
    assert counts(PKEConfig(score_requests=3000, score_pairs=4000), False) == (3000, 4000)
    for method in ("dinm", "dinm-parity"):
        assert counts(PKEConfig(method=method), True) == (9999, 9999)
    requests, locality = draw_for(PKEConfig(), range(9999), None, edits=True, beside=7)
    assert (len(requests), locality) == (2064 + 7, None)


def test_an_edit_of_a_stream_asks_about_those_it_comes_to_alone(four, monkeypatch):
    """The same edit as of the list: some requests and pairs are drawn, and the model is asked about no other."""
    asked = []
    answers = Workbench.answers

    def listening(self, prompts, tokens, doing):
        asked.append((doing, len(prompts)))
        return answers(self, prompts, tokens, doing)

    monkeypatch.setattr(Workbench, "answers", listening)
    results = []
    for requests, locality in ((many(), pairs()), (list(many()), list(pairs()))):
        model = tiny_model("llama")
        result = pke_fast.edit(model, tiny_tokenizer(), requests, CONFIG, locality=locality, samples=0)
        results.append(result)
        told = result.report["requests"]
        assert (told["n"], told["used"] + told["already_refused"]) == (MANY, 4)
        assert result.report["locality"]["source"] == f"4 drawn of {MANY} given"
    assert asked == [("Asking for unsafe answers", 4), ("Asking for benign answers", 4)] * 2
    for one, other in zip(results[0].patch.layers, results[1].patch.layers, strict=True):
        assert torch.equal(one.new, other.new)
    prompts = {drawn.prompt for drawn in draw(many(), 4, CONFIG.seed)}
    assert prompts != {request.prompt for request in list(many())[:4]}


def test_reserves_take_the_place_of_requests_that_the_model_refuses(four, monkeypatch):
    """It is asked about so many more as it refused, as long as there are any."""
    refusing = {request.prompt for number, request in enumerate(many()) if number % 3}  # two of three
    asked = []

    def answers(self, prompts, tokens, doing):
        asked.append((doing, prompts))
        return ["I cannot help with that." if prompt in refusing else "Sure" for prompt in prompts]

    monkeypatch.setattr(Workbench, "answers", answers)
    with workbench(tiny_model("llama"), tiny_tokenizer(), CONFIG) as bench:
        job = prepare(bench, draw(many(), 4, 0), list(pairs())[:1])
        (first, round_one), (second, round_two), *_ = asked[:-1]
        assert (first, second) == ("Asking for unsafe answers", "Asking for unsafe answers, 2")
        assert len(round_two) == sum(prompt in refusing for prompt in round_one) > 0
        prompts = [prompt for doing, some in asked for prompt in some if "unsafe" in doing]
        assert len(set(prompts)) == len(prompts)
        assert [r.prompt for r in job.requests] == [prompt for prompt in prompts if prompt not in refusing]
        assert (len(job.requests), job.already_refused, job.given) == (4, len(prompts) - 4, MANY)
        refusing.update(request.prompt for request in many())
        with pytest.raises(InputError, match=f"refuses all {4 * (1 + RESERVES)} requests already"):
            prepare(bench, draw(many(), 4, 0), None)


def test_what_is_held_out_is_a_share_of_all_that_were_given():
    requests = [EditRequest(f"Break lock {n}") for n in range(1000)]
    rest, held = hold_out(draw([*requests, *requests[:9]], 100, 0), 0.02, 0)
    assert (len(held), len(rest), rest.of) == (20, 80, 989)
    twins = Drawn(requests[:50], 1000, requests[:50])
    rest, held = hold_out(twins, 0.02, 0)
    assert len(rest.reserves) == len(rest) == 50 - len(held) == 30
    assert hold_out(Drawn([], 0), 0.5, 0) == ([], [])


def test_locating_comes_to_those_that_it_probes(monkeypatch):
    monkeypatch.setattr("pke_fast.drawn.PROBED", 5)
    found = pke_fast.locate(tiny_model("llama"), tiny_tokenizer(), many(), CONFIG, locality=pairs())
    assert (found.given, found.requests + found.already_refused, found.locality) == (MANY, 5, 5)


def test_the_report_and_the_terminal_tell_what_was_not_drawn(four, tmp_path, capsys):
    """Requests that are held out come beside those that are drawn for the edit."""
    model = tmp_path / "model"
    tiny_model("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps({"prompt": r.prompt, "ground_truth": "Sure"}) + "\n" for r in many()))
    settings = [f"{name}={getattr(CONFIG, name)}" for name in ("k", "num_steps", "batch_size", "locality_batch_size")]
    settings += ["window=[0, 3]", "detectors=false", "score_requests=3", "score_pairs=3", "companions=0"]
    settings += ["shipped_pairs=8", "locality_tokens=3"]
    given = ["--model", str(model), "--requests", str(file), *(part for s in settings for part in ("--set", s))]
    assert main(["edit", *given, "--out", str(tmp_path / "out"), "--held-out", "0.1"]) == 0
    shown = capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "report.json").read_text())["requests"]
    held = told["held_out"]
    assert (held > 0, told["n"], told["used"]) == (True, MANY - held, 4)
    assert f"{MANY - held - 4} other requests were not drawn" in shown
    assert f"{MANY - held - 4} were not drawn" in (tmp_path / "out" / "report.html").read_text()
    assert main(["edit", *given, "--out", str(tmp_path / "dry"), "--dry-run", "--json"]) == 0
    would = json.loads(capsys.readouterr().out)
    assert (would["requests given"], would["requests"], would["held out"]) == (MANY, 4, 4)
    assert main(["plan", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 4
