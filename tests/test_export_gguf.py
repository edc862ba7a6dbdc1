"""
GGUF export: the file computes what the model computes, in a plain reimplementation of llama.cpp's `apertus` and, if it
is installed, in llama.cpp itself.

    python -m pytest tests/test_export_gguf.py
    pip install llama-cpp-python --no-binary llama-cpp-python    # compiles llama.cpp: 10 minutes on two cores
"""

import itertools
import json
import random
import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import GOLDEN_VOCAB_SIZE, conversation, save_checkpoint, tiny_config, tiny_engine, tiny_gpt

from nanochat.conversation import render_for_completion
from nanochat.export import gguf as gguf_format
from nanochat.gpt import PORTABLE
from nanochat.request import Request
from nanochat.tokenizer import PORTABLE_SPLIT_PATTERN, SPECIAL_TOKENS, Tokenizer
from scripts import base_train, chat_sft, export, primer, tok_train

gguf = pytest.importorskip("gguf")

KNOWN_CHARACTERS = [chr(i) for i in range(0x20000) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
SIZES = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "rope_base": 5000.0, "qk_gain": 1.3}


@pytest.fixture(scope="module")
def tokenizer(golden_tokenizer) -> Tokenizer:
    ranks = {token: i for i, token in enumerate(golden_tokenizer.tokens)}
    return Tokenizer(PORTABLE_SPLIT_PATTERN, ranks)


@pytest.fixture
def model(base_dir, tokenizer):
    """A portable model with random weights, saved as "tiny" of the stage sft."""
    model = tiny_gpt(**PORTABLE | SIZES).eval()
    save_checkpoint(model, "sft", tokenizer=tokenizer)
    return model


def export_to(path, dtype, *argv):
    export.main(["--to", "gguf", "--dtype", dtype, "--out", str(path), *argv])
    return path


# ---- the file, read by the package gguf ----


class Apertus:
    """The architecture `apertus` as llama.cpp computes it (src/models/apertus.cpp), from the tensors of a file."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {}
        for tensor in reader.tensors:
            self.tensors[tensor.name] = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    def __getitem__(self, name):
        return self.fields[f"apertus.{name}"]

    def norm(self, x, name):
        return F.rms_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self["attention.layer_norm_rms_epsilon"])

    def linear(self, x, name):
        return x @ self.tensors[f"{name}.weight"].T

    def rotate(self, x_THD):
        """Rotation of type NEOX: by plus the angle, of channel j and channel j + D/2."""
        T, _, D = x_THD.shape
        angles = torch.arange(T)[:, None] * self["rope.freq_base"] ** (-torch.arange(0, D, 2) / D)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x1, x2 = x_THD.chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)

    def xielu(self, x, layer):
        alpha_p, alpha_n, beta, eps = (
            self.fields[f"xielu.{name}"][layer] for name in ("alpha_p", "alpha_n", "beta", "eps")
        )
        positive = np.log1p(np.exp(alpha_p)) * x * x + beta * x
        negative = (torch.expm1(x.clamp_max(eps)) - x) * (beta + np.log1p(np.exp(alpha_n))) + beta * x
        return torch.where(x > 0, positive, negative)

    def logits(self, idx_T):
        x = self.tensors["token_embd.weight"][idx_T]
        D = self["attention.key_length"]
        for i in range(self["block_count"]):
            y = self.norm(x, f"blk.{i}.attn_norm")
            q, k, v = (self.linear(y, f"blk.{i}.attn_{name}").unflatten(-1, (-1, D)) for name in "qkv")
            q = self.rotate(self.norm(q, f"blk.{i}.attn_q_norm"))
            k = self.rotate(self.norm(k, f"blk.{i}.attn_k_norm"))
            q, k, v = (heads.transpose(0, 1) for heads in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.linear(y.transpose(0, 1).flatten(1), f"blk.{i}.attn_output")
            y = self.xielu(self.linear(self.norm(x, f"blk.{i}.ffn_norm"), f"blk.{i}.ffn_up"), i)
            x = x + self.linear(y, f"blk.{i}.ffn_down")
        return self.linear(self.norm(x, "output_norm"), "output")


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-5), ("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 5e-2)])
def test_exported_tensors_compute_the_logits_of_the_model(model, tmp_path, dtype, tolerance):
    apertus = Apertus(export_to(tmp_path / "model.gguf", dtype))
    idx_T = torch.randint(GOLDEN_VOCAB_SIZE, (48,))
    with torch.no_grad():
        expected_TV = model(idx_T[None])[0]
        actual_TV = apertus.logits(idx_T)
    assert actual_TV.shape == expected_TV.shape
    assert (actual_TV - expected_TV).abs().max() < tolerance * expected_TV.abs().max()
    assert apertus["context_length"] == model.config.sequence_len


def test_exported_tokenizer_has_all_tokens_and_the_chat_template(model, tokenizer, tmp_path):
    fields = Apertus(export_to(tmp_path / "model.gguf", "f16")).fields
    tokens = fields["tokenizer.ggml.tokens"]
    assert tuple(tokens[-len(SPECIAL_TOKENS) :]) == SPECIAL_TOKENS and len(tokens) == tokenizer.vocab_size
    assert tokens[tokenizer.encode(" the")[0]] == "Ġthe"
    assert len(fields["tokenizer.ggml.merges"]) == len(tokenizer.tokens) - 256
    ends = [fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]]
    assert set(ends) == {tokenizer.special("<|assistant_end|>"), tokenizer.bos}
    prompt = render_template(fields["tokenizer.chat_template"], CONVERSATION)
    assert prompt == "".join(
        tokenizer.decode_bytes([i]).decode() for i in render_for_completion(CONVERSATION, tokenizer)
    )


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "42."},
        {"role": "user", "content": "And in words?"},
    ]
}


def render_template(template, conversation):
    jinja2 = pytest.importorskip("jinja2")
    return jinja2.Environment().from_string(template).render(**conversation, add_generation_prompt=True)


def test_modelfile_names_the_file_and_has_a_template(model, tmp_path):
    export_to(tmp_path / "chat/small.gguf", "q8_0")
    text = (tmp_path / "chat/Modelfile").read_text()
    assert text.startswith("FROM ./small.gguf\n") and "PARAMETER num_ctx 64\n" in text
    assert 'PARAMETER stop "<|assistant_end|>"' in text and "{{ .Content }}<|user_end|>" in text


def test_base_model_is_exported_without_chat_template(base_dir, tokenizer, tmp_path):
    save_checkpoint(tiny_gpt(**PORTABLE | SIZES), "base", tokenizer=tokenizer)
    fields = Apertus(export_to(tmp_path / "model.gguf", "f16", "-i", "base")).fields
    assert "tokenizer.chat_template" not in fields
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "Modelfile").read_text()


# ---- what cannot be exported ----


def test_obstacles_name_every_feature_in_the_way(golden_tokenizer, tokenizer):
    full = list(gguf_format.find_obstacles(tiny_config(sequence_len=1024), golden_tokenizer))
    assert full == [
        "value embeds",
        "smear",
        "backout",
        "residual scalars",
        "sliding windows (SSSL)",
        "the logit softcap (15)",
        "the tokenizer's split pattern",
    ]
    assert list(gguf_format.find_obstacles(tiny_config(**PORTABLE), tokenizer)) == []


def test_model_that_cannot_be_expressed_is_one_line_and_writes_nothing(base_dir, golden_tokenizer, tmp_path):
    save_checkpoint(tiny_gpt(), "sft", tokenizer=golden_tokenizer)
    with pytest.raises(SystemExit, match=r"because of value embeds, smear.*base_train --portable") as stopped:
        export_to(tmp_path / "new/model.gguf", "f16")
    assert "\n" not in str(stopped.value) and not (tmp_path / "new").exists()


def test_q8_0_of_uneven_width_names_f16(base_dir, tokenizer, tmp_path):
    save_checkpoint(tiny_gpt(**PORTABLE, n_embd=48), "sft", tokenizer=tokenizer)
    with pytest.raises(SystemExit, match="multiple of 32, this model has 48: use --dtype f16"):
        export_to(tmp_path / "model.gguf", "q8_0")


def test_existing_modelfile_is_refused_and_unchanged(model, tmp_path):
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(SystemExit, match="Modelfile exists"):
        export_to(tmp_path / "model.gguf", "f16")
    assert (tmp_path / "Modelfile").read_text() == "mine" and not (tmp_path / "model.gguf").exists()


# ---- llama.cpp itself ----


@pytest.fixture
def load_llama():
    """A function that loads a file in llama.cpp. Skips the test if llama-cpp-python is not installed."""
    llama_cpp = pytest.importorskip("llama_cpp")

    def load(path):
        full_precision = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # keys and values
        return llama_cpp.Llama(str(path), n_ctx=0, n_threads=1, logits_all=True, verbose=False, **full_precision)

    return load


@pytest.mark.slow
def test_greedy_tokens_of_llama_cpp_are_those_of_the_engine(base_dir, tokenizer, tmp_path, load_llama):
    model = tiny_gpt(**PORTABLE | SIZES, sequence_len=128).eval()
    save_checkpoint(model, "sft", tokenizer=tokenizer)
    llama = load_llama(export_to(tmp_path / "model.gguf", "f32"))
    prompts = torch.randint(GOLDEN_VOCAB_SIZE, (20, 24)).tolist()
    requests = [Request(prompt, max_tokens=64, temperature=0.0) for prompt in prompts]
    expected = [completion.tokens for completion in tiny_engine(model, tokenizer).generate(requests)]
    actual = [greedy(llama, prompt, 64) for prompt in prompts]
    assert all(len(tokens) == 64 for tokens in expected)
    assert actual == expected


def greedy(llama, prompt, max_tokens):
    llama.reset()
    return list(itertools.islice(llama.generate(prompt, temp=0.0, repeat_penalty=1.0), max_tokens))


@pytest.mark.slow
def test_logits_of_llama_cpp_are_those_of_the_model(model, tmp_path, load_llama):
    idx_T = torch.randint(GOLDEN_VOCAB_SIZE, (48,))
    with torch.no_grad():
        expected_TV = model(idx_T[None])[0]
    for dtype, tolerance in (("f32", 1e-5), ("f16", 1e-2), ("bf16", 5e-2), ("q8_0", 1e-1)):
        llama = load_llama(export_to(tmp_path / dtype / "model.gguf", dtype))
        llama.eval(idx_T.tolist())
        actual_TV = torch.from_numpy(llama.scores[: len(idx_T)])
        error = (actual_TV - expected_TV).abs().max() / expected_TV.abs().max()
        assert error < tolerance, (dtype, error)


@pytest.mark.slow
def test_large_activations_do_not_overflow_in_f16(base_dir, tokenizer, tmp_path, load_llama):
    model = tiny_gpt(**PORTABLE | SIZES).eval()
    with torch.no_grad():
        for block in model.transformer.h:  # the same function, with activations up to 10^6
            block.mlp.c_fc.weight *= 2.0**7
            block.mlp.c_proj.weight /= 2.0**14
        expected_V = model(torch.arange(32)[None])[0, -1]
    save_checkpoint(model, "sft", tokenizer=tokenizer)
    llama = load_llama(export_to(tmp_path / "model.gguf", "f16"))
    llama.eval(list(range(32)))
    assert (torch.from_numpy(llama.scores[31]) - expected_V).abs().max() < 1e-2 * expected_V.abs().max()


@pytest.mark.slow
def test_tokenizer_of_llama_cpp_gives_the_same_ids(model, tokenizer, tmp_path, load_llama):
    llama = load_llama(export_to(tmp_path / "model.gguf", "f16"))
    rng = random.Random(0)
    texts = [random_unicode(rng) for _ in range(5000)]
    for text in texts:
        ids = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text), repr(text)


def random_unicode(rng):
    """Up to 40 characters: words, digits, spaces and any character that this Python's Unicode (14 or later) knows."""
    alphabets = ["abc the THE é", "0123456789½²", " \t\n\r\u00a0\u3000", "'sS'll.,!?-_()", KNOWN_CHARACTERS]
    return "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 40)))


@pytest.mark.slow
def test_trained_portable_model_answers_in_llama_cpp(base_dir, tmp_path, monkeypatch, load_llama):
    """The primer's text, a small portable model, fine-tuning on one question: all stages by their command lines."""
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "primer"))
    primer.main(["--data-dir", str(tmp_path / "primer")])
    tok_train.main(["--portable", "--vocab-size", "600", "--max-chars", "300000"])
    machine = ["--device", "cpu", "--no-compile", "--eval-every", "-1", "--total-batch-size", "1024"]
    sizes = ["--depth", "2", "--head-dim", "64", "--max-seq-len", "128", "--num-iterations", "20"]
    base_train.main(["--portable", *sizes, *machine, "--sample-every", "-1"])
    messages = conversation("What is the capital of France?", "The capital of France is Paris.")["messages"]
    (tmp_path / "capital.jsonl").write_text(f"{json.dumps(messages)}\n" * 100)
    off = [f"--{name}-epochs=0" for name in ("smoltalk", "mmlu", "gsm8k", "simplespelling", "spellingbee")]
    own = ["--identity-file", str(tmp_path / "capital.jsonl"), "--identity-epochs", "50"]
    chat_sft.main([*off, *own, *machine, "--num-iterations", "30"])

    llama = load_llama(export_to(tmp_path / "model.gguf", "f16"))
    reply = llama.create_chat_completion([messages[0]], temperature=0.0, max_tokens=32)
    assert reply["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert reply["choices"][0]["finish_reason"] == "stop"
