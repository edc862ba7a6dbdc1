"""
Storage of keys and values on the device, for the decoder (decoder.py): those of its slots, and those of the prompts
that its slots share (shared_prompts.py).

Shapes: R sequences, K key/value heads, S tokens, D head size; L layers with the same window.
"""

from dataclasses import dataclass

import torch

from nanochat.gpt import GPTConfig


@dataclass(frozen=True)
class Prefix:
    """
    The model's state after a sequence of tokens: the keys and values of its last n tokens, as many as the window
    covers, of all L layers with that window: (2, L, n, K, D).
    """

    tokens: tuple[int, ...]
    caches: dict[int, torch.Tensor]  # by window


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from the host to a device, on CUDA without waiting for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def layers_by_window(config: GPTConfig) -> dict[int, list[int]]:
    """The indices of the layers that have the same window."""
    layers: dict[int, list[int]] = {}
    for layer, window in enumerate(config.windows):
        layers.setdefault(window, []).append(layer)
    return layers


class KVCache:
    """
    Room for the keys and values of sequences, of as many tokens as the layer's window needs.

    Layers with one window share a tensor, (2, L, R, K, S + 1, D), so a sequence is written with few copies. The last
    entry is never used: it keeps the part that a step reads from being contiguous, a special case for which torch would
    compile the step again.
    """

    def __init__(self, config: GPTConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.layers = layers_by_window(config)
        self.by_window: dict[int, torch.Tensor] = {}
        self.views_key = (0, 0)

    def grow(self, num_sequences: int, sizes: dict[int, int]) -> None:
        """Makes room for so many sequences of so many tokens, by window. Sequences keep their contents."""
        for window, layers in self.layers.items():
            shape = (2, len(layers), num_sequences, self.config.n_kv_head, sizes[window] + 1, self.config.head_dim)
            new = torch.zeros(shape, device=self.device, dtype=self.dtype)
            if window in self.by_window:
                old = self.by_window[window]
                # Correct for rings too: only a ring as long as its slot grows, and in it no position has wrapped yet.
                new[tuple(slice(size) for size in old.shape)] = old
            self.by_window[window] = new
        self.views_key = (0, 0)

    def write(self, window: int, sequences: slice, start: int, states: torch.Tensor) -> None:
        """Stores the same keys and values, (2, L, n, K, D), in several sequences from the entry `start` on."""
        stop = start + states.size(2)
        self.by_window[window][:, :, sequences, :, start:stop] = states.transpose(2, 3).unsqueeze(2)

    def move(self, source: int, target: int) -> None:
        """Copies a sequence to another."""
        for cache in self.by_window.values():
            cache[:, :, target] = cache[:, :, source]

    def views(self, num_sequences: int, num_tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and values by layer, (R * K, S, D): at most num_tokens entries of each of the first sequences."""
        if self.views_key != (num_sequences, num_tokens):  # it changes rarely
            views: dict[int, torch.Tensor] = {}
            for window, layers in self.layers.items():
                cache = self.by_window[window][:, :, :num_sequences].flatten(2, 3)
                size = min(num_tokens, cache.size(3) - 1)
                views |= zip(layers, cache[:, :, :, :size].unbind(1), strict=True)
            in_order = [views[layer] for layer in range(self.config.n_layer)]
            self.views_key = (num_sequences, num_tokens)
            self.last_views = [both[0] for both in in_order], [both[1] for both in in_order]
        return self.last_views
