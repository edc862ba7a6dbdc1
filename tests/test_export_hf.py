"""
The Hugging Face format: a classic model through transformers' own class, its tokenizer and chat template.

    python -m pytest tests/test_export_hf.py
"""

import json
import random

import pytest
import torch
from conftest import golden
from factories import save_checkpoint, tiny_gpt

from nanochat.legacy import VINTAGES
from scripts import export

transformers = pytest.importorskip("transformers")

TEXTS = ["", " ", "Hello, world!\n", "it's 1234567 o'clock\r\n\r\n  now", "日本語 и кириллица 😀 e\u0301", "<|bos|"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, golden_tokenizer):
    """(our model, folder) of a classic fine-tuned model."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        model = tiny_gpt(**VINTAGES["classic"])
        save_checkpoint(model, "sft", tokenizer=golden_tokenizer)
        export.main(["--out", str(folder / "hf")])
    return model.eval(), folder / "hf"


def random_texts(count):
    """Texts of characters from all of Unicode, mixed with ASCII."""
    rng = random.Random(0)
    for _ in range(count):
        codes = [rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000))) for _ in range(20)]
        yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def test_classic_model_is_the_native_class_with_equal_logits(exported):
    model, folder = exported
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(hf_model) is transformers.NanoChatForCausalLM
    ids = torch.randint(0, 1024, (2, 40))
    with torch.no_grad():
        assert torch.allclose(hf_model(ids).logits, model(ids), atol=1e-4)


def test_tokenizer_gives_the_same_ids(exported, golden_tokenizer):
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(exported[1])
    for text in [*TEXTS, *random_texts(200)]:
        assert hf_tokenizer(text)["input_ids"] == golden_tokenizer.encode(text)
        assert hf_tokenizer.decode(golden_tokenizer.encode(text)) == text


def test_chat_template_gives_ids_and_mask_of_the_golden_conversations(exported):
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(exported[1])
    for case in json.loads(golden("conversations/cases.json").read_text()):
        messages = case["conversation"]["messages"]
        result = hf_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert result["input_ids"][: case["max_tokens"]] == case["ids"]
        assert result["assistant_masks"][: case["max_tokens"]] == case["mask"]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        prompt = hf_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt["input_ids"] == case["completion_ids"]
