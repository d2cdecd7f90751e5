"""One head over several processes: vocabulary shards of a process group, and FSDP's sharded weights.

Shards exchange each row's maximum, sums and picked logit, 6 numbers, and in the backward dhidden; never the logits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.kernels.linear_token_logprobs.engine import State


def resolve(name: str) -> "dist.ProcessGroup | None":
    """The process group of this name; None for ""."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[arg-type]


def vocab_range(size: int, device: torch.device, group: "dist.ProcessGroup | None") -> tuple[int, int]:
    """(first entry of this rank's shard, size of the whole vocabulary); waits for the device where there is a group.

    Shards are in rank order and may differ in size.
    """
    if group is None:
        return 0, size
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    sizes[dist.get_rank(group)] = size
    dist.all_reduce(sizes, group=group)
    counts = sizes.tolist()
    return sum(counts[: dist.get_rank(group)]), sum(counts)


def combine(
    state: State, inverse_temperature: Tensor, group: "dist.ProcessGroup | None"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(largest [R], sums [3, R], picked [E], top [R, k]) over the whole vocabulary from those of this shard."""
    if group is None:
        return state.largest, state.sums, state.picked, state.top
    largest = state.largest.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    finite = torch.where(largest == -torch.inf, 0.0, largest)
    shift = torch.where(state.largest == largest, 0.0, (state.largest - finite) * inverse_temperature)
    shift = shift.clamp_min(-1e4).to(state.sums.dtype)
    decay = shift.exp()
    sums = torch.stack(
        (state.sums[0] * decay, (state.sums[1] + state.sums[0] * shift) * decay, state.sums[2] * decay.square())
    )
    absent = state.picked.isnan()  # exact: a label of this shard whose logit is NaN makes its row's sum NaN
    found = torch.stack((torch.where(absent, 0.0, state.picked), (~absent).to(state.picked.dtype)))
    dist.all_reduce(sums, group=group)
    dist.all_reduce(found, group=group)
    picked = torch.where(found[1] == 1, found[0], torch.nan)
    top = state.top
    if top is not None:
        parts = [torch.empty_like(top) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, top.contiguous(), group=group)
        top = torch.cat(parts, dim=1).topk(top.shape[1], dim=1).values
    return largest, sums, picked, top


def maximum_over(group: "dist.ProcessGroup | None", tensor: Tensor | None) -> Tensor | None:
    """The elementwise largest over the group."""
    if group is not None and tensor is not None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor


def sum_over(group: "dist.ProcessGroup | None", *tensors: Tensor | None) -> None:
    """All-reduces each tensor in place."""
    if group is None:
        return
    for tensor in tensors:
        if tensor is not None:
            dist.all_reduce(tensor, group=group)


def name_of(group: "dist.ProcessGroup | str | None") -> str:
    """What a custom op can take for a process group."""
    if group is None or isinstance(group, str):
        return group or ""
    name = getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(f"group is a {type(group).__name__}; it should be a process group, or the name of one")
    return name


def local(weight: Tensor, group: "dist.ProcessGroup | str | None") -> Tensor:
    """The plain tensor behind a DTensor: this rank's shard where the op runs over a group, else all of it.

    Gathered weights are FSDP2's, so the gradient is reduced as FSDP2 reduces: averaged over the mesh, then scattered.
    """
    if not dist.is_available():
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    if group is not None:
        return weight.to_local()
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
