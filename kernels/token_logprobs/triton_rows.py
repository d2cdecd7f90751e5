"""What every Triton kernel of ``token_logprobs`` needs to know of a row of logits [outer, inner, V]."""

import triton
import triton.language as tl

# Arguments that change from batch to batch: compiled for any value, so that no batch waits for the compiler.
ANY_VALUE = ["inner", "label_set_size", "ignore_index", "topk", "num_rows", "splits", "tiles"]


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Where row ``row`` of [outer, inner, V] begins; int64, since N * V > 2^31 is ordinary."""
    row = row.to(tl.int64)
    return (row // inner) * stride_outer + (row % inner) * stride_inner


@triton.jit
def row_temperature(row, temperature, temperatures_ptr):
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row)
    return temperature
