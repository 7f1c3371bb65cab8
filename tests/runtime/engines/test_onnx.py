from __future__ import annotations

import logging
import threading
import warnings

import pytest

from coalescer_fast.runtime.engines.onnx import quiet_exporter


def test_the_exporter_leaves_logging_and_warnings_as_they_were():
    logging.disable(logging.ERROR)
    try:
        with quiet_exporter():
            assert logging.root.manager.disable == logging.ERROR
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)
    filters = list(warnings.filters)
    with pytest.raises(KeyError), quiet_exporter():
        raise KeyError
    assert logging.root.manager.disable == logging.NOTSET
    assert list(warnings.filters) == filters


def test_one_thread_exports_at_a_time():
    inside, most = [], []

    def enter():
        with quiet_exporter():
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.01)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
