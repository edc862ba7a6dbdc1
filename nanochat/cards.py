"""
The GPUs that the planner knows: memory, peak rates and price of each. `find_machine` parses --for.

Memory is what the driver reports, a little less than the name promises. FLOP/s (dense, in the dtype that training uses
on the card) and bytes/s are from the vendors' data sheets. Prices are typical ones of rented cards in November 2026. If
you pay another price, scale the cost of a plan by it.
"""

from typing import NamedTuple

import torch

from nanochat.common import UserError


class Card(NamedTuple):
    name: str  # as --for takes it
    driver_name: str  # a part of the name that the driver reports
    gib: float  # of memory
    flops: float  # FLOP/s
    bandwidth: float  # bytes/s of memory
    dollars_per_hour: float
    capability: tuple[int, int]  # CUDA compute capability

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that training computes in, as hardware.pick_dtype chooses it."""
        return torch.bfloat16 if self.capability >= (8, 0) else torch.float32

    @property
    def has_fp8(self) -> bool:
        return self.capability >= (8, 9)


# find_card takes the first match: GB200 comes before B200, because it contains that name.
CARDS = (
    Card("GB200", "GB200", 184.0, 2.5e15, 8.0e12, 6.5, (10, 0)),
    Card("B200", "B200", 178.0, 2.25e15, 8.0e12, 5.5, (10, 0)),
    Card("H200", "H200", 139.8, 989e12, 4.8e12, 3.6, (9, 0)),
    Card("H100-PCIe", "H100 PCIe", 79.2, 756e12, 2.0e12, 2.4, (9, 0)),
    Card("H100-NVL", "H100 NVL", 93.1, 835e12, 3.9e12, 2.8, (9, 0)),
    Card("H100", "H100", 79.2, 989e12, 3.35e12, 3.0, (9, 0)),
    Card("H800", "H800", 79.2, 989e12, 3.35e12, 3.0, (9, 0)),
    Card("A100-40", "A100-SXM4-40GB", 39.4, 312e12, 1.55e12, 1.3, (8, 0)),
    Card("A100-40-PCIe", "A100-PCIE-40GB", 39.4, 312e12, 1.55e12, 1.3, (8, 0)),
    Card("A100-80", "A100", 79.2, 312e12, 2.0e12, 1.8, (8, 0)),
    Card("A800", "A800", 79.2, 312e12, 2.0e12, 1.8, (8, 0)),
    Card("L40S", "L40S", 44.4, 362e12, 0.864e12, 1.0, (8, 9)),
    Card("L40", "L40", 44.4, 181e12, 0.864e12, 0.9, (8, 9)),
    Card("L4", "L4", 22.0, 121e12, 0.3e12, 0.7, (8, 9)),
    Card("A10", "A10", 22.0, 125e12, 0.6e12, 0.7, (8, 6)),
    Card("RTX5090", "RTX 5090", 31.4, 209e12, 1.79e12, 0.7, (12, 0)),
    Card("RTX4090", "RTX 4090", 23.5, 165e12, 1.01e12, 0.45, (8, 9)),
    Card("RTX3090", "RTX 3090", 23.5, 71e12, 0.936e12, 0.25, (8, 6)),
    Card("V100-32", "V100-SXM2-32GB", 31.7, 15.7e12, 0.9e12, 0.6, (7, 0)),
    Card("V100-16", "V100", 15.8, 15.7e12, 0.9e12, 0.5, (7, 0)),
    Card("T4", "T4", 14.6, 8.1e12, 0.32e12, 0.35, (7, 5)),
)


class Machine(NamedTuple):
    """A number of equal GPUs, in one node or several."""

    card: Card
    num_gpus: int


def find_machine(name: str) -> Machine:
    """The machine of a name such as "8xH100" or "RTX4090" (one card). UserError lists the cards that are known."""
    count, separator, card_name = name.partition("x")
    if not separator or not count.isdigit():
        count, card_name = "1", name
    card = next((card for card in CARDS if card.name.lower() == card_name.lower()), None)
    if card is None or int(count) < 1:
        known = ", ".join(card.name for card in CARDS)
        raise UserError(f"--for {name}: write the number of GPUs and the card, as in 8xH100; cards: {known}")
    return Machine(card, int(count))


def find_card(driver_name: str) -> Card | None:
    """The card that a driver reports under this name; None if it is not in the table."""
    return next((card for card in CARDS if card.driver_name in driver_name), None)
