"""What a server says that it serves."""

import pytest

from polarctl.errors import PolarctlError
from polarctl.parallel.http_client import Fault
from polarctl.parallel.served import ReplyName


def test_the_first_name_binds_those_after_it():
    named = ReplyName("http://host")
    for reply in ({}, {"model": None}, {"model": "alias"}, {}, {"model": "alias"}):
        named.check(reply)
    assert named.name == "alias"
    with pytest.raises(PolarctlError, match="by the model `b`, the ones before by `alias`"):
        named.check({"model": "b"})


def test_a_name_that_the_server_does_not_list_is_refused():
    named = ReplyName("http://host", ["rm", "rm-lora"])
    with pytest.raises(PolarctlError, match="by the model `other`, which it does not list"):
        named.check({"model": "other"})
    named.check({"model": "rm-lora"})


@pytest.mark.parametrize("name", [7, ["rm"], {"id": "rm"}, True])
def test_a_name_that_is_no_text_is_a_fault(name):
    with pytest.raises(Fault, match="`model` is no text"):
        ReplyName("http://host").check({"model": name})
