"""Checksums in JSON data: what is damaged or edited is found out, what is laid out anew is not."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedshape.files import ContentError, with_checksum, without_checksum

VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
DATA = st.dictionaries(st.text().filter(lambda key: key != "sha256"), VALUE, max_size=5)


@given(data=DATA)
@settings(deadline=None, max_examples=150)
def test_data_comes_back_however_it_is_laid_out(data: dict[str, Any]) -> None:
    written = with_checksum(data)
    assert list(written)[-1] == "sha256"
    assert with_checksum(written) == written
    for text in (json.dumps(written), json.dumps(written, indent=3, sort_keys=True)):
        assert without_checksum(json.loads(text), "file") == data


@given(data=DATA, other=DATA)
@settings(deadline=None, max_examples=150)
def test_other_data_is_refused(data: dict[str, Any], other: dict[str, Any]) -> None:
    edited = {**with_checksum(data), **other}
    if json.dumps({**data, **other}, sort_keys=True) == json.dumps(data, sort_keys=True):
        assert without_checksum(edited, "file") == data
        return
    with pytest.raises(ContentError, match=r"^file is damaged or was edited"):
        without_checksum(edited, "file")


@pytest.mark.parametrize("change", [math.nextafter(0.1, 1), 0, -0.1, "0.1", None, [0.1]])
def test_the_smallest_change_is_found_out(change: object) -> None:
    written = with_checksum({"rows": [{"ms": 0.1}]})
    edited = copy.deepcopy(written)
    edited["rows"][0]["ms"] = change
    with pytest.raises(ContentError, match="its checksum is not that of its content"):
        without_checksum(edited, "file")


def test_a_checksum_is_demanded() -> None:
    with pytest.raises(ContentError, match=r"^file has lost its checksum, the field 'sha256'"):
        without_checksum({"rows": []}, "file")
    with pytest.raises(ValueError, match="not JSON compliant"):
        with_checksum({"ms": math.nan})
