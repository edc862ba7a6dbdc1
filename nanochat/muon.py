"""
MuonAdamW, the optimizer: Muon for the matrices of the blocks, AdamW for everything else; for one rank and for many.

Muon (https://kellerjordan.github.io/posts/muon/) replaces each matrix's momentum (its averaged gradient) by
the nearest orthogonal matrix, so that all directions of the update are equally large. That suits matrices that multiply
activations; tables, lm_head and scalars do better with AdamW.

With many ranks there is no DDP wrapper: gradients are summed here (the loss is already normalized over all ranks), and
the optimizer's state is sharded as in ZeRO-2 (arXiv 1910.02054). A rank owns a slice of the rows of each large AdamW
table and some of the matrices of each Muon group. An optimizer step has three phases:

1. reduce   reduce-scatter the gradients: each rank gets the sum over all ranks of what it owns
2. compute  update what this rank owns
3. gather   all-gather the updated weights

With sharded weights (base_train --shard, sharding.py) the backward pass has summed the gradients already, and each rank
holds its rows of every matrix and table. AdamW updates them where they are. Muon needs whole matrices, and there are
two ways to them. For matrices of M bytes in all, on W ranks, each rank sends per step:
- all matrices to all ranks:          M (W - 1) / W         by an all-gather; each rank orthogonalizes all of them
- each matrix to the rank it is dedicated to, and its update back:  2 M (W - 1) / W²   by two all-to-alls
The second is W / 2 times less, and no rank repeats the work of another, so this is what phases 1 and 3 do. On two ranks
the bytes are equal. The states of Muon are those of whole matrices in both modes.

Phase 1 is complete before phase 2 starts, because the training loop checks loss and gradient norm in between: the loop
calls `reduce_gradients` (phase 1) and then `step` (phases 2 and 3). The gather of a group overlaps with the computation
of the groups after it. AdamW updates its weights in place. Muon updates a stacked copy of a group's matrices, which is
copied back to the parameters: at once on a single rank, otherwise after the gather.

On two CPU ranks over gloo, 53 to 65 % of the time of all transfers is hidden behind computation, and in phases 2 and 3
alone 80 to 85 % (from the profiler's trace; depth 4, width 512, vocabulary 8,192, on a busy machine). With sharded
weights it is 13 %, as fully_shard waits for each transfer on a CPU; on a GPU it has separate streams for them.

Two things that are not done:
- starting phase 1 by hooks on the parameters while the last backward pass still runs. On GPUs the model is compiled in
  parts (GPT.compile_parts), so the hooks would run in time, and the transfer of the gradients is 14 of 451 ms of a step
  (depth 22, 8xH100, calculated in docs/time_to_gpt2.md). But ranks without micro-batches, which fine-tuning has, would
  start in another order and wait for each other forever. A model that is compiled as a whole returns all gradients at
  the end of its backward pass.
- allocating the buffers of phases 1 and 3 once. It made 600 steps of another nanochat 377 -> 261 s, as its allocator
  then no longer freed and mapped memory in every step (karpathy/nanochat #830). Ours does not: the handle of a transfer
  releases its buffers when it has been waited for, and hardware.py sets expandable_segments, so the backward pass and
  the optimizer share one range of memory. Depth 22, vocabulary 49,152, 8 ranks, counted on a null GPU: no memory is
  mapped after the second step, or after the fifth where the GPU has only 1 % more memory than the peak
  (tests/test_null_gpu.py); the planner leaves 3 % free. Buffers that stay would take 2.2 GiB more in the backward pass,
  where the peak is.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.gpt import GPT

# torch 2.13 has new names for these two functions and warns about the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

ADAM_EPS = 1e-10  # far below 1e-8: gradients of embedding rows are tiny, and a large eps would damp their steps
NORMUON_BETA2 = 0.9
SHARD_MIN_NUMEL = 2**14  # smaller AdamW parameters are replicated: a transfer costs more than their update (heuristic)
# Polar Express (arXiv 2505.16932): one quintic polynomial per iteration. Each is optimal for the range of singular
# values that remains after the one before.
POLAR_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share learning rate and weight decay. recipe.param_groups makes the groups."""

    name: str
    prefixes: tuple[str, ...]  # of the parameters' names
    lr: float
    weight_decay: float
    betas: tuple[float, float] | None = None  # of AdamW; None = this group is Muon's
    skips_first_step: bool = False  # its learning rate is 0 in the first one of pretraining (recipe.py)


@dataclass(frozen=True)
class StepSchedule:
    """What a schedule (nanochat/recipe.py) sets for one optimizer step."""

    lr_multiplier: float  # on the learning rates of all groups
    muon_momentum: float
    decay_multiplier: float = 1.0  # on Muon's weight decay; AdamW's is constant
    is_first_step: bool = False  # groups with skips_first_step get a learning rate of 0


def build_optimizer(
    model: GPT, groups: Iterable[ParamGroup], *, rank: int = 0, world_size: int = 1, compile: bool = False
) -> "MuonAdamW":
    """
    Sorts a model's trainable parameters into the groups. A Muon group is split by shape, as matrices of one shape are
    stacked and updated together.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    param_groups: list[dict[str, Any]] = []
    for group in groups:
        names = [name for name in named if name.startswith(group.prefixes)]
        parts = [names]
        if group.betas is None:
            shapes = sorted({named[name].shape for name in names})
            parts = [[name for name in names if named[name].shape == shape] for shape in shapes]
        options: dict[str, Any] = {
            "name": group.name,
            "kind": "muon" if group.betas is None else "adamw",
            "lr": group.lr,
            "initial_lr": group.lr,
            "decay": group.weight_decay,
            "initial_decay": group.weight_decay,
            "skips_first_step": group.skips_first_step,
            "betas": group.betas,
        }
        for part in parts:
            param_groups.append(options | {"names": part, "params": [named[name] for name in part]})
    return MuonAdamW(param_groups, rank=rank, world_size=world_size, compile=compile, dtype=model.dtype)


@dataclass
class Update:
    """What the three phases know of one AdamW parameter, or of the matrices of one Muon group."""

    group: dict[str, Any]
    params: list[torch.Tensor]
    # Of what this rank owns, summed over the ranks once `reduce` is done. For Muon on sharded weights its matrices as
    # they arrive: the rows that rank 0 had of each of them, those of rank 1, …
    grad: torch.Tensor
    is_sharded: bool  # False: every rank has the whole gradient and makes the same update
    reduce: Any = None  # the handle of the reduction; None on a single rank
    gather: Any = None  # the handle of the all-gather
    # Muon: the updated matrices of all ranks; for sharded weights this rank's rows of all update directions
    gathered: torch.Tensor | None = None


class MuonAdamW(torch.optim.Optimizer):
    """
    Groups of kind "adamw" hold lr, betas and decay; groups of kind "muon" hold lr, momentum, decay and matrices of one
    shape. `dtype` is that of Muon's orthogonalization.
    """

    def __init__(self, groups: list[dict[str, Any]], *, rank: int, world_size: int, compile: bool, dtype: torch.dtype):
        super().__init__(groups, {"momentum": 0.95})
        self.rank = rank
        self.world_size = world_size
        self.dtype = dtype if dtype == torch.bfloat16 else torch.float32  # float16 would overflow
        self.num_steps = 0
        self.pending: list[Update] = []  # reduced gradients that `step` has not used yet
        # On a CPU compiling the updates costs 20 s and saves 15 ms a step (depth 4, width 256).
        self.compiles = compile and groups[0]["params"][0].is_cuda
        # The functions that compute an update and apply it in place. AdamW's is torch's fused kernel, or is compiled.
        self.adamw_kernel: Callable[..., None] = fused_adamw_update
        self.muon_kernel: Callable[..., None] = muon_update
        self.direction_kernel: Callable[..., torch.Tensor] = muon_direction
        if self.compiles:
            self.direction_kernel = torch.compile(muon_direction, dynamic=False)
            self.adamw_kernel = torch.compile(adamw_update, dynamic=False)
            self.muon_kernel = torch.compile(muon_update, dynamic=False)

    def set_schedule(self, schedule: StepSchedule) -> None:
        """Sets learning rates, momentum and weight decay of the next step."""
        for group in self.param_groups:
            is_skipped = schedule.is_first_step and group["skips_first_step"]
            group["lr"] = 0.0 if is_skipped else group["initial_lr"] * schedule.lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = schedule.muon_momentum
                group["decay"] = group["initial_decay"] * schedule.decay_multiplier

    def params(self) -> list[torch.Tensor]:
        """All parameters that this optimizer updates."""
        return [p for group in self.param_groups for p in group["params"]]

    def learning_rates(self) -> dict[str, float]:
        """The learning rates of the next step by group, for the log; Muon's groups share one."""
        return {group["name"]: group["lr"] for group in self.param_groups}

    @torch.no_grad()
    def reduce_gradients(self) -> torch.Tensor:
        """
        Phase 1. Returns this rank's part of the squared gradient norm, a float32 scalar. Summed over the ranks, the
        parts are the squared norm of the whole gradient.
        """
        self.pending = []
        for group in self.param_groups:
            if group["kind"] == "muon":
                self.pending.append(self._reduce_muon(group))
            else:
                self.pending += [self._reduce_adamw(group, p) for p in group["params"]]
        squares = []
        for update in self.pending:
            if update.reduce:
                update.reduce.wait()
            square = torch.linalg.vector_norm(update.grad, dtype=torch.float32).square()
            if not update.is_sharded:
                square = square / self.world_size  # every rank has it whole, and the caller adds up the ranks
            squares.append(square)
        return torch.stack(squares).sum()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Phases 2 and 3, with the gradients of reduce_gradients; calls it first if the caller has not."""
        if not self.pending:
            self.reduce_gradients()
        self.num_steps += 1
        for update in self.pending:
            if update.group["kind"] == "muon":
                self._compute_muon(update)
            else:
                self._compute_adamw(update)
        for update in self.pending:
            if update.gather:
                update.gather.wait()
            if update.gathered is not None:
                self._apply_gathered(update)
        self.pending = []

    # ---- AdamW: a parameter at a time, large ones sharded by rows ----

    def _reduce_adamw(self, group: dict[str, Any], p: torch.Tensor) -> Update:
        if is_sharded(p):
            return Update(group, [p], local(_grad(p)), is_sharded=True)
        grad = _grad(p)
        if self._shares_rows(p):
            own = torch.empty_like(self._own_rows(p))
            return Update(group, [p], own, is_sharded=True, reduce=reduce_scatter(own, grad, async_op=True))
        work = dist.all_reduce(grad, async_op=True) if self.world_size > 1 else None
        return Update(group, [p], grad, is_sharded=False, reduce=work)

    def _compute_adamw(self, update: Update) -> None:
        group, (p,) = update.group, update.params
        shares_rows = self._shares_rows(p)
        weights = self._own_rows(p) if shares_rows else local(p)
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(weights)
            state["exp_avg_sq"] = torch.zeros_like(weights)
        beta1, beta2 = group["betas"]
        scalars = self._scalars(group["lr"], group["decay"], beta1, beta2, self.num_steps)
        self.adamw_kernel(weights, update.grad, state["exp_avg"], state["exp_avg_sq"], *scalars)
        if shares_rows:
            update.gather = all_gather(p.data, weights.clone(), async_op=True)

    def _shares_rows(self, p: torch.Tensor) -> bool:
        """Whether each rank updates a slice of the rows of a replicated parameter."""
        is_large = p.numel() >= SHARD_MIN_NUMEL and p.size(0) % self.world_size == 0
        return self.world_size > 1 and is_large and not is_sharded(p)

    def _own_rows(self, p: torch.Tensor) -> torch.Tensor:
        return p.data.chunk(self.world_size)[self.rank]

    # ---- Muon: a stack of matrices at a time, sharded by matrices ----

    def _reduce_muon(self, group: dict[str, Any]) -> Update:
        params = group["params"]
        if is_sharded(params[0]):
            rows = math.ceil(params[0].size(0) / self.world_size)
            shards = torch.stack(self._padded([_pad_rows(local(_grad(p)), rows) for p in params]))
            received = torch.empty_like(shards)
            work = dist.all_to_all_single(received, shards, async_op=True)
            return Update(group, params, received, is_sharded=True, reduce=work)
        grads = torch.stack(self._padded([_grad(p) for p in params]))
        if self.world_size == 1:
            return Update(group, params, grads, is_sharded=False)
        own = torch.empty_like(grads[: self._num_own(params)])
        return Update(group, params, own, is_sharded=True, reduce=reduce_scatter(own, grads, async_op=True))

    def _compute_muon(self, update: Update) -> None:
        group, params = update.group, update.params
        if is_sharded(params[0]):
            self._compute_direction(update)
            return
        first = self.rank * self._num_own(params)
        # A copy of the matrices that this rank owns.
        weights = torch.stack(self._padded(list(params))[first : first + self._num_own(params)])
        state = self._muon_state(params, update.grad)
        scalars = self._scalars(group["lr"], group["decay"], group["momentum"], NORMUON_BETA2)
        self.muon_kernel(weights, update.grad, state["momentum_buffer"], state["second_moment"], *scalars, self.dtype)
        if self.world_size == 1:
            self._copy_to_params(params, weights)
            return
        update.gathered = weights.new_empty((self._num_own(params) * self.world_size, *weights.shape[1:]))
        update.gather = all_gather(update.gathered, weights, async_op=True)

    def _compute_direction(self, update: Update) -> None:
        """Muon on sharded weights: directions of the matrices that this rank owns, sent to the owners of their rows."""
        group, params = update.group, update.params
        num_own, num_rows = self._num_own(params), params[0].size(0)
        by_source = update.grad.unflatten(0, (self.world_size, num_own))
        grads = by_source.transpose(0, 1).flatten(1, 2)[:, :num_rows].contiguous()
        state = self._muon_state(params, grads)
        scalars = self._scalars(group["momentum"], NORMUON_BETA2)
        u = self.direction_kernel(grads, state["momentum_buffer"], state["second_moment"], *scalars, self.dtype)
        u = F.pad(u, (0, 0, 0, by_source.size(2) * self.world_size - num_rows))
        shards = u.unflatten(1, (self.world_size, -1)).transpose(0, 1).flatten(0, 1)
        update.gathered = torch.empty_like(shards)
        update.gather = dist.all_to_all_single(update.gathered, shards.contiguous(), async_op=True)

    def _muon_state(self, params: list[torch.Tensor], grads: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a group, for the matrices that this rank owns: the entry of the first parameter."""
        state = self.state[params[0]]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grads)
            state["second_moment"] = torch.zeros_like(grads.mean(dim=_norm_dim(grads), keepdim=True))
        return state

    def _apply_gathered(self, update: Update) -> None:
        assert update.gathered is not None
        params, group = update.params, update.group
        if not is_sharded(params[0]):
            self._copy_to_params(params, update.gathered)
            return
        for p, u in zip(params, update.gathered, strict=False):  # the rest is padding
            rows = local(p)
            apply_direction(rows, u[: rows.size(0)], group["lr"], group["decay"], p.shape)

    @staticmethod
    def _copy_to_params(params: list[torch.Tensor], stack: torch.Tensor) -> None:
        torch._foreach_copy_(params, list(stack[: len(params)].unbind()))  # the rest is padding

    def _num_own(self, params: list[torch.Tensor]) -> int:
        """Matrices of a group per rank."""
        return math.ceil(len(params) / self.world_size)

    def _padded(self, matrices: list[torch.Tensor]) -> list[torch.Tensor]:
        """The matrices of a group, padded with zero matrices to a multiple of the number of ranks."""
        missing = self._num_own(matrices) * self.world_size - len(matrices)
        return matrices + [torch.zeros_like(matrices[0])] * missing

    def _scalars(self, *values: float) -> tuple[Any, ...]:
        """As tensors where updates are compiled: a float that changes would mean compiling again."""
        return tuple(torch.tensor(v, dtype=torch.float32) for v in values) if self.compiles else values

    # ---- state for checkpoints: whole tensors by parameter name, independent of the number of ranks ----

    def full_state(self) -> dict[str, torch.Tensor]:
        """
        Returns all state on the CPU, `<parameter>.<state>` → tensor, on rank 0; an empty dict on the others, to save
        memory of the host. All ranks have to call it.
        """
        full = {"num_steps": torch.tensor(self.num_steps)} if self.rank == 0 else {}
        for group in self.param_groups:
            for name, value in self._whole_states(group):
                if self.rank == 0:
                    full[name] = value.to("cpu", copy=True)
        return full

    def _whole_states(self, group: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Gathers the states of a group, at most one matrix of each rank at a time. Collective."""
        names, params = group["names"], group["params"]
        if group["kind"] == "adamw":
            for name, p in zip(names, params, strict=True):
                is_part = is_sharded(p) or self._shares_rows(p)
                for key, value in self.state[p].items():
                    yield f"{name}.{key}", gather_rows(value, p.size(0), self.world_size) if is_part else value
            return
        for key, stack in self.state[params[0]].items():
            for i, own in enumerate(stack):
                matrices = gather_rows(own[None], self.world_size, self.world_size)  # the i-th of each rank
                for name, matrix in zip(names[i :: len(stack)], matrices, strict=False):  # the last are padding
                    yield f"{name}.{key}", matrix

    def load_full_state(self, full: Mapping[str, torch.Tensor]) -> None:
        """
        Loads what full_state returned, on any number of ranks. It takes one tensor at a time from the mapping, which
        may read it from a file then. UserError if it belongs to another model.
        """
        self.num_steps = int(full["num_steps"])
        if self.num_steps == 0:
            return
        for group in self.param_groups:
            if group["kind"] == "adamw":
                for name, p in zip(group["names"], group["params"], strict=True):
                    for key in ("exp_avg", "exp_avg_sq"):
                        value = _stored(full, name, key, p.shape)
                        if is_sharded(p) or self._shares_rows(p):
                            value = own_rows(value, self.rank, self.world_size)
                        self.state[p][key] = value.to(p.device, copy=True)
            else:
                self._load_muon(group, full)

    def _load_muon(self, group: dict[str, Any], full: Mapping[str, torch.Tensor]) -> None:
        params = group["params"]
        own = range(self.rank * self._num_own(params), (self.rank + 1) * self._num_own(params))
        stacks: dict[str, list[torch.Tensor]] = {"momentum_buffer": [], "second_moment": []}
        for i in own:
            name = group["names"][min(i, len(params) - 1)]
            momentum = _stored(full, name, "momentum_buffer", params[0].shape)
            second_moment = full[f"{name}.second_moment"]
            is_padding = i >= len(params)
            stacks["momentum_buffer"].append(torch.zeros_like(momentum) if is_padding else momentum)
            stacks["second_moment"].append(torch.zeros_like(second_moment) if is_padding else second_moment)
        for key, matrices in stacks.items():
            self.state[params[0]][key] = torch.stack(matrices).to(params[0].device)


def _stored(full: Mapping[str, torch.Tensor], name: str, key: str, shape: torch.Size) -> torch.Tensor:
    """The state of a parameter, which has its shape. UserError if it is missing or has another shape."""
    value = full.get(f"{name}.{key}")
    if value is None or value.shape != shape:
        raise UserError(f"the optimizer state does not fit {name}: it was saved by another model")
    return value


# ---- sharded tensors (sharding.py) ----


def is_sharded(p: torch.Tensor) -> bool:
    """Whether the rows are split over the ranks (DTensor, whose module takes a second to import)."""
    return hasattr(p, "to_local")


def local(p: Any) -> torch.Tensor:
    """This rank's rows of a sharded tensor; any other tensor itself."""
    return p.to_local() if is_sharded(p) else p


def own_rows(whole: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """The rows of one rank, a view, split as by torch.chunk: the last ranks may have fewer, or none."""
    size = math.ceil(whole.size(0) / world_size)
    return whole[rank * size : (rank + 1) * size]


def gather_rows(own: torch.Tensor, num_rows: int, world_size: int) -> torch.Tensor:
    """The whole tensor from the rows of all ranks. Collective."""
    if world_size == 1:
        return own
    size = math.ceil(num_rows / world_size)
    whole = own.new_empty((size * world_size, *own.shape[1:]))
    all_gather(whole, _pad_rows(own, size))
    return whole[:num_rows]


@torch.no_grad()
def gather_weights(params: Mapping[str, torch.Tensor], rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Whole copies of the parameters on the CPU, on rank 0; an empty dict on the others. Collective if sharded."""
    weights = {}
    for name, p in params.items():
        whole = gather_rows(local(p), p.size(0), world_size) if is_sharded(p) else p
        if rank == 0:
            weights[name] = whole.detach().to("cpu", copy=True).contiguous()
    return weights


def _pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Appends rows of zeros."""
    return torch.cat([x, x.new_zeros((num_rows - x.size(0), *x.shape[1:]))]) if x.size(0) < num_rows else x.contiguous()


# ---- the updates ----


def _grad(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _norm_dim(x: torch.Tensor) -> int:
    """The axis to average over: tall and square matrices get one number per row, wide ones one per column."""
    return -1 if x.size(-2) >= x.size(-1) else -2


def adamw_update(p, grad, exp_avg, exp_avg_sq, lr, decay, beta1, beta2, step) -> None:
    """AdamW with decoupled weight decay and bias correction (arXiv 1711.05101), in place."""
    p.mul_(1 - lr * decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    root = (exp_avg_sq / (1 - beta2**step)).sqrt() + ADAM_EPS
    p.sub_(lr / (1 - beta1**step) * exp_avg / root)


def fused_adamw_update(p, grad, exp_avg, exp_avg_sq, lr, decay, beta1, beta2, step) -> None:
    """The same update by torch's fused kernel, where it is not compiled: 3.8 instead of 20 ms a step on a CPU."""
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": decay, "eps": ADAM_EPS}
    steps = [torch.full((), float(step), device=p.device)]  # filled there: torch.tensor would wait for a copy
    torch._fused_adamw_([p], [grad], [exp_avg], [exp_avg_sq], [], steps, **options, amsgrad=False, maximize=False)


def muon_update(p, grad, momentum_buffer, second_moment, lr, decay, momentum, beta2, dtype: torch.dtype) -> None:
    """One Muon step on a stack of matrices (N, rows, columns), in place."""
    u = muon_direction(grad, momentum_buffer, second_moment, momentum, beta2, dtype)
    apply_direction(p, u, lr, decay, p.shape)


def muon_direction(grad, momentum_buffer, second_moment, momentum, beta2, dtype: torch.dtype) -> torch.Tensor:
    """
    The direction of the update of a stack of matrices (N, rows, columns); changes their momentum and second moment:

    1. Nesterov momentum
    2. all rows scaled to one norm (arXiv 2603.28254)
    3. orthogonalized by Polar Express (arXiv 2505.16932), in `dtype`
    4. scaled to Frobenius norm sqrt(min(rows, columns)), that of an orthogonal matrix (arXiv 2602.21545)
    5. NorMuon (arXiv 2510.05491): each row (or column) is divided by its running root mean square, the norm restored
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    g = grad.lerp(momentum_buffer, momentum)

    row_norms = g.norm(dim=-1, keepdim=True)
    g = g * (row_norms.mean(dim=-2, keepdim=True) / row_norms.clamp_min(1e-7))

    u = orthogonalize(g.to(dtype)).float()
    target_norm = math.sqrt(min(grad.size(-2), grad.size(-1)))
    u = u * (target_norm / u.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7))

    second_moment.lerp_(u.square().mean(dim=_norm_dim(grad), keepdim=True), 1 - beta2)
    u = u * second_moment.clamp_min(1e-10).rsqrt()
    return u * (target_norm / u.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7))


def apply_direction(p, u, lr, decay, shape: torch.Size) -> None:
    """
    Moves weights against the direction, in place. shape: of the whole matrices, of which p may be some rows. Weight
    decay applies only where u and the weight have the same sign: there the update, which subtracts u, moves the weight
    toward zero too, so the two never work against each other.
    """
    lr = lr * math.sqrt(max(1.0, shape[-2] / shape[-1]))  # tall matrices take larger steps
    p.sub_(lr * u + lr * decay * p * (u * p >= 0))


def orthogonalize(g: torch.Tensor) -> torch.Tensor:
    """
    Polar Express: returns approximately U Vᵀ for each matrix G = U S Vᵀ of a stack (N, rows, columns). Instead of an
    SVD it takes only matrix products: five polynomials in G bring its singular values near 1 (0.8 to 1.2, which is
    close enough to train equally well).
    """
    x = g / (1.01 * g.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # X Xᵀ is the smaller product for wide matrices
    for a, b, c in POLAR_COEFFICIENTS:
        A = x @ x.mT
        # baddbmm instead of b * A + c * (A @ A): one rounding less, and a fifth faster on a CPU.
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        x = torch.baddbmm(x, B, x, beta=a)
    return x.mT if tall else x
