"""What packages of TensorRT offer, recorded from the real ones in tensorrt_api.json, and a strict stand-in built from
it.

`python tests/tensorrt_api.py MODULE.so VERSION` records another: the binding alone suffices, loaded against libraries
that export its few C entry points and do nothing (so were tensorrt 10 and 11 recorded, whose libraries no machine of
ours can load).
"""

from __future__ import annotations

import ctypes
import enum
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("tensorrt_api.json")
CLASSES = (
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInspector",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "IRuntimeConfig",
    "ITimingCache",
    "LayerInformationFormat",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "ProfilingVerbosity",
    "Refitter",
    "Runtime",
)


def surface(module: Any) -> dict[str, list[str]]:
    """Class -> its public names, of an enum the members."""
    found = {}
    for name in CLASSES:
        if (cls := getattr(module, name, None)) is not None:
            members = getattr(cls, "__members__", None)
            found[name] = sorted(members or (each for each in dir(cls) if not each.startswith("_")))
    return found


def recorded() -> dict[str, dict[str, list[str]]]:
    """ "tensorrt 10.8.0.43" -> `surface`."""
    return json.loads(DATA.read_text("utf-8"))


def record(which: str, found: dict[str, list[str]]) -> None:
    everything = (recorded() if DATA.exists() else {}) | {which: found}
    versions = [
        f"{json.dumps(version)}: {{\n"
        + ",\n".join(f" {json.dumps(name)}: {json.dumps(names)}" for name, names in each.items())
        + "\n}"
        for version, each in sorted(everything.items())
    ]
    DATA.write_text("{\n" + ",\n".join(versions) + "\n}\n", "utf-8")


# how a plan of the stand-in computes: inputs by name, (address, shape) -> outputs by name are written to their
# addresses
Compute = Callable[[dict[str, tuple[int, tuple[int, ...]]], dict[str, int]], None]


class Fake(types.ModuleType):
    """Stands in for a package: it has what was recorded of it, and nothing else.

    used: (class, name) of all that was touched. What it does is set by attributes of ``does``: parse, build, load (True
        or what is said of the failure), ports (inputs, outputs of a plan), compute.
    """

    def __init__(self, which: str):
        package, version = which.split(" ")
        super().__init__(package)
        self.__version__ = version
        self.used: set[tuple[str, str]] = set()
        self.calls: list[tuple[Any, ...]] = []
        self.does = types.SimpleNamespace(
            parse=None, build=None, load=None, refit=None, ports=([], []), compute=None, layers=[]
        )
        api = recorded()[which]
        for name, names in api.items():
            if name.endswith(("Flag", "Level", "Format", "Verbosity", "Strategy", "Capability")):
                setattr(self, name, self._enum(name, names))
        for cls in behaviour(self):
            if cls.__name__ in api:
                setattr(self, cls.__name__, cls)
                cls._names = set(api[cls.__name__])

    def _enum(self, name: str, names: list[str]) -> Any:
        used = self.used

        class Members(enum.EnumMeta):
            def __getattribute__(cls, attribute: str) -> Any:
                if not attribute.startswith("_"):
                    used.add((name, attribute))
                return super().__getattribute__(attribute)

        return Members(name, (enum.IntEnum,), _members(Members, name, names))


def _members(meta: Any, name: str, names: list[str]) -> Any:
    space = meta.__prepare__(name, (enum.IntEnum,))
    for i, each in enumerate(names):
        space[each] = i
    return space


def behaviour(fake: Fake) -> list[type]:
    """Classes of a package, as far as they are used."""
    does, calls = fake.does, fake.calls

    def check(cls: Any, name: str) -> None:
        if name not in cls._names:
            raise AttributeError(f"{fake.__name__} {fake.__version__}: {cls.__name__} has no {name}")
        fake.used.add((cls.__name__, name))

    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            if not name.startswith("_") and name != "mro" and "_names" in vars(cls):
                check(cls, name)
            return super().__getattribute__(name)

    class Recorded(metaclass=Meta):
        _names: set[str]

        def __getattribute__(self, name: str) -> Any:
            # what a subclass adds to it is its own
            if not name.startswith("_") and ("_names" in vars(type(self)) or name in type(self)._names):
                check(next(cls for cls in type(self).__mro__ if "_names" in vars(cls)), name)
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            if "_names" in vars(type(self)) and not name.startswith("_"):
                check(type(self), name)
                calls.append((type(self).__name__, name, value))
            super().__setattr__(name, value)

    class ILogger(Recorded):
        VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR = range(5)

    class IProgressMonitor(Recorded):
        pass

    class IHostMemory(Recorded, bytes):
        pass

    class ITimingCache(Recorded):
        def serialize(self) -> bytes:
            return b"timings"

    class IOptimizationProfile(Recorded):
        def set_shape(self, *shape: Any) -> None:
            calls.append(("set_shape", *shape))

    class IBuilderConfig(Recorded):
        profiling_verbosity = progress_monitor = hardware_compatibility_level = None
        num_compute_capabilities = 0

        def set_flag(self, flag: Any) -> None:
            calls.append(("set_flag", flag.name))

        def clear_flag(self, flag: Any) -> None:
            calls.append(("clear_flag", flag.name))

        def add_optimization_profile(self, profile: Any) -> int:
            return 0

        def set_compute_capability(self, capability: Any, i: int) -> bool:
            calls.append(("set_compute_capability", capability.name, i))
            return True

        def create_timing_cache(self, stored: bytes) -> Any:
            return None if stored == b"of another GPU" else ITimingCache()

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            calls.append(("set_timing_cache", ignore_mismatch))
            return True

        def get_timing_cache(self) -> Any:
            return ITimingCache()

    class INetworkDefinition(Recorded):
        pass

    class Builder(Recorded):
        def __init__(self, logger: Any):
            self._logger = logger

        def create_network(self, flags: int) -> Any:
            calls.append(("create_network", flags))
            return INetworkDefinition()

        def create_builder_config(self) -> Any:
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            monitor = config.progress_monitor
            for name in ("phase_start", "step_complete", "phase_finish"):
                check(IProgressMonitor, name)  # what the library calls
            check(ILogger, "log")
            monitor.phase_start("building", None, 3)
            monitor.phase_start("timing", "building", 2)
            for step in range(2):
                if not monitor.step_complete("timing", step):
                    return None
            monitor.phase_finish("timing")
            monitor.phase_finish("building")
            if does.build is not None:
                self._logger.log(ILogger.ERROR, does.build)
                return None
            return IHostMemory(b"plan")

    class ParserError(Recorded):
        def desc(self) -> str:
            return does.parse

    class OnnxParser(Recorded):
        def __init__(self, network: Any, logger: Any):
            pass

        def parse_from_file(self, path: str) -> bool:
            assert Path(path).is_file()
            return does.parse is None

        @property
        def num_errors(self) -> int:
            return 1

        def get_error(self, i: int) -> Any:
            return ParserError()

    class EngineInspector(Recorded):
        def get_engine_information(self, form: Any) -> str:
            return json.dumps({"Layers": does.layers})

    class IExecutionContext(Recorded):
        def __init__(self) -> None:
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._memory: tuple[int, int] | None = None

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self._shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert isinstance(address, int)
            self._addresses[name] = address
            return True

        def update_device_memory_size_for_shapes(self) -> int:
            return 64

        def set_device_memory(self, address: int, size: int) -> None:
            self._memory = (address, size)

        def execute_async_v3(self, stream: int) -> bool:
            assert self._memory is not None
            assert self._memory[1] == 64
            ctypes.memset(*self._memory[:1], 1, 64)
            inputs, outputs = does.ports
            if does.compute is None:
                return False
            does.compute(
                {name: (self._addresses[name], self._shapes[name]) for name in inputs},
                {n: self._addresses[n] for n in outputs},
            )
            return True

    class IRuntimeConfig(Recorded):
        dynamic_shapes_kernel_specialization_strategy = None

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self._strategy = strategy

    class ICudaEngine(Recorded):
        @property
        def num_io_tensors(self) -> int:
            return sum(map(len, does.ports))

        def get_tensor_name(self, i: int) -> str:
            return [*does.ports[0], *does.ports[1]][i]

        def create_engine_inspector(self) -> Any:
            return EngineInspector()

        def create_runtime_config(self) -> Any:
            return IRuntimeConfig()

        def create_execution_context(self, asked: Any) -> Any:
            calls.append(
                ("create_execution_context", (asked._strategy if isinstance(asked, IRuntimeConfig) else asked).name)
            )
            return IExecutionContext()

    class Runtime(Recorded):
        engine_host_code_allowed = False

        def __init__(self, logger: Any):
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            if does.load is not None:
                self._logger.log(ILogger.INTERNAL_ERROR, does.load)
                return None
            return ICudaEngine()

    class Refitter(Recorded):
        def __init__(self, engine: Any, logger: Any):
            pass

        def refit_cuda_engine(self) -> bool:
            return True

    class OnnxParserRefitter(Recorded):
        def __init__(self, refitter: Any, logger: Any):
            pass

        def refit_from_file(self, path: str) -> bool:
            calls.append(("refit_from_file", path))
            return does.refit is None

    return [
        each
        for each in locals().values()
        if isinstance(each, type) and issubclass(each, Recorded) and each is not Recorded
    ]


if __name__ == "__main__":
    path, which = sys.argv[1:]
    if path.endswith(".so"):
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(path)
    record(which, surface(module))
