"""When a result is right, by the rule of the tests.

A result's error is the largest |y - truth|, where the truth is the reference in float64. It is at most

    min(2 e + ulp, cap * ulp)

with e the error of the reference in the same dtype, ulp that of the truth's largest magnitude or of 1, and `CAP_ULPS`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coalescer_fast.bench.errors import Tensors

# An op rounds a few times, each time by half an ulp of an intermediate result that is not much larger than the final
# one. In float32 the sums behind the statistics round as well; torch's own, of squares, by ten ulps of the result.
CAP_ULPS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}


def several(result: torch.Tensor | Tensors) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


class Refcheck:
    """Holds results against the truth.

    Args:
        truth: outputs of the reference in float64.
        plain: outputs of the reference in the dtype that is checked, computed in several ways; the largest of their
            errors counts, since torch has other algorithms for other memory formats.

    Attributes:
        worst: the largest error of the last result, as a share of what is allowed.
    """

    def __init__(self, truth: Tensors, plain: Sequence[Tensors]):
        self.truth = truth
        self.dtypes = [output.dtype for output in plain[0]]
        self.plain = [max(largest(y - exact) for y in ways) for *ways, exact in zip(*plain, truth)]
        self.worst = 0.0

    def __call__(self, result: torch.Tensor | Tensors, peer: bool = False) -> tuple[float, str]:
        """The largest error, and what is wrong or "".

        Args:
            result: outputs of shape and dtype of the reference's.
            peer: whether it need only be below the cap, as torch itself, whose errors set the rule.
        """
        errors, wrong = [], []
        self.worst = 0.0
        for output, truth, plain, dtype in zip(several(result), self.truth, self.plain, self.dtypes):
            if output.shape != truth.shape or output.dtype != dtype:
                expected = f"{dtype} {tuple(truth.shape)}"
                return float("nan"), f"result is {output.dtype} {tuple(output.shape)}; expected {expected}"
            error = largest(output - truth)
            ulp = torch.finfo(output.dtype).eps * max(1.0, largest(truth))
            cap = CAP_ULPS[output.dtype] * ulp
            limit = cap if peer else min(2 * plain + ulp, cap)
            self.worst = max(self.worst, error / limit, key=lambda share: (share != share, share))
            if not error <= limit:  # NaN is wrong, too
                wrong.append(f"error {error:.3g} is above {limit:.3g}, {self.first_wrong(output, truth, limit)}")
            errors.append(error)
        return max(errors, key=lambda e: (e != e, e)), "; ".join(wrong)

    def first_wrong(self, output: torch.Tensor, truth: torch.Tensor, limit: float) -> str:
        """The first element, in the order of its indices, whose error is above the limit, in words."""
        index = tuple(((output - truth).abs() <= limit).logical_not().nonzero()[0].tolist())
        return f"first at {self.place(index)}: {float(output[index]):.6g}, expected {float(truth[index]):.6g}"

    def place(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Where an element of what is checked is in the whole result."""
        return index
