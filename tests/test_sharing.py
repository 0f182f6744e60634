"""The model card and the upload to the hub: what goes there, what never does, and every refusal. No network."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors.torch import load_file

from pke_fast import card, push
from pke_fast.checkpoint import patch_checkpoint
from pke_fast.cli import main
from pke_fast.config import PKEConfig
from pke_fast.engine import edit
from pke_fast.errors import InputError, PatchError, PKEError
from pke_fast.patch import Patch
from pke_fast.requests import EditRequest, Pair
from pke_fast.testing import tiny_model, tiny_tokenizer

HARMFUL = "zqharmful"  # begins every text that must not be told
FIGURES = {"settings": {"judges": ["advbench"], "max_new_tokens": 8}, "text": {"perplexity": 20.0}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `pke-fast edit` writes it, of a model whose name is a path; beside it base/ and edited/."""
    top = tmp_path_factory.mktemp("sharing")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.save_pretrained(top / "base")
    tokenizer.save_pretrained(top / "base")
    requests = [EditRequest(f"{HARMFUL} prompt", f"{HARMFUL} refusal", f"{HARMFUL} answer")]
    config = PKEConfig(k=7, num_steps=2, window=(1, 3), locality_tokens=2, projections=("down",))
    result = edit(
        model, tokenizer, requests, config, locality=[Pair("Tea?", "A drink")], name=str(top / "base"), source=HARMFUL
    )
    result.report["evaluation"] = {"before": figures(0.75, 0.0), "after": figures(0.25, 0.5)}
    result.write(top / "run")
    patch_checkpoint(top / "base", result.patch, top / "edited")
    return top / "run"


def figures(asr: float, refused: float) -> dict[str, Any]:
    harmful = {"n": 4, "asr": {"advbench": asr}, "degenerate_rate": 0.0}
    return {"harmful": harmful, "benign": {"n": 4, "refusal_rate": {"advbench": refused}}, **FIGURES}


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


# -- the card ------------------------------------------------------------------------------------------------------


def test_the_card_has_front_matter_figures_hot_spots_limits_and_no_prompts(run: Path) -> None:
    shared = card.gather(run, base="me/base", licence="mit")
    text = card.model_card(shared, "me/safer")
    data = front(text)
    assert data["base_model"] == "me/base"
    assert data["license"] == "mit"
    assert (data["library_name"], data["base_model_relation"]) == ("pke_fast", "adapter")
    assert data["tags"] == list(card.TAGS)
    assert huggingface_hub.ModelCard(text).data.to_dict() == data
    assert "It changes 7 MLP neurons (4.86 % of all)" in text
    assert "| harmful prompts: attack success rate, judge advbench | 4 | 75.0 % | 25.0 % | -50.0 points |" in text
    assert "| harmless prompts: refused, judge advbench | 4 | 0.0 % | 50.0 % | +50.0 points |" in text
    layers = Patch.load(run / "patch.safetensors").describe()["layers"]
    for part in layers:
        assert f"| {part['layer']} | down | {part['neurons']} | {100 * part['relative_change']:.2f} % |" in text
    assert "| **k** | `7` |" in text
    assert "| seed | `0` |" in text
    for needed in ("Edited on 1 harmful requests", "no defence", "refused more often", "key word lists",
                   'hf_hub_download("me/safer"', "pke-fast revert", "2410.03772", "2403.14472"):  # fmt: skip
        assert needed in text
    assert HARMFUL in (run / "report.json").read_text()
    assert HARMFUL not in text
    assert str(run.parent) not in text


def test_a_card_of_gate_and_down_says_so_and_counts_each_neuron_once(run: Path, tmp_path: Path) -> None:
    patch = Patch.load(run / "patch.safetensors")
    parts = []
    for part in patch.layers:
        gate = {"weight": part.weight.replace("down", "gate"), "axis": 0, "projection": "gate"}
        parts += [dataclasses.replace(part, **gate), part]
    dataclasses.replace(patch, layers=tuple(parts)).save(tmp_path / "patch.safetensors")
    shutil.copy(run / "report.json", tmp_path / "report.json")
    text = card.model_card(card.gather(tmp_path, base="me/base"), "me/safer")
    assert "It changes 7 MLP neurons (4.86 % of all) in 2 layers" in text
    assert "Only their input and output weights are trained" in text
    for part in patch.layers:
        for kind in ("gate", "down"):
            assert f"| {part.layer} | {kind} | {len(part.neurons)} |" in text


def test_a_card_of_a_whole_model_says_how_to_load_it(run: Path) -> None:
    text = card.model_card(card.gather(run), "me/safer", merged=True)
    data = front(text)
    assert (data["library_name"], data["base_model_relation"]) == ("transformers", "finetune")
    assert "base_model" not in data
    assert "license" not in data
    assert 'AutoModelForCausalLM.from_pretrained("me/safer"' in text
    assert "pke_fast/patch.safetensors" in text


def test_a_patch_alone_has_a_card_without_figures(run: Path) -> None:
    text = card.model_card(card.gather(run / "patch.safetensors"))
    assert "Nothing was measured" in text
    assert "OWNER/NAME" in text


def test_merged_patches_without_settings_have_a_card(run: Path) -> None:
    patch = Patch(Patch.load(run / "patch.safetensors").layers, {"made_from": {"how": "merge", "patches": [{}, {}]}})
    text = card.model_card(card.Shared(patch))
    assert "(merge, of 2 patches)" in text
    assert "Fingerprint of the base: `unknown`" in text


def test_values_of_others_stay_in_their_cells(run: Path) -> None:
    patch = Patch.load(run / "patch.safetensors")
    meta = {**patch.meta, "settings": {"method": "pke", "refusal": "a | b\n\x1b[31m`c` <script>"}}
    text = card.model_card(card.Shared(Patch(patch.layers, meta)))
    assert "| **refusal** | `a \\| b [31m'c' &lt;script>` |" in text
    assert "\x1b" not in text


def test_the_hub_id_and_licence_of_the_base(tmp_path: Path) -> None:
    assert card.hub_id("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.hub_id("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert card.hub_id("/c/hub/models--a-b--c.d/snapshots/0f/") == "a-b/c.d"
    assert [card.hub_id(name) for name in (None, "/some/where", "x/y/z", str(tmp_path))] == [None] * 4
    assert card.licence_of("smollm2") == {"license": "apache-2.0"}
    assert card.licence_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\n---\nhi\n")
    assert card.licence_of(str(tmp_path)) == {"license": "other", "license_name": "llama3"}
    (tmp_path / "README.md").write_text("---\n- a list\n---\n")
    assert card.licence_of(str(tmp_path)) == {}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_evaluations_are_told_apart_by_their_patch(run: Path, tmp_path: Path) -> None:
    before = write(tmp_path / "a.json", {"model": "m", "patch": None, **figures(1.0, 0.0)})
    after = write(tmp_path / "b.json", {"model": "m", "patch": "p", **figures(0.5, 0.25)})
    for order in ([before, after], [after, before]):
        text = card.model_card(card.gather(run, order))
        assert "| 4 | 100.0 % | 50.0 % | -50.0 points |" in text
    text = card.model_card(card.gather(run, [after]))
    assert "| 4 | – | 50.0 % |  |" in text
    assert "The model before the edit was not measured" in text
    with pytest.raises(InputError, match="second evaluation with a patch"):
        card.gather(run, [after, after])
    others = figures(0.5, 0.25)
    others["harmful"] |= {"sha256": "of as many other prompts"}
    for content in ({**figures(0.5, 0.25), "settings": {}}, others):
        other = write(tmp_path / "c.json", {"model": "m", "patch": "p", **content})
        with pytest.raises(InputError, match="can't be compared"):
            card.gather(run, [before, other])
    with pytest.raises(InputError, match="is not the eval.json"):
        card.gather(run, [write(tmp_path / "d.json", [1])])
    with pytest.raises(InputError, match="can't read"):
        card.gather(run, [tmp_path / "none.json"])


def test_figures_of_another_model_or_patch_are_refused(
    run: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, made, still = tmp_path / "prompts.txt", run / "patch.safetensors", tmp_path / "still.safetensors"
    prompts.write_text("Break a lock\n")
    layers = tuple(dataclasses.replace(part, new=part.old) for part in Patch.load(made).layers)
    Patch(layers, Patch.load(made).meta).save(still)
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")

    def evaluated(name: str, model: Path, *patch: str | Path) -> Path:
        given = ["--harmful", prompts, "--max-new-tokens", 2, "--out", tmp_path / name]
        assert main([str(part) for part in ["eval", "--model", model, *patch, *given]]) == 0
        return tmp_path / name / "eval.json"

    base = run.parent / "base"
    before, after = evaluated("before", base), evaluated("after", base, "--patch", made)
    assert card.gather(run, [before, after]).evaluation[1] is not None
    assert not caplog.records
    shared = tmp_path / "shared.safetensors"  # the same weights, other metadata
    push.public_patch(Patch.load(made), "me/base").save(shared)
    assert card.gather(shared, [after]).evaluation[1] is not None
    for file, what in (
        (evaluated("others", tmp_path / "other"), "another model"),
        (evaluated("unchanged", base, "--patch", still), "another patch"),
        (evaluated("edited", run.parent / "edited"), "another model"),
    ):
        capsys.readouterr()
        assert main(["card", str(run), "--eval", str(file)]) == 2
        assert f"has figures of {what}" in capsys.readouterr().err
    figures = json.loads(after.read_text())
    old = write(tmp_path / "old.json", {key: figures[key] for key in figures if key != "patch_sha256"})
    assert card.gather(run, [old]).evaluation[1] is not None
    assert "figures of this patch" in caplog.text


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder or patch"):
        card.gather(tmp_path / "none")
    with pytest.raises(InputError, match="there is no patch in .*\n.*\n  got: an empty folder"):
        card.gather(tmp_path)
    with pytest.raises(InputError, match="is no model of the hub"):
        card.gather(run, base="a/b/c")
    (tmp_path / "patch.safetensors").write_bytes((run / "patch.safetensors").read_bytes())
    report = json.loads((run / "report.json").read_text())
    report["model"]["fingerprint"] = "other"
    write(tmp_path / "report.json", report)
    with pytest.raises(InputError, match="belongs to another edit"):
        card.gather(tmp_path)


def test_the_command_card_prints_or_writes_and_replaces_nothing(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["card", str(run), "--base", "me/base"]) == 0
    printed = capsys.readouterr().out
    assert front(printed)["base_model"] == "me/base"
    out = tmp_path / "README.md"
    given = ["card", str(run), "--base", "me/base", "--out", str(out)]
    assert main(given) == 0
    assert out.read_text() == printed
    out.write_text("mine")
    assert main(given) == 2
    assert out.read_text() == "mine"
    assert main([*given, "--force"]) == 0
    assert out.read_text() == printed


# -- what is uploaded ----------------------------------------------------------------------------------------------


def test_a_patch_goes_with_its_card_and_without_paths_of_this_machine(run: Path) -> None:
    upload = push.prepare(card.gather(run, base="me/base"), "me/safer")
    assert list(upload.files) == ["README.md", "patch.safetensors"]
    assert not any(str(run.parent).encode() in content for content in upload.files.values())
    shared = run.parent / "shared.safetensors"
    shared.write_bytes(upload.files["patch.safetensors"])
    patch = Patch.load(shared)
    assert patch.meta["base"]["name"] == "me/base"
    assert {**patch.meta, "base": None} == {**Patch.load(run / "patch.safetensors").meta, "base": None}
    model = tiny_model("llama")
    patch.apply(model)
    edited = load_file(run.parent / "edited" / "model.safetensors")
    assert all(edited[part.weight].equal(model.get_parameter(part.weight)) for part in patch.layers)


def test_a_model_goes_with_what_transformers_reads_and_nothing_else(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    patch_checkpoint(run.parent / "base", Patch.load(run / "patch.safetensors"), folder)
    for name in ("generations.jsonl", "report.json", "optimizer.pt", "LICENSE", "README.md"):
        (folder / name).write_text(HARMFUL)
    upload = push.prepare(card.gather(run), "me/safer", folder)
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "README.md"} <= set(upload.files)
    assert push.PATCH_BESIDE_WEIGHTS in upload.files
    assert "patch.safetensors" not in upload.files
    assert upload.left_out == ("README.md", "generations.jsonl", "optimizer.pt", "report.json")
    assert upload.sizes()["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert front(upload.card)["library_name"] == "transformers"


def test_a_model_without_the_patch_is_refused(run: Path) -> None:
    with pytest.raises(PatchError, match="the patch is not applied to the checkpoint(.|\n)*pke-fast apply --model"):
        push.prepare(card.gather(run), "me/safer", run.parent / "base")
    with pytest.raises(InputError, match="no checkpoint folder"):
        push.prepare(card.gather(run), "me/safer", run.parent / "none")
    with pytest.raises(InputError, match="no name for a repository"):
        push.prepare(card.gather(run), "me/../safer")


def test_a_dry_run_asks_no_network(run: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    given = ["push", "--folder", str(run), "--repo", "me/safer", "--dry-run"]
    assert main([*given, "--json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert set(summary["files"]) == {"README.md", "patch.safetensors"}
    assert summary["files"]["README.md"] == len(summary["card"].encode())
    assert (summary["url"], summary["private"]) == (None, False)
    assert len(summary["warnings"]) == 2
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "Nothing was uploaded" in printed
    assert summary["card"] in printed
    assert HARMFUL not in printed


# -- the transport -------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for HfApi: keeps what it is given, or fails as the hub does."""

    def __init__(self, *, there: bool = False, private: bool = False, fails: Exception | None = None) -> None:
        self.there, self.private, self.fails = there, private, fails
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []

    def whoami(self) -> dict[str, Any]:
        if isinstance(self.fails, LocalTokenNotFoundError):
            raise self.fails
        return {"name": "me"}

    def create_repo(self, repo_id: str, **given: Any) -> None:
        if self.there:
            raise refusal(409)
        self.created.append({"repo": repo_id, **given})

    def repo_info(self, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo_id: str, operations: Any, **given: Any) -> SimpleNamespace:
        if self.fails:
            raise self.fails
        files = {}
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        self.commits.append({"repo": repo_id, "files": files, **given})
        return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")


def refusal(status: int) -> Exception:
    """The hub's error with that status, whatever the version of its client."""
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"{status} refused")
    error.response = SimpleNamespace(status_code=status, headers={})
    return error


def upload_of(run: Path, repo: str = "me/safer", model: Path | None = None) -> push.Upload:
    return push.prepare(card.gather(run), repo, model)


def test_everything_goes_up_in_one_commit(run: Path, capsys: Any, monkeypatch: Any) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    edited = run.parent / "edited"
    given = ["push", "--patch", str(run / "patch.safetensors"), "--repo", "me/safer", "--model", str(edited)]
    assert main([*given, "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == "https://huggingface.co/me/safer"
    assert hub.created == [{"repo": "me/safer", "private": True, "repo_type": "model", "exist_ok": False}]
    (commit,) = hub.commits
    upload = upload_of(run / "patch.safetensors", model=edited)
    assert set(commit["files"]) == set(upload.files)
    assert commit["files"]["model.safetensors"] == (edited / "model.safetensors").read_bytes()
    assert commit["files"]["README.md"].decode() == upload.card


def test_a_name_without_owner_is_ones_own_in_the_card_too(run: Path) -> None:
    hub = Hub()
    assert push.push(upload_of(run, "safer"), api=hub) == "https://huggingface.co/me/safer"
    assert hub.commits[0]["repo"] == "me/safer"
    assert b'hf_hub_download("me/safer", "patch.safetensors")' in hub.commits[0]["files"]["README.md"]


def test_a_repository_that_is_there_is_added_to_only_when_told(run: Path) -> None:
    hub = Hub(there=True)
    with pytest.raises(InputError, match="is there already"):
        push.push(upload_of(run), api=hub)
    with pytest.raises(InputError, match="me/safer is public"):
        push.push(upload_of(run), private=True, force=True, api=hub)
    assert hub.commits == []
    push.push(upload_of(run), force=True, api=hub)
    hub.private = True
    push.push(upload_of(run), private=True, force=True, api=hub)
    assert len(hub.commits) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no token"), "not logged in"),
        (refusal(401), "doesn't accept the token"),
        (refusal(403), "may not write to me/safer"),
        (refusal(500), "refused the upload"),
        (ConnectionError("no route"), "could not be reached"),
    ],
)
def test_what_the_hub_refuses_is_said(run: Path, error: Exception, message: str) -> None:
    hub = Hub(fails=error)
    with pytest.raises(PKEError, match=message):
        push.push(upload_of(run), api=hub)
    assert hub.commits == []


def test_the_real_client_says_the_same(run: Path, monkeypatch: Any) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PKEError, match="HF_HUB_OFFLINE is set"):
        push.push(upload_of(run), api=huggingface_hub.HfApi(token="hf_x"))
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(PKEError, match="not logged in"):
        push.push(upload_of(run), api=huggingface_hub.HfApi())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(PKEError, match="could not be reached"):  # nothing listens on port 9
        push.push(upload_of(run), api=huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="hf_x"))
