"""
Prompts that several slots of the decoder share: keys and values are stored once per prompt, not once per slot. For
reinforcement learning and pass@k, which sample several completions of each prompt.

A step of many slots spends most of its time reading keys and values, and those of a question's prompt are the same for
all its completions. With sharing, a slot's ring holds only what was generated. The queries of all slots of a prompt are
multiplied by the prompt's keys in one matrix product, which reads them once:

    queries (U * K, M * G * T, D) @ keys (U * K, P, D) → one row per slot → softmax with the scores of the slot's ring
    → weights (U * K, M * G * T, P) @ values (U * K, P, D) → one row per slot → + the sum over the ring

The slots need no order: `rows_UM` lists those of each prompt. So slots are filled and freed one by one, as without
sharing, and the room of a prompt is free when its last slot is. The result is the same up to the order of summation,
which changes with the number of slots of a prompt.

Bytes per step at depth 24 with 256 slots, 16 per prompt, prompts of 150 tokens and 75 to 250 generated ones: 10.1 to
16.7 GB without sharing, 4.7 to 11.3 with it, of which 1.6 are weights.

Shapes: U prompts, M slots of one prompt (at most), P tokens of a prompt (at most); B rows of a step, T tokens of each,
K key/value heads, G query heads for each of them, D head size, R slots.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from nanochat.gpt import GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.sampling import next_power_of_two

# On a GPU, sharing adds about six kernels per layer, 0.4 ms a step at depth 24, and with 64 slots reads 1.3 GB less,
# also 0.4 ms. Calculated, not measured.
MIN_SLOTS_TO_SHARE = 64
LENGTH_MULTIPLE = 128  # room for prompts grows in multiples of this; heuristic, not tuned


def pays_to_share(num_samples: int, num_slots: int, device: torch.device) -> bool:
    """
    Whether sharing makes generation faster, with num_samples completions per prompt. On a CPU it does not, though it
    saves memory there too: 0.96 / 0.93 times the speed at 32 slots, 0.99 / 0.96 at 256, with prompts of 24 / 150 tokens
    (Zen 4, one core of a busy machine, depth 4, 16 completions per prompt of up to 48 / 128 tokens).
    """
    return num_samples > 1 and num_slots >= MIN_SLOTS_TO_SHARE and device.type == "cuda"


class PromptShape(NamedTuple):
    """The sizes U, M and P of a step."""

    num_prompts: int
    num_slots: int
    num_tokens: int


class LayerPrompts(NamedTuple):
    """The prompts of a step as one layer of the forward pass reads them."""

    keys_ZPD: torch.Tensor  # Z = U * K
    values_ZPD: torch.Tensor
    prompt_B: torch.Tensor  # which prompt a row has …
    sample_B: torch.Tensor  # … and which of the prompt's slots it is
    rows_UM: torch.Tensor  # the inverse; unused places have any row

    def scores(self, q_NQD: torch.Tensor) -> torch.Tensor:
        """The products of each row's queries with its prompt's keys, in float32: (B * K, Q, P)."""
        q_ZXD, keys_ZDP = self._by_prompt(q_NQD), self.keys_ZPD.transpose(1, 2)
        if q_ZXD.is_cuda and q_ZXD.dtype != torch.float32:
            scores_ZXP = torch.bmm(q_ZXD, keys_ZDP, out_dtype=torch.float32)
        else:
            scores_ZXP = torch.bmm(q_ZXD.float(), keys_ZDP.float())
        return self._by_row(scores_ZXP, q_NQD.size(1))

    def weighted_sum(self, weights_NQP: torch.Tensor) -> torch.Tensor:
        """The sums of the prompts' values with these weights: (B * K, Q, D)."""
        dtype = self.values_ZPD.dtype if weights_NQP.is_cuda else torch.float32
        sums_ZXD = torch.bmm(self._by_prompt(weights_NQP).to(dtype), self.values_ZPD.to(dtype))
        return self._by_row(sums_ZXD, weights_NQP.size(1))

    def _by_prompt(self, x_NQF: torch.Tensor) -> torch.Tensor:
        """(B * K, Q, F) → (U * K, M * Q, F)."""
        B, (_, Q, F) = self.prompt_B.size(0), x_NQF.shape
        x_UMKQF = x_NQF.view(B, -1, Q, F)[self.rows_UM]
        return x_UMKQF.transpose(1, 2).reshape(-1, self.rows_UM.size(1) * Q, F)

    def _by_row(self, x_ZXF: torch.Tensor, Q: int) -> torch.Tensor:
        """The inverse: (U * K, M * Q, F) → (B * K, Q, F)."""
        (U, M), F = self.rows_UM.shape, x_ZXF.size(2)
        x_UMKQF = x_ZXF.view(U, -1, M, Q, F).transpose(1, 2)
        return x_UMKQF[self.prompt_B, self.sample_B].flatten(0, 1)


class StepPrompts:
    """The prompts of a step for all layers. `tensors`: from SharedPrompts.tensors, a list because of compiled code."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self.lengths_B, self.prompt_B, self.sample_B, self.rows_UM, *caches = tensors
        num_layers = len(caches) // 2
        self.keys, self.values = caches[:num_layers], caches[num_layers:]

    def layer(self, layer: int) -> LayerPrompts:
        return LayerPrompts(self.keys[layer], self.values[layer], self.prompt_B, self.sample_B, self.rows_UM)

    def is_hidden(self, layer: int, ring_positions_BT: torch.Tensor, window: int) -> torch.Tensor:
        """Which tokens of its prompt a query does not see, (B, T, P)."""
        lengths_B11 = self.lengths_B[:, None, None].clamp(max=window)  # only the last tokens are kept
        entries_P = torch.arange(self.keys[layer].size(1), device=self.lengths_B.device)
        distance_BTP = ring_positions_BT[:, :, None] + lengths_B11 - entries_P
        return (entries_P >= lengths_B11) | (distance_BTP > window)


class SharedPrompts:
    """The prompts of the active slots: their keys and values, and which slot has which prompt."""

    def __init__(self, config: GPTConfig, device: torch.device, dtype: torch.dtype):
        self.device = device
        self.prompts: list[tuple[int, ...]] = []  # the tokens of each
        self.of_slot: list[int] = []  # the prompt of each active slot
        self.cache = KVCache(config, device, dtype)
        self.capacity = self.length = 0  # room for so many prompts, of so many tokens
        self.per_row_3R = self.rows = torch.empty(0)
        self.prepared: tuple[int, PromptShape] | None = None

    # ---- slots ----

    def reserve_slots(self, num_slots: int) -> None:
        """Makes room for the tables of so many slots."""
        self.per_row_3R = torch.zeros(3, num_slots, device=self.device, dtype=torch.long)
        # U + M is at most R + 1, and powers of two are less than twice as large.
        self.rows = torch.zeros((num_slots + 1) ** 2, device=self.device, dtype=torch.long)
        self.prepared = None

    def fill(self, tokens: tuple[int, ...], states: Mapping[int, torch.Tensor], num_slots: int) -> bool:
        """
        Adds slots after the active ones. states: the prompt's keys and values, as in kv_cache.Prefix. Returns whether
        tensors were replaced, so that captured graphs cannot be used any more.
        """
        is_replaced = False
        if tokens not in self.prompts:
            is_replaced = self._reserve(len(self.prompts) + 1, len(tokens))
            for window, state in states.items():
                self.cache.write(window, slice(len(self.prompts), len(self.prompts) + 1), 0, state)
            self.prompts.append(tokens)
        self.of_slot += [self.prompts.index(tokens)] * num_slots
        self.prepared = None
        return is_replaced

    def free(self, slot: int) -> None:
        """Removes a slot; the last one gets its number, and the last prompt the number of one without slots."""
        prompt = self.of_slot[slot]
        self.of_slot[slot] = self.of_slot[-1]
        self.of_slot.pop()
        self.prepared = None
        if prompt in self.of_slot:
            return
        last = len(self.prompts) - 1
        if prompt < last:
            self.cache.move(last, prompt)
            self.prompts[prompt] = self.prompts[last]
            self.of_slot = [prompt if other == last else other for other in self.of_slot]
        self.prompts.pop()

    def _reserve(self, num_prompts: int, length: int) -> bool:
        """Grows to room for so many prompts of so many tokens; they keep their contents. Returns whether it grew."""
        if num_prompts <= self.capacity and length <= self.length:
            return False
        self.capacity = max(self.capacity, 2, next_power_of_two(num_prompts))  # 2: see `shape`
        self.length = max(self.length, -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, LENGTH_MULTIPLE)
        self.cache.grow(self.capacity, {window: min(window, self.length) for window in self.cache.layers})
        return True

    # ---- steps ----

    @property
    def longest(self) -> int:
        return max(1, *map(len, self.prompts))

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each active slot's prompt."""
        return [len(self.prompts[prompt]) for prompt in self.of_slot]

    def shape(self, num_tokens: int, is_static: bool) -> PromptShape:
        """The sizes of the next step, at least those of the slots. is_static: powers of two, for captured graphs."""
        num_prompts, num_slots = len(self.prompts), max(Counter(self.of_slot).values())
        if len(self.of_slot) > 1:  # code that was compiled for several slots needs sizes above 1
            num_prompts, num_slots = max(num_prompts, 2), max(num_slots, 2)
        if is_static:
            num_prompts, num_slots = next_power_of_two(num_prompts), next_power_of_two(num_slots)
        return PromptShape(num_prompts, num_slots, min(num_tokens, self.length))

    def prepare(self, num_rows: int, shape: PromptShape) -> None:
        """Must be called before a step whose first rows are the active slots; the others repeat the first one."""
        if self.prepared == (num_rows, shape):
            return
        samples: list[int] = []
        rows: list[list[int]] = [[] for _ in range(shape.num_prompts)]
        for row, prompt in enumerate(self.of_slot):
            samples.append(len(rows[prompt]))
            rows[prompt].append(row)
        columns = (self.lengths, self.of_slot, samples)
        per_row = torch.tensor([[*column, *[column[0]] * (num_rows - len(column))] for column in columns])
        table = torch.tensor([some + [0] * (shape.num_slots - len(some)) for some in rows])
        # Copied to the addresses that captured graphs read.
        self.per_row_3R[:, :num_rows] = per_row.to(self.device)
        self.rows[: table.numel()] = table.flatten().to(self.device)
        self.prepared = (num_rows, shape)

    def tensors(self, num_rows: int, shape: PromptShape) -> list[torch.Tensor]:
        """What StepPrompts is made from."""
        U, M, P = shape
        keys, values = self.cache.views(U, P)
        return [*self.per_row_3R[:, :num_rows], self.rows[: U * M].view(U, M), *keys, *values]
