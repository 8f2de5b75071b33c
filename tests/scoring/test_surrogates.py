"""Surrogates: what they learn from features, what they say of them, and what they refuse."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.ensemble
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing
import torch
import xgboost

from lightning_prune.scoring import NeuralProbe, SklearnEstimator, Surrogate, XGBoost
from lightning_prune.scoring.surrogates import Parts, metric_function, split_samples

N, WIDTH, TELLING = 300, 6, (1, 4)


def table(classes: int = 3, seed: int = 0) -> tuple[Any, Any]:
    """Two of six features tell the class; the last one is the same everywhere."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(N, WIDTH)).astype(np.float32)
    labels = rng.integers(0, classes, N)
    features[:, 1] += 3 * (labels == 0)
    features[:, 4] += 3 * (labels == 1)
    features[:, 5] = 2.0
    return features, labels


def numbers(seed: int = 0) -> tuple[Any, Any]:
    """The same for numbers to predict."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(N, WIDTH)).astype(np.float32)
    features[:, 5] = 2.0
    return features, 3.0 * features[:, 1] - 2.0 * features[:, 4] + 0.1 * rng.normal(size=N) + 7.0


def forest(task: Any = "classification", importance: Any = "own") -> SklearnEstimator:
    kind = "Classifier" if task == "classification" else "Regressor"
    return SklearnEstimator(
        f"sklearn.ensemble.RandomForest{kind}", {"n_estimators": 20}, task=task, importance=importance
    )


SURROGATES: list[Callable[..., Surrogate]] = [XGBoost, NeuralProbe, forest]
KINDS = [(make, importance) for make in SURROGATES for importance in make().importances]
kinds = pytest.mark.parametrize(
    ("make", "importance"), KINDS, ids=[f"{type(make()).__name__}-{importance}" for make, importance in KINDS]
)


def test_every_surrogate_is_tested() -> None:
    own = {kind for kind in Surrogate.__subclasses__() if kind.__module__.startswith("lightning_prune.")}
    assert {type(make()) for make in SURROGATES} == own


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (XGBoost(threads=1), XGBoost(threads=2, device="cuda")),
        (XGBoost(params={"nthread": 1}), XGBoost()),
        (XGBoost(params={"nthread": 1, "gamma": 2}), XGBoost(params={"gamma": 2})),
        (NeuralProbe(), NeuralProbe(device="cuda")),
        (
            SklearnEstimator("sklearn.ensemble.RandomForestClassifier", {"n_estimators": 5, "n_jobs": 2}),
            SklearnEstimator("sklearn.ensemble.RandomForestClassifier", {"n_estimators": 5}),
        ),
    ],
)
def test_where_it_is_fitted_is_no_part_of_what_scores_depend_on(one: Surrogate, other: Surrogate) -> None:
    assert one.key == other.key
    assert one.key != replace(one, seed=1).key


def test_every_other_setting_is() -> None:
    others: dict[str, Any] = {
        **{"task": "regression", "rounds": 9, "max_depth": 2, "learning_rate": 0.1, "max_bin": 32},
        **{"colsample_bynode": 0.5, "early_stopping": None, "class_weight": "balanced", "importance": "weight"},
        **{"seed": 1, "memory_limit": 10, "params": {"gamma": 2}},
    }
    assert {*others, "threads", "device"} == {field.name for field in fields(XGBoost)}
    assert len({XGBoost().key, *(XGBoost(**{name: value}).key for name, value in others.items())}) == len(others) + 1


@kinds
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_what_tells_is_found(make: Callable[..., Surrogate], importance: Any, task: Any) -> None:
    features, labels = table() if task == "classification" else numbers()
    parts = split_samples(labels, task)
    fitted = make(task=task, importance=importance).fit(features, labels, parts)
    assert 0.8 < fitted.score <= 1
    for found in (fitted.importance, fitted.share):
        assert found.shape == (WIDTH,)
        assert found.dtype == np.float64
        assert found.sum() == pytest.approx(1)
        assert set(np.argsort(found)[-2:]) == set(TELLING)
        assert found[5] == 0


@kinds
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_same_again(make: Callable[..., Surrogate], importance: Any, task: Any) -> None:
    """The same numbers every time, and nobody else's random numbers are touched."""
    features, labels = table() if task == "classification" else numbers()
    parts = split_samples(labels, task)
    before = torch.get_rng_state()
    first = make(task=task, importance=importance).fit(features, labels, parts)
    np.random.seed(7)
    torch.set_rng_state(before)
    second = make(task=task, importance=importance).fit(features, labels, parts)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.score == second.score
    np.testing.assert_array_equal(first.importance, second.importance)
    np.testing.assert_array_equal(first.share, second.share)


@kinds
def test_features_are_equal(make: Callable[..., Surrogate], importance: Any) -> None:
    """The importances do not hang on features that say nothing."""
    features, labels = table()
    parts = split_samples(labels, "classification")
    features[:, 0] = 0
    found = make(importance=importance).fit(features, labels, parts).importance
    assert found[0] == 0


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("stopping", [10, None])
def test_xgboost_equals_xgboost(classes: int, stopping: int | None) -> None:
    """By scikit-learn's interface of XGBoost, called with the documented defaults."""
    features, labels = table(classes)
    parts = split_samples(labels, "classification")
    fitted = XGBoost(early_stopping=stopping, rounds=20).fit(features, labels, parts)
    naive = xgboost.XGBClassifier(
        n_estimators=20,
        max_depth=3,
        learning_rate=0.3,
        max_bin=64,
        tree_method="hist",
        early_stopping_rounds=stopping,
        random_state=0,
    )
    stop = (features[parts.stop], labels[parts.stop])
    naive.fit(features[parts.fit], labels[parts.fit], eval_set=[stop], verbose=False)
    right = naive.predict(features[parts.held_back]) == labels[parts.held_back]
    assert fitted.score == pytest.approx(right.mean(), abs=1 / len(right))
    booster = naive.get_booster()
    if stopping is not None:
        booster = booster[: naive.best_iteration + 1]
    for found, kind in ((fitted.importance, "gain"), (fitted.share, "total_gain")):
        scores = booster.get_score(importance_type=kind)
        expected = np.array([scores.get(f"f{i}", 0.0) for i in range(WIDTH)])
        np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-4)


def test_the_mean_of_gains_is_not_their_sum() -> None:
    features, labels = table()
    fitted = XGBoost().fit(features, labels, split_samples(labels, "classification"))
    assert not np.allclose(fitted.importance, fitted.share)


def test_class_weights() -> None:
    """One class in forty samples is found where classes count alike."""
    rng = np.random.default_rng(0)
    labels = (rng.random(2000) < 0.025).astype(np.int64)
    features = (rng.normal(size=(2000, 1)) + labels[:, None]).astype(np.float32)
    parts = split_samples(labels, "classification")
    plain = XGBoost(rounds=10).fit(features, labels, parts, "balanced_accuracy").score
    weighted = XGBoost(rounds=10, class_weight="balanced").fit(features, labels, parts, "balanced_accuracy").score
    assert weighted > plain + 0.1


@pytest.mark.parametrize("weight", [None, "balanced"])
def test_a_table_larger_than_memory(weight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read part by part, each within the limit, it is as good, finds the same features, and leaves no files."""
    read, sizes = xgboost.ExtMemQuantileDMatrix, list[int]()

    def watched(parts: Any, **options: Any) -> Any:
        while parts.next(lambda data, **_: sizes.append(data.nbytes)):
            pass
        parts.reset()
        return read(parts, **options)

    monkeypatch.setattr(xgboost, "ExtMemQuantileDMatrix", watched)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    features, labels = table()
    parts = split_samples(labels, "classification")
    whole = XGBoost(rounds=20, class_weight=weight).fit(features, labels, parts)
    paged = XGBoost(rounds=20, class_weight=weight, memory_limit=2**10).fit(features, labels, parts)
    assert len(sizes) > 2
    assert max(sizes) <= 2**10
    assert paged.score == pytest.approx(whole.score, abs=0.05)
    np.testing.assert_allclose(paged.share, whole.share, atol=0.05)
    assert not list(tmp_path.iterdir())


def test_other_parameters_win() -> None:
    features, labels = table()
    parts = split_samples(labels, "classification")
    small = XGBoost(rounds=5, early_stopping=None, params={"max_depth": 1}, importance="weight")
    large = XGBoost(rounds=5, early_stopping=None, importance="weight")
    assert np.count_nonzero(small.fit(features, labels, parts).importance) < np.count_nonzero(
        large.fit(features, labels, parts).importance
    )


def test_probe_without_patience_and_without_hidden_layer() -> None:
    features, labels = table()
    parts = split_samples(labels, "classification")
    assert NeuralProbe(epochs=10, patience=None, hidden=0, lr=0.01).fit(features, labels, parts).score > 0.8


def test_a_linear_estimator_a_pipeline_and_one_that_knows_nothing_of_its_features() -> None:
    features, labels = table()
    parts = split_samples(labels, "classification")
    logistic = sklearn.linear_model.LogisticRegression()
    scaled = sklearn.pipeline.make_pipeline(sklearn.preprocessing.StandardScaler(), logistic)
    found = {}
    for name, estimator in (
        ("logistic", logistic),
        ("scaled", scaled),
        ("neighbours", "sklearn.neighbors.KNeighborsClassifier"),
    ):
        fitted = SklearnEstimator(estimator).fit(features, labels, parts)
        found[name] = fitted.importance
        assert set(np.argsort(fitted.importance)[-2:]) == set(TELLING)
    assert not hasattr(logistic, "coef_"), "the estimator that was given is not fitted itself"
    np.testing.assert_allclose(found["logistic"], found["scaled"], atol=0.1)
    alone = sklearn.pipeline.make_pipeline(logistic)  # nothing has scaled what it sees
    wide = [SklearnEstimator(estimator).fit(3 * features, labels, parts).importance for estimator in (logistic, alone)]
    np.testing.assert_allclose(*wide)


def test_estimators_of_any_other_thing_are_refused() -> None:
    with pytest.raises(TypeError, match="has no fit, predict, get_params"):
        SklearnEstimator(object())
    with pytest.raises(ValueError, match=r"expected the path of a class, such as 'sklearn.ensemble.RandomForest'"):
        SklearnEstimator("RandomForest")
    with pytest.raises(ValueError, match=r"sklearn\.ensemble has no 'Nonsense'"):
        SklearnEstimator("sklearn.ensemble.Nonsense")
    with pytest.raises(ValueError, match="expected `params` with the name of a class only"):
        SklearnEstimator(sklearn.ensemble.RandomForestClassifier(), {"n_estimators": 3})


def test_metrics() -> None:
    labels, guesses = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
    assert metric_function(None, "classification")(labels, guesses) == 0.75
    assert metric_function("balanced_accuracy", "classification")(labels, guesses) == 0.5
    assert metric_function(None, "regression")(np.array([1.0, 3.0]), np.array([2.0, 2.0])) == 0
    assert metric_function("r2", "regression")(np.array([1.0, 3.0]), np.array([1.0, 3.0])) == 1
    with pytest.raises(ValueError, match='expected a `metric` for regression \\("r2"\\)'):
        metric_function("accuracy", "regression")


def test_a_metric_of_the_users_own() -> None:
    """It sees the classes as the user has them, not their positions."""
    features, labels = table()
    parts = split_samples(labels + 10, "classification")
    seen = []

    def metric(truth: Any, predictions: Any) -> Any:
        seen.append((set(truth), set(predictions)))
        return np.float32(0.25)

    assert XGBoost(rounds=5).fit(features, labels + 10, parts, metric).score == 0.25
    assert seen == [({10, 11, 12}, {10, 11, 12})]
    with pytest.raises(TypeError, match="expected `metric` to return a number, got None"):
        XGBoost(rounds=5).fit(features, labels, parts, lambda *_: None)  # type: ignore[arg-type, return-value]


def test_parts() -> None:
    """Every class in every part by its share, no sample twice, the same every time."""
    labels = np.repeat([0, 1, 2], [100, 50, 3])
    parts = split_samples(labels, "classification", seed=3)
    together = np.concatenate([parts.fit, parts.stop, parts.held_back])
    assert sorted(together) == list(range(153))
    assert np.bincount(labels[parts.held_back]).tolist() == [20, 10, 1]
    assert np.bincount(labels[parts.stop]).tolist() == [10, 5, 1]
    again, other = (split_samples(labels, "classification", seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(parts.held_back, again.held_back)
    assert not np.array_equal(parts.held_back, other.held_back)
    assert len(split_samples(np.linspace(0, 1, 100), "regression").held_back) == 20


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(10, dtype=np.int64), "expected samples of at least two classes, got 10 of class 0"),
        (np.array([0, 0, 0, 1, 1]), r"at least three samples of each class.*of class 1 \(2\)"),
        (np.array([0.0, 0.5, 1.0, 1.0]), "expected whole numbers as classes, got labels such as 0.5.*regression"),
        (np.array([0.0, np.nan, 1.0, 1.0]), "expected whole numbers as classes, got labels such as nan"),
        (np.zeros((10, 2)), r"expected one label per sample, shape \(n,\), got \(10, 2\)"),
    ],
)
def test_labels_that_cannot_be_split(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_samples(labels, "classification")


def test_whole_numbers_are_classes_whatever_their_type() -> None:
    """Binary cross entropy takes 0.0 and 1.0."""
    features, labels = table(2)
    parts = split_samples(labels.astype(np.float32), "classification")
    assert XGBoost().fit(features, labels.astype(np.float32), parts).score > 0.9


def test_shares_of_parts() -> None:
    with pytest.raises(ValueError, match="expected shares above 0 that leave samples to fit"):
        split_samples(np.arange(10) % 2, "classification", held_back=0.9, stop=0.1)
    with pytest.raises(ValueError, match="expected at least 3 samples, got 2"):
        split_samples(np.zeros(2), "regression")


@kinds
def test_bad_tables(make: Callable[..., Surrogate], importance: Any) -> None:
    features, labels = table()
    surrogate, parts = make(importance=importance), split_samples(labels, "classification")
    broken = features.copy()
    broken[5, 2] = np.nan
    with pytest.raises(FloatingPointError, match=r"1 of 300 samples in 1 of 6 channels .*channel 2"):
        surrogate.fit(broken, labels, parts)
    with pytest.raises(ValueError, match=r"expected features of shape \(300, width\).*got \(299, 6\)"):
        surrogate.fit(features[:-1], labels, parts)
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        surrogate.fit(features, np.zeros(N, dtype=np.int64), parts)
    lacking = Parts(parts.fit, parts.stop, np.flatnonzero(labels != 2)[:20])
    with pytest.raises(ValueError, match="every class in the part that is measured on, got none of class 2"):
        surrogate.fit(features, labels, lacking)


@pytest.mark.parametrize("make", SURROGATES)
def test_bad_numbers_to_predict(make: Callable[..., Surrogate]) -> None:
    features, labels = numbers()
    surrogate, parts = make(task="regression"), split_samples(labels, "regression")
    with pytest.raises(ValueError, match="expected different numbers to predict"):
        surrogate.fit(features, np.ones(N), parts)
    labels[3] = np.inf
    with pytest.raises(FloatingPointError, match="expected finite labels"):
        surrogate.fit(features, labels, parts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: XGBoost(rounds=0), "expected `rounds` of at least 1, got 0"),
        (lambda: XGBoost(colsample_bynode=0), r"expected `colsample_bynode` in \(0, 1\], got 0"),
        (lambda: XGBoost(task="regression", class_weight="balanced"), "expected no `class_weight` for regression"),
        (lambda: XGBoost(class_weight="equal"), 'expected `class_weight` to be "balanced" or None'),  # type: ignore[arg-type]
        (lambda: XGBoost(task="ranking"), 'expected `task` to be "classification" or "regression", got \'ranking\''),  # type: ignore[arg-type]
        (lambda: NeuralProbe(importance="gain"), 'expected `importance` to be "weight" or "permutation"'),  # type: ignore[arg-type]
        (lambda: NeuralProbe(lr=0), "expected `lr` above 0"),
        (lambda: NeuralProbe(epochs=0), "expected `epochs` of at least 1"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Surrogate], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_without_xgboost(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = table()
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(ModuleNotFoundError, match=r'`xgboost` is needed here.*extra `xgb`: pip install .*"xgboost>=3"'):
        XGBoost().fit(features, labels, split_samples(labels, "classification"))


@pytest.mark.parametrize("memory_limit", [None, 1000])
def test_the_device_reaches_xgboost(memory_limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a parameter of the training; without a GPU it is trained on the CPU here."""
    features, labels = table()
    parts = split_samples(labels, "classification")
    train, devices = xgboost.train, []

    def on_cpu(params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        devices.append(params["device"])
        return train({**params, "device": "cpu"}, *args, **kwargs)

    monkeypatch.setattr(xgboost, "train", on_cpu)
    for device in ("cuda", "cuda:1"):
        XGBoost(device=device, rounds=2, memory_limit=memory_limit).fit(features, labels, parts)
    assert devices == ["cuda", "cuda:1"]
