"""Records say what is wrong with them in the words of who wrote the file: fields, values, what is allowed."""

import json

import pytest
from pydantic import model_validator

from asdm.digests import short_digest
from asdm.errors import AsdmError
from asdm.records import FieldError, Record, read_record


class Part(Record):
    weight: float
    path: str = ""

    @model_validator(mode="after")
    def _has_file(self):
        if self.path:
            raise AsdmError(f"{self.path}: no such file")
        if self.weight < 0:
            raise FieldError("weight", f"={self.weight}: give none below 0")
        return self


class Whole(Record):
    parts: list[Part]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"parts": [{"weight": "x"}]}, "parts.0.weight='x': input should be a valid number"),
        ({"parts": [{}]}, "parts.0.weight: field required"),
        ({"parts": [{"weight": True}]}, "parts.0.weight=True: must not be true or false"),
        ({"parts": [{"weight": 1, "path": "Style.pt"}]}, "parts.0: Style.pt: no such file"),
        ({"parts": [{"weight": -1}]}, "parts.0.weight=-1.0: give none below 0"),
        ({"parts": 3}, "parts=3: input should be a valid list"),
        ({"parts": [], "other": 1}, "other=1: extra inputs are not permitted"),
    ],
)
def test_a_fault_names_the_field_and_no_class_from_a_call_and_from_a_file(tmp_path, fields, told):
    with pytest.raises(AsdmError) as of_call:
        Whole(**fields)
    assert str(of_call.value).startswith(told)
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(AsdmError) as of_file:
        read_record(Whole, path, "a whole", "write it again")
    assert str(of_file.value) == f"{path}: not a whole: {of_call.value}; write it again"


def test_a_digest_in_a_file_of_an_earlier_version_is_todays():
    assert short_digest("model ", b"data") == short_digest("model data") == "6dbdb6a147ad4d80"


def test_a_file_that_an_editor_marked_as_utf_8_is_read(tmp_path):
    (tmp_path / "whole.json").write_bytes(b'\xef\xbb\xbf{"parts": [{"weight": 1}]}')
    assert read_record(Whole, tmp_path / "whole.json", "a whole", "make one").parts[0].weight == 1
