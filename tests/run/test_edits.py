"""Random edits of the JSON of a run: launch/tables/edits.py makes hundreds, a test a few."""

from tests.house.test_house import loaded

WHERE = {
    "types": "config.json",
    "cut": "metrics.jsonl",
    "byte": "watch.jsonl",
    "hole": "scores.jsonl",
    "nested": "best.json",
    "twice": "scores.jsonl",
    "swapped": "metrics.jsonl",
}


def test_a_run_with_an_edited_file_ends_in_the_same_bits_or_names_the_file(tmp_path, monkeypatch):
    edits, base = loaded("edits"), tmp_path / "finished"
    monkeypatch.setattr(edits.Judged, "curves", lambda *_: None)
    with edits.cheap():
        edits.start(base, edits.VALUES)
    reference = edits.unharmed(base, edits.VALUES)
    assert list(WHERE) == list(edits.EDITS)
    rows = [edits.once(base, name, how, "0", reference) for how, name in WHERE.items()]
    assert [row for row in rows if "said" in row] == []
    assert {row["outcome"] for row in rows} == {"same bits", "same bits, told", "one line"}
