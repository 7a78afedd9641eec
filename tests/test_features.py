"""kNN, retrieval, linear classifier and log odds on fixed features, against reference numbers and scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import reference, sine
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from common.evaluate import _ranks, knn_probabilities, log_odds, logistic_regression, mean_average_precision

CASES = reference("features")


@pytest.mark.parametrize("case", CASES["knn"], ids=lambda c: f"k{c['k']}")
def test_knn_equals_equation_2_6(case):
    inputs = CASES["inputs"]
    queries, keys = sine(inputs["query_embeddings"]), sine(inputs["memory_embeddings"])
    labels = torch.tensor(inputs["memory_labels"])
    expected = torch.tensor(case["expected"]["probabilities"], dtype=torch.float64)
    for chunk in (1, 1024):
        found = knn_probabilities(queries, keys, labels, case["k"], case["sigma"], inputs["num_classes"], chunk)
        assert torch.allclose(found, expected, atol=1e-9)
    assert ((found == 0) == (expected == 0)).all()  # exactly 0 without a neighbour
    narrow = knn_probabilities(queries.float(), keys.float(), labels, case["k"], case["sigma"], inputs["num_classes"])
    assert torch.allclose(narrow.double(), expected, rtol=1e-4, atol=1e-6)


def test_mean_average_precision_equals_the_reference_and_scikit_learns():
    inputs, labels = CASES["inputs"], torch.tensor(CASES["inputs"]["memory_labels"])
    fine = torch.tensor(CASES["average_precision"]["query_fine_label"])
    found = mean_average_precision(sine(inputs["query_embeddings"]), fine, sine(inputs["memory_embeddings"]), labels)
    assert found == pytest.approx(CASES["average_precision"]["expected"]["map_cosine"], abs=1e-12)
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(40, 8)), rng.normal(size=(700, 8))
    gallery[100:200] = gallery[0]  # a hundred ties
    q_labels, g_labels = rng.integers(0, 6, 40), rng.integers(0, 5, 700)  # class 5 has nothing relevant
    scores = F.normalize(torch.from_numpy(queries), dim=1) @ F.normalize(torch.from_numpy(gallery), dim=1).T
    by_hand = [average_precision_score(g_labels == q, s) for q, s in zip(q_labels, scores.numpy()) if q < 5]
    for chunk in (7, 256):
        found = mean_average_precision(*(torch.from_numpy(a) for a in (queries, q_labels, gallery, g_labels)), chunk)
        assert found == pytest.approx(np.mean(by_hand), abs=1e-9)


@pytest.mark.parametrize("spread", ["wide", "narrow", "ties", "equal", "groups", "outlier"])
def test_ranks_are_exact_for_any_distribution_of_scores(spread):
    rng = np.random.default_rng(0)
    for kind in ("float32", "float64"):
        scores = rng.normal(size=5000).astype(kind)
        if spread == "narrow":  # neighbouring floating point numbers
            scores = (1 + np.finfo(kind).eps * np.round(50 * scores)).astype(kind)
        elif spread == "ties":
            scores = np.round(scores * 4) / 4
        elif spread == "equal":
            scores[:] = -0.3
        elif spread == "groups":  # log odds added to cosines
            scores = scores / 10 + rng.choice([-27.6, -1.5, 27.6], 5000).astype(kind)
        elif spread == "outlier":
            scores[7] = 1e30
        for count in (1, 40, 5000):
            relevant = np.sort(rng.permutation(scores)[:count])
            expected = [(scores >= r).sum() for r in relevant]
            assert _ranks(scores, relevant).tolist() == expected


@pytest.mark.parametrize("case", CASES["average_precision_literal"], ids=lambda c: str(c["expected_ap"])[:5])
def test_average_precision_of_given_scores(case):
    """Scores as cosines with a query along the first axis."""
    scores = torch.tensor(case["scores"], dtype=torch.float64)
    gallery = torch.stack([scores, (1 - scores**2).sqrt()], 1)
    labels = torch.tensor(case["relevant"])
    found = mean_average_precision(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1]), gallery, labels)
    assert found == pytest.approx(case["expected_ap"], abs=1e-9)


def objective(weight, bias, x, y, C: float) -> float:
    return (C * F.cross_entropy(x @ weight.T + bias, y, reduction="sum") + 0.5 * weight.square().sum()).item()


def digits(case: dict):
    x, y = load_digits(return_X_y=True)
    kept = np.isin(y, case["classes"])
    x, y = x[kept].astype(np.float64), np.searchsorted(case["classes"], y[kept])
    n = case["n_train"]
    if case["features"] == "div16":
        x = x / 16
    elif case["features"] == "l2":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    else:
        x = (x - x[:n].mean(0)) / np.maximum(x[:n].std(0, ddof=1), 1e-5)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    return x[:n], y[:n], x[n : n + case["n_test"]], y[n : n + case["n_test"]]


@pytest.mark.parametrize(
    "case", [c for c in CASES["logreg"] if len(c["classes"]) > 2],
    ids=lambda c: f"{c['features']}-{c['C']}-{len(c['classes'])}"
)
def test_logistic_regression_reaches_the_reference_optimum(case):
    x, y, test_x, test_y = digits(case)
    expected, K = case["expected"], len(case["classes"])
    weight, bias = logistic_regression(x, y, K, case["C"])
    found = objective(weight, bias, x, y, case["C"])
    assert found == pytest.approx(expected["objective_J"], rel=1e-5) and found >= expected["objective_J"] * (1 - 1e-7)
    for c, d, value in expected["W_samples_class_feature_value"]:
        assert weight[c, d].item() == pytest.approx(value, abs=1e-2 * expected["weight_norm"])
    errors = ((test_x @ weight.T + bias).argmax(1) != test_y).sum().item()
    assert abs(errors - expected["n_test_errors"]) <= 1


def test_two_classes_are_scikit_learns_at_twice_the_c():
    """It fits one weight vector w = w1 - w0 there, and |w1|^2 + |w0|^2 = |w|^2 / 2."""
    case = next(c for c in CASES["logreg"] if len(c["classes"]) == 2)
    x, y, _, _ = digits(case)
    theirs = LogisticRegression(C=2 * case["C"], tol=1e-12, max_iter=20000).fit(x.numpy(), y.numpy())
    weight, bias = logistic_regression(x, y, 2, case["C"])
    assert torch.allclose(weight[1] - weight[0], torch.from_numpy(theirs.coef_[0]), atol=1e-3)
    assert (bias[1] - bias[0]).item() == pytest.approx(theirs.intercept_[0], abs=1e-3)


def problems() -> dict:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 6))
    y = (x @ rng.normal(size=(6, 3))).argmax(1)
    rare = np.where(np.arange(120) < 3, 2, np.arange(120) % 2)
    return {
        "separable": (x, y),
        "one class rare": (x, rare),
        "features of very different scale": (x * 10.0 ** np.arange(-3, 3), rng.integers(0, 3, 120)),
        "more features than samples": (rng.normal(size=(40, 100)), np.arange(40) % 4),
        "many classes": (rng.normal(size=(200, 10)), np.arange(200) % 20),
    }


@pytest.mark.parametrize("name", problems())
@pytest.mark.parametrize("C", [0.01, 10.0])
def test_logistic_regression_equals_scikit_learns(name, C):
    x, y = problems()[name]
    theirs = LogisticRegression(C=C, tol=1e-12, max_iter=20000).fit(x, y)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    weight, bias = logistic_regression(x, y, int(y.max()) + 1, C)
    best = objective(torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_), x, y, C)
    assert objective(weight, bias, x, y, C) <= best * (1 + 1e-6)
    assert bias.mean().item() == pytest.approx(0, abs=1e-9)


def test_log_odds():
    case = CASES["log_odds"]
    found = [log_odds(p / 100) for p in case["accuracies_percent"]]
    assert found == pytest.approx(case["expected_log_odds"], abs=1e-12)
    assert np.mean(found) == pytest.approx(case["expected_mean_log_odds"], abs=1e-12)
    assert (log_odds(0), log_odds(1)) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="in 0..1"):
        log_odds(78.0)
