"""Loading with the garbage collector paused."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from hpctrain.launch.process_group import loading


@pytest.fixture(autouse=True)
def enabled_again() -> Iterator[None]:
    yield
    gc.enable()


def test_the_collector_rests_and_what_was_loaded_is_kept_from_it() -> None:
    with loading():
        assert not gc.isenabled()
        loaded = [[]]
    assert gc.isenabled()
    assert not any(each is loaded for each in gc.get_objects())


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was_also_by_an_error(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert gc.isenabled() == enabled
