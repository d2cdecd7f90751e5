"""token_logprobs as an op: registration, torch.compile, what it refuses. Values: tests/test_token_logprobs.py."""

import pytest
import torch

from fastpo.kernels.token_logprobs import token_logprobs


def test_opcheck():
    logits, labels = torch.randn(1, 6, 50, requires_grad=True), torch.randint(50, (6,))
    stats = "entropy,sum_p2,topk_mass"
    forward = torch.ops.fastpo.token_logprobs_fwd
    torch.library.opcheck(forward, (logits, labels, None, None, 1.0, 0.0, -100, 4, stats, False))
    torch.library.opcheck(forward, (logits, labels, torch.ones(6), torch.tensor([3]), 1.0, 5.0, -100, 4, "", False))
    with torch.no_grad():
        _, normalizer, *_ = forward(logits, labels, None, None, 1.0, 0.0, -100, 4, stats, False)
        args = (logits.detach(), labels, None, 1.0, 0.0, -100, normalizer, torch.ones(6), torch.randn(3, 6))
        torch.library.opcheck(torch.ops.fastpo.token_logprobs_bwd, args)
        torch.library.opcheck(torch.ops.fastpo.token_logprobs_bwd_, args)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole(inplace):
    """fullgraph: one graph forward, one backward, also when the number of rows changes; same bits as eager."""

    def loss(hidden, weight, labels):
        logps, stats = token_logprobs(hidden @ weight, labels, stats=("entropy",), inplace_backward=inplace)
        return (logps + 0.1 * stats["entropy"]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 8):
        hidden, labels = torch.randn(n, 4, requires_grad=True), torch.randint(50, (n,))
        weight = torch.randn(4, 50)
        (expected,) = torch.autograd.grad(loss(hidden, weight, labels), hidden)
        (grad,) = torch.autograd.grad(compiled(hidden, weight, labels), hidden)
        assert torch.equal(grad, expected)


LOGITS, LABELS = torch.zeros(3, 7), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("logits", "labels", "settings", "message"),
    [
        (LOGITS.int(), LABELS, {}, "logits is torch.int32; it should be float32"),
        (LOGITS[:, :0], LABELS, {}, r"logits has shape \[3, 0\]; it should be \[..., V\] with V >= 1"),
        (LOGITS, LABELS.float(), {}, "labels is torch.float32; it should be an integer type"),
        (LOGITS, LABELS[:2], {}, r"labels has shape \[2\]; it should be \[3\]"),
        (LOGITS, LABELS + 7, {}, r"labels has 7 at position 0; it should be from 0 to 6, or ignore_index \(-100\)"),
        (LOGITS, LABELS - 1, {}, "labels has -1 at position 0"),
        (LOGITS, LABELS, {"temperature": 0.0}, "temperature is 0.0; it should be a positive number"),
        (LOGITS, LABELS, {"temperature": torch.ones(2)}, r"temperature has shape \[2\]; it should be \[3\]"),
        (LOGITS, LABELS, {"temperature": LABELS}, "temperature is torch.int64; it should be a floating"),
        (LOGITS, LABELS, {"temperature": torch.tensor([1, 0.0, 1])}, "temperature has 0.0 at row 1"),
        (LOGITS, LABELS, {"temperature": torch.ones(3, requires_grad=True)}, "temperature requires grad"),
        (LOGITS, LABELS, {"logit_softcap": -1.0}, "logit_softcap is -1.0; it should be a positive number, or None"),
        (LOGITS, LABELS, {"stats": ("entropie",)}, "stats contains 'entropie'; it should contain only logsumexp,"),
        (LOGITS, LABELS, {"stats": "entropy"}, "stats is the string 'entropy'; it should be a sequence"),
        (LOGITS, LABELS, {"topk": 17}, "topk is 17; it should be from 1 to 16"),
        (LOGITS, LABELS, {"label_set": LABELS[:1]}, "label_set is given; it should be given exactly when"),
        (LOGITS, LABELS, {"stats": ("label_set_prob",)}, "label_set is missing"),
        (
            LOGITS,
            LABELS,
            {"stats": ("label_set_prob",), "label_set": torch.tensor([7])},
            "its ids should be from 0 to 6",
        ),
        (LOGITS, LABELS, {"stats": ("label_set_prob",), "label_set": LABELS}, "its ids should be distinct"),
        (LOGITS, LABELS, {"stats": ("label_set_prob",), "label_set": LABELS[0]}, "should be a vector of integer token"),
    ],
)
def test_errors_name_the_argument_in_one_line(logits, labels, settings, message):
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        token_logprobs(logits, labels, **settings)
    assert "\n" not in str(raised.value)
