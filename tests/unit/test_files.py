import json
import math

import pytest

from nemo_paced.files import digest, replacing, without_nan, write_json, write_whole


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_whole(path, "first")
    with pytest.raises(OSError), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "first"
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert [each.name for each in path.parent.iterdir()] == ["file.json"], "nothing is left"


def test_json_has_null_for_what_is_no_number(tmp_path):
    tree = {"a": math.nan, "b": [1.5, -math.inf, (math.inf,)], "c": "nan"}
    write_json(tmp_path / "file.json", tree)
    written = json.loads((tmp_path / "file.json").read_text())
    assert written == without_nan(tree) == {"a": None, "b": [1.5, None, [None]], "c": "nan"}


def test_a_digest_is_that_of_the_files_of_earlier_runs():
    """data_fingerprint.json and results.json hold such digests."""
    assert digest({"id": "p", "answer": "1"}) == "898533f815a58019"
    assert digest({"id": "p", "answer": "1"}, 12) == "898533f815a5"
