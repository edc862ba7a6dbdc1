"""
Errors of the processes that benchmarks run.

    python -m pytest tests/test_bench_harness.py
"""

import pytest

from nanochat.common import UserError
from scripts.bench.harness import Worker


def fail(connection):
    raise UserError("no checkpoint d4: train one first")


@pytest.mark.slow
def test_user_error_of_a_process_is_raised_without_a_traceback(capfd):
    worker = Worker(fail)
    worker.connection.poll(None)  # the error has arrived
    with pytest.raises(UserError, match="^no checkpoint d4: train one first$"):
        worker.request("measure")
    with pytest.raises(UserError, match="a benchmark process ended early"):
        worker.request("measure")
    assert capfd.readouterr().err == ""
