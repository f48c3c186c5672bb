"""What a run says of its scores at several numbers of sampling steps."""

import pytest

from dmf.run import scoreboard

FALLING = {1: 0.30, 2: 0.20, 4: 0.10, 8: 0.104, 32: 0.09}  # 8 steps are within the margin
RISING = {1: 0.20, 2: 0.10, 4: 0.12, 32: 0.15}


@pytest.mark.parametrize(
    ("scores", "worse"), [(FALLING, []), (RISING, [(2, 4), (2, 32)]), ({}, [])]
)
def test_more_steps_are_worse_where_their_score_is_above_the_best_of_fewer(scores, worse):
    assert scoreboard.rises(scores) == worse


class Said:
    """The part of a judge that prints."""

    main = "fid"

    def table(self, rows):
        return "the table"


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (FALLING, "\ncurve     fid falls or stays with more steps"),
        (
            RISING,
            "\nwarning   more steps are worse: fid is higher at 4 (0.120) than 2 (0.100), "
            "at 32 (0.150) than 2 (0.100)",
        ),
        ({1: 0.3}, ""),
    ],
)
def test_the_table_of_a_run_says_in_one_line_whether_its_curve_falls(scores, said):
    rows = [{"nfe": n, "fid": score} for n, score in scores.items()]
    assert scoreboard._scored(Said(), rows) == "the table" + said
