"""How does a GGUF become a folder that vLLM loads? `python gguf2hf.py FILE.gguf FOLDER`.

Convert a llama- or qwen2-architecture GGUF into a Hugging Face folder: bf16 safetensors, tokenizer.json, chat template.
Needs only gguf, numpy, safetensors, tokenizers and ml_dtypes: no torch, no hub. Runs in `.venv-vllm`, which has them.

By the authors of this project; Apache-2.0. The weights keep their own licence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
WHOLE = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
PER_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# How Qwen2 cuts text into words, from its published tokenizer.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL, _ADDED = 3, 4  # kinds of tokens in a GGUF

Fields = dict[str, Any]


def convert(source: Path, folder: Path) -> None:
    """Write the folder. Raises ValueError for an architecture or a tokenizer that it does not know."""
    reader = GGUFReader(source)
    fields: Fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture}")
    folder.mkdir(parents=True, exist_ok=True)
    tied = _write_weights(reader, fields, folder / "model.safetensors")
    settings = _settings(fields, tied=tied)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_settings(fields, settings), indent=1))
    ends = [settings["eos_token_id"]]
    if architecture == "qwen2":
        ends.append(fields["tokenizer.ggml.padding_token_id"])
    generation = {"bos_token_id": settings["bos_token_id"], "eos_token_id": ends}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _write_weights(reader: GGUFReader, fields: Fields, path: Path) -> bool:
    """Write all tensors as bf16. Whether the output shares its matrix with the embeddings."""
    architecture = fields["general.architecture"]
    heads = {
        "attn_q": fields[f"{architecture}.attention.head_count"],
        "attn_k": fields[f"{architecture}.attention.head_count_kv"],
    }
    weights: dict[str, Any] = {}
    for tensor in reader.tensors:
        name, _, suffix = tensor.name.rpartition(".")
        values = dequantize(tensor.data, tensor.tensor_type)
        if name == "rope_freqs":
            continue
        if name in WHOLE:
            target = WHOLE[name]
        else:
            _, layer, part = name.split(".", 2)
            if architecture == "llama" and part in heads:
                values = _unpermuted(values, heads[part])
            target = f"model.layers.{layer}.{PER_LAYER[part]}.{suffix}"
        weights[target] = np.ascontiguousarray(values).astype(ml_dtypes.bfloat16)
    tied = "lm_head.weight" not in weights
    if not tied and architecture == "qwen2":
        tied = _tie(weights)
    save_file(weights, path, metadata={"format": "pt"})
    return tied


def _unpermuted(values: Any, heads: int) -> Any:
    """Undo how llama.cpp interleaves the rows of q and k for its rotary embedding; qwen2's are stored as they are."""
    return (
        values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def _tie(weights: dict[str, Any]) -> bool:
    """Small Qwen2.5 models share the two matrices; their GGUF has a second copy, in a finer quantisation: keep that."""
    output, embeddings = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    if output.shape != embeddings.shape:
        return False
    sample = output[:2000].astype(np.float32)
    difference = np.abs(sample - embeddings[:2000].astype(np.float32)).mean()
    if difference >= 0.2 * np.abs(sample).mean():
        return False
    weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
    return True


def _settings(fields: Fields, *, tied: bool) -> Fields:
    architecture = fields["general.architecture"]

    def of(name: str) -> Any:
        return fields[f"{architecture}.{name}"]

    settings: Fields = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(np.float32(of("attention.layer_norm_rms_epsilon"))),
        "rope_theta": fields.get(f"{architecture}.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
    if architecture == "llama":
        settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    return settings


def _tokenizer(fields: Fields) -> Tokenizer:
    words = fields["tokenizer.ggml.pre"]
    if fields["tokenizer.ggml.model"] != "gpt2" or words not in {"smollm", "qwen2"}:
        raise ValueError(f"unknown tokenizer {fields['tokenizer.ggml.model']}/{words}")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    if words == "smollm":
        splits = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    else:
        tokenizer.normalizer = normalizers.NFC()
        splits = [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, fields["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in kinds if kind == _SPECIAL]
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, kind in kinds if kind == _ADDED])
    return tokenizer


def _tokenizer_settings(fields: Fields, settings: Fields) -> Fields:
    tokens = fields["tokenizer.ggml.tokens"]
    told: Fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[settings["bos_token_id"]],
        "eos_token": tokens[settings["eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "model_max_length": settings["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    if "tokenizer.ggml.unknown_token_id" in fields:
        told["unk_token"] = tokens[fields["tokenizer.ggml.unknown_token_id"]]
    return told


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
