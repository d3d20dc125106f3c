"""In how many channels triggers live, against what defenses make of them."""

import matplotlib
import pandas as pd
import pytest

from abdlab.attacks.triggers import TRIGGERS
from abdlab.plots import channels_figure
from abdlab.studies.channels import ACHIEVED, correlations, measured

matplotlib.use("Agg")

ROWS = pd.DataFrame(
    {
        "trigger": ["badnet_sq", "blend", "sig", "smooth", "cl"],
        "asr": [100.0, 99.0, 98.0, 97.0, 12.0],
        "share": [0.1, 0.3, 0.2, 0.4, 0.9],
        "bounded_asr": [5.0, 60.0, 70.0, 90.0, 0.0],
        "sv_auc": [0.9, 0.7, 0.8, 0.6, 0.1],
    }
)


def test_rank_correlations_by_hand():
    """Ranks 1 3 2 4 against 1 2 3 4 differ by 1 twice: rho = 1 - 6 x 2 / (4 x 15) = .8, and
    the p-value is that of Student's t with 2 degrees of freedom. cl's backdoor is not there.
    """
    found = correlations(ROWS)
    t = 0.8 * (2 / (1 - 0.8**2)) ** 0.5
    p = 1 - t / (2 + t**2) ** 0.5  # two-sided, of 2 degrees of freedom
    assert found["bounded_asr"] == (0.8, pytest.approx(p, abs=1e-4), 4)
    assert found["sv_auc"][0] == -1.0
    assert correlations(ROWS, least=0.0)["bounded_asr"] == (
        pytest.approx(1 - 6 * (1 + 0 + 4 + 1 + 16) / (5 * 24), abs=1e-3),
        pytest.approx(0.8729, abs=1e-3),
        5,
    )


def test_rows_that_are_there_are_not_made_again(tmp_path):
    file = tmp_path / "rows.csv"
    ROWS.to_csv(file, index=False)
    written = file.read_bytes()
    assert measured(file, tmp_path / "none", ["blend", "cl"]).equals(ROWS)
    assert file.read_bytes() == written
    assert not (tmp_path / "none").exists()


def test_the_figure_has_a_named_point_per_trigger():
    figure = channels_figure(ROWS, ACHIEVED, correlations(ROWS))
    bounded, vaccine = figure.axes
    assert [t.get_text() for t in bounded.texts] == list(ROWS["trigger"])
    assert (
        bounded.collections[0].get_offsets().tolist()
        == ROWS[["share", "bounded_asr"]].values.tolist()
    )
    assert vaccine.get_title().startswith("Spearman's rho -1.00")
    assert set(ROWS["trigger"]) <= set(TRIGGERS)
