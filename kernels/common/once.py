"""Backwards whose gradients have no graph: they refuse to make one."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def once_differentiable(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward of the op ``name``: under ``create_graph=True`` it raises RuntimeError, one line.

    torch's own ``once_differentiable`` waits until its gradient is differentiated, and does not see that where the
    upstream gradient is a constant, as at a loss, or where ``autograd.grad`` is asked for certain inputs: a penalty on
    the gradient would train as if it were a constant, without a word.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(f"{name} is once differentiable; create_graph is True, it should be False")
            return backward(ctx, *grads)

        return once

    return decorate
