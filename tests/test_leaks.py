"""
No result of a token depends on a later token: attention kernels, models, packed rows and their targets, KV caches.

A leak makes the loss too low, and generated text bad. It is easily missed, because training looks better than ever. So
each part is tested by `find_leaks`, and each test also plants a mistake in the part, which `find_leaks` has to report.

    python -m pytest tests/test_leaks.py
    TRITON_INTERPRET=1 python -m pytest tests/test_leaks.py     # the fused MLP too, if the package triton is installed

Shapes: B rows of a batch, T tokens, S inputs that are changed one at a time (one per row), E numbers per input, F per
output, C channels, V vocabulary.
"""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import CPU, FAMILY, NEEDS_NUMBERS, tiny_engine, tiny_gpt
from test_attention import StandIn, stand_in  # noqa: F401  a fixture
from test_dataloader import NumberTokenizer, pretrain_loader, random_row_groups
from test_fp8 import emulated_product
from test_mlp import DEVICE, DTYPES, runs_kernel
from torch.nn.attention import flex_attention

from nanochat import attention, dataloader, fp8, gpt, loss, slot_attention
from nanochat.attention import LOADERS, AttentionShape
from nanochat.common import UserError
from nanochat.conversation import render, turns
from nanochat.dataloader import ConversationLoader, StreamsLoader
from nanochat.distributed import Dist
from nanochat.eval.core import PrefixSharingCache, TreeBatch, build_prefix_trees, scored_states
from nanochat.eval.core_tasks import ScoredPrompt
from nanochat.gpt import GPT, Block
from nanochat.kernels import band_mask, cpu, flash, mlp
from nanochat.muon import build_optimizer
from nanochat.prefill import EMPTY, Prefill
from nanochat.recipe import param_groups
from nanochat.request import ActiveRequest, Request
from nanochat.rollout import Rollout, pack_micro_batches
from nanochat.slot_attention import SlotCache
from nanochat.step_forward import StepForward
from nanochat.tokenizer import SPECIAL_TOKENS

T = 24  # tokens of the models here, whose short windows are 8


# ---- the checker ----


def no_later_one(t, s):
    return s <= t


def find_leaks(compute, inputs_TE, *, may_see=no_later_one, positions=None):
    """
    The pairs (t, s) for which output t depends on input s although may_see(t, s) is false.

    compute is a function of a batch of rows, (B, T, E) → (B, T, F); token ids are (B, T). Two methods, which do not use
    the code that is tested:
    - Changes: each row has another one of its inputs changed. Outputs that may not depend on it must keep every bit.
      They are compared with those of a batch of equal rows without the change, as rounding may differ between shapes
      and between the rows of a batch. A dependence on other rows shows as well, because their changes are elsewhere.
    - Gradients, for inputs that have one: in each row, that of another output must be exactly 0 at the other inputs.
      This also finds a leak that only the backward pass of a kernel has.

    positions: inputs to change, and outputs to differentiate; default: all.
    """
    positions = list(range(len(inputs_TE))) if positions is None else list(positions)
    pairs = pairs_by_changes(compute, inputs_TE, positions)
    if inputs_TE.is_floating_point():
        pairs |= pairs_by_gradients(compute, inputs_TE, positions)
    return sorted((t, s) for t, s in pairs if not may_see(t, s))


def pairs_by_changes(compute, inputs_TE, positions):
    inputs = torch.stack([inputs_TE] * len(positions))
    changed = inputs.clone()
    changed[range(len(positions)), positions] = other_values(inputs_TE)[positions]
    with torch.no_grad():
        differs_ST = (compute(changed) != compute(inputs)).flatten(2).any(dim=-1)
    assert differs_ST.any(), "no output depends on any input, so nothing can be found"
    return {(t, positions[row]) for row, t in differs_ST.nonzero().tolist()}


def pairs_by_gradients(compute, inputs_TE, positions):
    inputs = torch.stack([inputs_TE] * len(positions)).requires_grad_()
    outputs_SF = compute(inputs)[range(len(positions)), positions]
    weights_SF = torch.randn(outputs_SF.shape, generator=torch.Generator().manual_seed(0)).to(outputs_SF)
    (gradient,) = torch.autograd.grad((outputs_SF * weights_SF).sum(), inputs)
    depends_ST = (gradient != 0).any(dim=-1)
    assert depends_ST.any(), "no output depends on any input, so nothing can be found"
    return {(positions[row], s) for row, s in depends_ST.nonzero().tolist()}


def other_values(inputs_TE):
    """Values that differ from the inputs: random numbers are added to them; of token ids, others below 1,000."""
    if inputs_TE.is_floating_point():
        return inputs_TE + torch.randn(inputs_TE.shape, generator=torch.Generator().manual_seed(0)).to(inputs_TE)
    return (inputs_TE + 500) % 1000


def random_ids(count, seed=0):
    """Token ids below 1,000, as those above are special tokens of the golden tokenizer."""
    return torch.randint(1000, (count,), generator=torch.Generator().manual_seed(seed))


# ---- attention kernels ----

HEADS = (2, 1, 1)  # of queries, keys and values
HEAD_DIM = 64  # kernels for GPUs do not have all sizes
KERNELS = ["banded", "sdpa", "blocks", "flex", "fa3", "fa4"]
BLOCK_EDGES = (0, 1, 8, 9, 127, 128, 129, 136, 158, 159)  # "blocks" has 128 tokens in a block


@pytest.fixture
def load_kernel(monkeypatch, stand_in):  # noqa: F811
    """A function that returns a kernel on the CPU; those for GPUs call stand-ins instead of their packages."""

    def load(name):
        if name in ("fa3", "fa4"):
            stand_in(name)
        if name == "flex":
            monkeypatch.setattr(flex_attention, "flex_attention", dense_attention)
            monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        return LOADERS[name]()

    return load


def dense_attention(q, k, v, block_mask, enable_gqa):
    """FlexAttention without its blocks, as it has no backward pass on a CPU."""
    mask = flex_attention.create_mask(block_mask.mask_mod, None, None, q.size(2), k.size(2), device="cpu")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)


def leaks_of_kernel(kernel, num_tokens, window, positions=None, device=CPU, dtype=torch.float32):
    """Queries, keys and values are the inputs of a token, one after the other."""
    torch.manual_seed(0)
    inputs_TE = torch.randn(num_tokens, sum(HEADS) * HEAD_DIM).to(device, dtype)

    def compute(inputs_BTE):
        q, k, v = inputs_BTE.unflatten(-1, (-1, HEAD_DIM)).split(HEADS, dim=2)
        return kernel(F.rms_norm(q, (HEAD_DIM,)), F.rms_norm(k, (HEAD_DIM,)), v, window).flatten(2)

    return find_leaks(compute, inputs_TE, may_see=lambda t, s: t - window <= s <= t, positions=positions)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("num_tokens, window", [(9, 0), (9, 1), (160, 8), (160, 128), (160, 159), (160, 160)])
def test_kernel_sees_its_window_only(load_kernel, name, num_tokens, window):
    positions = BLOCK_EDGES if num_tokens == 160 else None
    assert leaks_of_kernel(load_kernel(name), num_tokens, window, positions) == []


def plant_in_band_mask(monkeypatch, queries_later, wider):
    def leaking_mask(positions, first_key, stop_key, window):
        return band_mask(positions + queries_later, first_key, stop_key, window + wider)

    monkeypatch.setattr(attention, "band_mask", leaking_mask)
    monkeypatch.setattr(cpu, "band_mask", leaking_mask)


def plant_in_flex(monkeypatch, queries_later, wider):
    create_block_mask = flex_attention.create_block_mask

    def leaking_block_mask(is_visible, *arguments, **options):
        def leaks(b, h, query, key):
            query = query + queries_later
            return is_visible(b, h, query, key) | is_visible(b, h, query - wider, key)

        return create_block_mask(leaks, *arguments, **options)

    monkeypatch.setattr(flex_attention, "create_block_mask", leaking_block_mask)


def plant_in_flash(monkeypatch, queries_later, wider):
    """The stand-in for the package takes the key of the next token; or its wrapper passes another window."""
    forward, left_window = StandIn.forward, flash._left_window

    def next_keys(self, q, k, v, window):
        k, v = (x.roll(-queries_later, 1).contiguous() for x in (k, v))
        return forward(self, q, k, v, window)

    monkeypatch.setattr(StandIn, "forward", next_keys)
    monkeypatch.setattr(flash, "_left_window", lambda q, window, full: left_window(q, window + wider, full))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("queries_later, wider, distance", [(1, 0, 1), (0, 1, -9)])
def test_kernel_with_planted_leak_is_reported(monkeypatch, load_kernel, name, queries_later, wider, distance):
    """A query that sees the key after it; a window of 9 instead of 8."""
    plant = {"flex": plant_in_flex, "fa3": plant_in_flash, "fa4": plant_in_flash}.get(name, plant_in_band_mask)
    plant(monkeypatch, queries_later, wider)
    leaks = leaks_of_kernel(load_kernel(name), 160, 8, BLOCK_EDGES)
    assert distance in {s - t for t, s in leaks}


@pytest.mark.parametrize("name", ["banded", "sdpa"])
def test_kernel_that_is_not_causal_over_a_full_window_is_reported(monkeypatch, load_kernel, name):
    plain_sdpa = attention._plain_sdpa
    monkeypatch.setattr(attention, "_plain_sdpa", lambda q, k, v, mask, is_causal: plain_sdpa(q, k, v, mask, False))
    assert leaks_of_kernel(load_kernel(name), 5, 5) == [(t, s) for t in range(5) for s in range(t + 1, 5)]


def test_kernel_whose_backward_pass_alone_leaks_is_reported(load_kernel):
    kernel = load_kernel("banded")

    def leaking(q, k, v, window):
        wider = kernel(q, k, v, window + 1)
        return kernel(q, k, v, window) + (wider - wider.detach())

    assert {t - s for t, s in leaks_of_kernel(leaking, 12, 3)} == {4}


@NEEDS_NUMBERS
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa3", "fa4", "flash", "flex", "banded", "sdpa"])
def test_kernel_on_a_gpu_sees_its_window_only(name):
    device = torch.device("cuda")
    try:
        _, kernel = attention.choose(name, AttentionShape(256, 2, 1, 64, (128,)), device, torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))

    def with_next_keys(q, k, v, window):
        return kernel(q, k.roll(-1, 1), v.roll(-1, 1), window)

    options = {"positions": BLOCK_EDGES, "device": device, "dtype": torch.bfloat16}
    for window in (8, 160):
        assert leaks_of_kernel(kernel, 160, window, **options) == []
    assert (8, 9) in leaks_of_kernel(with_next_keys, 160, 160, **options)


@runs_kernel
def test_fused_mlp_sees_its_own_token_only():
    from nanochat.kernels import relu2

    (x, w1, w2), _ = mlp.random_inputs(64, 20, DEVICE, DTYPES[0])

    def same_token(t, s):
        return t == s

    assert find_leaks(lambda x: relu2.mlp(x, w1, w2), x, may_see=same_token) == []
    assert find_leaks(lambda x: relu2.mlp(x.roll(-1, 1), w1, w2), x, may_see=same_token)


# ---- the model ----


@pytest.fixture
def short_windows(monkeypatch):
    """Models with a context of 24 tokens have short windows of 8 instead of 24."""
    monkeypatch.setattr(gpt, "SHORT_WINDOW_MULTIPLE", 8)


def make_model(member="modern", pattern="SSL", **changes):
    sizes = {"sequence_len": T, "n_layer": 3}
    model = tiny_gpt(**sizes | FAMILY[member] | {"window_pattern": pattern} | changes)
    assert model.config.windows[0] == (8 if pattern[0] == "S" else T)
    return model


def from_embeddings(model, ids_T, targets_T=None):
    """
    The embeddings of the tokens in all tables of the model, side by side, (T, E); and the function from batches of them
    to the logits, or with targets to the losses.
    """
    tables = [model.transformer.wte, *model.value_embeds.values()]
    widths = [table.embedding_dim for table in tables]

    def compute(inputs_BTE):
        parts = dict(zip(tables, inputs_BTE.split(widths, dim=-1), strict=True))
        hooks = [table.register_forward_hook(lambda table, *_: parts[table]) for table in tables]
        ids_BT = ids_T.expand(len(inputs_BTE), -1)
        try:
            if targets_T is None:
                return model(ids_BT)
            return model(ids_BT, targets_T.expand_as(ids_BT), reduction="none").unsqueeze(-1)
        finally:
            for hook in hooks:
                hook.remove()

    return torch.cat([table(ids_T).detach() for table in tables], dim=-1), compute


def leaks_of_model(model):
    inputs_TE, compute = from_embeddings(model, random_ids(T))
    return find_leaks(compute, inputs_TE) + find_leaks(model, random_ids(T))


@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("pattern", ["L", "SL", "SSSL"])
@pytest.mark.parametrize("name", ["banded", "sdpa", "blocks"])
def test_model_sees_no_later_token(short_windows, member, pattern, name):
    model = make_model(member, pattern, n_layer=max(len(pattern), 2))
    model.use_attention(LOADERS[name]())
    assert leaks_of_model(model) == []


GPT_SMEAR, BLOCK_FORWARD = GPT._smear, Block.forward


def smear_of_next_token(self, x_BTC, cache):
    return GPT_SMEAR(self, x_BTC.flip(1), cache).flip(1)


def value_embed_of_next_token(self, x, value_embed, *others):
    return BLOCK_FORWARD(self, x, None if value_embed is None else value_embed.roll(-1, 1), *others)


def norm_over_tokens(x):
    return x / x.square().mean(dim=(1, -1), keepdim=True).sqrt()


PLANTED = [
    (GPT, "_smear", smear_of_next_token),
    (Block, "forward", value_embed_of_next_token),
    (gpt, "norm", norm_over_tokens),
]


@pytest.mark.parametrize("owner, name, leaking", PLANTED)
def test_model_with_planted_leak_is_reported(short_windows, monkeypatch, owner, name, leaking):
    monkeypatch.setattr(owner, name, leaking)
    assert (5, 6) in leaks_of_model(make_model())


@pytest.mark.parametrize("shift, dim", [(-1, 1), (1, 0)])
def test_model_whose_attention_sees_next_tokens_or_other_rows_is_reported(short_windows, shift, dim):
    model = make_model()
    model.use_attention(lambda q, k, v, window: attention.attend(q, k.roll(shift, dim), v.roll(shift, dim), window))
    assert (5, 6) in leaks_of_model(model)


def test_fp8_shares_a_scale_between_tokens_in_training_only(monkeypatch):
    """The one leak that is accepted: the largest number of a tensor sets the scale of all its tokens (fp8.py)."""
    monkeypatch.setattr(fp8, "scaled_product", emulated_product)
    model = make_model(pattern="L", n_layer=1, n_embd=128)
    fp8.use_fp8(model, build_optimizer(model, param_groups(model.config)), compile=False)
    assert leaks_of_model(model.train()) != []
    assert leaks_of_model(model.eval()) == []


# ---- packed rows and their targets ----


def wrong_targets(inputs_BT, targets_BT, followers):
    """
    The (row, position) whose target is not the token that follows the input in its document. followers: the pairs of a
    token and its successor that may be trained on. A target of -1 is not trained on.
    """
    wrong = []
    for row, pairs in enumerate(zip(inputs_BT.tolist(), targets_BT.tolist(), strict=True)):
        for position, pair in enumerate(zip(*pairs, strict=True)):
            if pair[1] != -1 and pair not in followers:
                wrong.append((row, position))
    return wrong


def pairs_of(documents):
    return {pair for document in documents for pair in itertools.pairwise(document)}


def pretraining_steps(num_streams=1):
    """Steps of 4 rows of 2 micro-batches, and the pairs of tokens. The rows may come from several streams."""
    row_groups = random_row_groups(4, 40)
    documents = [[0, *map(int, text.split()), 0] for group in row_groups for text in group]

    def make_stream(number):
        return pretrain_loader(row_groups, 1, 64, rank=number, world_size=num_streams)

    return list(StreamsLoader(make_stream, num_streams, 4, Dist(CPU)).steps(2, 6)), pairs_of(documents)


def wrong_targets_of(steps, followers):
    """Over all micro-batches of the steps. Fails if there are no targets, or if a row does not start with BOS (0)."""
    micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
    assert sum(int((y_BT >= 0).sum()) for _, y_BT, _ in micro_batches) > 500
    assert all((x_BT[:, 0] == 0).all() for x_BT, _, _ in micro_batches)
    return [wrong for x_BT, y_BT, _ in micro_batches for wrong in wrong_targets(x_BT, y_BT, followers)]


@pytest.mark.parametrize("num_streams", [1, 2])
def test_pretraining_targets_are_the_next_tokens(num_streams):
    assert wrong_targets_of(*pretraining_steps(num_streams)) == []


def rows_as_packed(pack, batch_size, sequence_len):
    rows = np.empty((batch_size, sequence_len + 1), dtype=np.int64)
    for row in rows:
        pack(row)
    return torch.from_numpy(rows)


def targets_not_shifted(pack, batch_size, sequence_len):
    rows_BT = rows_as_packed(pack, batch_size, sequence_len)
    return rows_BT[:, :-1], rows_BT[:, :-1]


def targets_shifted_by_two(pack, batch_size, sequence_len):
    rows_BT = rows_as_packed(pack, batch_size, sequence_len)
    return rows_BT[:, :-1], rows_BT[:, 1:].roll(-1, 1)


def last_target_of_another_row(pack, batch_size, sequence_len):
    rows_BT = rows_as_packed(pack, batch_size, sequence_len - 1)
    next_row_BT = rows_as_packed(pack, batch_size, sequence_len - 1)
    return rows_BT, torch.cat([rows_BT[:, 1:], next_row_BT[:, :1]], dim=1)


@pytest.mark.parametrize("leaking", [targets_not_shifted, targets_shifted_by_two, last_target_of_another_row])
def test_pretraining_with_wrong_targets_is_reported(monkeypatch, leaking):
    monkeypatch.setattr(dataloader, "pack_batch", leaking)
    assert wrong_targets_of(*pretraining_steps()) != []


class ChatTokenizer(NumberTokenizer):
    """Texts are token ids already; the special tokens are 0, 1, 2, …"""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def special(self, name):
        return SPECIAL_TOKENS.index(name)


def make_conversations(count):
    """Conversations of one or two turns in which no word occurs twice; some use a tool."""
    generator, numbers = np.random.default_rng(0), itertools.count(100)

    def words(most):
        return " ".join(str(next(numbers)) for _ in range(generator.integers(1, most)))

    conversations = []
    for i in range(count):
        kinds = ("text", "python", "python_output", "text") if i % 3 == 0 else ("text",)
        reply = [{"type": kind, "text": words(8)} for kind in kinds]
        more = (words(10), words(10)) if i % 4 == 0 else ()
        conversations.append({"messages": turns(words(12), reply, *more)})
    return conversations


def chat_steps():
    """Steps of fine-tuning with several conversations in a row, and the pairs of tokens that are trained on."""
    conversations = make_conversations(120)
    loader = ConversationLoader(ChatTokenizer(), conversations, batch_size=4, sequence_len=96, dist=Dist(CPU))
    followers = set()
    for conversation in conversations:
        ids, mask = render(conversation, ChatTokenizer())
        followers |= {pair for pair, trained in zip(itertools.pairwise(ids), mask[1:], strict=True) if trained}
    return list(loader.steps(accumulation=2)), followers


def test_chat_targets_are_the_next_tokens_of_the_assistant():
    steps, followers = chat_steps()
    assert wrong_targets_of(steps, followers) == []
    starts = [(x_BT == 0).sum(dim=1) for step in steps for x_BT, _, _ in step.micro_batches]
    assert torch.cat(starts).max() > 2  # several conversations in a row


@pytest.mark.parametrize("shift_of_targets, shift_of_mask", [(0, 0), (0, 1), (1, 0), (2, 2)])
def test_chat_with_wrong_targets_is_reported(monkeypatch, shift_of_targets, shift_of_mask):
    """The right shifts are (1, 1)."""
    pack_row = ConversationLoader._pack_row

    def leaking(self, num_steps):
        inputs, targets = pack_row(self, num_steps)
        row = np.append(inputs, 0)
        supervised = np.append(False, targets >= 0)
        shifted = np.roll(row, -shift_of_targets)[:-1]
        return inputs, np.where(np.roll(supervised, -shift_of_mask)[:-1], shifted, -1)

    monkeypatch.setattr(ConversationLoader, "_pack_row", leaking)
    assert wrong_targets_of(*chat_steps()) != []


def first_rows(steps, vocab_size=1000):
    """The first row of a few micro-batches, with ids that a tiny model has: (inputs, targets)."""
    for step in steps[:2]:
        x_BT, y_BT, _ = step.micro_batches[0]
        yield x_BT[0] % vocab_size, torch.where(y_BT[0] < 0, -1, y_BT[0] % vocab_size)


@pytest.mark.parametrize("make_steps", [pretraining_steps, chat_steps])
def test_loss_of_packed_rows_sees_no_later_token(monkeypatch, make_steps):
    """Documents of a row are not masked from each other: a token sees all earlier ones of its row, and no other row."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 50 * 1024)  # the logits of 50 tokens at a time
    model = tiny_gpt(sequence_len=96)
    for inputs_T, targets_T in first_rows(make_steps()[0]):
        positions = (targets_T >= 0).nonzero().flatten()[::5].tolist()
        inputs_TE, compute = from_embeddings(model, inputs_T, targets_T)
        assert find_leaks(compute, inputs_TE, positions=positions) == []
        leaking = functools.partial(leaking_loss, compute)
        assert find_leaks(leaking, inputs_TE, positions=positions) != []


def leaking_loss(compute, inputs_BTE):
    """The loss of a token is given to the one before it."""
    return compute(inputs_BTE).roll(-1, 1)


def make_rollouts():
    """Rollouts of different lengths, partly with tokens that a tool forced; and the pairs of tokens to train on."""
    generator, numbers = np.random.default_rng(0), itertools.count(1)
    rollouts, followers = [], set()
    for i in range(10):
        prompt, completion = ([next(numbers) for _ in range(generator.integers(2, 20))] for _ in range(2))
        sampled = [bool(number) for number in generator.integers(0, 4, len(completion))]
        rollouts.append(Rollout(prompt, completion, sampled, [], float(i), 1.0, "stop"))
        pairs = itertools.pairwise(prompt[-1:] + completion)
        followers |= {pair for pair, trained in zip(pairs, sampled, strict=True) if trained}
    return rollouts, followers


def trained_pairs(batch):
    """The input and the target at each trained position of a RolloutBatch, as rows of one token."""
    return batch.idx_BT.flatten()[batch.positions_N][:, None], batch.targets_N[:, None]


def test_rollout_targets_are_the_next_sampled_tokens():
    rollouts, followers = make_rollouts()
    batches, num_targets = pack_micro_batches(rollouts, 4, Dist(CPU))
    assert sum(len(batch.targets_N) for batch in batches) == num_targets == len(followers)
    for batch in batches:
        assert wrong_targets(*trained_pairs(batch), followers) == []
        later = batch._replace(positions_N=batch.positions_N + 1)  # the input is the target itself
        assert len(wrong_targets(*trained_pairs(later), followers)) == len(batch.targets_N)


# ---- KV caches ----


@pytest.fixture
def make_engine(short_windows, golden_tokenizer):
    """A function that makes an engine with a slot for each of 26 requests, which reads prompts in chunks of 4."""

    def make(member="modern", **options):
        made = tiny_engine(make_model(member), golden_tokenizer, max_slots=26, **options)
        made.prefixes.chunk_size = 4
        return made

    return make


def read_tokens(engine, rows, num_prompt):
    """
    Reads token sequences as simultaneous requests: the first num_prompt tokens of each as its prompt, the others as
    tokens that a tool forces. Returns the logits after the tokens from the last one of the prompt on, by row.
    """
    logits = {}  # by the request's number, then by position

    def keep(module, inputs, raw_BTV):
        for entry, raw_TV in zip(engine.active, raw_BTV, strict=False):  # there may be unused slots
            position = len(entry.request.prompt) + len(entry.completion.tokens) - 1
            logits[entry.number] |= {position + i: raw_V.clone() for i, raw_V in enumerate(raw_TV)}

    hook = engine.decoder.model.lm_head.register_forward_hook(keep)
    for row in rows:
        prompt, forced = row[:num_prompt], row[num_prompt:]
        number = engine.add(Request(prompt, max_tokens=len(forced) + 1, temperature=0.0))
        engine.waiting[-1][0].forced.extend(forced)
        logits[number] = {}
    while engine.is_busy:
        engine.step()
    hook.remove()
    positions = range(num_prompt - 1, len(rows[0]))
    return torch.stack([torch.stack([of_row[p] for p in positions]) for of_row in logits.values()])


def with_own_first_tokens(ids_BT):
    """The rows as lists, each after another first token: otherwise equal rows would share their prompts."""
    return [[row, *ids] for row, ids in enumerate(ids_BT.tolist())]


def leaks_of_generation(engine, num_prompt):
    """Output t is the logits after token t + num_prompt - 1, where the first token is one of with_own_first_tokens."""

    def compute(ids_BT):
        engine.refresh_weights()  # empties the prefix cache: what is read together must not follow from earlier calls
        return read_tokens(engine, with_own_first_tokens(ids_BT), num_prompt)

    return find_leaks(compute, random_ids(T - 1), may_see=lambda t, s: s + 1 <= t + num_prompt - 1)


DECODE_KERNELS = {
    "products": slot_attention.attend_by_products,
    "sums": slot_attention.attend_by_sums,
    "without_maximum": slot_attention.attend_without_maximum,
}


@pytest.mark.parametrize("num_prompt", [1, 11])
@pytest.mark.parametrize("name", DECODE_KERNELS)
def test_decode_sees_no_later_token_and_no_other_slot(make_engine, name, num_prompt):
    engine = make_engine()
    engine.decoder.forward = StepForward(engine.decoder.model, DECODE_KERNELS[name])
    assert leaks_of_generation(engine, num_prompt) == []


@pytest.mark.parametrize("member", FAMILY)
def test_decode_of_every_family_with_unused_slots_sees_no_later_token(make_engine, member):
    engine = make_engine(member)
    engine.decoder.use_static_shapes = True  # 32 slots instead of 23
    assert leaks_of_generation(engine, 6) == []


@pytest.mark.parametrize("member", FAMILY)
def test_full_forward_pass_equals_prefill_and_decode(make_engine, member):
    engine = make_engine(member)
    rows = with_own_first_tokens(random_ids(3 * (T - 1)).view(3, -1))
    model = engine.model
    with torch.no_grad():
        expected = model(torch.tensor(rows))
    for num_prompt in (1, 5, 23):
        raw_BTV = read_tokens(engine, rows, num_prompt)
        found = loss.softcap(raw_BTV[..., : model.config.vocab_size].float(), model.config.logit_softcap)
        torch.testing.assert_close(found, expected[:, num_prompt - 1 :], rtol=1e-4, atol=1e-4)


def keys_of_other_slots(q_NGD, keys_NSD, values_NSD, *others):
    return slot_attention.attend_by_products(q_NGD, keys_NSD.roll(1, 0), values_NSD.roll(1, 0), *others)


def test_decode_that_sees_another_slot_is_reported(make_engine):
    engine = make_engine()
    engine.decoder.forward = StepForward(engine.decoder.model, keys_of_other_slots)
    assert leaks_of_generation(engine, 6) != []


def leaks_of_prefill(model):
    """The output of a token is its keys and values in all layers; those of the last layer depend on all tokens."""

    def compute(ids_BT):
        chunks, outputs = [EMPTY] * len(ids_BT), []
        for some_ids_BT in ids_BT.split(5, dim=1):
            tokens = [tuple(ids) for ids in some_ids_BT.tolist()]
            chunks = Prefill(model).read(list(zip(chunks, tokens, strict=True)))
            states = [torch.cat([*chunk.caches.values()], dim=1) for chunk in chunks]  # (2, L, T, K, D)
            outputs.append(torch.stack(states).movedim(3, 1).flatten(2))
        return torch.cat(outputs, dim=1)

    return find_leaks(compute, random_ids(T))


def test_prefill_in_chunks_sees_no_later_token(short_windows):
    for member in FAMILY:
        assert leaks_of_prefill(make_model(member)) == []


def test_prefill_that_sees_a_later_token_is_reported(short_windows, monkeypatch):
    monkeypatch.setattr("nanochat.prefill.band_mask", lambda positions, *keys: band_mask(positions + 1, *keys))
    assert (6, 7) in leaks_of_prefill(make_model())


def test_prefill_that_smears_the_next_token_is_reported(short_windows, monkeypatch):
    monkeypatch.setattr(GPT, "_smear", smear_of_next_token)
    assert (6, 7) in leaks_of_prefill(make_model())


def show_all_entries(monkeypatch):
    """Rings show all their entries, also those that are older than the window or of an earlier request."""
    ring = SlotCache._ring

    def leaking(self, *arguments, **options):
        indices_NT, mask_NTS = ring(self, *arguments, **options)
        return indices_NT, torch.zeros_like(mask_NTS)

    monkeypatch.setattr(SlotCache, "_ring", leaking)


def leaks_of_used_slots(engine):
    """The inputs are two requests of 11 tokens, one after the other in the same slot; outputs are those of both."""

    def compute(ids_BT):
        both = [read_tokens(engine, with_own_first_tokens(ids), 1) for ids in ids_BT.split(11, dim=1)]
        return torch.cat(both, dim=1)

    def may_see(t, s):
        return t // 12 == s // 11 and s % 11 < t % 12

    return find_leaks(compute, random_ids(22), may_see=may_see)


def test_used_slot_keeps_nothing_of_an_earlier_request(make_engine):
    assert leaks_of_used_slots(make_engine()) == []


def test_used_slot_that_keeps_an_old_key_is_reported(make_engine, monkeypatch):
    show_all_entries(monkeypatch)
    assert (13, 8) in leaks_of_used_slots(make_engine())


def leaks_of_drafts(engine, monkeypatch):
    """
    The inputs are 20 tokens of a request and 3 drafts, which are wrong and offered before every second token; the
    outputs are those of the request.
    """

    def compute(ids_BT):
        drafts = ids_BT[:, 20:].tolist()
        first = engine.num_requests

        def draft(self):
            return drafts[self.number - first] if self.next_read[0] % 2 else []

        monkeypatch.setattr(ActiveRequest, "draft", draft)
        return read_tokens(engine, with_own_first_tokens(ids_BT[:, :20]), 1)

    return find_leaks(compute, random_ids(23), may_see=lambda t, s: s < t and s < 20)


@pytest.mark.parametrize("num_prompt", [1, 11])
def test_accepted_drafts_see_no_later_token(make_engine, num_prompt):
    assert leaks_of_generation(make_engine(speculate=3), num_prompt) == []


def test_rejected_drafts_leave_nothing(make_engine, monkeypatch):
    assert leaks_of_drafts(make_engine(speculate=3), monkeypatch) == []


def test_drafts_that_leave_their_keys_are_reported(make_engine, monkeypatch):
    show_all_entries(monkeypatch)
    assert leaks_of_generation(make_engine(speculate=3), 1) != []  # tokens that are read together see each other
    assert {s for _, s in leaks_of_drafts(make_engine(speculate=3), monkeypatch)} >= {20, 21, 22}


def leaks_of_samples(engine):
    """The inputs are a prompt of 5 tokens and two continuations of 4; the outputs are those of both continuations."""

    def compute(ids_BT):
        engine.refresh_weights()
        outputs = []
        for prompt, *continuations in (ids.split([5, 4, 4]) for ids in ids_BT):
            rows = [torch.cat([prompt, continuation]).tolist() for continuation in continuations]
            outputs.append(read_tokens(engine, rows, num_prompt=5).flatten(0, 1))
        return torch.stack(outputs)

    def may_see(t, s):
        sample, token = divmod(s - 5, 4)
        return s < 5 or (sample == t // 5 and token < t % 5)

    return find_leaks(compute, random_ids(13), may_see=may_see)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_samples_of_one_prompt_do_not_see_each_other(make_engine, share_prompts):
    assert leaks_of_samples(make_engine(share_prompts=share_prompts)) == []


def test_samples_that_see_each_other_are_reported(make_engine):
    engine = make_engine()
    engine.decoder.forward = StepForward(engine.decoder.model, keys_of_other_slots)
    assert leaks_of_samples(engine) != []


@pytest.mark.parametrize("num_prompt", [1, 11])
@pytest.mark.parametrize("name", DECODE_KERNELS)
def test_decode_with_shared_prompts_sees_no_later_token_and_no_other_prompt(make_engine, name, num_prompt):
    engine = make_engine(share_prompts=True)
    engine.decoder.forward = StepForward(engine.decoder.model, DECODE_KERNELS[name])
    assert leaks_of_generation(engine, num_prompt) == []


def test_prompts_of_other_samples_are_reported(make_engine):
    def keys_of_other_prompts(*arguments):
        *others, prompts = arguments
        shift = len(prompts.keys_ZPD) // 2
        keys_ZPD, values_ZPD = prompts.keys_ZPD.roll(shift, 0), prompts.values_ZPD.roll(shift, 0)
        return slot_attention.attend_by_products(*others, prompts._replace(keys_ZPD=keys_ZPD, values_ZPD=values_ZPD))

    engine = make_engine(share_prompts=True)
    engine.decoder.forward = StepForward(engine.decoder.model, keys_of_other_prompts)
    assert leaks_of_generation(engine, 6) != []


def leaks_of_cached_prefix(engine):
    """The inputs are 8 tokens that start two prompts, and 5 more of each; the output is that of the second prompt."""

    def compute(ids_BT):
        outputs = []
        for common, first, second in (ids.split([8, 5, 5]) for ids in ids_BT):
            engine.refresh_weights()
            for rest in (first, second):
                logits_BTV = read_tokens(engine, [[*common.tolist(), *rest.tolist()]], num_prompt=13)
            assert len(engine.prefixes.chunks) >= 3  # two chunks of the common tokens, one of the first prompt
            outputs.append(logits_BTV[0])
        return torch.stack(outputs)

    return find_leaks(compute, random_ids(18), may_see=lambda t, s: not 8 <= s < 13)


class CacheByLength(dict):
    """A cache of chunks that compares only the number of their tokens."""

    def get(self, key):
        return next((chunk for (previous, _), chunk in self.items() if previous is key[0]), None)


def test_cached_prefix_contains_nothing_of_another_prompt(make_engine):
    assert leaks_of_cached_prefix(make_engine()) == []


def test_cached_prefix_of_other_tokens_is_reported(make_engine):
    engine = make_engine()
    engine.prefixes.chunks = CacheByLength()
    assert (0, 8) in leaks_of_cached_prefix(engine)


# ---- trees of CORE ----


def leaks_of_tree():
    """The inputs are the columns of a tree of three prompts; the outputs are the states of its scored tokens."""
    model = make_model()
    prompts = {}
    for choice, length in enumerate((3, 1, 5)):
        tokens = [*range(12), *range(100 * choice + 20, 100 * choice + 20 + length)]
        prompts[choice] = ScoredPrompt(tokens, 10, len(tokens))
    (tree,) = build_prefix_trees(0, prompts)
    batch = TreeBatch([tree])
    segments, positions = batch.segments[0], batch.positions[0]
    scored = [(choice + 1, position) for choice, prompt in prompts.items() for position in range(9, prompt.stop - 1)]

    def compute(ids_BT):
        batch = TreeBatch([tree] * len(ids_BT))
        batch.tokens = ids_BT.tolist()
        return scored_states(model, batch).unflatten(0, (len(ids_BT), -1))

    def may_see(t, column):
        number, position = scored[t]
        # The copy of the prefix's last token is before the first token of a suffix, and only for this one (smear).
        segment = segments[column] if segments[column] >= 0 else segments[column + 1]
        return segment in (0, number) and positions[column] <= position

    return find_leaks(compute, torch.tensor(batch.tokens[0]), may_see=may_see)


def test_prompts_of_a_tree_see_their_own_tokens_only(short_windows):
    assert leaks_of_tree() == []


def test_tree_whose_prompts_see_each_other_is_reported(short_windows, monkeypatch):
    mask = PrefixSharingCache._mask
    monkeypatch.setattr(PrefixSharingCache, "_mask", lambda *arguments: torch.ones_like(mask(*arguments)))
    assert leaks_of_tree() != []
