"""
MuonAdamW: Muon for the matrices of the blocks, AdamW for everything else; one class for one rank and for many.

With many ranks there is no DDP wrapper. Each rank's gradients are summed here (the loss is already normalized over all
ranks), and the optimizer's state is sharded: a rank owns a slice of the rows of each large AdamW table and some of the
matrices of each stacked Muon group. Reduce-scatter, update what one owns, all-gather; every transfer is started before
the first is waited for, so that they overlap with the updates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nanochat.common import UserError
from nanochat.gpt import GPT

ADAM_EPS = 1e-10
NORMUON_BETA2 = 0.9
SHARD_MIN_NUMEL = 2**14  # smaller AdamW parameters are replicated: one transfer costs more than the update; arbitrary
# Polar Express (arXiv 2505.16932): one quintic per iteration, each the best for what the one before leaves.
POLAR_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class LearningRates:
    """Per optimizer update; the defaults are for width 768 and batches of 2^19 tokens."""

    unembedding: float = 0.008
    embedding: float = 0.3
    value_embedding: float = 0.15
    matrix: float = 0.02
    scalar: float = 0.5
    smear_backout: float = 0.2


def build_optimizer(
    model: GPT,
    rates: LearningRates,
    batch_factor: float = 1.0,
    weight_decay: float = 0.28,
    rank: int = 0,
    world_size: int = 1,
    compile: bool = False,
) -> "MuonAdamW":
    """
    Sorts a GPT's parameters into groups. batch_factor is sqrt(batch / reference batch); it scales every rate but those
    of smear and backout, whose gradients hardly depend on the batch. Tables and head also go with (C / 768)^-0.5.
    weight_decay is Muon's; the AdamW groups have their own.
    """
    named = dict(model.named_parameters())
    width = (model.config.n_embd / 768) ** -0.5 * batch_factor
    adamw: list[tuple[str, tuple[str, ...], float, tuple[float, float], float]] = [
        # name, parameters that start with, lr, betas, weight decay
        ("lm_head", ("lm_head.",), rates.unembedding * width, (0.8, 0.96), 0.01),
        ("wte", ("transformer.wte.",), rates.embedding * width, (0.8, 0.995), 0.001),
        ("value_embeds", ("value_embeds.",), rates.value_embedding * width, (0.8, 0.995), 0.01),
        ("resid", ("resid_lambdas",), 0.01 * rates.scalar * batch_factor, (0.8, 0.95), 0.05),
        ("x0", ("x0_lambdas",), rates.scalar * batch_factor, (0.96, 0.95), 0.0),
        ("smear_backout", ("smear_", "backout_"), rates.smear_backout, (0.8, 0.95), 0.0),
    ]
    groups: list[dict[str, Any]] = []
    for name, prefixes, lr, betas, decay in adamw:
        names = [n for n in named if n.startswith(prefixes)]
        if names:
            groups.append({"kind": "adamw", "name": name, "names": names, "lr": lr, "betas": betas, "decay": decay})
    matrices = [n for n in named if n.startswith("transformer.h.")]
    for shape in sorted({named[n].shape for n in matrices}):
        names = [n for n in matrices if named[n].shape == shape]
        lr = rates.matrix * batch_factor
        groups.append({"kind": "muon", "name": f"muon{tuple(shape)}", "names": names, "lr": lr, "decay": weight_decay})
    for group in groups:
        group["params"] = [named[n] for n in group["names"]]
        group["initial_lr"], group["initial_decay"] = group["lr"], group["decay"]
    return MuonAdamW(groups, rank, world_size, compile, model.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """
    Groups of kind "adamw" hold lr, betas, decay; groups of kind "muon" hold lr, momentum, decay and matrices of one
    shape, which are stacked and updated together. `dtype` is that of Muon's orthogonalization.
    """

    def __init__(self, groups: list[dict], rank: int, world_size: int, compile: bool, dtype: torch.dtype):
        super().__init__(groups, {"momentum": 0.95})
        self.rank, self.world_size = rank, world_size
        self.dtype = dtype if dtype == torch.bfloat16 else torch.float32  # float16 would overflow
        self.num_steps = 0
        # On a CPU compiling the updates costs 20 s and saves 15 ms a step (depth 4, width 256).
        self.compiles = compile and groups[0]["params"][0].is_cuda
        self.adamw_update: Callable = fused_adamw_update
        self.muon_update: Callable = muon_update
        if self.compiles:
            self.adamw_update, self.muon_update = (torch.compile(f, dynamic=False) for f in (adamw_update, muon_update))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the .grad of every parameter, summed over the ranks."""
        self.num_steps += 1
        reduces = [r for group in self.param_groups for r in self._start_reduce(group)]
        gathers = [gather for reduce in reduces if (gather := reduce())]
        for gather in gathers:
            gather()

    def set_schedule(self, lr_multiplier: float, momentum: float, decay_multiplier: float) -> None:
        """Sets this step's values; decay_multiplier is Muon's, AdamW's decay stays."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["decay"] = group["initial_decay"] * decay_multiplier

    # ---- per group: start the reduction; the function returned updates, starts the gather, returns what ends that ----

    def _start_reduce(self, group: dict) -> list[Callable]:
        if group["kind"] == "muon":
            return [self._start_muon(group)]
        return [self._start_adamw(group, p) for p in group["params"]]

    def _start_adamw(self, group: dict, p: torch.Tensor) -> Callable:
        grad = _grad(p)
        work, sharded = None, self._is_sharded(p)
        if sharded:
            mine = torch.empty_like(self._rows(p))
            work = dist.reduce_scatter_tensor(mine, grad, async_op=True)
            grad = mine
        elif self.world_size > 1:
            work = dist.all_reduce(grad, async_op=True)

        def update() -> Callable | None:
            if work:
                work.wait()
            weights = self._rows(p) if sharded else p
            state = self.state[p]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weights), torch.zeros_like(weights)
            beta1, beta2 = group["betas"]
            scalars = self._scalars(group["lr"], group["decay"], beta1, beta2, self.num_steps)
            self.adamw_update(weights, grad, state["exp_avg"], state["exp_avg_sq"], *scalars)
            return dist.all_gather_into_tensor(p.data, weights.clone(), async_op=True).wait if sharded else None

        return update

    def _start_muon(self, group: dict) -> Callable:
        params = group["params"]
        own = math.ceil(len(params) / self.world_size)  # matrices per rank; the last stacks are padded with zeros
        padding = [torch.zeros_like(params[0])] * (own * self.world_size - len(params))
        grads = torch.stack([_grad(p) for p in params] + padding)
        work = None
        if self.world_size > 1:
            mine = torch.empty_like(grads[:own])
            work = dist.reduce_scatter_tensor(mine, grads, async_op=True)
            grads = mine

        def update() -> Callable | None:
            if work:
                work.wait()
            first = self.rank * own
            weights = torch.stack((list(params) + padding)[first : first + own])
            state = self.state[params[0]]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grads)
                state["second_moment"] = torch.zeros_like(grads.mean(dim=_norm_dim(grads), keepdim=True))
            scalars = self._scalars(group["lr"], group["decay"], group["momentum"], NORMUON_BETA2)
            self.muon_update(weights, grads, state["momentum_buffer"], state["second_moment"], *scalars, self.dtype)
            if self.world_size == 1:
                torch._foreach_copy_(params, list(weights.unbind()))
                return None
            everyone = weights.new_empty((own * self.world_size, *weights.shape[1:]))
            gather = dist.all_gather_into_tensor(everyone, weights, async_op=True)

            def finish() -> None:
                gather.wait()
                torch._foreach_copy_(params, list(everyone[: len(params)].unbind()))

            return finish

        return update

    def _scalars(self, *values: float) -> tuple[Any, ...]:
        """Tensors where updates are compiled: they must not be compiled again when a rate changes."""
        return tuple(torch.tensor(v, dtype=torch.float32) for v in values) if self.compiles else values

    def _is_sharded(self, p: torch.Tensor) -> bool:
        return self.world_size > 1 and p.numel() >= SHARD_MIN_NUMEL and p.size(0) % self.world_size == 0

    def _rows(self, p: torch.Tensor) -> torch.Tensor:
        return p.data.chunk(self.world_size)[self.rank]

    # ---- state for checkpoints: whole tensors by parameter name, whatever the number of ranks ----

    def full_state(self) -> dict[str, torch.Tensor]:
        """
        All state on the CPU, `<parameter>.<state>` → tensor. Collective: every rank calls it, the first one gets it; a
        copy for each would take the host's memory as many times as there are ranks.
        """
        full = {"num_steps": torch.tensor(self.num_steps)} if self.rank == 0 else {}
        for group in self.param_groups:
            if group["kind"] == "adamw":
                for name, p in zip(group["names"], group["params"], strict=True):
                    for key, value in self.state[p].items():
                        value = self._gather(value) if self._is_sharded(p) else value
                        if self.rank == 0:
                            full[f"{name}.{key}"] = value.to("cpu", copy=True)
            else:
                for key, value in self.state[group["params"][0]].items():
                    stack = self._gather(value) if self.world_size > 1 else value
                    for name, matrix in zip(group["names"], stack if self.rank == 0 else (), strict=False):
                        full[f"{name}.{key}"] = matrix.to("cpu", copy=True)
        return full

    def load_full_state(self, full: dict[str, torch.Tensor]) -> None:
        """Takes what full_state gave, under any number of ranks. UserError if it belongs to another model."""
        self.num_steps = int(full["num_steps"])
        for group in self.param_groups if self.num_steps else []:
            key = "exp_avg" if group["kind"] == "adamw" else "momentum_buffer"
            for name, p in zip(group["names"], group["params"], strict=True):
                if f"{name}.{key}" not in full or full[f"{name}.{key}"].shape != p.shape:
                    raise UserError(f"the optimizer state does not fit {name}: it is another model's; start without it")
        for group in self.param_groups if self.num_steps else []:
            params, names = group["params"], group["names"]
            if group["kind"] == "adamw":
                for name, p in zip(names, params, strict=True):
                    for key in ("exp_avg", "exp_avg_sq"):
                        value = full[f"{name}.{key}"].to(p.device)
                        self.state[p][key] = (self._rows(value) if self._is_sharded(p) else value).clone()
            else:
                own = math.ceil(len(params) / self.world_size)
                for key in ("momentum_buffer", "second_moment"):
                    stack = [full[f"{name}.{key}"] for name in names]
                    stack += [torch.zeros_like(stack[0])] * (own * self.world_size - len(stack))
                    mine = stack[self.rank * own : (self.rank + 1) * own]
                    self.state[params[0]][key] = torch.stack(mine).to(params[0].device)

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        full = mine.new_empty((mine.size(0) * self.world_size, *mine.shape[1:]))
        dist.all_gather_into_tensor(full, mine.contiguous())
        return full


def _grad(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _norm_dim(x: torch.Tensor) -> int:
    """The axis over which NorMuon averages: rows of tall and square matrices, columns of wide ones."""
    return -1 if x.size(-2) >= x.size(-1) else -2


def adamw_update(p, grad, exp_avg, exp_avg_sq, lr, decay, beta1, beta2, step) -> None:
    """AdamW with decoupled decay and bias correction (arXiv 1711.05101), in place."""
    p.mul_(1 - lr * decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    root = (exp_avg_sq / (1 - beta2**step)).sqrt() + ADAM_EPS
    p.sub_(lr / (1 - beta1**step) * exp_avg / root)


def fused_adamw_update(p, grad, exp_avg, exp_avg_sq, lr, decay, beta1, beta2, step) -> None:
    """The same by torch's own loop, for updates that are not compiled: a fifth of the time on a CPU (3.8 / 20 ms)."""
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": decay, "eps": ADAM_EPS}
    steps = [torch.tensor(float(step), device=p.device)]
    torch._fused_adamw_([p], [grad], [exp_avg], [exp_avg_sq], [], steps, **options, amsgrad=False, maximize=False)


def muon_update(p, grad, momentum_buffer, second_moment, lr, decay, momentum, beta2, dtype: torch.dtype) -> None:
    """
    Muon on a stack of matrices (N, rows, columns), in place. Nesterov momentum, rows brought to one norm (arXiv
    2603.28254), orthogonalized, scaled to a fixed Frobenius norm (arXiv 2602.21545), variance-reduced (NorMuon, arXiv
    2510.05491), decayed only where update and weight agree in sign.
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    g = grad.lerp(momentum_buffer, momentum)
    row_norms = g.norm(dim=-1, keepdim=True)
    g = g * (row_norms.mean(dim=-2, keepdim=True) / row_norms.clamp_min(1e-7))
    u = orthogonalize(g.to(dtype)).float()
    target_norm = math.sqrt(min(p.size(-2), p.size(-1)))
    u = u * (target_norm / u.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7))

    second_moment.lerp_(u.square().mean(dim=_norm_dim(p), keepdim=True), 1 - beta2)
    u = u * second_moment.clamp_min(1e-10).rsqrt()
    u = u * (target_norm / u.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7))

    lr = lr * math.sqrt(max(1.0, p.size(-2) / p.size(-1)))
    p.sub_(lr * u + lr * decay * p * (u * p >= 0))


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix U Vᵀ of each matrix U S Vᵀ of a stack, by Polar Express."""
    x = g / (1.01 * g.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in POLAR_COEFFICIENTS:
        A = x @ x.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # not b * A + c * (A @ A): a rounding less, a fifth faster on a CPU
        x = torch.baddbmm(x, B, x, beta=a)
    return x.mT if tall else x
