"""The address under which peers reach this process."""

from __future__ import annotations

import pytest

from vllm_rfork.engines.host import local_ipv4
from vllm_rfork.errors import EngineError


def test_a_host_name_becomes_the_address_the_engine_demands() -> None:
    assert local_ipv4("yuanrong", "localhost") == "127.0.0.1"
    assert local_ipv4("yuanrong", "127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize("host", ["0.0.0.0", "::1", "192.0.2.1", "no such host", "x" * 300])
def test_a_host_that_is_not_this_machines_says_what_to_set(host: str) -> None:
    with pytest.raises(EngineError, match="rfork_seed_advertise_host") as caught:
        local_ipv4("yuanrong", host)
    assert caught.value.operation == "open"
