"""Forms with files are read and written within limits."""

from __future__ import annotations

import pytest

from llama_smart_proxy.proxy.api.multipart import MAX_PARTS, Form
from llama_smart_proxy.proxy.errors import BadRequest

FORM = "multipart/form-data; boundary=a"


def form_of(fields: int) -> bytes:
    part = b'--a\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n'
    return part * fields + b"--a--\r\n"


def test_a_form_has_a_limited_number_of_fields() -> None:
    """Each takes time on the event loop: a form of some megabytes that was nothing but boundaries took seconds."""
    assert Form.of(FORM).parse(form_of(MAX_PARTS)).text("x") == "1"
    with pytest.raises(BadRequest, match="over 1000 fields"):
        Form.of(FORM).parse(form_of(MAX_PARTS + 1))


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data; boundary*=x", "multipart/form-data; boundary*0*=utf-9'en'%; boundary*2=a", "é\udcff", ""],
)
def test_any_content_type_is_a_form_or_refused(content_type: str) -> None:
    try:
        Form.of(content_type).parse(b"--a--")
    except BadRequest as exc:
        assert exc.code == "invalid_form"
