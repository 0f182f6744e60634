"""Settings: presets, YAML, --set, and a clear word about every bad one."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from pke_fast.config import CONFIGS, PRESETS, PKEConfig, load_config
from pke_fast.errors import InputError


def test_settings_win_in_order(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 5e-4\nk: 10\nwindow: [2, 4]\n")  # PyYAML reads 5e-4 as a string
    config = load_config(path, ["k=20", "norm_constraint=0.5", "exclude=['3:17']"])
    assert (config.lr, config.k, config.window, config.norm_constraint) == (5e-4, 20, (2, 4), 0.5)
    assert config.exclude == ("3:17",)
    assert config.num_steps == PKEConfig().num_steps


def test_text_needs_no_quotes():
    for text in ("Sorry: no", "2024-13-45", "[no", "12", "I'm sorry"):
        assert load_config(overrides=[f"refusal={text}"]).refusal == text
    assert load_config(overrides=["refusal='I do not'"]).refusal == "I do not"
    assert load_config(overrides=["system_prompt="]).system_prompt == ""


def test_projections_are_in_one_order():
    assert PKEConfig().projections == ("gate", "up", "down")
    assert load_config(overrides=["projections=[down, gate, down]"]).projections == ("gate", "down")
    assert load_config(overrides=["detectors=false"]).detectors is False


@pytest.mark.parametrize("method", ["dinm", "dinm-parity"])
def test_methods_come_with_their_settings(method):
    config = PKEConfig.preset(method)
    assert (config.method, config.num_steps, config.lr, config.w_edit, config.w_kl) == (method, 10, 5e-4, 0.1, 1.0)
    assert load_config(overrides=[f"method={method}", "lr=1e-5"]).lr == 1e-5
    assert config.edited == ("down",)
    assert config.companions == 0
    assert PKEConfig.preset("pke") == PKEConfig()


def test_presets_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PRESETS == ("dinm", "dinm-parity", "pke", "pke-fast-draft")
    draft = load_config("pke-fast-draft", ["k=20"])
    assert (draft.method, draft.k) == ("pke", 20)
    assert draft.num_steps < PKEConfig().num_steps
    assert draft.shipped_pairs < PKEConfig().shipped_pairs
    assert load_config("dinm") == PKEConfig.preset("dinm") == load_config(overrides=["method=dinm"])
    with pytest.raises(InputError, match="a preset: dinm, dinm-parity, pke, pke-fast-draft"):
        load_config("pke-draft")
    with pytest.raises(InputError, match="no preset 'pke-draft'"):
        PKEConfig.preset("pke-draft")


def test_the_preset_to_copy_from_has_every_setting():
    settings = yaml.safe_load((CONFIGS / "pke.yaml").read_text())
    assert set(settings) == {field.name for field in dataclasses.fields(PKEConfig)}
    assert PKEConfig(**settings) == PKEConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("k=0", "setting k can't be 0"),
        ("k=-3", "setting k can't be -3"),
        ("k=1.5", "a whole number"),
        ("k=many", "a whole number"),
        ("k=1" + "0" * 400, "a whole number"),
        ("lr=1" + "0" * 400, "a number"),
        ("lr=fast", "a number"),
        ("lr=.nan", "a finite number"),
        ("w_kl=-1", "0 or more"),
        ("method=pki", "one of pke, dinm, dinm-parity"),
        ("window=[3, 1]", r"\[first, last \+ 1\]"),
        ("window=3", "two numbers"),
        ("window=[0.5, 1.5]", "shares of the depth"),
        ("exclude=[12]", '"layer:neuron"'),
        ("per_layer_cap=0", "at least 1"),
        ("norm_constraint=0", "above 0"),
        ("refusal=' '", "some text"),
        ("projections=[]", "one or more of gate, up, down"),
        ("projections=[gate, side]", "one or more of gate, up, down"),
        ("projections=[[gate]]", "one or more of gate, up, down"),
        ("projections=down", "one or more of gate, up, down"),
        ("detectors=1", "true or false"),
        ("detectors=maybe", "true or false"),
        ("companions=-1", "0 or more"),
        ("companions=many", "a whole number"),
        ("shipped_pairs=0", "at least 1"),
        ("score_requests=0", "at least 1"),
        ("score_pairs=0", "at least 1"),
        ("framed=1.5", "a share from 0 to 1"),
        ("framed=-0.1", "a share from 0 to 1"),
        ("framed=.nan", "a share from 0 to 1"),
        ("k=2024-13-45", "not YAML"),
        ("num_step=3", "did you mean 'num_steps'"),
        ("k", "key=value"),
        ("k=[", "not YAML"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(InputError, match=message):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "can't read settings"), (b"- 1\n", "name: value"), (b"a: [", "not YAML"), (b"\xff", "not YAML")],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_config(path)


def test_the_window_is_in_layers_or_in_shares_of_the_depth():
    assert PKEConfig(window=(0.5, 1.0)).layer_window(30) == (15, 30)
    assert PKEConfig(window=(0.9, 1.0)).layer_window(32) == (28, 32)
    assert PKEConfig(window=(0, 1)).layer_window(30) == (0, 1)
    assert PKEConfig(window=(0.0, 1.0)).layer_window(30) == (0, 30)
    with pytest.raises(InputError, match="layers between 0 and 30"):
        PKEConfig(window=(10, 31)).layer_window(30)


def test_replace_checks_too():
    with pytest.raises(InputError, match="setting k"):
        PKEConfig().replace(k=0)
    with pytest.raises(InputError, match="unknown setting"):
        PKEConfig().replace(kk=1)
