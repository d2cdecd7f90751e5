"""What ``fastpo info`` says a fused head costs is what the ops plan to do."""

from fastpo import info

OPS = ("linear_token_logprobs", "linear_preference_loss")


def test_info_says_what_a_head_costs():
    rows = info.head_rows()
    assert [row[:3] for row in rows if row[1] != "trained head"] == [
        (op, mode, gemms) for op in OPS for mode, gemms in (("no gradient", "1.00F"), ("frozen head", "2.00F"))
    ]
    assert all("1F for the logits" in why for *_, why in rows)


def test_a_budget_costs_logits_made_again_or_groups():
    trained = [row for row in info.head_rows((4096, 32000, 1024), 192 * 2**20) if row[1] == "trained head"]
    (logps, loss), sizes = trained, [int(row[3]) for row in trained]
    assert 3.5 < float(logps[2].rstrip("F")) < 4 and "that memory_budget does not hold" in logps[4]
    assert loss[2] == "3.00F" and "groups of whole pairs" in loss[4]
    assert max(sizes) <= 192


def test_pairs_of_any_number_of_tokens():
    for tokens in (1, 255, 512, 700):
        segments, pairs = info.pairs_of(tokens, "cpu")
        assert int(segments.cu_seqlens[-1]) == tokens and segments.num_sequences == 2 * len(pairs.index)
