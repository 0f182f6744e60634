"""Tiny random models of every supported family and a tiny byte-level tokenizer, for tests and benchmarks."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from pke_fast.dtypes import BY_NAME

# transformers' names (`model_type`) of the families that the installed version has: qwen3 came with 4.51.
FAMILIES = tuple(
    family
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "gpt_neox")
    if find_spec(f"transformers.models.{family}")
)

SPECIAL_TOKENS = ("<|end|>", "<|start|>", "<|system|>", "<|pad|>")  # their ids follow those of the 256 bytes
VOCABULARY = 256 + len(SPECIAL_TOKENS)
CONTEXT = 512  # tokens; the longest sequence of every tiny model
HIDDEN_SIZE, LAYERS, NEURONS = 32, 3, 48

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|system|>{% else %}<|start|>{{ message['role'][0] }}:{% endif %}"
    "{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>a:{% endif %}"
)


def tiny_model(family: str, seed: int = 0, dtype: str = "fp32") -> Any:
    """A random causal language model of a family, for `tiny_tokenizer`'s tokens, in eval mode on the CPU.

    d = 32, 3 layers of D = 48 neurons, 4 heads (2 of keys and values where the family groups them), a context of 512
    tokens. The weights are drawn in fp32, large enough that other prompts get other answers, and then rounded to
    `dtype` ("fp32", "bf16" or "fp16"); the global random state isn't touched.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_sizes(family)))
        _fill(model)
    return model.to(BY_NAME[dtype]).eval()


def _sizes(family: str) -> dict[str, Any]:
    """The sizes of a family's tiny model, under the names that its configuration has for them."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 259}
    if family == "gpt2":
        return {
            **tokens,
            "n_embd": HIDDEN_SIZE,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_inner": NEURONS,
            "n_positions": CONTEXT,
        }
    sizes = {
        **tokens,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    }
    if family == "gpt_neox":
        return sizes
    sizes["num_key_value_heads"] = 2
    if family in ("qwen3", "gemma", "gemma2"):
        sizes["head_dim"] = 8
    if family == "gemma2":
        sizes["query_pre_attn_scalar"] = 8
    return sizes


def _fill(model: nn.Module) -> None:
    with torch.no_grad():
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        for parameter in model.parameters():
            if id(parameter) in embeddings:  # small, or a model with tied embeddings repeats its prompt's last token
                parameter.normal_(0.0, 0.1)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
            else:  # norms and biases: moved from where they start, so that one left out shows
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def tiny_tokenizer(chat: bool = True) -> Any:
    """A tokenizer of one token a byte (any text encodes and decodes to itself), with end and pad tokens.

    Args:
        chat: give it a chat template (system and user turns).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|start|>", "<|system|>"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
