"""Inception score of logits that arrive in parts; the number of samples is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import log_softmax, xlogy

from dmf.errors import DmfError
from dmf.metrics.frechet import check_features

_STATE = ("seen", "split_of_row", "probability", "log_probability")


class InceptionScore:
    """Inception score of `count` samples: mean and standard deviation over `splits` parts.

        p_i = softmax(logits_i)
        q_k = 1/n_k sum_i p_i
        IS_k = exp(1/n_k sum_i sum_c p_ic log(p_ic / q_kc))

    i runs over split k: positions [k N/splits, (k + 1) N/splits), rounded down.
    The position of a row is its place in the file, or order[row], a permutation.
    The score depends on the order in its third digit, so a protocol names it.
    ADM takes the file's order, N = 50,000 and 10 splits.
    torch-fidelity's default is np.argsort(np.random.RandomState(2020).permutation(N)).

    Salimans et al. 2016 (arXiv 1606.03498), section 4.
    Raises DmfError where a split would be empty, or `order` is no permutation of 0..count-1.
    """

    def __init__(self, count: int, splits: int = 10, order: np.ndarray | None = None) -> None:
        if not 1 <= splits <= count:
            raise DmfError(
                f"the inception score needs 1 to {count} splits for {count} samples, got {splits}"
            )
        position = np.arange(count) if order is None else np.asarray(order)
        if position.shape != (count,) or not np.array_equal(np.sort(position), np.arange(count)):
            raise DmfError(
                f"order must be a permutation of 0..{count - 1}, got shape {position.shape}"
            )
        bounds = np.arange(1, splits) * count // splits
        self._split_of_row = np.searchsorted(bounds, position, side="right")
        self._seen = 0
        self._probability, self._log_probability = np.zeros((splits, 0)), np.zeros(splits)

    def add(self, logits: np.ndarray) -> None:
        """Takes the next rows of logits (n, C), in the order of the file.

        Raises DmfError for non-finite values, a new C, or more rows than announced.
        """
        logits = np.asarray(logits)
        check_features(logits, "logits", min_rows=1)
        rows, classes = logits.shape
        if self._seen == 0:
            self._probability = np.zeros((len(self._log_probability), classes))
        elif classes != self._probability.shape[1]:
            raise DmfError(
                f"logits have {classes} classes, expected {self._probability.shape[1]} as in the "
                "parts before"
            )
        if self._seen + rows > len(self._split_of_row):
            raise DmfError(
                f"{self._seen + rows} rows of logits were given, expected "
                f"{len(self._split_of_row)} in all"
            )
        log_p = log_softmax(logits.astype(np.float64), axis=1)
        p = np.exp(log_p)
        split_of_row = self._split_of_row[self._seen : self._seen + rows]
        for k in np.unique(split_of_row):
            mine = split_of_row == k
            self._probability[k] += p[mine].sum(axis=0)
            self._log_probability[k] += np.sum(p[mine] * log_p[mine])
        self._seen += rows

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation of the splits (ddof = 0).

        Raises DmfError until all rows were given.
        """
        if self._seen != len(self._split_of_row):
            raise DmfError(
                f"{self._seen} rows of logits were given, expected {len(self._split_of_row)} in all"
            )
        n = np.bincount(self._split_of_row)
        q = self._probability / n[:, None]
        scores = np.exp(self._log_probability / n - xlogy(q, q).sum(axis=1))
        return float(scores.mean()), float(scores.std())

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the rows seen, the split of each row, and the sums, for `from_state`."""
        sums = self._probability, self._log_probability
        values = (np.asarray(self._seen), self._split_of_row, *sums)
        return {name: value.copy() for name, value in zip(_STATE, values, strict=True)}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> InceptionScore:
        """A score that continues from a state, bit for bit. Raises DmfError for missing arrays."""
        if set(state) != set(_STATE):
            raise DmfError(
                f"the state of an inception score has arrays {sorted(state)}, expected "
                f"{sorted(_STATE)}"
            )
        score = cls(len(state["split_of_row"]), len(state["log_probability"]))
        score._seen = int(state["seen"])
        score._split_of_row = np.array(state["split_of_row"])
        score._probability = np.array(state["probability"])
        score._log_probability = np.array(state["log_probability"])
        return score
