"""The ceiling that label noise sets: against made-up opinions whose expectation is known, and on KonIQ-10k's real ones
where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from smart_iqa.metrics import ceiling_of, evaluate, noise_ceiling

KONIQ = (
    Path(os.environ.get("SMART_IQA_DATA") or Path(__file__).parents[2] / "shared" / "data").expanduser()
    / "scores"
    / "koniq10k_distributions_sets.csv"
)


def made_up(n, votes, seed=0, low=20, high=80):
    """True scores, and mean, std and number of `votes` opinions whose spread differs from picture to picture."""
    rng = np.random.default_rng(seed)
    true, votes = rng.uniform(low, high, n), np.broadcast_to(votes, n)
    spread = rng.uniform(5, 30, n)
    opinions = [t + s * rng.standard_normal(v) for t, s, v in zip(true, spread, votes)]
    return true, pd.DataFrame(
        dict(score=[o.mean() for o in opinions], std=[o.std(ddof=1) for o in opinions], votes=votes)
    )


@pytest.mark.parametrize("votes", [3, 10, 40, "mixed"])
@pytest.mark.parametrize("low, high", [(20, 80), (45, 60)])
def test_stated_is_what_the_truth_reaches(votes, low, high):
    """Many votes or few, a wide range of qualities or a narrow one: within .01 where the scores are mostly signal, and
    the floor of the RMSE within 5 %."""
    count = np.random.default_rng(9).integers(3, 60, 4000) if votes == "mixed" else votes
    true, table = made_up(4000, count, low=low, high=high)
    stated, real = ceiling_of(table, n_sim=100), evaluate(true, table.score, n_boot=0)
    slack = (
        0.01 if stated["reliability"] > 0.6 else 0.05
    )  # of mostly noise the observed distribution is not the true one
    assert stated["plcc"] == pytest.approx(real["plcc"], abs=slack) and stated["srcc"] == pytest.approx(
        real["srcc"], abs=slack
    )
    assert stated["rmse"] == pytest.approx(real["rmse"], rel=0.05) and stated["n"] == 4000


def test_range_holds_new_noise():
    """The 95 % range is that of the noise: other people on the same pictures land in it about as often as it says."""
    rng = np.random.default_rng(4)
    true, se = rng.normal(50, 12, 300), rng.uniform(2, 6, 300)
    stated = noise_ceiling(
        true * np.sqrt(1 + np.mean(se**2) / true.var(ddof=1)), se, 1
    )  # scores whose shrunk ones are as spread as the true ones
    again = [stats.spearmanr(true, true + se * rng.standard_normal(300)).statistic for _ in range(400)]
    inside = np.mean([stated["srcc_low"] <= r <= stated["srcc_high"] for r in again])
    assert 0.9 <= inside <= 0.99 and stated["srcc"] == pytest.approx(np.mean(again), abs=0.002)


def test_more_votes_less_noise_higher():
    _, table = made_up(500, 10)
    few, many = (ceiling_of(table.assign(votes=v), n_sim=50) for v in (5, 50))
    assert few["srcc"] < many["srcc"] < 1 and few["plcc"] < many["plcc"] < 1 and few["rmse"] > many["rmse"]
    assert ceiling_of(table.assign(std=0.0), n_sim=5)["srcc"] == pytest.approx(1)


def test_order_of_rows_and_seed():
    _, table = made_up(300, 10)
    assert ceiling_of(table, 50) == ceiling_of(table, 50) and ceiling_of(table, 50) != ceiling_of(table, 50, seed=1)
    assert ceiling_of(table.sample(frac=1, random_state=0))["srcc"] == pytest.approx(
        ceiling_of(table)["srcc"], abs=1e-3
    )


def test_unknown_is_none_and_wrong_is_an_error():
    _, table = made_up(50, 10)
    assert (
        ceiling_of(table[["score", "std"]]) is None
        and ceiling_of(table.assign(std=np.nan)) is None
        and ceiling_of(table.head(0)) is None
    )
    assert ceiling_of(table.assign(std=table["std"].where(table.index > 4)), 5)["n"] == 45
    for column, value, said in (
        ("votes", 0, "votes in row 7"),
        ("std", -1.0, "std in row 7"),
        ("score", np.inf, "score in row 7"),
    ):
        bad = table.copy()
        bad.loc[7, column] = value
        with pytest.raises(ValueError, match=said):
            ceiling_of(bad)
    with pytest.raises(ValueError, match="one unit"):
        ceiling_of(table.assign(std=table["std"] * 100))


@pytest.mark.skipif(
    not KONIQ.is_file(), reason="KonIQ-10k's score file is not at hand (SMART_IQA_DATA or ../shared/data)"
)
def test_koniq():
    """The official test split: the ceiling lies above .99, for the stretched MOS and the plain mean of the votes, so
    noise does not keep models at .93."""
    t = pd.read_csv(KONIQ).query("set == 'test'")
    given = dict(std=25 * t.SD, votes=t.c_total)  # opinions of 1-5
    of_mos = ceiling_of(
        pd.DataFrame(dict(score=(t.MOS - 1) / 0.99, **given))
    )  # MOS of 1-100, as the table of the set has it
    grades = t[[f"c{k}" for k in range(1, 6)]].to_numpy() @ np.arange(1, 6)
    plain = ceiling_of(pd.DataFrame(dict(score=25 * (grades - 1), **given)))
    print(of_mos, plain)
    assert of_mos["n"] == plain["n"] == 2015
    assert of_mos["srcc"] == pytest.approx(0.994, abs=0.001) and of_mos["plcc"] == pytest.approx(0.996, abs=0.001)
    assert plain["srcc"] == pytest.approx(0.9925, abs=0.001) and plain["rmse"] == pytest.approx(1.4, abs=0.02)
    assert of_mos["srcc_low"] > 0.99 and plain["srcc_low"] > 0.99
    poor = ceiling_of(
        pd.DataFrame(dict(score=(t.MOS - 1) / 0.99, std=25 * t.SD, votes=5))
    )  # a small study's five raters
    assert poor["srcc"] < 0.93
