"""The launchers of the Triton kernels get as far as the launch without a GPU.

The interpreter never binds arguments as triton's launcher does (which types, which specialised, which constant), and
fastpo.aot compiles what it is told. Here a stub stands for the driver: every launch is bound and compiled for sm_90 as
on a GPU, then not launched. In a process of its own, since this one may interpret its kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastpo.dispatch import triton_missing

ROOT = Path(__file__).resolve().parents[1]
STUB = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
compiled, run = set(), JITFunction.run

def bind(self, *args, grid, warmup, **kwargs):
    compiled.add((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs).hash))

JITFunction.run = bind
"""
PREFERENCE_LOSS = """
from preference_loss_cases import TOKEN_FIELDS, Batch
from fastpo import objectives
from fastpo.kernels.preference_loss import records, triton_kernels

def step(batch, given=False):
    tensors = {**batch.leaves, "ref_logps": batch.ref, "cu_seqlens": batch.cu, "mask": batch.mask}
    tensors = {n: x.float() if x is not None and x.dtype == torch.float64 else x for n, x in tensors.items()}
    tokens = records.Tokens(**dict.fromkeys(records.Tokens._fields) | tensors)
    columns = {n: x.float() for n, x in batch.columns.items()}
    tuples = records.Tuples(**dict.fromkeys(records.Tuples._fields) | columns | {"index": batch.index})
    setting = records.token_settings(batch.objective)
    scores = torch.zeros(len(batch.cu) - 1) if given else None
    out = triton_kernels.forward(tokens, scores, tuples, setting, records.TupleSettings.of(batch.objective))
    needs = [getattr(tokens, name) is not None for name in records.TokenGrads._fields]
    for some in (needs, [True] + [False] * 5):
        triton_kernels.backward(torch.ones(()), out.score_grads, out.nll_grads, tokens, out.lengths, setting, some)

step(Batch(objectives.dpo()))
step(Batch(objectives.dpo(), mask=False))
step(Batch(objectives.cpo(), fields=("pairs.weights", "pairs.margins", "pairs.beta_scales")))
step(Batch(objectives.orpo(), fields=[f"segments.{name}" for name in TOKEN_FIELDS]), given=True)
step(Batch(objectives.irpo(), (9000, 8192), ((0, 1),)))
before = len(compiled)
for pairs in (16, 17, 31, 64):
    for tokens in (250, 241, 255):
        step(Batch(objectives.dpo(beta=0.01 * pairs), (tokens,) * 2 * pairs, [(i, i + pairs) for i in range(pairs)]))
print(before, len(compiled) - before)
"""

TOKEN_LOGPROBS = """
from token_logprobs_cases import rows
from fastpo.kernels.token_logprobs import op

def step(n, vocab, dtype=torch.bfloat16, stats="", inner=1, softcap=0.0, per_row=False, label_set=None, topk=10):
    logits, labels = rows(n * inner, vocab, dtype)
    temperatures = torch.ones(n * inner) if per_row else None
    logits = logits.view(n, inner, vocab)
    outputs = op._allocate(logits, labels, stats.split(","))
    scalars = (0.5, softcap, -100)
    op._Triton.forward(logits, labels, temperatures, label_set, *scalars, topk, *outputs)
    for coefs in (None, torch.zeros(3, n * inner)):
        grads = (outputs[1], torch.ones(n * inner), coefs)
        op._Triton.backward(logits, labels, temperatures, *scalars, *grads, torch.empty_like(logits))

step(20, 4096)
step(20, 4097, torch.float32, ",".join(op.STATS), 1, 30.0, True, torch.tensor([1, 2, 3]))
step(3, 40960, torch.float16, ",".join(op.STATS), 1, 30.0, True, torch.tensor([1, 2, 3]))
step(3, 40960)
before = len(compiled)
for n, inner in ((17, 1), (32, 1), (9, 5), (1000, 1)):
    step(n, 4096, inner=inner)
print(before, len(compiled) - before)
"""

LINEAR_TOKEN_LOGPROBS = """
from fastpo.kernels.linear_token_logprobs import triton_kernels

def step(rows, width=8192, dtype=torch.bfloat16, hidden=4096, bias=None, softcap=0.0, top=0, start=0, moments=False):
    z, row = torch.empty(rows, width), torch.empty(rows)
    starts, labels, values = torch.arange(rows + 1), torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    first = (bias, row, starts, labels, start, 1.5, softcap, row)
    top = torch.empty(rows, top) if top else None
    sums = torch.empty(3, rows, dtype=torch.float64)
    for out in (z.to(dtype), None):
        triton_kernels.forward(z, out, None, *first[:-1], 20.0, row, sums, row, values, top, moments)
    triton_kernels.gradient(z, z.to(dtype), *first, row, torch.empty(3, rows), values)
    weight = torch.empty(8, hidden, dtype=dtype)
    triton_kernels.finish(torch.empty(rows, hidden), row, starts, labels, weight, values, torch.empty(rows, hidden))

step(32)
step(32, 257, torch.float32, 100, torch.empty(257), 30.0, 5, 512, True)
before = len(compiled)
for rows in (17, 64, 1000):
    for start in (0, 8192, 24576):
        step(rows, start=start)
    step(rows, 257, torch.float32, 100, torch.empty(257), 20.0, 16, 1024, True)
print(before, len(compiled) - before)
"""

TREE_ATTENTION = """
from tree_attention_cases import chain, random_forest, tensors
from fastpo import attention_blocks
from fastpo.kernels.tree_attention import triton_kernels

def step(tree, heads=(4, 2), size=64, dtype=torch.bfloat16, sinks=False, softcap=0.0, window=0):
    *qkv, sinks = [*tensors(tree, heads, size, dtype, sinks), *[None] * (not sinks)]
    q, k, v = (x.detach() for x in qkv)
    sinks = None if sinks is None else sinks.detach()
    settings = (attention_blocks(tree), sinks, 0.125, softcap, window)
    out, logsumexp = triton_kernels.forward(q, k, v, *settings)
    triton_kernels.backward(q, q, k, v, out, logsumexp, *settings)

step(chain(70))
step(chain(70), (6, 2), 80, torch.float16, True, 30.0, 5)
before = len(compiled)
for n in (71, 128, 1000):
    step(random_forest(n, 0.1))
    step(random_forest(n, 0.1), (6, 2), 80, torch.float16, True, 20.0, 7)
print(before, len(compiled) - before)
"""


def launch(script: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run([sys.executable, "-c", STUB + script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(triton_missing() == "triton is not installed", reason="triton is not installed")
def test_preference_loss_compiles_for_any_batch_once():
    """Neither the number of pairs, nor that of tokens, nor beta is compiled in, once each kernel's kinds are there."""
    kinds, more = map(int, launch(PREFERENCE_LOSS).split())
    assert kinds >= 20
    assert more <= 2  # another block size of sums and backward


@pytest.mark.skipif(triton_missing() == "triton is not installed", reason="triton is not installed")
def test_token_logprobs_compiles_for_any_batch_once():
    """Forward, join and backward with all arguments and with none; then no number of rows compiles anything."""
    kinds, more = map(int, launch(TOKEN_LOGPROBS).split())
    assert kinds >= 12
    assert more == 0


@pytest.mark.skipif(triton_missing() == "triton is not installed", reason="triton is not installed")
def test_linear_token_logprobs_compiles_for_any_batch_once():
    """All tile functions with all arguments and with none; then no number of rows and no tile compiles anything."""
    kinds, more = map(int, launch(LINEAR_TOKEN_LOGPROBS).split())
    assert kinds >= 8
    assert more == 0


@pytest.mark.skipif(triton_missing() == "triton is not installed", reason="triton is not installed")
def test_tree_attention_compiles_for_any_forest_once():
    """All four kernels with all arguments and with none; then no number of tokens and no tree compiles anything."""
    kinds, more = map(int, launch(TREE_ATTENTION).split())
    assert kinds == 8
    assert more == 0
