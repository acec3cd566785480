"""Every planted fault is noticed by the check that is there for it; see `planted`."""

from __future__ import annotations

import planted_engine
import planted_graph
import planted_integers
import planted_kernels
import planted_passes
import pytest
from planted import FAULTS, Fault

MODULES = (planted_graph, planted_passes, planted_engine, planted_kernels, planted_integers)


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 15
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def failure_of(fault: Fault) -> BaseException | None:
    """How the check fails, if it does. pytest's own failures are no Exceptions."""
    try:
        fault.check()
    except (Exception, pytest.fail.Exception) as failure:
        return failure
    return None


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_noticed(fault: Fault, monkeypatch: pytest.MonkeyPatch):
    fault.check()
    with monkeypatch.context() as planted:
        fault.plant(planted)
        failure = failure_of(fault)
    assert failure is not None, "nothing failed"
    assert not isinstance(failure, (NameError, AttributeError, SyntaxError)), failure
    fault.check()
