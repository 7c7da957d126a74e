"""Logits as numbers between 0 and 1, for thresholds, in the very order of the logits."""

import numpy as np


def sigmoid_in_order(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) of finite fp32 logits [n], as fp32 [n] that compare as the logits do.

    In fp32 distinct logits can share a sigmoid: neighbours anywhere above 0, all beyond 17, where
    it is 1, and all below -104, where it is 0. There the lower logit takes the next smaller number,
    so that only equal logits tie: a value moves by at most n 2^-24, and stays above 0 (the floor is
    the least normal number).
    """
    distinct, place = np.unique(logits.astype(np.float32), return_inverse=True)
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-distinct.astype(np.float64)))
    # fp32 numbers above 0 follow each other as their bits do, read as whole numbers
    bits, steps = exact.astype(np.float32).view(np.int32), np.arange(len(distinct), dtype=np.int32)
    below_the_next = np.minimum.accumulate((bits - steps)[::-1])[::-1] + steps
    floor = np.finfo(np.float32).tiny.view(np.int32) + steps
    return np.maximum(below_the_next, floor).view(np.float32)[place]
