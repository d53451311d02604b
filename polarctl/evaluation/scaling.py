"""Scaling laws: how the held-out loss L falls with model size N, data D and compute C.

Two forms are fitted by least squares in ln L, so that residuals are relative errors:

* `power`: L = a X^b
* `constant`: L = a X^b + L_inf, with L_inf >= 0 the loss that no model of this kind gets below

Intervals are 95 % ones from the fit's covariance with Student's t (n - 2 and n - 3 degrees of
freedom). They hold if the points scatter independently around the law; they know nothing of how
the points were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

POWER, CONSTANT = "power", "constant"
# Points that a fit needs: one more than it has parameters, since it is to be checked by something.
LEAST = {POWER: 3, CONSTANT: 4}
_LEVEL = 0.95
_SAME = 1.05  # sizes, or amounts of data, that differ by less count as the same
_EXACT = 1e-15  # mean squared residual below which a fit is exact to rounding

# The paper's laws (arXiv 2507.05197): a and b of L = a X^b.
PAPER = {"N": (0.9, -0.0425), "C": (2.4, -0.0342)}
AXES = ("N", "C", "D")


@dataclass(frozen=True)
class TrainedRun:
    """One training run, as a point of the laws.

    Attributes:
        name: Its folder.
        parameters: Weights without the input embedding, N.
        tokens: Tokens of its training, all sequences of all triples counted whole, D.
        triples: Triples of its training.
        loss: Its last held-out loss.
        held_out: What tells its held-out triples from those of another run.
    """

    name: str
    parameters: float
    tokens: float
    triples: float
    loss: float
    held_out: str = ""

    @property
    def compute(self) -> float:
        """FLOPs of its training by the convention C = 6 N D."""
        return 6 * self.parameters * self.tokens

    def at(self, axis: str) -> float:
        """Its N, C or D."""
        return {"N": self.parameters, "C": self.compute, "D": self.tokens}[axis]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One form fitted to points.

    Attributes:
        form: `power` or `constant`.
        n: Points.
        a: Factor.
        b: Exponent.
        constant: L_inf; 0 for `power`.
        a_interval: Ends of the 95 % interval; so for the other two.
        b_interval: Of the exponent.
        constant_interval: Of L_inf, cut off at 0.
        r2: Explained share of the variance of ln L, or None where all losses are equal.
        aic: n ln(RSS / n) + 2 k with k parameters, the variance among them.
        residuals: ln L minus the law's, for every point in the order given.
        covariance: Of ln a, b and, with the constant, L_inf.
    """

    form: str
    n: int
    a: float
    b: float
    constant: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]
    constant_interval: tuple[float, float] | None
    r2: float | None
    aic: float
    residuals: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]

    def loss(self, x: float) -> float:
        """The law's loss at X."""
        return float(self.a * x**self.b + self.constant)

    def predicted(self, x: float) -> tuple[float, float, float]:
        """The loss of a new point at X, and the 95 % interval that it should fall into."""
        import numpy as np
        from scipy import stats

        value, power = self.loss(x), self.a * x**self.b
        gradient = np.array([power, power * math.log(x), 1.0][: len(self.covariance)]) / value
        noise = sum(r * r for r in self.residuals) / (self.n - len(self.covariance))
        spread = noise + float(gradient @ np.array(self.covariance) @ gradient)
        reach = stats.t.ppf(0.5 + _LEVEL / 2, self.n - len(self.covariance)) * math.sqrt(spread)
        return value, value * math.exp(-reach), value * math.exp(reach)


def fit(xs: Sequence[float], losses: Sequence[float], form: str) -> Fit:
    """Fit one form.

    Args:
        xs: N, C or D, above 0.
        losses: Above 0.
        form: `power` or `constant`.

    Raises:
        ValueError: Too few different X, or a number that is not above 0.
    """
    import numpy as np

    x, y = np.asarray(xs, dtype=float), np.asarray(losses, dtype=float)
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError("every number of a law must be finite and above 0")
    if len(set(xs)) < LEAST[form]:
        raise ValueError(f"{len(set(xs))} different points; {LEAST[form]} are needed")
    x, y = np.log(x), np.log(y)
    centre = float(x.mean())  # in the middle of the data ln a and b are nearly independent
    slope, height = np.polyfit(x - centre, y, 1)
    theta = np.array([height, slope])
    if form == CONSTANT:
        theta = _with_constant(x - centre, y, theta)
    law, jacobian = _law(x - centre, theta)
    residuals = y - law
    noise = float(residuals @ residuals) / (len(x) - len(theta))
    covariance = np.linalg.pinv(jacobian.T @ jacobian, hermitian=True) * noise
    return _finished(form, theta, covariance, residuals, y, centre)


def _law(x: NDArray[Any], theta: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The law at centred ln X: ln L and its derivatives. Shapes: (n,), (n, parameters)."""
    import numpy as np

    power = np.exp(theta[0] + theta[1] * x)
    whole = power + (theta[2] if len(theta) > 2 else 0.0)
    columns = [power / whole, power * x / whole, 1 / whole][: len(theta)]
    return np.log(whole), np.stack(columns, axis=1)


def _with_constant(x: NDArray[Any], y: NDArray[Any], power: NDArray[Any]) -> NDArray[Any]:
    """The best parameters with a constant, from several starts: there are local optima."""
    import numpy as np
    from scipy.optimize import least_squares

    lowest, found = float(np.exp(y.min())), []

    def off(theta: NDArray[Any]) -> NDArray[Any]:
        return _law(x, _natural(theta))[0] - y

    def slopes(theta: NDArray[Any]) -> NDArray[Any]:
        natural = _natural(theta)
        return _law(x, natural)[1] * np.array([1.0, 1.0, natural[2]])

    for share in (0.1, 0.5, 0.8, 0.95):
        slope, height = np.polyfit(x, np.log(np.exp(y) - share * lowest), 1)
        start = [height, slope, math.log(share * lowest)]
        found.append(least_squares(off, start, jac=slopes, method="lm", max_nfev=400))
    best = _natural(min(found, key=lambda result: result.cost).x)
    return best if best[2] > 1e-4 * lowest else np.append(power, 0.0)


def _natural(theta: NDArray[Any]) -> NDArray[Any]:
    """From the logarithm of the constant, in which the search cannot leave its range."""
    import numpy as np

    return np.array([theta[0], theta[1], math.exp(min(theta[2], 700.0))])


def _finished(
    form: str,
    theta: NDArray[Any],
    covariance: NDArray[Any],
    residuals: NDArray[Any],
    y: NDArray[Any],
    centre: float,
) -> Fit:
    """The figures of a fit, from centred ln X back to X: ln a = theta_0 - b centre."""
    import numpy as np
    from scipy import stats

    n, count = len(y), len(theta)
    shift = np.eye(count)
    shift[0, 1] = -centre
    values, spread = shift @ theta, shift @ covariance @ shift.T
    reach = stats.t.ppf(0.5 + _LEVEL / 2, n - count) * np.sqrt(np.diag(spread).clip(0))
    low, high = values - reach, values + reach
    total = float(((y - y.mean()) ** 2).sum())
    rss = float(residuals @ residuals)
    return Fit(
        form=form,
        n=n,
        a=_exp(values[0]),
        b=float(values[1]),
        constant=float(values[2]) if count > 2 else 0.0,
        a_interval=(_exp(low[0]), _exp(high[0])),
        b_interval=(float(low[1]), float(high[1])),
        constant_interval=(max(0.0, float(low[2])), float(high[2])) if count > 2 else None,
        r2=1 - rss / total if total > _EXACT * n else None,
        aic=n * math.log(max(rss / n, _EXACT**2)) + 2 * (count + 1),
        residuals=tuple(map(float, residuals)),
        covariance=tuple(tuple(map(float, row)) for row in spread),
    )


def _exp(value: float) -> float:
    return math.exp(min(float(value), 700.0))


def preferred(fits: Mapping[str, Fit]) -> str:
    """The form with the lower AIC; `power` where there are too few points for the other.

    Not AICc: with the 4 to 7 points of a usual study it never takes a constant that is there, and
    its predictions were worse by more than AIC's are where there is none.
    """
    constant = fits.get(CONSTANT)
    if constant is None or constant.constant == 0:
        return POWER
    return CONSTANT if constant.aic < fits[POWER].aic else POWER


# -- which points ---------------------------------------------------------------------------------


def envelope(runs: Sequence[TrainedRun], axis: str) -> list[TrainedRun]:
    """The runs that a law is fitted to, in the order of X.

    Of each X the lowest loss; values within 5 % count as one. Of C then those runs that no other
    with less compute beats: the compute-optimal ones of those that were made.
    """
    groups: list[list[TrainedRun]] = []
    for run in sorted(runs, key=lambda run: (run.at(axis), run.loss)):
        if groups and run.at(axis) <= _SAME * groups[-1][0].at(axis):
            groups[-1].append(run)
        else:
            groups.append([run])
    lowest = [min(group, key=lambda run: run.loss) for group in groups]
    if axis != "C":
        return lowest
    kept: list[TrainedRun] = []
    for run in lowest:
        if not kept or run.loss < kept[-1].loss:
            kept.append(run)
    return kept


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the smaller runs say of the largest one.

    Attributes:
        run: Name of the largest run of the envelope.
        form: The form that was fitted to the rest.
        points: Points of that fit.
        beyond: X of the run divided by the largest X of the rest.
        value: The predicted loss.
        interval: Where the loss of a new run should be, in 95 of 100 cases.
        measured: The loss that was measured.
    """

    run: str
    form: str
    points: int
    beyond: float
    value: float
    interval: tuple[float, float]
    measured: float

    @property
    def error(self) -> float:
        """The predicted loss over the measured one, minus 1."""
        return self.value / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """The law of one axis.

    Attributes:
        axis: N, C or D.
        points: The runs that it is fitted to, in the order of X.
        fits: Form to fit; empty where there are too few points.
        form: The form that AIC prefers.
        prediction: Of the held-out largest run, or None where too few points are left.
    """

    axis: str
    points: tuple[TrainedRun, ...]
    fits: Mapping[str, Fit]
    form: str
    prediction: Prediction | None


def law_of(runs: Sequence[TrainedRun], axis: str) -> ScalingLaw:
    """Fit the law of one axis; without fits where fewer than three points are left."""
    points = envelope(runs, axis)
    fits = _fits(points, axis)
    if not fits:
        return ScalingLaw(axis=axis, points=tuple(points), fits={}, form=POWER, prediction=None)
    return ScalingLaw(
        axis=axis,
        points=tuple(points),
        fits=fits,
        form=preferred(fits),
        prediction=_prediction(runs, axis, points[-1]),
    )


def _fits(points: Sequence[TrainedRun], axis: str) -> dict[str, Fit]:
    xs, losses = [run.at(axis) for run in points], [run.loss for run in points]
    return {form: fit(xs, losses, form) for form, least in LEAST.items() if len(set(xs)) >= least}


def _prediction(runs: Sequence[TrainedRun], axis: str, largest: TrainedRun) -> Prediction | None:
    """Fit what lies below the largest run, and say what it says of that run.

    All runs with as much of X as it or more are held out with it, and those within 5 % of that.
    """
    end = largest.at(axis)
    rest = envelope([run for run in runs if run.at(axis) * _SAME < end], axis)
    fits = _fits(rest, axis)
    if not fits:
        return None
    form = preferred(fits)
    value, low, high = fits[form].predicted(end)
    return Prediction(
        run=largest.name,
        form=form,
        points=len(rest),
        beyond=end / rest[-1].at(axis),
        value=value,
        interval=(low, high),
        measured=largest.loss,
    )
