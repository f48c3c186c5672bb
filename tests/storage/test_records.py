"""JSON that is read again: what is not as expected is one line with the file and the place."""

import math

import pytest

from dmf.errors import DmfError
from dmf.logging import ASIDE, JsonLines
from dmf.storage import records
from dmf.storage.records import COUNT, NUMBER, POSITIVE, Is, Maybe

FORM = {
    "step": COUNT,
    "scale": Maybe(float),
    "shards": Maybe([{"name": str, "bytes": POSITIVE}]),
    "source": Maybe((dict, None)),
    "kind": Maybe(Is("a or b", lambda x: x in ("a", "b"))),
    ...: NUMBER,
}


@pytest.mark.parametrize(
    "content",
    [
        b'{"step": 0}',
        b'\xef\xbb\xbf{"step": 1, "scale": 2}',
        b'{"step": 3, "source": null, "loss": NaN, "shards": [{"name": "x", "bytes": 1, "z": []}]}',
    ],
)
def test_what_the_form_allows_is_read(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert records.read(tmp_path / "a.json", FORM)["step"] in (0, 1, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a.json line 1: no JSON \(Expecting value\); expected WANTED"),
        (b'{"step": 1,\n "scale"', r"a.json line 2: no JSON \(Expecting ':' delimiter\); expected"),
        (b'{"step":\n\n"\xff"}', r"a.json line 3: the byte 0xff is no text in UTF-8; expected"),
        (b'{"a": ' * 100_000, r"a.json: no JSON \(its values are nested too deeply\); expected"),
        (b'{"step": 1, "step": 2}', r"a.json: no JSON \('step' is given twice\); expected"),
        (b'{"step": ' + b"1" * 5000 + b"}", r"a.json: no JSON \(Exceeds the limit .*; expected"),
        (b"[]", r"a.json: it is \[\], expected an object"),
        (b"{}", r"a.json: step is missing, expected a whole number, 0 or more"),
        (b'{"step": true}', r"a.json: step is True, expected a whole number"),
        (b'{"step": 1e999}', r"a.json: step is inf, expected a whole number"),
        (b'{"step": 1, "scale": NaN}', r"a.json: scale is nan, expected a finite number"),
        (b'{"step": 1, "scale": 1' + b"0" * 400 + b"}", r"scale is 1.*, expected a finite number"),
        (b'{"step": 1, "source": 3}', r"a.json: source is 3, expected an object or null"),
        (b'{"step": 1, "kind": "c"}', r"a.json: kind is 'c', expected a or b"),
        (b'{"step": 1, "loss": "1"}', r"a.json: \['loss'\] is '1', expected a number"),
        (b'{"step": 1, "shards": 1}', r"a.json: shards is 1, expected a list"),
        (
            b'{"step": 1, "shards": [{"name": "x", "bytes": 1}, {"name": "y", "bytes": -1}]}',
            r"a.json: shards\[1\].bytes is -1, expected a whole number above 0",
        ),
    ],
)
def test_what_it_does_not_allow_is_one_line_with_file_and_place(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DmfError, match=message.replace("WANTED", "it")) as caught:
        records.read(tmp_path / "a.json", FORM, "it")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_seal_shows_an_alteration_and_entries_of_older_versions_have_none():
    entry = records.sealed({"step": 3})
    assert records.unsealed(entry, "x") == records.unsealed({"step": 3}, "x") == {"step": 3}
    with pytest.raises(DmfError, match="x: its values were altered; expected what dmf wrote"):
        records.unsealed(entry | {"step": 4}, "x")


BAD = {  # what becomes of line 2 of 3, and what is said of it
    "torn": (b'{"step": 2, "lo\n', "line 2: no JSON"),
    "bytes": (b'{"step": \xff}\n', "line 2: the byte 0xff is no text"),
    "nested": (b"[" * 100_000 + b"\n", "line 2: no JSON .its values are nested too deeply"),
    "type": (b'{"step": "2"}\n', "line 2: step is '2', expected a whole number"),
    "no object": (b"2\n", "line 2: it is 2, expected an object"),
    "zeros": (b"\0" * 12 + b"\n", "line 2: no JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_in_the_middle_of_a_log_is_kept_aside_and_the_rest_stays(tmp_path, caplog, name):
    bad, message = BAD[name]
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.path.write_bytes(b'{"step": 1}\n' + bad + b'{"step": 3, "loss": NaN}\n')
    assert [row["step"] for row in lines.read()] == [1, 3]
    lines.resume(3)
    assert lines.path.read_text() == '{"step": 1}\n{"step": 3, "loss": NaN}\n'
    assert message.split(" .")[0] in caplog.text and f"kept in m.jsonl{ASIDE}" in caplog.text
    aside = tmp_path / f"m.jsonl{ASIDE}"
    assert aside.read_text() == bad.decode(errors="backslashreplace")
    caplog.clear()
    lines.resume(3)
    assert not caplog.text and math.isnan(lines.read()[1]["loss"])


def test_lines_twice_or_out_of_order_are_put_right_and_told(tmp_path, caplog, capsys):
    lines = JsonLines(tmp_path / "m.jsonl")
    rows = ['{"step": 2}\n', '{"step": 1}\n', '{"step": 1}\n', '{"step": 9}\n', '{"step": 3']
    lines.path.write_text("".join(rows))
    lines.resume(5)
    assert lines.path.read_text() == '{"step": 1}\n{"step": 2}\n'
    for said in ("line 5: no JSON", "it was cut off", "1 lines twice", "lines out of order"):
        assert said in caplog.text
    assert "1 rows after step 5 are left out" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [lines.path]
