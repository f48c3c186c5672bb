"""The score of the small labelled sets, digits and photos. Its rules are fixed.

Nothing is tuned, and every run gives the same numbers.
All scores depend on the sample count M: with M a Frechet distance falls, and recall rises.
Compare only scores of equal M. Therefore `n_samples` stands beside every score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from dmf.errors import DmfError, NotFinite
from dmf.metrics.frechet import frechet_distance, moments
from dmf.metrics.precision_recall import nearest_distances, precision_recall

_SEED = 0  # of initial weights, batch order, and the halves and the subset in `floor`
_NEIGHBOURS = 3
_RANGE_SLACK = 1e-3


@dataclass(frozen=True)
class Rules:
    """What the score of one data set fixes.

    components: the space "pixels" has so many principal components of the training images.
        With 0 it has the pixel values themselves.
    """

    image_shape: tuple[int, int, int]
    components: int = 0


class LabelledScorer:
    """Scores class-conditional samples (M, H, W, C) in [-1, 1] against real images.

    There are two feature spaces, both fitted on the training images only.
    "pixels" is the pixel values or their first principal components.
    "hidden" is the 64 ReLU activations max(x W + b, 0) of a small classifier of pixel values.

    floor: what real data scores, under the same keys as a score.
        Its sets are smaller than the usual M.

        fd_hidden, fd_pixels
            between two fixed halves of all real images
        fd_hidden_heldout, fd_pixels_heldout
            between training and held-out images: the score of perfect memory
        accuracy, precision, recall
            of the held-out images, scored as samples
        nn_ratio
            of one half of the held-out images
            against the other half and a part of the training images, in their sizes' ratio

    classifier_accuracy: the share of held-out images that the feature classifier gets right.

    scored_by: of a run; scores with equal values may be compared.

    Raises DmfError unless images are finite (N, H, W, C) in [-1, 1], with N integers as labels.
    """

    floor: dict[str, float]
    classifier_accuracy: float
    scored_by: str = ""

    # One BLAS thread gives equal numbers on any number of cores, and is faster for small products.
    @threadpool_limits.wrap(limits=1, user_api="blas")
    def __init__(
        self,
        rules: Rules,
        train_images: np.ndarray,
        train_labels: np.ndarray,
        heldout_images: np.ndarray,
        heldout_labels: np.ndarray,
    ) -> None:
        # Imported here: runs on other data need not wait for them, which takes a second.
        from sklearn.neural_network import MLPClassifier
        from sklearn.svm import SVC

        self._rules = rules
        self._train = _real_pixels(train_images, "train_images", rules)
        self._heldout = _real_pixels(heldout_images, "heldout_images", rules)
        train_labels = _labels(train_labels, "train_labels", len(self._train))
        heldout_labels = _labels(heldout_labels, "heldout_labels", len(self._heldout))
        # The line searches of L-BFGS turn another processor's rounding into 1 % of the distances.
        # Adam keeps it below 1e-10, and stops by its tolerance long before max_iter.
        classifier = MLPClassifier((64,), alpha=0.3, tol=1e-4, max_iter=2000, random_state=_SEED)
        classifier.fit(self._train, train_labels)
        self._weight, self._bias = classifier.coefs_[0], classifier.intercepts_[0]
        self.classifier_accuracy = float(classifier.score(self._heldout, heldout_labels))
        self._basis = _principal(self._train, rules.components) if rules.components else None
        self._judge = SVC(kernel="rbf", C=10.0, gamma="scale").fit(
            self._reduced(self._train), train_labels
        )
        self._train_hidden = self.hidden(self._train)
        self._references = {
            "fd_hidden": moments(self._train_hidden),
            "fd_hidden_heldout": moments(self.hidden(self._heldout)),
            "fd_pixels": moments(self._reduced(self._train)),
            "fd_pixels_heldout": moments(self._reduced(self._heldout)),
        }
        self.floor = self._real_data_scores(heldout_labels)

    @threadpool_limits.wrap(limits=1, user_api="blas")
    def __call__(self, samples: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Score of `samples` (M, H, W, C) generated for `labels` (M,), clipped to [-1, 1] first.

            fd_hidden, fd_pixels                  Frechet distance to the training images
            fd_hidden_heldout, fd_pixels_heldout  the same to the held-out images
            accuracy                              share whose label an RBF SVM of "pixels" finds
            precision, recall                     k-NN, k = 3, "hidden", training images
            nn_train, nn_heldout                  median L2 distance of pixel values
                                                  to the nearest image of the set
            nn_ratio                              nn_train / nn_heldout, inf if nn_heldout is 0;
                                                  well below floor["nn_ratio"] means memorised
            n_samples                             M

        Raises DmfError for non-finite samples, fewer than 4 samples, wrong shapes, and labels
        that are no integers.
        """
        pixels = np.clip(_pixels(samples, "samples", self._rules), -1.0, 1.0)
        labels = _labels(labels, "labels", len(pixels))
        if len(pixels) <= _NEIGHBOURS:
            raise DmfError(
                f"samples has {len(pixels)} images, at least {_NEIGHBOURS + 1} are needed"
            )
        return {
            **self._distances(pixels),
            **self._fidelity(pixels, labels),
            **_memorisation(pixels, self._train, self._heldout),
            "n_samples": float(len(pixels)),
        }

    def hidden(self, pixels: np.ndarray) -> np.ndarray:
        """Hidden activations (N, 64) of the feature classifier, of pixels x (N, H W C).

        max(x W + b, 0)
        """
        return np.maximum(pixels @ self._weight + self._bias, 0.0)

    def _reduced(self, pixels: np.ndarray) -> np.ndarray:
        return pixels if self._basis is None else pixels @ self._basis

    def _distances(self, pixels: np.ndarray) -> dict[str, float]:
        own = {"hidden": moments(self.hidden(pixels)), "pixels": moments(self._reduced(pixels))}
        return {
            key: frechet_distance(own[key.split("_")[1]], ref)
            for key, ref in self._references.items()
        }

    def _fidelity(self, pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        precision, recall = precision_recall(self._train_hidden, self.hidden(pixels), _NEIGHBOURS)
        accuracy = float((self._judge.predict(self._reduced(pixels)) == labels).mean())
        return {"accuracy": accuracy, "precision": precision, "recall": recall}

    def _real_data_scores(self, heldout_labels: np.ndarray) -> dict[str, float]:
        rng = np.random.RandomState(_SEED)  # its stream is frozen across NumPy versions
        halves = np.array_split(rng.permutation(np.concatenate([self._train, self._heldout])), 2)
        probe, rest = np.array_split(rng.permutation(self._heldout), 2)
        size = round(len(self._train) * len(rest) / len(self._heldout))
        part = rng.permutation(self._train)[:size]
        hidden, reduced = ([moments(of(x)) for x in halves] for of in (self.hidden, self._reduced))
        refs = self._references
        return {
            "fd_hidden": frechet_distance(*hidden),
            "fd_pixels": frechet_distance(*reduced),
            "fd_hidden_heldout": frechet_distance(refs["fd_hidden"], refs["fd_hidden_heldout"]),
            "fd_pixels_heldout": frechet_distance(refs["fd_pixels"], refs["fd_pixels_heldout"]),
            **self._fidelity(self._heldout, heldout_labels),
            "nn_ratio": _memorisation(probe, part, rest)["nn_ratio"],
        }


DigitsScorer = partial(LabelledScorer, Rules((8, 8, 1)))
# 768 values are too many for the covariance of 828 held-out crops.
# 64 components have 98 % of the variance.
PhotosScorer = partial(LabelledScorer, Rules((16, 16, 3), components=64))


def _principal(pixels: np.ndarray, components: int) -> np.ndarray:
    """The first principal directions (D, components) of rows (N, D)."""
    return np.linalg.eigh(moments(pixels).cov)[1][:, : -components - 1 : -1]


def _memorisation(pixels: np.ndarray, train: np.ndarray, heldout: np.ndarray) -> dict[str, float]:
    """Median distances to the nearest image of each set.

    The larger set is nearer by its size alone. floor["nn_ratio"] has the same bias.
    Equal sizes would remove the bias, and the signal too: a copy of a dropped image would not show.
    The training images score 0 here. With equal sizes they would score about 0.85.
    """
    nn_train = float(np.median(nearest_distances(pixels, train)))
    nn_heldout = float(np.median(nearest_distances(pixels, heldout)))
    ratio = nn_train / nn_heldout if nn_heldout > 0 else float("inf")
    return {"nn_train": nn_train, "nn_heldout": nn_heldout, "nn_ratio": ratio}


def _pixels(images: np.ndarray, name: str, rules: Rules) -> np.ndarray:
    """Images (N, H, W, C) as float64 rows (N, H W C)."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != rules.image_shape:
        raise DmfError(
            f"{name} must have shape (N, {', '.join(map(str, rules.image_shape))}), got "
            f"{images.shape}"
        )
    rows = images.reshape(len(images), -1).astype(np.float64)
    bad = len(rows) - int(np.isfinite(rows).all(axis=1).sum())
    if bad:
        raise NotFinite(f"{name} has non-finite values in {bad} of {len(rows)} images")
    return rows


def _real_pixels(images: np.ndarray, name: str, rules: Rules) -> np.ndarray:
    rows = _pixels(images, name, rules)
    if len(rows) < 2 * (_NEIGHBOURS + 1):
        raise DmfError(
            f"{name} has {len(rows)} images, at least {2 * (_NEIGHBOURS + 1)} are needed"
        )
    if np.abs(rows).max() > 1.0 + _RANGE_SLACK:
        raise DmfError(
            f"{name} reaches from {rows.min():g} to {rows.max():g}, expected values in [-1, 1]"
        )
    return rows


def _labels(labels: np.ndarray, name: str, count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        found = f"{labels.dtype} of shape {labels.shape}"
        raise DmfError(f"{name} must be {count} integers of shape ({count},), got {found}")
    return labels
