"""Random edits of the JSON of a run: launch/tables/edits.py makes hundreds, a test one of each."""

from collections import Counter

from tests.house.test_house import loaded


def test_a_run_with_an_edited_file_ends_in_the_same_bits_or_names_the_file(tmp_path):
    rows = loaded("edits").run(tmp_path, count=7, seed=0)
    assert Counter(row["edit"] for row in rows) == dict.fromkeys(
        ("types", "cut", "byte", "hole", "nested", "twice", "swapped"), 1
    )
    assert [row for row in rows if "said" in row] == []
