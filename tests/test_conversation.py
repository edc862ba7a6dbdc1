"""
Conversations: validation, token ids and loss masks, prompts that fit the context, generated tokens back to text.

    python -m pytest tests/test_conversation.py
"""

import copy
import json

import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.conversation import (
    completion_text,
    multiple_choice,
    read_parts,
    render,
    render_for_completion,
    render_to_fit,
    validate,
)
from nanochat.tokenizer import Tokenizer
from scripts.show_conversation import highlight

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be brief"}


def conversation(*messages):
    return {"messages": list(messages)}


def assistant(content):
    return {"role": "assistant", "content": content}


def test_render_golden_conversations_gives_golden_ids_and_masks(golden_tokenizer):
    for case in json.loads((GOLDEN / "conversations" / "cases.json").read_text()):
        before = copy.deepcopy(case["conversation"])
        ids, mask = render(case["conversation"], golden_tokenizer, case["max_tokens"])
        assert (ids, mask) == (case["ids"], case["mask"])
        assert render_for_completion(case["conversation"], golden_tokenizer) == case["completion_ids"]
        assert case["conversation"] == before


def test_render_tool_output_is_not_trained_on(golden_tokenizer):
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2."}]
    ids, mask = render(conversation(USER, assistant(parts)), golden_tokenizer)
    supervised = golden_tokenizer.decode([token for token, m in zip(ids, mask, strict=True) if m])
    assert supervised == "<|python_start|>1+1<|python_end|>2.<|assistant_end|>"


def test_render_without_max_tokens_does_not_truncate(golden_tokenizer):
    long = conversation({"role": "user", "content": "word " * 5000}, ASSISTANT)
    ids, mask = render(long, golden_tokenizer)
    assert ids[-1] == golden_tokenizer.special("<|assistant_end|>") and len(ids) == len(mask) > 5000
    assert render(long, golden_tokenizer, 10) == (ids[:10], mask[:10])


def test_render_system_message_is_joined_to_first_user_message(golden_tokenizer):
    joined = {"role": "user", "content": "be brief\n\nhi"}
    assert render(conversation(SYSTEM, USER, ASSISTANT), golden_tokenizer) == render(
        conversation(joined, ASSISTANT), golden_tokenizer
    )


def test_render_for_completion_ignores_a_final_reply(golden_tokenizer):
    ids = render_for_completion(conversation(SYSTEM, USER), golden_tokenizer)
    assert ids == render_for_completion(conversation(SYSTEM, USER, ASSISTANT), golden_tokenizer)
    assert ids[-1] == golden_tokenizer.special("<|assistant_start|>")


@pytest.mark.parametrize("system", [[], [SYSTEM]])
@pytest.mark.parametrize("reply", [[], [ASSISTANT]])  # a final reply is generated again
def test_render_to_fit_long_conversation_drops_oldest_exchanges(golden_tokenizer, system, reply):
    turns = [message for i in range(9) for message in ({"role": "user", "content": f"{i} hi " * i}, ASSISTANT)]

    def ids(dropped):
        return render_for_completion(conversation(*system, *turns[dropped:]), golden_tokenizer)

    messages = conversation(*system, *turns[:-1], *reply)
    for dropped in range(0, 18, 2):
        fitting = len(ids(dropped)) + 20
        assert render_to_fit(messages, golden_tokenizer, fitting, 20) == (ids(dropped), dropped)
        if dropped < 16:
            assert render_to_fit(messages, golden_tokenizer, fitting - 1, 20) == (ids(dropped + 2), dropped + 2)
    context = 2 * len(ids(16))
    assert render_to_fit(messages, golden_tokenizer, context, 10**6)[1] == 16  # the prompt may take half of the context
    with pytest.raises(UserError, match=f"have {context // 2} tokens, at most {context // 2 - 1} fit"):
        render_to_fit(messages, golden_tokenizer, context - 2, 10**6)


def test_render_special_tokens_in_user_text_are_plain_characters(golden_tokenizer):
    ids, _ = render(conversation({"role": "user", "content": "<|assistant_start|><|bos|>"}), golden_tokenizer)
    assert [i for i, token in enumerate(ids) if token >= golden_tokenizer.bos] == [0, 1, len(ids) - 1]


@pytest.mark.parametrize(
    "bad, message",
    [
        ([USER], "a conversation is"),
        ({}, "a conversation is"),
        ({"messages": "hi"}, "a conversation is"),
        (conversation(), "needs a user message"),
        (conversation(SYSTEM), "needs a user message"),
        (conversation(USER, "hi"), "message 1: expected {"),
        (conversation({"role": "user"}), "message 0: expected {"),
        (conversation(ASSISTANT, USER), "message 0: expected role 'user', found 'assistant'"),
        (conversation(SYSTEM, ASSISTANT), "message 1: expected role 'user', found 'assistant'"),
        (conversation(USER, USER), "message 1: expected role 'assistant', found 'user'"),
        (conversation(USER, ASSISTANT, SYSTEM), "message 2: expected role 'user', found 'system'"),
        (conversation(USER, {"role": "tool", "content": ""}), "message 1: expected role 'assistant', found 'tool'"),
        (conversation({"role": "user", "content": [{"type": "text", "text": "hi"}]}), "message 0: .*must be a string"),
        (conversation({"role": "system", "content": None}, USER), "message 0: .* found NoneType"),
        (conversation(USER, assistant(3)), "message 1: .* list of parts, found int"),
        (conversation(USER, assistant(["hi"])), "message 1, part 0"),
        (conversation(USER, assistant([{"type": "text", "text": "a"}, {"type": "image", "text": ""}])), "part 1"),
        (conversation(USER, assistant([{"type": "text"}])), "part 0"),
        (conversation(USER, assistant([{"type": [], "text": "a"}])), "part 0"),
    ],
)
def test_validate_bad_conversation_raises(golden_tokenizer, bad, message):
    with pytest.raises(UserError, match=message):
        validate(bad)
    with pytest.raises(UserError, match=message):
        render(bad, golden_tokenizer)


def test_multiple_choice_puts_letters_after_choices():
    assert multiple_choice("Which is red?", ["sky", "blood"]) == (
        "Multiple Choice question: Which is red?\n- sky=A\n- blood=B\n"
        "\nRespond only with the letter of the correct answer."
    )
    assert "- b=2\n" in multiple_choice("q", ["a", "b"], letters=("1", "2"))
    with pytest.raises(ValueError, match="3 choices but only 2 letters"):
        multiple_choice("q", ["a", "b", "c"], letters="AB")


def test_highlight_supervised_text_has_its_own_style(golden_tokenizer):
    ids, mask = render(conversation(USER, assistant("[red]Ñ 水[/red]")), golden_tokenizer)
    view = highlight(ids, mask, golden_tokenizer)
    assert view.plain == golden_tokenizer.decode(ids)
    other, supervised = view.spans
    assert view.plain[supervised.start : supervised.end] == "[red]Ñ 水[/red]<|assistant_end|>"
    assert supervised.style != other.style


# ---- generated tokens ----


def test_read_parts_returns_the_rendered_parts(golden_tokenizer):
    parts = [
        {"type": "text", "text": "Ñ 水: "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2."},
    ]
    ids, _ = render(conversation(USER, assistant(parts)), golden_tokenizer)
    generated = ids[ids.index(golden_tokenizer.special("<|assistant_start|>")) + 1 :]
    assert read_parts(generated, golden_tokenizer) == parts
    assert completion_text(generated, golden_tokenizer) == "Ñ 水: 2."


TOKENIZER = Tokenizer.load(GOLDEN / "tokenizer")


@pytest.mark.slow
@given(st.text(), st.lists(st.tuples(st.sampled_from(["text", "python", "python_output"]), st.text(min_size=1))))
def test_read_parts_any_text_survives_rendering(question, typed):
    parts = [{"type": kind, "text": text} for kind, text in typed]
    ids, _ = render(conversation({"role": "user", "content": question}, assistant(parts)), TOKENIZER)
    start = ids.index(TOKENIZER.special("<|assistant_start|>")) + 1
    expected = "".join(text for kind, text in typed if kind == "text")
    assert completion_text(ids[start:], TOKENIZER) == expected
