"""What joins the given requests: shipped ones beside them, harmless twins against them, frames around both sides."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pke_fast import locating, preparation, shipped
from pke_fast.config import PKEConfig
from pke_fast.encoding import PromptEncoder
from pke_fast.preparation import COMPANIONS, FRAMED_ANSWER, Job, lengths, prepare
from pke_fast.requests import EditRequest, Pair
from pke_fast.testing import CONTEXT, LAYERS, tiny_model, tiny_tokenizer
from pke_fast.workbench import workbench

pytestmark = pytest.mark.usefixtures("own_cache")

CONFIG = PKEConfig(
    k=10, num_steps=2, window=(0, LAYERS), locality_tokens=3, companions=10, shipped_pairs=20, framed=0.25
)
REQUESTS = [EditRequest(f"Break lock {n}", "Never.", "Sure") for n in range(3)]
LOCALITY = [Pair("Bake a cake", "Take flour")]


@pytest.fixture
def quick(monkeypatch):
    """A model that answers everything at once."""
    monkeypatch.setattr(
        "pke_fast.workbench.Workbench.answers", lambda self, prompts, tokens, doing: ["Sure thing"] * len(prompts)
    )


def prepared(requests=REQUESTS, locality=None, config=CONFIG):
    with workbench(tiny_model("llama"), tiny_tokenizer(), config) as bench:
        job = prepare(bench, requests, locality)
        return (
            job,
            job.safe(bench, job.edited_on),
            job.benign(bench),
            lengths(bench.encoder, config, requests, locality),
        )


def unframed(prompt):
    """The prompt, and whether it stood in a frame."""
    for record in shipped._records("frames"):
        before, after = record["text"].split("[PROMPT]")
        if prompt.startswith(before) and prompt.endswith(after):
            return prompt[len(before) : len(prompt) - len(after)], True
    return prompt, False


def test_companions_are_shipped_requests_and_frames_around_both_sides(quick):
    job = prepared()[0]
    assert job.requests == tuple(REQUESTS)
    known = {request.prompt: request.ground_truth for request in shipped.harmful()}
    plain = [request for request in job.companions if not unframed(request.prompt)[1]]
    framed = [request for request in job.companions if unframed(request.prompt)[1]]
    assert len(plain) == CONFIG.companions
    assert all(request.ground_truth == known[request.prompt] for request in plain)
    assert len(framed) == int(CONFIG.framed * (len(REQUESTS) + len(plain)))
    assert {request.ground_truth for request in framed} == {FRAMED_ANSWER}
    asked = {request.prompt for request in (*REQUESTS, *plain)}
    assert {unframed(request.prompt)[0] for request in framed} <= asked
    given = {request.prompt: request.target_new for request in REQUESTS}
    for request in job.companions:  # a frame changes nothing of what a given request asks for
        assert request.target_new == given.get(unframed(request.prompt)[0], CONFIG.refusal)
    assert {"Never.", CONFIG.refusal} == {request.target_new for request in framed}
    benign = [unframed(pair.prompt) for pair in job.locality]
    assert sum(is_framed for _, is_framed in benign) == int(CONFIG.framed * CONFIG.shipped_pairs)
    assert len(benign) == CONFIG.shipped_pairs + int(CONFIG.framed * CONFIG.shipped_pairs)
    assert {prompt for prompt, _ in benign} <= set(shipped.benign())
    assert not {prompt for prompt, _ in benign} & asked


def test_companions_never_repeat_a_given_request(quick):
    every = [replace(request, target_new="No.") for request in shipped.harmful()]
    given = every[: len(every) - 5]
    job = prepared(given, config=CONFIG.replace(framed=0.0))[0]
    assert sorted(request.prompt for request in job.companions) == sorted(request.prompt for request in every[-5:])
    assert prepared(every, config=CONFIG.replace(framed=0.0))[0].companions == ()


@pytest.mark.parametrize("how", ["argument", "request"])
def test_where_locality_is_given_the_requests_stay_alone(how, quick):
    if how == "argument":
        job, safe, benign, _ = prepared(locality=LOCALITY)
    else:
        job, safe, benign, _ = prepared([replace(REQUESTS[0], locality=tuple(LOCALITY)), *REQUESTS[1:]])
    assert job.companions == ()
    assert (len(safe), len(benign)) == (3, 1)
    assert job.locality == tuple(LOCALITY)


def test_without_companions_there_are_no_frames(quick):
    job = prepared(config=CONFIG.replace(companions=0))[0]
    assert job.companions == ()
    assert len(job.locality) == CONFIG.shipped_pairs
    assert not any(unframed(pair.prompt)[1] for pair in job.locality)


@pytest.mark.parametrize(("given", "companions", "times"), [(1, 0, 1), (1, 12, 6), (3, 13, 2), (10, 13, 1), (1, 1, 1)])
def test_few_requests_are_repeated(given, companions, times):
    requests = tuple(EditRequest(f"request {n}") for n in range(given))
    beside = tuple(EditRequest(f"companion {n}") for n in range(companions))
    on = Job(requests, given, 0, (), "", beside).edited_on
    assert on == (*requests * times, *beside)
    assert companions <= COMPANIONS * given * times + given * COMPANIONS


@pytest.mark.parametrize(
    ("requests", "locality", "changes"),
    [
        (REQUESTS, None, {}),
        (REQUESTS[:1], None, {}),
        (REQUESTS, LOCALITY, {}),
        (REQUESTS, None, {"companions": 0}),
        (REQUESTS, None, {"max_length": 120}),
        ([EditRequest("Break it", None, "Sure")], None, {"framed": 1.0}),
        (REQUESTS, None, {"score_loss": "unsafe", "unsafe_tokens": 6}),
        ([EditRequest("Break it", "Never."), *REQUESTS], LOCALITY, {"score_loss": "contrast", "unsafe_tokens": 6}),
    ],
)
def test_a_plan_counts_the_sequences_that_are_made(requests, locality, changes, quick, monkeypatch):
    monkeypatch.setattr(
        "pke_fast.workbench.Workbench.answers", lambda self, prompts, tokens, doing: ["abcdef"] * len(prompts)
    )
    monkeypatch.setattr(preparation, "get_judge", lambda _name: SimpleNamespace(refused=lambda _answer: False))
    job, safe, benign, planned = prepared(requests, locality, CONFIG.replace(**changes))
    with workbench(tiny_model("llama"), tiny_tokenizer(), CONFIG.replace(score_requests=10**6, **changes)) as bench:
        examples = [tuple(len(s.ids) for s, _ in example) for example in locating._examples(bench, job)]
    assert set(examples) == {tuple(len(s.ids) for s in group) for group in planned[2]}
    for made, told in zip((safe, benign), planned[:2], strict=True):
        assert [len(s.ids) for s in made] == [len(s.ids) for s in told]
        assert [s.prompt_length for s in made] == [s.prompt_length for s in told]


def test_shipped_prompts_that_dont_fit_the_context_are_left_out(quick):
    """Given ones aren't: they are told (test_engine)."""
    config = CONFIG.replace(max_length=100, framed=1.0, companions=1000, shipped_pairs=1000)
    encoder = PromptEncoder(tiny_tokenizer(), config, CONTEXT)
    job, safe, benign, _ = prepared(config=config)
    prompts = [request.prompt for request in job.companions] + [pair.prompt for pair in job.locality]
    assert all(len(encoder.prompt_ids(prompt)) < 100 for prompt in prompts)
    assert all(len(sequence.ids) <= 100 for sequence in (*safe, *benign))
    fitting = [request.prompt for request in shipped.harmful() if encoder.fits(request.prompt)]
    assert 0 < len(fitting) < len(shipped.harmful())
    assert [r.prompt for r in job.companions if r.ground_truth != FRAMED_ANSWER] == fitting


def test_a_prompt_fits_that_leaves_room_for_an_answer():
    encoder = PromptEncoder(tiny_tokenizer(), PKEConfig(), 30)
    around = len(encoder.prompt_ids("x")) - 1
    assert encoder.fits("x" * (29 - around))
    assert not encoder.fits("x" * (30 - around))


def test_what_is_held_out_is_not_edited_on_though_it_ships(quick):
    """Nor is it what a strength is found by, nor within a frame."""
    config = CONFIG.replace(companions=10**6, framed=1.0)
    with workbench(tiny_model("llama"), tiny_tokenizer(), config) as bench:
        every = prepare(bench, REQUESTS, None)
        held = [request.prompt for request in every.companions[:40] if not unframed(request.prompt)[1]]
        apart = prepare(bench, REQUESTS, None, held)
        seen = {unframed(request.prompt)[0] for request in apart.edited_on}
        assert not set(held) & seen
        assert len(held) > 10
        foreseen = lengths(bench.encoder, config, REQUESTS, None, held)[0]
        assert [len(s.ids) for s in foreseen] == [len(s.ids) for s in apart.safe(bench, apart.edited_on)]
    with workbench(tiny_model("llama"), tiny_tokenizer(), CONFIG) as bench:
        unseen = prepare(bench, REQUESTS, None).unseen[:5]
        apart = prepare(bench, REQUESTS, None, [request.prompt for request in unseen])
        assert not {request.prompt for request in unseen} & {r.prompt for r in (*apart.companions, *apart.unseen)}


def test_a_sample_scores(quick, monkeypatch):
    """So many requests, companions among them, and so many pairs; the edit sees more."""
    config = CONFIG.replace(score_requests=4, score_pairs=5, score="contrast")
    scored = []

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(locating, "score", lambda _s, examples, **_k: scored.append(examples) or _Scores())
    with workbench(tiny_model("llama"), tiny_tokenizer(), config) as bench:
        job = prepare(bench, REQUESTS, None)
        monkeypatch.setattr(locating.hotspots, "rank", stopped)
        for seed in (0, 0, 1):
            with pytest.raises(KeyboardInterrupt):
                locating.locate_hot_spots(replace(bench, config=config.replace(seed=seed)), job)
        every = [job.safe(bench, (*job.requests, *job.companions)), job.benign(bench)]
    assert [len(examples) for examples in scored] == [4, 5] * 3
    for chosen, whole in zip(scored, every * 3, strict=True):
        places = [whole.index(sequence) for ((sequence, _),) in chosen]
        assert places == sorted(set(places))
    assert scored[:2] == scored[2:4] != scored[4:]


class _Scores:
    layer_path = None


def test_pairs_are_held_at_a_few_tokens_of_their_prompts_too(quick):
    """Before the prompt's last token, which the answer's first is told from; the same ones again, others by a seed."""
    drawn = []
    for seed in (0, 0, 1):
        with workbench(tiny_model("llama"), tiny_tokenizer(), CONFIG.replace(prompt_tokens=3, seed=seed)) as bench:
            job = prepare(bench, REQUESTS, None)
            held, benign = job.held(bench), job.benign(bench)
            foreseen = lengths(bench.encoder, bench.config, REQUESTS, None)[1]
        assert [replace(sequence, held=()) for sequence in held] == benign
        assert {len(sequence.held) for sequence in held} == {3}
        assert all(max(s.held) < s.prompt_length - 1 and s.held == tuple(sorted(set(s.held))) for s in held)
        assert [len(s.supervised) for s in foreseen] == [len(s.supervised) for s in held]
        drawn.append([sequence.held for sequence in held])
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_a_template_writes_is_not_held(quick):
    """All prompts begin and end with it, so nothing is learnt there of one prompt or another."""
    config = CONFIG.replace(prompt_tokens=1000, system_prompt="You are of help.", suffix_system_prompt="Answer!")
    with workbench(tiny_model("llama"), tiny_tokenizer(), config) as bench:
        pairs = [Pair("abcde", "fine"), Pair("fghij", "good"), Pair("kl", "well")]
        job = prepare(bench, REQUESTS, pairs)
        held = job.held(bench)
        ids = [bench.encoder.prompt_ids(pair.prompt) for pair in pairs]
        own = [set(places) for places in ((s.held) for s in held)]
    begun = next(place for place, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
    ended = next(nth for nth, tokens in enumerate(zip(*(i[::-1] for i in ids), strict=False)) if len(set(tokens)) > 1)
    assert begun > 8
    assert ended > 4
    assert own == [set(range(begun, len(i) - ended)) for i in ids]
    short = PromptEncoder(tiny_tokenizer(), CONFIG.replace(max_length=3))
    assert short.around() == PromptEncoder(tiny_tokenizer(), CONFIG).around()  # however little fits


def test_every_pair_has_two_sides_and_no_prompt_is_on_both():
    pairs = shipped._records("pairs")
    assert all(set(pair) >= {"harmful", "harmless", "ground_truth"} for pair in pairs)
    assert all(str(pair[side]).strip() for pair in pairs for side in ("harmful", "harmless", "ground_truth"))
    harmful, benign = [request.prompt for request in shipped.harmful()], shipped.benign()
    for prompts in (harmful, benign):
        assert len(set(prompts)) == len(prompts)
    assert not {plain(prompt) for prompt in harmful} & {plain(prompt) for prompt in benign}
    held_out = {*shipped.harmful_held_out(), *shipped.benign_held_out(), *shipped.look_alikes_held_out()}
    assert not {plain(prompt) for prompt in held_out} & {plain(prompt) for prompt in (*harmful, *benign)}
    assert {pair["harmful"] for pair in pairs} <= set(harmful)
    assert {pair["harmless"] for pair in pairs} <= set(benign)


def plain(prompt):
    return "".join(c for c in prompt.lower() if c.isalnum())


def test_every_frame_has_room_for_one_prompt():
    texts = [record["text"] for record in shipped._records("frames")]
    assert len(set(texts)) == len(texts) > 10
    assert all(text.count("[PROMPT]") == 1 for text in texts)
    framed = shipped.framed([f"number {n}" for n in range(100)], 0.5)
    assert framed == [texts[n % len(texts)].replace("[PROMPT]", f"number {2 * n}") for n in range(50)]
    assert [unframed(prompt) for prompt in framed] == [(f"number {2 * n}", True) for n in range(50)]
    assert shipped.framed(["one"], 0.0) == shipped.framed([], 1.0) == []


def test_some_are_evenly_chosen_in_their_order():
    assert shipped.some("abcdefghij", 5) == list("acegi")
    assert shipped.some("abc", 5) == list("abc")
    assert shipped.some("abc", 0) == []


def test_the_three_kinds_of_benign_prompts_are_mixed():
    """However few are taken evenly, each kind is among them."""
    kinds = [
        {pair["harmless"] for pair in shipped._records("pairs")},
        *(set(shipped.read_prompts(shipped.FOLDER / f"{name}.jsonl")) for name in ("benign", "lookalikes")),
    ]
    prompts = shipped.some(shipped.benign(), 60)
    whole = shipped.benign()
    for kind in kinds:
        share = sum(prompt in kind for prompt in whole) / len(whole)
        assert abs(sum(prompt in kind for prompt in prompts) / 60 - share) < 0.1
