"""
Checks an exported folder in a process that cannot import nanochat, against results that the tests computed before.

    python tests/hf_checks.py FOLDER REFERENCE.pt      # prints a JSON object: check → number

A number is a largest difference of logits or gradients, or how many tokens differ: small is good. That of bfloat16 is a
ratio.
"""

import json
import os
import sys
import tempfile

sys.modules["nanochat"] = None  # importing it raises

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: E402

CACHE = "cache" if hasattr(transformers.modeling_outputs.CausalLMOutputWithPast, "cache") else "past_key_values"


class Checks:
    """Each public method is a check: it returns its number, or several by name."""

    def __init__(self, folder, reference):
        self.folder = folder
        self.reference = torch.load(reference, weights_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.model = self.load(attn_implementation="sdpa")
        self.is_native = "NanoChatForCausalLM" in dir(transformers) and type(self.model).__module__.startswith(
            "transformers."
        )

    def load(self, **options):
        return AutoModelForCausalLM.from_pretrained(self.folder, trust_remote_code=True, **options).eval()

    def logits(self, model, ids, **options):
        with torch.no_grad():
            return model(torch.as_tensor(ids), **options).logits

    def difference(self, model, **options):
        """The largest difference to our logits."""
        return (self.logits(model, self.reference["ids"], **options) - self.reference["logits"]).abs().max().item()

    def greedy(self, num_tokens, **options):
        config = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "disable_compile": True}
        return GenerationConfig(**config | options, max_new_tokens=num_tokens)

    # ---- checks ----

    def logits_of_each_attention(self):
        return {name: self.difference(self.load(attn_implementation=name)) for name in ("eager", "sdpa")}

    def greedy_tokens_of_each_cache(self):
        wrong = {}
        for cache in ("dynamic", "static"):
            wrong[cache] = 0
            for prompt, expected in zip(self.reference["prompts"], self.reference["completions"], strict=True):
                config = self.greedy(len(expected), cache_implementation=cache)
                found = self.model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
                wrong[cache] += different(found.tolist(), expected)
        return wrong

    def pipeline(self):
        """The number of characters that differ from the text of our greedy tokens."""
        pipe = transformers.pipeline("text-generation", model=self.model, tokenizer=self.tokenizer)
        expected = self.reference["completions"][0]
        result = pipe(
            self.tokenizer.decode(self.reference["prompts"][0]),
            return_full_text=False,
            generation_config=self.greedy(len(expected)),
        )
        return different(result[0]["generated_text"], self.tokenizer.decode(expected, skip_special_tokens=True))

    def chat_pipeline(self):
        """0 if a conversation is answered by one message of the assistant."""
        pipe = transformers.pipeline("text-generation", model=self.model, tokenizer=self.tokenizer)
        result = pipe([{"role": "user", "content": "Hello"}], max_new_tokens=4)
        roles = [message["role"] for message in result[0]["generated_text"]]
        return int(roles != ["user", "assistant"])

    def left_padded_batch(self):
        texts = [self.tokenizer.decode(prompt) for prompt in self.reference["prompts"]]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True)
        expected = [completion[:50] for completion in self.reference["completions"]]
        found = self.model.generate(**batch, generation_config=self.greedy(50))
        rows = found[:, batch["input_ids"].size(1) :].tolist()
        wrong = sum(different(row, completion) for row, completion in zip(rows, expected, strict=True))
        # Without position_ids, a plain forward pass has to derive them from the mask.
        logits = self.logits(self.model, batch["input_ids"], attention_mask=batch["attention_mask"])
        largest = 0.0
        for row, prompt in zip(logits, self.reference["prompts"], strict=True):
            alone = self.logits(self.model, [prompt])[0]
            largest = max(largest, (row[-len(prompt) :] - alone).abs().max().item())
        return {"tokens": wrong, "logits": largest}

    def packed_rows(self):
        prompts = self.reference["prompts"]
        row = torch.tensor([[token for prompt in prompts for token in prompt]])
        positions = torch.tensor([[i for prompt in prompts for i in range(len(prompt))]])
        separate = torch.cat([self.logits(self.model, [prompt])[0] for prompt in prompts])
        packed = self.logits(self.model, row, position_ids=positions, use_cache=False)[0]
        return (packed - separate).abs().max().item()

    def beam_search(self):
        """Beam search with a cache must find what it finds without."""
        prompt = torch.tensor([self.reference["prompts"][0]] * 2)
        found = [
            self.model.generate(prompt, generation_config=self.greedy(20, num_beams=3, use_cache=use_cache))
            for use_cache in (True, False)
        ]
        return different(found[0].flatten().tolist(), found[1].flatten().tolist())

    def cache_in_pieces(self):
        """Logits of a row that is passed in pieces, with a part of the cache cut off in between."""
        ids = self.reference["ids"][:1, :100]
        with torch.no_grad():
            first = self.model(ids[:, :60], use_cache=True)
            first[CACHE].crop(-20)
            second = self.model(ids[:, 40:99], **{CACHE: first[CACHE]})
            third = self.model(ids[:, 99:], **{CACHE: second[CACHE]})
        found = torch.cat([first.logits[:, :40], second.logits, third.logits], dim=1)
        return (found - self.reference["logits"][:1, :100]).abs().max().item()

    def gradient_checkpointing(self):
        ids = self.reference["ids"][:, :30]
        gradients = []
        for checkpointing in (False, True):
            model = self.load().train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            loss = model(ids, labels=ids).loss
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        reference = torch.nn.functional.cross_entropy(
            self.reference["logits"][:, :29].flatten(0, 1), ids[:, 1:].flatten()
        )
        return {
            "gradients": (gradients[0] - gradients[1]).abs().max().item(),
            "loss": abs(loss.item() - reference.item()),
        }

    def compile(self):
        """The whole forward pass is one graph. The backend "eager" runs it without compiling kernels."""
        return self.difference(torch.compile(self.model, backend="eager", fullgraph=True), use_cache=False)

    def saved_again(self):
        """transformers saves the model with its code, and the copy computes the same."""
        with tempfile.TemporaryDirectory() as copy:
            self.model.save_pretrained(copy)
            self.tokenizer.save_pretrained(copy)
            again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
            has_code = os.path.exists(f"{copy}/modeling_nanochat.py")
            return {"logits": self.difference(again), "code": int(has_code == self.is_native)}

    def bfloat16(self):
        """The mean difference to our logits in float32, as a multiple of that of our own model in bfloat16."""
        model = self.load(dtype=torch.bfloat16)
        reference = self.reference["logits"]
        error = (self.logits(model, self.reference["ids"]) - reference).abs().mean()
        return (error / (self.reference["logits_bfloat16"] - reference).abs().mean()).item()

    def served_like_vllm(self):
        return served_like_vllm(self)


def different(found, expected):
    """The number of places in which two sequences differ."""
    return abs(len(found) - len(expected)) + sum(a != b for a, b in zip(found, expected, strict=False))


# ---- vLLM's transformers backend ----


class PagedAttention:
    """One layer's attention as vLLM computes it: each request has its own keys and values; tokens come in one row."""

    def __init__(self, model_config, layer):
        self.num_heads = model_config.num_attention_heads
        self.num_kv_heads = model_config.num_key_value_heads
        self.head_dim = model_config.head_dim
        is_sliding = getattr(model_config, "layer_types", None) and model_config.layer_types[layer] != "full_attention"
        self.window = model_config.sliding_window if is_sliding else None
        self.stored = {}  # request → (keys, values)

    def forward(self, query, key, value, spans, scale):
        """query (T, H * D), key and value (T, K * D); spans: (request, number of tokens) in the order of the row."""
        outputs = []
        start = 0
        for request, length in spans:
            rows = slice(start, start + length)
            start += length
            q = query[rows].view(length, self.num_heads, self.head_dim).transpose(0, 1)
            k = key[rows].view(length, self.num_kv_heads, self.head_dim).transpose(0, 1)
            v = value[rows].view(length, self.num_kv_heads, self.head_dim).transpose(0, 1)
            if request in self.stored:
                k = torch.cat([self.stored[request][0], k], dim=1)
                v = torch.cat([self.stored[request][1], v], dim=1)
            self.stored[request] = (k, v)
            places = torch.arange(k.size(1) - length, k.size(1))[:, None] - torch.arange(k.size(1))
            mask = places >= 0 if self.window is None else (places >= 0) & (places < self.window)
            attended = torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True
            )
            outputs.append(attended[0].transpose(0, 1).reshape(length, -1))
        return torch.cat(outputs)


def paged_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """Has the signature of vLLM's attention function; `spans` stands for its global attention metadata."""
    num_tokens = query.shape[-2]
    query, key, value = (x.transpose(1, 2).reshape(num_tokens, -1) for x in (query, key, value))
    spans = attention_instances["spans"]
    return attention_instances[module.layer_idx].forward(query, key, value, spans, scaling), None


def served_like_vllm(checks):
    """
    Serves requests that join and leave, prompts in chunks, together with others that decode. Returns the number of
    greedy tokens that differ from ours, and the largest difference to the logits of whole sequences.
    """
    transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["paged"] = paged_attention
    model = checks.load(attn_implementation="paged")
    instances = {layer: PagedAttention(model.config, layer) for layer in range(model.config.num_hidden_layers)}
    requests = {}
    wrong = 0
    largest = 0.0
    for step in range(80):
        if step % 10 == 0 and step < 10 * len(checks.reference["prompts"]):
            prompt = checks.reference["prompts"][step // 10]
            requests[step // 10] = {"tokens": list(prompt), "done": 0, "prompt": len(prompt)}
        spans, row, positions = [], [], []
        for name, request in requests.items():
            new = request["tokens"][request["done"] :][:16]
            spans.append((name, len(new)))
            row += new
            positions += range(request["done"], request["done"] + len(new))
            request["done"] += len(new)
        if not row:
            break
        instances["spans"] = spans
        with torch.no_grad():
            hidden = model.model(
                input_ids=torch.tensor([row]),
                position_ids=torch.tensor([positions]),
                use_cache=False,
                attention_instances=instances,
                return_dict=False,
            )[0][0]
        end = 0
        for name, length in spans:
            end += length
            request = requests[name]
            if request["done"] < len(request["tokens"]):
                continue  # the rest of the prompt comes in the next steps
            logits = capped(model, model.lm_head(hidden[end - 1]))
            whole = checks.logits(checks.model, [request["tokens"]])[0, -1]
            largest = max(largest, (logits - whole).abs().max().item())
            request["tokens"].append(logits.argmax().item())
        for name in [name for name, request in requests.items() if len(request["tokens"]) == request["prompt"] + 40]:
            finished = requests.pop(name)
            expected = checks.reference["completions"][name][:40]
            wrong += different(finished["tokens"][finished["prompt"] :], expected)
    assert not requests, "a request did not finish"
    return {"tokens": wrong, "logits": largest}


def capped(model, logits):
    cap = model.config.final_logit_softcapping
    return cap * torch.tanh(logits / cap) if cap else logits


def main(folder, reference):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checks = Checks(folder, reference)
    results = {}
    for name in [name for name in vars(Checks) if not name.startswith("_")]:
        if name in ("load", "logits", "difference", "greedy"):
            continue
        found = getattr(checks, name)()
        for part, number in found.items() if isinstance(found, dict) else [("", found)]:
            results[f"{name} {part}".strip()] = number
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
