"""Time to an event, some of it censored: bins of time, losses, concordance, groups of risk.

Times are in the unit of the table; events are 1 (seen) or 0 (censored: not seen until then).
Importing this module imports neither torch nor scikit-survival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.errors import Refused

if TYPE_CHECKING:
    import torch

SMALLEST = 1e-7  # of a probability before its logarithm
TIED_RISK = 1e-8  # risks this close count as equal


# ---------------------------------------------------------------------------- bins of time

def survival_bins(times: np.ndarray, events: np.ndarray, n_bins: int) -> tuple[float, ...]:
    """(n_bins + 1) edges of bins of time: the quantiles of the times (n,) with an event.

    To be given the training slides alone. Bin b holds the times from edge b to below edge b + 1;
    the outer edges are only for the record, the first and the last bin hold all that is beyond.
    Raises ``Refused`` without events, or when a bin would hold none: too few distinct times.
    Source: quartiles of the uncensored cases, ABMILX (abmilx.md section 9).
    """
    seen = np.asarray(times, np.float64)[np.asarray(events) == 1]
    if not seen.size:
        raise Refused("no training slide has an event, so there is nothing to learn of survival: "
                      "make other splits")
    edges = tuple(np.quantile(seen, np.linspace(0, 1, n_bins + 1)).tolist())
    if not np.bincount(time_bins(seen, edges), minlength=n_bins).all():
        raise Refused(f"{n_bins} bins of time would leave one without a training event: the "
                      f"{seen.size} events have {len(np.unique(seen))} distinct times; "
                      "give a lower --n_bins")
    return edges


def time_bins(times: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """(n,) int64 bin of each time, see ``survival_bins``."""
    return np.searchsorted(np.asarray(edges[1:-1]), times, side="right")


# ---------------------------------------------------------------------------- what models learn

def survival_curve(logits: torch.Tensor) -> torch.Tensor:
    """(n, T) float32 probability S_t of no event until the end of bin t, of logits (n, T).

    The hazard of a bin is the sigmoid of its logit; S_t is the product of 1 - hazard up to t.
    """
    return (1.0 - logits.float().sigmoid()).cumprod(dim=1)


def nll_survival(
    logits: torch.Tensor, bins: torch.Tensor, events: torch.Tensor, *, alpha: float = 0.0
) -> torch.Tensor:
    """(n,) float32 negative log-likelihood of discrete times, of logits (n, T).

    bins: (n,) int64 bin of each time; events: (n,) 1 or 0; alpha: a censored slide counts
    1 - alpha. A slide with an event in bin y costs -log S_{y-1} - log h_y, a censored one
    -log S_y; probabilities below 1e-7 count as that.
    Source: Zadeh and Schmid, "Bias in Cross-Entropy-Based Training of Deep Survival Networks",
    TPAMI 2021, as in ABMILX (abmilx.md section 9).
    """
    import torch

    events, own = events.float(), bins[:, None]
    hazards, curve = logits.float().sigmoid(), survival_curve(logits)
    curve = torch.cat([torch.ones_like(curve[:, :1]), curve], dim=1)  # from S_{-1} = 1 on

    def cost(probabilities: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return -probabilities.gather(1, column).clamp(min=SMALLEST).log()[:, 0]

    seen = cost(curve, own) + cost(hazards, own)
    return events * seen + (1.0 - alpha) * (1.0 - events) * cost(curve, own + 1)


def cox_loss(risks: torch.Tensor, times: torch.Tensor, events: torch.Tensor) -> torch.Tensor:
    """Scalar negative log partial likelihood of log-risks (n,), the mean over the events.

    Slides are at risk while their time is not below that of the event; ties as by Breslow.
    0 (with a graph) without events. Source: Cox, "Regression Models and Life-Tables", 1972.
    """
    import torch

    order = torch.argsort(times, descending=True, stable=True)
    risks, times, events = risks.float()[order], times[order], events.float()[order]
    last_tied = torch.searchsorted(-times, -times, right=True) - 1
    at_risk = risks.logcumsumexp(dim=0)[last_tied]
    return (events * (at_risk - risks)).sum() / events.sum().clamp(min=1.0)


# ---------------------------------------------------------------------------- how good it is

@dataclass(frozen=True, kw_only=True)
class Concordance:
    """Pairs of slides in which the one with the earlier event has the higher risk, and others.

    c_index: share of concordant pairs, ties of risk count half; NaN without comparable pairs,
    ``reason`` why
    """

    c_index: float
    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int
    reason: str


def concordance(risks: np.ndarray, times: np.ndarray, events: np.ndarray) -> Concordance:
    """Harrell's c-index of risks (n,), by scikit-survival; risks within 1e-8 are tied."""
    from sksurv.exceptions import NoComparablePairException
    from sksurv.metrics import concordance_index_censored

    seen = np.asarray(events) == 1
    reason = ("there are no slides" if not len(seen) else
              "there is one slide only" if len(seen) == 1 else
              "no slide has an event" if not seen.any() else
              "a risk is not finite" if not np.isfinite(risks).all() else "")
    counts: tuple[Any, ...] = (float("nan"), 0, 0, 0, 0)
    if not reason:
        try:
            with np.errstate(invalid="ignore"):  # 0 / 0 where all pairs are tied in time
                counts = concordance_index_censored(seen, times, risks, tied_tol=TIED_RISK)
        except NoComparablePairException:
            pass
        if np.isnan(counts[0]):
            reason = "no two slides can be compared"
    return Concordance(c_index=float(counts[0]), concordant=int(counts[1]),
                       discordant=int(counts[2]), tied_risk=int(counts[3]),
                       tied_time=int(counts[4]), reason=reason)


# ---------------------------------------------------------------------------- groups of risk

@dataclass(frozen=True, kw_only=True)
class KaplanMeier:
    """Share of a group without event over time, for a step plot that starts at (0, 1).

    times: (m,) distinct times, increasing; survival, low, high: (m,) from that time on, with a
    pointwise 95 % interval; at_risk: (m,) slides not out before that time; n, n_events: in all
    """

    times: np.ndarray
    survival: np.ndarray
    low: np.ndarray
    high: np.ndarray
    at_risk: np.ndarray
    n: int
    n_events: int


def kaplan_meier(times: np.ndarray, events: np.ndarray) -> KaplanMeier:
    """The Kaplan-Meier estimate of times (n,) and events (n,), n >= 1, by scikit-survival."""
    from sksurv.nonparametric import kaplan_meier_estimator

    times, seen = np.asarray(times, np.float64), np.asarray(events) == 1
    steps, survival, (low, high) = kaplan_meier_estimator(seen, times, conf_type="log-log")
    at_risk = len(times) - np.searchsorted(np.sort(times), steps, side="left")
    return KaplanMeier(times=steps, survival=survival, low=low, high=high, at_risk=at_risk,
                       n=len(times), n_events=int(seen.sum()))


def risk_groups(risks: np.ndarray, *, n_groups: int = 2) -> np.ndarray:
    """(n,) int64 group of each slide, 0 the lowest risk: cut at the quantiles of the risks (n,).

    A risk equal to a cut is in the lower group, so that equal risks stay together.
    """
    cuts = np.quantile(risks, np.arange(1, n_groups) / n_groups)
    return np.searchsorted(cuts, risks, side="left")


@dataclass(frozen=True, kw_only=True)
class LogRank:
    """Do groups differ in survival? NaN where the test says nothing, ``reason`` why."""

    statistic: float
    p_value: float
    reason: str


def log_rank(times: np.ndarray, events: np.ndarray, groups: np.ndarray) -> LogRank:
    """The log-rank test of two or more groups (n,), by scikit-survival."""
    from sksurv.compare import compare_survival
    from sksurv.util import Surv

    seen = np.asarray(events) == 1
    nothing = float("nan")
    if len(np.unique(groups)) < 2:
        return LogRank(statistic=nothing, p_value=nothing, reason="there is one group only")
    if not seen.any():
        return LogRank(statistic=nothing, p_value=nothing, reason="no slide has an event")
    try:
        found = compare_survival(Surv.from_arrays(seen, times), groups)
    except np.linalg.LinAlgError:
        return LogRank(statistic=nothing, p_value=nothing,
                       reason="no event leaves slides of two groups to compare")
    return LogRank(statistic=float(found[0]), p_value=float(found[1]), reason="")
