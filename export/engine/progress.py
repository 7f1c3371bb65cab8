"""The builder's progress on a bar of tqdm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def progress_monitor(trt: Any, bar: Any) -> Any:
    """A ``trt.IProgressMonitor`` that moves a bar.

    Its ``stopped`` is the exception that ended the build early, such as a KeyboardInterrupt, or None.

    Args:
        trt: The package.
        bar: A bar of tqdm, or None.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.stopped: BaseException | None = None
            self.left: dict[str, int] = {}  # steps that are left of each running phase

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.left[phase_name] = num_steps
            self._show(lambda: self._grow(phase_name, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.left[phase_name] = self.left.get(phase_name, 1) - 1
            self._show(lambda: bar.update())
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            left = max(self.left.pop(phase_name, 0), 0)
            self._show(lambda: bar.update(left))

        def _grow(self, phase: str, steps: int) -> None:
            bar.total = (bar.total or 0) + steps
            bar.set_description(phase[:40])

        def _show(self, change: Callable[[], object]) -> None:
            # an exception must not pass through the library
            try:
                if bar is not None:
                    change()
            except BaseException as error:
                self.stopped = error

    return Monitor()
