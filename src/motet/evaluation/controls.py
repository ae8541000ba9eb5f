"""Controls: what anybody gets without a taste, without reading, or with the truth in hand.

In:  the same whitened features that the method sees, the same training pairs, the same test pairs.
Out: margins on the test pairs.

``shared``: one linear reward for everybody. ``oracle``: one per true axis, trained centrally on the pooled pairs of the
people who hold it. ``length``: the same with nothing but the answers' length. All three are logistic regressions by
scikit-learn, with the ridge chosen by cross-validation over prompts.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

RIDGES = (3.0, 30.0, 100.0, 300.0, 1000.0)
"""Candidates for the ridge; in a trial 100 was best with few noisy pairs, and 3 lost 19 points there."""


def linear_reward(
    difference: NDArray[np.float64], groups: Sequence[str], ridges: Sequence[float] = RIDGES
) -> NDArray[np.float64]:
    """Weights of a linear reward fitted to choices (Bradley-Terry), ridge by cross-validation.

    Args:
        difference: Features of the chosen answer minus those of the rejected one, pairs x features.
        groups: Prompt of each pair; pairs of one prompt stay in one fold.
        ridges: Candidates.

    Returns:
        Weights; all zero where there are no pairs.
    """
    if difference.shape[0] == 0:
        return np.zeros(difference.shape[1])
    names = np.asarray(groups)
    folds = min(3, len(set(groups)))
    best = ridges[len(ridges) // 2]
    if folds > 1 and len(ridges) > 1:
        scores = []
        for ridge in ridges:
            losses = []
            for train, test in GroupKFold(n_splits=folds).split(difference, groups=names):
                margin = difference[test] @ _fit(difference[train], ridge)
                losses.append(np.logaddexp(0, -margin).mean())
            scores.append(np.mean(losses))
        best = ridges[int(np.argmin(scores))]
    return _fit(difference, best)


def _fit(difference: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    # each pair stands once in each order: without an intercept that changes nothing but gives both classes
    rows = np.concatenate([difference, -difference])
    labels = np.concatenate([np.ones(len(difference)), np.zeros(len(difference))])
    model = LogisticRegression(C=2 / ridge, fit_intercept=False, max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 500 steps of L-BFGS are enough for a control
        model.fit(rows, labels)
    return np.asarray(model.coef_[0], dtype=np.float64)
