"""
Sharded training (base_train --shard), for models that do not fit into each GPU's memory: every rank keeps its rows of
each large parameter, of its gradient and of the optimizer's state (ZeRO-3, arXiv 1910.02054; PyTorch's fully_shard).

    model = build(config, dist, dtype)            # initial weights, or those of a checkpoint; never whole on one rank
    loss = model(x_BT, y_BT); loss.backward()     # collective; p.grad holds this rank's rows, summed over the ranks
    weights = muon.gather_weights(…)              # name → whole tensor on rank 0's CPU, for a checkpoint

Before a block computes, its weights are gathered from all ranks, in the compute dtype; after it they are freed. The
backward pass gathers them again and sums the gradients over the ranks (reduce-scatter, in float32) as soon as a block
has computed them: on a GPU this overlaps with the computation of the next block, on a CPU fully_shard waits for it.
Tables and lm_head are gathered in float32, so that the results are those of a replicated model, and only once: their
gradients do not depend on their weights. Parameters below SHARD_MIN_NUMEL stay replicated; muon.py adds up their
gradients. With torch.compile each block is compiled by itself (run.py).

A sharded parameter is a DTensor whose rows are split as by torch.chunk: rank r has the rows from r * ceil(rows / ranks)
on. The checkpoint format is that of replicated training: rank 0 gathers one parameter at a time and keeps it in host
memory, which on a GPU server is larger than the memory of all its GPUs. So a sharded run's checkpoint can be read by
every program, with any number of ranks, and torch.distributed.checkpoint, a second format with pickled metadata, is
not needed. Loading reads one parameter at a time and keeps this rank's rows.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from nanochat.distributed import Dist
from nanochat.gpt import GPT, GPTConfig, rotary_table
from nanochat.muon import SHARD_MIN_NUMEL, is_sharded, local, own_rows

DRAWS = {"normal_", "uniform_", "kaiming_uniform_", "zero_", "fill_"}  # what gives parameters their initial values


def build(config: GPTConfig, dist: Dist, dtype: torch.dtype, weights: Mapping[str, torch.Tensor] | None = None) -> GPT:
    """
    A sharded model. Without weights it gets the initial ones, drawn as for a replicated model: the same for any number
    of ranks. Collective.
    """
    model = GPT(config, "meta", dtype)
    shard(model, dist)
    model.to_empty(device=dist.device)
    model.cos, model.sin = rotary_table(config.sequence_len, config.head_dim, config.rope_base, dist.device)
    if weights is None:
        with DrawWhole(dist):
            model.init_weights()
    else:
        with torch.no_grad():
            for name, p in model.named_parameters():
                local(p).copy_(own_rows(weights[name], dist.rank, dist.world_size) if is_sharded(p) else weights[name])
    return model


def shard(model: GPT, dist: Dist) -> None:
    """Applies fully_shard to the blocks, the tables and lm_head."""
    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    small = {p for p in model.parameters() if p.numel() < SHARD_MIN_NUMEL}
    if model.config.norm_gains:  # each layer uses a row: they would have to be gathered again in the backward pass
        small.add(model.mlp_gains)
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": small, "reshard_after_forward": True}
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy, **options)
    edges = [cast(nn.Embedding, table) for table in (model.transformer.wte, *model.value_embeds.values())]
    for table in edges:
        fully_shard(table, **options)
        table.register_forward_pre_hook(_add_anchor, prepend=True, with_kwargs=True)
        table.forward = partial(_look_up, table)  # type: ignore[method-assign]
    fully_shard(model, **options)  # what is left: lm_head
    for module in (*edges, model):
        module.set_unshard_in_backward(False)  # type: ignore[operator, union-attr]
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are summed: the loss is already normalized over all ranks
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


# fully_shard reduces the gradient of a module when that of its input has been computed. The input of a table is token
# ids, which have none: the gradients of all tables, and weights that activation checkpointing gathers again, would stay
# in memory to the end of the backward pass. So tables get a second input that has a gradient, of 0.


def _add_anchor(table: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"anchor": torch.zeros((), device=args[0].device, requires_grad=True)}


def _look_up(table: nn.Embedding, idx_BT: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    return _LookUp.apply(idx_BT, table.weight, anchor)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx_BT, weight_VC, anchor):
        ctx.save_for_backward(idx_BT)
        ctx.num_rows = weight_VC.size(0)
        return F.embedding(idx_BT, weight_VC)

    @staticmethod
    def backward(ctx, grad_BTC):
        (idx_BT,) = ctx.saved_tensors
        d_weight_VC = torch.ops.aten.embedding_dense_backward(grad_BTC, idx_BT, ctx.num_rows, -1, False)
        return None, d_weight_VC, grad_BTC.new_zeros(())


class DrawWhole(TorchFunctionMode):
    """
    Inside, an in-place operation that gives a sharded parameter its initial values draws all of its rows and keeps this
    rank's: the values, and the state of the random generator, are those of a replicated model.
    """

    def __init__(self, dist: Dist):
        super().__init__()
        self.dist = dist

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        p = args[0] if args else kwargs.pop("tensor", None)  # torch.nn.init names it
        if not isinstance(p, DTensor) or getattr(func, "__name__", "") not in DRAWS:
            return func(*args, **kwargs) if args or p is None else func(p, **kwargs)
        whole = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        func(whole, *args[1:], **kwargs)
        p.to_local().copy_(own_rows(whole, self.dist.rank, self.dist.world_size))
        return p
