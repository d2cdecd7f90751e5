"""linear_token_logprobs over processes: vocabulary shards and FSDP2's sharded weights equal one process.

Each test spawns its ranks once and runs all its cases in them; a rank that disagrees fails the test with its traceback.
"""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastpo import objectives
from fastpo.kernels.linear_preference_loss import linear_preference_loss
from fastpo.kernels.linear_token_logprobs import linear_token_logprobs
from fastpo.kernels.token_logprobs import STATS
from fastpo.types import Pairs, Segments

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

N, H, V = 24, 16, 103  # V is odd: the shards differ in size


def rank_main(rank: int, world: int, rendezvous: str, body) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    body(rank, world)
    dist.barrier()  # no rank leaves while another still talks to it
    os._exit(0)  # past the destructors of gloo's threads, which now and then abort a process that is done


def spawn(world: int, body) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (world, os.path.join(folder, "rendezvous"), body), nprocs=world)


def problem(dtype=torch.float32) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Leaves of a head with everything, labels [N] of which a quarter are ignored, an upstream gradient [N]."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, H), "weight": (V, H), "bias": (V,), "lora_a": (2, H), "lora_b": (V, 2)}
    leaves = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    labels = torch.randint(V, (N,), generator=generator)
    labels[:6], labels[6], labels[7] = -100, 0, V - 1
    return leaves, labels, torch.randn(N, generator=generator)


def run(leaves, labels, upstream, *, stats, trained, **settings):
    """(values, gradients) by name."""
    leaves = {name: leaf.detach().clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
    settings |= {"bias": leaves["bias"], "lora": (leaves["lora_a"], leaves["lora_b"], 0.5), "logit_softcap": 5.0}
    out = linear_token_logprobs(leaves["hidden"], leaves["weight"], labels, stats=stats, **settings)
    values = {"logps": out[0], **out[1]} if stats else {"logps": out}
    total = sum((values[name] * upstream).sum() for name in ("logps", *STATS[:3]) if name in values)
    return values, dict(zip(trained, torch.autograd.grad(total, [leaves[name] for name in trained]), strict=True))


def shard(name: str, tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    return tensor.tensor_split(world)[rank] if name in ("weight", "bias", "lora_b") else tensor


def assert_shards_equal_the_whole(rank: int, world: int) -> None:
    everything, name = ("hidden", "weight", "bias", "lora_a", "lora_b"), dist.group.WORLD.group_name
    cases = [
        {"stats": (), "trained": everything},
        {"stats": (), "trained": ("hidden",)},
        {"stats": STATS[:5], "trained": everything, "topk": 4},
        {"stats": ("label_set_prob",), "trained": ("hidden",), "label_set": torch.tensor([0, 50, V - 1])},
        {
            "stats": (),
            "trained": everything,
            "rows": torch.arange(N).flip(0) // 2,
            "group": name,
        },
    ]
    leaves, labels, upstream = problem()
    for case in cases:
        whole = run(leaves, labels, upstream, **{k: v for k, v in case.items() if k != "group"})
        parts = {name: shard(name, leaf, rank, world) for name, leaf in leaves.items()}
        values, grads = run(parts, labels, upstream, **{"group": dist.group.WORLD, **case})
        for name, value in values.items():
            torch.testing.assert_close(value, whole[0][name], msg=lambda text, name=name: f"{name}: {text}")
        for name, grad in grads.items():
            expected = shard(name, whole[1][name], rank, world)
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5, msg=lambda t, name=name: f"d {name}: {t}")
    labels[8] = V
    with pytest.raises(ValueError, match="labels has 103 at position 8; it should be from 0 to 102"):
        run({name: shard(name, leaf, rank, world) for name, leaf in leaves.items()}, labels, upstream,
            stats=(), trained=("hidden",), group=dist.group.WORLD)  # fmt: skip


def assert_sharded_weight_equals_the_whole(rank: int, world: int) -> None:
    """FSDP2: each rank has its tokens and a shard of the weight; gradients are averaged over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    leaves, labels, upstream = problem()
    mine = slice(rank * N // world, (rank + 1) * N // world)
    weight = distribute_tensor(leaves["weight"], mesh, [Shard(0)]).requires_grad_()
    logps = linear_token_logprobs(leaves["hidden"][mine], weight, labels[mine])
    (logps * upstream[mine]).sum().backward()
    whole = leaves["weight"].clone().requires_grad_()
    expected = linear_token_logprobs(leaves["hidden"], whole, labels)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(logps, expected[mine])
    assert weight.grad.placements == weight.placements
    torch.testing.assert_close(weight.grad.full_tensor(), whole.grad / world)

    # Over a group the same DTensor is taken for what it is, a shard of the vocabulary.
    parallel = linear_token_logprobs(leaves["hidden"], weight.detach(), labels, group=mesh.get_group())
    torch.testing.assert_close(parallel, expected)


def assert_sharded_loss_equals_the_whole(rank: int, world: int) -> None:
    """The same of linear_preference_loss: each rank has its pairs, as FSDP2's ranks have; bf16 too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        leaves, labels, _ = problem(dtype)
        ref = torch.full((N,), -4.0)
        mine = slice(rank * N // world, (rank + 1) * N // world)

        def loss(weight, part, leaves=leaves, labels=labels, ref=ref):
            size = (part.stop - part.start) // 2
            segments = Segments(cu_seqlens=torch.tensor([0, size, 2 * size]))
            pairs = Pairs.of(chosen=torch.tensor([0]), rejected=torch.tensor([1]))
            hidden = leaves["hidden"][part].clone().requires_grad_()
            given = (hidden, weight, labels[part], ref[part], segments, pairs, objectives.irpo())
            out = linear_preference_loss(*given)
            out.loss.backward()
            return out.loss.detach(), hidden.grad

        weight = distribute_tensor(leaves["weight"], mesh, [Shard(0)]).requires_grad_()
        found = loss(weight, mine)
        totals, expected = torch.zeros(V, H), None
        for other in range(world):
            own = leaves["weight"].clone().requires_grad_()
            part = slice(other * N // world, (other + 1) * N // world)
            values = loss(own, part)
            totals += own.grad.float() / world
            expected = values if other == rank else expected
        torch.testing.assert_close(found, expected)
        assert weight.grad.placements == weight.placements
        error = (weight.grad.full_tensor().float() - totals).abs().max()
        assert error <= tolerance * totals.abs().max()


def both(rank: int, world: int) -> None:
    assert_shards_equal_the_whole(rank, world)
    assert_sharded_weight_equals_the_whole(rank, world)
    assert_sharded_loss_equals_the_whole(rank, world)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world):
    spawn(world, both)
