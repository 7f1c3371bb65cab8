"""`ModuleRuntime`: any torch module as native programs, in the place of its forward."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from ...dtypes import dtype_name
from ...ops import native_library
from ...ops.layout import transforms_active
from ..base import Part, counted, lock_anew_after_fork, quiet_torch
from ..watch import Watch, fingerprints, foreign
from .pack import Weights
from .packed_file import PackedFile
from .program import Program, ProgramCache, Ranges
from .record import MetaCopy, Recorder, Recording, record_module
from .steps import Convolution
from .value import Unsupported

logger = logging.getLogger(__name__)

# Arguments that may be numbers and that programs take as tensors, so that another number needs no other program.
NUMBERS = ("timestep", "timesteps")
# What else a module may be given or return, beside tensors: a program is made for what they are.
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
_META = torch.device("meta")
MOST_CALLS = 32  # whose arguments are kept to find ranges with
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; without, it is emulated, and slower than float32."""
    return torch.bfloat16 in native_library.products()


def floats_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a program's floating-point values: of int8, bfloat16 where the CPU multiplies it, else float32."""
    if dtype != torch.int8:
        return dtype
    return torch.bfloat16 if native_bfloat16() else torch.float32


def no_programs(dtype: torch.dtype) -> str:
    """Why no network can run as a program of this dtype here, or ""."""
    if reason := native_library.unavailable():
        return reason
    if dtype not in native_library.products():
        return f"the processor does not multiply {dtype_name(dtype)} itself"
    # vectors of four floats are no match for torch's own convolutions
    return "the processor has neither AVX2 nor AVX-512" if native_library.isa() == "portable" else ""


class ModuleRuntime:
    """Runs a module on a CPU as native programs, one for every structure and shapes of its arguments.

    It stands in the module's ``__dict__`` as its ``forward``, so that hooks of the module itself run as before. What
    the module does is recorded from its class's forward: the module's own code is the only description of it. That code
    itself runs where it does what no step does, where hooks or patches are inside, and where a gradient is wanted.

    runtime/cuda/module.py has a subclass for CUDA devices, with programs of another kind.

    Attributes:
        device: of the module and its arguments.
        quantised: whether products multiply in 8 bits, where that pays.
        dtype: of the programs; with 8 bits that of all other values, see `floats_of`.
        refused: why the last call did not run as a program, or "".
        programs: those that were used last.
        ranges: what `Program` needs for 8 bits, None until they are found.
        inputs: the arguments of some calls, to find ranges with.
        collected: while it is a list, calls add their arguments to it, and run in ``dtype``.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        inputs: Sequence[Any] = (),
        keep_weights: bool = True,
        cache: str | None = None,
        auto: bool = False,
        winograd_memory: int | None = None,
    ):
        """Stand in for the module's forward from now on.

        Args:
            module: on the CPU.
            dtype: float32, bfloat16, or int8.
            inputs: of int8, the arguments of some calls, each a tuple or a dict.
            keep_weights: whether the module keeps weights that programs have packed.
            cache: a folder for packed weights, or None.
            auto: whether calls go to torch where its convolutions are faster.
            winograd_memory: see `Weights`.
        """
        self.device = torch.device("cpu")
        self.quantised = dtype == torch.int8
        self.dtype = floats_of(dtype)
        self.inputs = [as_arguments(each) for each in inputs]
        self.collected: list[Arguments] | None = None
        self.keep_weights, self.cache, self.auto = keep_weights, cache, auto
        self.lock = threading.RLock()
        self._module = weakref.ref(module)
        self._forward = type(module).forward
        self._previous = module.__dict__.get("forward")
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(self._forward).parameters.values()
        self._positional = [each.name for each in parameters if each.kind in positional][1:]
        self._watch: Watch | None = None
        self._weights = self._no_weights(winograd_memory)
        self._fingerprints: dict[str, Any] = {}
        self._left: dict[str, nn.Parameter] = {}  # in the place of parameters that were freed
        self._weights.is_freed = self._left.__contains__
        # of these
        self._strides: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._copied: MetaCopy | None = None  # while a program is made
        self._replacement: Callable[..., Any] | None = None
        self.refused = ""
        self._has_own_code = ""  # why no call can
        self._refusals: dict[Hashable, str] = {}  # why calls of a key cannot
        self.programs = ProgramCache()
        self.ranges: Ranges | None = None
        self._observers: ProgramCache | None = None
        lock_anew_after_fork(self)
        module.__dict__["forward"] = self

    # What depends on the device.

    def _no_weights(self, winograd_memory: int | None) -> Weights:
        """What will hold the weights of programs."""
        return Weights(self.dtype, winograd_memory)

    def _unavailable(self) -> str:
        """Why there are no programs here, or ""."""
        return no_programs(torch.uint8 if self.quantised else self.dtype)

    def _is_here(self, x: Tensor) -> bool:
        """Whether a program can be given a tensor that is where this is."""
        return x.device.type == "cpu"

    def _number(self, value: int) -> Tensor:
        """A number as a program takes it."""
        return torch.tensor(value, dtype=torch.int64)

    def _made(self, recording: Recording, threads: int, ranges: Ranges | None) -> Any:
        """A program of what was recorded."""
        return Program(recording, self._weights, threads, ranges)

    def _outputs(self, program: Any, given: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        """What a program gives for the tensors among a call's arguments, in a dtype and in memory of their own."""
        for mine, x in zip(program.inputs, program.prologue(given)):
            mine.copy_(x)
        if self._observers is not None:
            assert self.ranges is not None
            program.observe(self.ranges)
        else:
            program.run()
        return [x.to(dtype, copy=True) for x in program.outputs]

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None
        return module

    @property
    def own_forward(self) -> Callable[..., Any]:
        """The forward that the module had before."""
        forward: Callable[..., Any] = self._previous or self._forward.__get__(self.module)
        return forward

    @property
    def __code__(self) -> Any:
        return self._forward.__code__

    @property
    def __globals__(self) -> Any:
        return self._forward.__globals__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own_forward)

    @property
    def precision(self) -> str:
        """What it multiplies in."""
        return "int8" if self.quantised else dtype_name(self.dtype)

    @property
    def freed(self) -> bool:
        """Whether weights of the module are gone, which are there as packed ones alone."""
        return bool(self._left)

    # Copies of the module are accelerated, too.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _again(memo[id(self.module)], *copy.deepcopy(self._settings, memo))

    def __reduce__(self) -> Any:
        return _again, (self.module, *self._settings)

    @property
    def _settings(self) -> tuple[Any, ...]:
        """The class and its arguments after the module."""
        if self.freed:
            raise ValueError(
                f"{self.name} cannot be copied: its weights were freed, by keep_weights=False; load it anew"
            )
        dtype = torch.int8 if self.quantised else self.dtype
        return type(self), dtype, self.inputs, self.keep_weights, self.cache, self.auto, self._weights.winograd_memory

    @property
    def name(self) -> str:
        return type(self.module).__name__

    # Calls.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward returns, up to rounding."""
        if self._replacement is not None:
            return self._replacement(*args, **kwargs)
        if reason := self._is_for_torch(args, kwargs):
            self.refused = reason
            return self._in_torch(args, kwargs)
        with self.lock:
            self.refresh()
            if self.collected is not None and len(self.collected) < MOST_CALLS:
                self.collected.append(tree_map_only(Tensor, torch.clone, (args, kwargs)))
            self.refused = self._has_own_code
            if not self.refused:
                try:
                    with quiet_torch():
                        return self._run(args, kwargs)
                except Unsupported as reason:
                    self.refused = str(reason)
            if os.environ.get("COALESCER_FAST_STRICT") == "1":
                raise ValueError(f"COALESCER_FAST_STRICT=1 forbids {self.name} to run in torch; {self.refused}")
            _warn_once(self.name, self.refused)
        return self._in_torch(args, kwargs)

    def _in_torch(self, args: Any, kwargs: Any) -> Any:
        if self.freed:
            raise ValueError(
                f"{self.name} cannot run in torch, for its weights were freed, by keep_weights=False"
                + (f"; it has no native program, because {self.refused}" if self.refused else "")
            )
        return self.own_forward(*args, **kwargs)

    def _slower_than_torch(self) -> str:
        """Why torch is faster, or ""; weights of float32 it would multiply in float32."""
        if not self.auto or self.freed:
            return ""
        first = next(self.module.parameters(), None)
        return (
            native_library.slower_than_torch(self.dtype) if first is not None and first.dtype == torch.bfloat16 else ""
        )

    def _is_for_torch(self, args: Any, kwargs: Any) -> str:
        """Why torch has to see a call, or "": for its compilers and transforms, or for a gradient."""
        if torch.compiler.is_compiling() or transforms_active() or forward_ad._current_level >= 0:
            return "torch compiled or transformed the last call"
        if reason := self._slower_than_torch():
            return reason
        if _get_current_dispatch_mode() is not None:
            return "the last call was traced"
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if any(type(x) not in (Tensor, nn.Parameter) or not self._is_here(x) for x in tensors):
            self._check_device()
            return "the last call had tensors of another kind or device"
        if any(x.numel() == 0 for x in tensors):
            return "the last call had an empty tensor"
        if self.quantised and not all(bool(x.isfinite().all()) for x in tensors if x.is_floating_point()):
            return "the last call had numbers that are not finite, which 8 bits cannot hold"
        if not torch.is_grad_enabled():
            return ""
        training = self.module.training and any(p.requires_grad for p in self.module.parameters())
        wanted = training or any(x.requires_grad for x in tensors)
        return "the last call needed a gradient: call it under torch.no_grad()" if wanted else ""

    def _run(self, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._numbers_as_tensors(args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self.quantised and self.inputs and self.collected is None and self.ranges is None:
            self._find_ranges()
        program, out_spec, out_leaves = self._program(leaves, spec)
        floats = [x.dtype for x in sorted(tensors, key=lambda x: x.ndim != 4) if x.is_floating_point()]
        dtype = floats[0] if floats else next((p.dtype for p in self.module.parameters()), torch.float32)
        outputs = self._outputs(program, tensors, dtype)
        results = [outputs[leaf.number] if isinstance(leaf, _Output) else leaf for leaf in out_leaves]
        return tree_unflatten(results, out_spec)

    def _numbers_as_tensors(self, args: Any, kwargs: Any) -> Arguments:
        def tensor(name: str, value: Any) -> Any:
            # a fraction is rounded by some modules and not by others
            whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value % 1 == 0
            return self._number(int(value)) if name in NUMBERS and whole else value

        named = zip(self._positional, args)
        args = (*(tensor(name, value) for name, value in named), *args[len(self._positional) :])
        return args, {name: tensor(name, value) for name, value in kwargs.items()}

    def _program(self, leaves: list[Any], spec: TreeSpec) -> _Prepared:
        threads = torch.get_num_threads()
        key: tuple[Hashable, ...] = (threads, spec, *map(_description, leaves))
        programs = self.programs if self._observers is None else self._observers
        if reason := self._refusals.get(key):
            raise Unsupported(reason)
        if (program := programs.get(key)) is None:
            output: list[Any] = []  # how the module returns its results

            def run(copied: Any, recorder: Recorder) -> list[Tensor]:
                given = [recorder.given(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                args, kwargs = tree_unflatten(given, spec)
                results, out_spec = tree_flatten(copied.forward(*args, **kwargs))  # hooks run around the program
                if strange := [x for x in results if not isinstance(x, (Tensor, *CONSTANTS))]:
                    raise Unsupported(f"it returns a {type(strange[0]).__name__}")
                numbers = {i: n for n, i in enumerate(i for i, x in enumerate(results) if isinstance(x, Tensor))}
                out_leaves = [_Output(numbers[i]) if i in numbers else leaf for i, leaf in enumerate(results)]
                output[:] = out_spec, out_leaves
                return [results[i] for i in numbers]

            observing = self._observers is not None
            ranges = self.ranges if not observing and self.collected is None else None
            try:
                self._copied = MetaCopy(self.module, evaluation=False, strides=self._strides)
                before = self._copied.attributes()
                recording = record_module(self._copied, run)
                for old, new in zip(before, self._copied.attributes()):
                    if changed := [name for name in {*old, *new} if old.get(name) is not new.get(name)]:
                        raise Unsupported(f"its forward sets the attribute {min(changed)}")
                if not recording.steps:
                    raise Unsupported("there is no step for any of it")
                with self._freeing(recording, frees=not (self.keep_weights or observing or self.collected is not None)):
                    program = self._made(recording, threads, ranges)
            except Unsupported as reason:
                self._refusals[key] = str(reason)
                raise
            finally:
                self._copied = None
            program.bound = tuple(output)
            programs.add(key, counted(program))
            if self._weights.file is not None:
                self._weights.file.flush()
        out_spec, out_leaves = cast(tuple[TreeSpec, list[Any]], program.bound)
        return program, out_spec, out_leaves

    # Weights.

    @contextmanager
    def _freeing(self, recording: Recording, frees: bool) -> Iterator[None]:
        """Inside, parameters are freed as they are packed, if that is wanted."""
        if frees:
            self._weights.free_after(self._packed_alone(recording), self._free)
            self._watch = None  # which holds all parameters
        try:
            yield
        finally:
            self._weights.free_after({}, self._free)
            if frees:
                self._fingerprints, self._watch = fingerprints(self.module), Watch(self.module)

    def _packed_alone(self, recording: Recording) -> Counter[str]:
        """How often parameters are packed that nothing else is done with."""
        convolutions = [step for step in recording.steps if isinstance(step, Convolution)]
        uses = Counter(step.weight.name for step in convolutions)
        # diffusers takes a module's device and dtype from its first parameter
        uses.pop(next(name for name, _ in self.module.named_parameters()), None)
        for name in (*recording.read, *self._left):
            uses.pop(name, None)
        return uses

    def _free(self, name: str) -> None:
        """Leave the module a parameter without memory."""
        path, _, last = name.rpartition(".")
        holder = self.module.get_submodule(path)
        own = holder._parameters[last]
        assert own is not None
        # one number, that shows in whatever is computed with it, and that nobody can write to
        nothing = torch.full((1,), torch.nan, dtype=own.dtype).expand(own.shape)
        if not self.freed:  # the first
            self.module.register_state_dict_pre_hook(_refuse_to_be_saved)
            self.module.register_load_state_dict_pre_hook(_refuse_to_be_loaded)
        holder._parameters[last] = self._left[name] = nn.Parameter(nothing, requires_grad=False)
        self._strides[name], self._dtypes[name] = own.stride(), own.dtype
        assert self._copied is not None
        self._copied.free(name)

    def _open_file(self, module: nn.Module, now: dict[str, Any]) -> None:
        """Look for packed weights of the module as it is now on disk."""
        if self.cache is None or native_library.unavailable():
            return
        content = repr([(name, *p.shape, now[name][-1]) for name, p in module.named_parameters()])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        name = f"{self.name}-{dtype_name(self.dtype)}-{native_library.isa()}-{digest}.safetensors"
        self._weights.file = PackedFile(Path(self.cache) / name)

    # Changes.

    def refresh(self) -> None:
        """Take over the module as it is now, if it is another than at the last call, or has changed since.

        Raises:
            ValueError: it has moved to another device.
        """
        if self._watch is None or self._watch.changed(self.module):
            self._take_over()

    def forget(self) -> None:
        """Have the next `refresh` take the module as changed, even if it looks the same."""
        self._watch, self._fingerprints = None, {}

    def _check_device(self) -> None:
        devices = (p.device for p in self.module.parameters())
        if other := next((device for device in devices if device not in (self.device, _META)), None):
            where = "the CPU" if self.device.type == "cpu" else self.device
            raise ValueError(f"{self.name} was accelerated on {where} and is on {other}: move it back, or restore it")

    def _take_over(self) -> None:
        module = self.module
        self._check_device()
        self._watch = None  # until all of it is taken over
        self.programs, self._refusals = ProgramCache(), {}
        there = dict(module.named_parameters())
        for name in [name for name, left in self._left.items() if there.get(name) is not left]:
            del self._left[name], self._strides[name], self._dtypes[name]  # the user has given another
            self._weights.drop([name])
        for name, left in self._left.items():
            if left.dtype != self._dtypes[name]:
                raise ValueError(
                    f"{self.name} cannot be made {dtype_name(left.dtype)}: its weights were freed, by "
                    "keep_weights=False; load it anew"
                )
        if not self.freed:  # what is freed is there for these ranges alone
            self.ranges = None
            self._weights.drop_integers()
        now = fingerprints(module)
        if self._fingerprints:
            changed = {name for name, seen in self._fingerprints.items() if now.get(name) != seen}
            if changed - self._left.keys():
                self._weights.file = None  # it is of other weights
            self._weights.drop(changed - self._left.keys())
        else:
            self._weights.drop(now.keys() - self._left.keys())
            self._open_file(module, now)
        self._has_own_code = self._unavailable()
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            self._has_own_code = "there are hooks of all modules"
        elif self._previous is not None:
            self._has_own_code = f"the forward of {self.name} was patched before"
        elif what := foreign(module, own_forward=self):
            self._has_own_code = what
        elif moved := [
            name for name, p in there.items() if bool(p.numel()) and _is_nothing(p) and name not in self._left
        ]:
            raise ValueError(f"{moved[0]} was freed where it was before, by keep_weights=False: load {self.name} anew")
        self._fingerprints, self._watch = now, Watch(module)

    # 8 bits.

    def _find_ranges(self) -> None:
        """Find the ranges of the calls of `inputs`, for calls with images of any size."""
        self._observers, self.ranges = ProgramCache(), {}
        try:
            for number, (args, kwargs) in enumerate(self.inputs):
                try:
                    self._run(args, kwargs)
                except Unsupported as reason:
                    raise Unsupported(f"int8 finds no ranges with inputs[{number}], because {reason}") from reason
        except BaseException:  # ranges of a part of the calls are none
            self.ranges = None
            raise
        finally:
            self._observers = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, calls are noted; what they were given are the `inputs` from then on."""
        self.collected = []
        try:
            yield
            self.inputs = self.collected
        finally:
            self.collected = None
            self.programs, self.ranges = ProgramCache(), None

    @contextmanager
    def replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Inside, all calls are those of ``forward``."""
        self._replacement = forward
        try:
            yield
        finally:
            self._replacement = None

    def part(self, name: str = "") -> Part:
        """The row of `explain`.

        Args:
            name: of the module in a pipeline.
        """
        name = name or self.name
        if reason := self._slower_than_torch() or self.refused:
            return Part(name, "torch", reason)
        way = f"native program, {self.dtype}"
        program = self.programs.last
        if self.quantised and not self.inputs:
            way += ", no inputs to find the ranges of int8 with"
        elif self.quantised and program is None:
            way += ", int8 where it pays, its ranges found at the first call"
        way += "" if program is None else program.described
        if not self.keep_weights:
            way += ", weights freed" if self.freed else ", weights freed by the first call"
        because = f"it can run on {native_library.isa()}"
        return Part(name, way, because if program else f"{because}; it is recorded at its first call")

    def remove(self) -> None:
        """Give the module its own forward back.

        Raises:
            ValueError: its weights were freed, or somebody else has patched the forward since.
        """
        module = self.module
        if self.freed:
            raise ValueError(
                f"{self.name} cannot be restored: its weights were freed, by keep_weights=False; load it anew"
            )
        if module.__dict__.get("forward") is not self:
            raise ValueError(f"{self.name} cannot be restored: its forward was patched since; remove that first")
        if self._previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = self._previous


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    logger.warning("%s runs in torch, as it is: %s", name, reason)


def _refuse_to_be_saved(module: nn.Module, *others: Any) -> None:
    if any(map(_is_nothing, module.parameters())):
        name = type(module).__name__
        raise ValueError(f"{name} cannot be saved: its weights were freed, by keep_weights=False; load it anew")


def _refuse_to_be_loaded(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *others: Any
) -> None:
    if not metadata.get("assign_to_params_buffers") and any(map(_is_nothing, module.parameters())):
        raise ValueError(
            f"{type(module).__name__} has no memory for these weights: its own were freed, by keep_weights=False; "
            "call load_state_dict with assign=True"
        )


def _is_nothing(parameter: Tensor) -> bool:
    """Whether it is what is left of one that was freed."""
    return parameter.ndim > 0 and not any(parameter.stride()) and bool(parameter.flatten()[0].isnan())


class _Output:
    """The place of a program's output among the leaves of what a module returns."""

    def __init__(self, number: int):
        self.number = number


_Prepared = tuple[Program, TreeSpec, list[Any]]


def runtime_of(module: nn.Module) -> ModuleRuntime | None:
    """What `coalescer_fast.accelerate` has put in the place of the module's forward, or None."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, ModuleRuntime) else None


def as_arguments(inputs: Any) -> Arguments:
    """The arguments of a call, given as a tuple, a dict or (args, kwargs)."""
    if isinstance(inputs, dict):
        return (), inputs
    if not isinstance(inputs, tuple):
        raise TypeError(f"inputs holds a {type(inputs).__name__}; expected the arguments of a call, a tuple or a dict")
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs
    return inputs, {}


def _again(module: nn.Module, kind: type[ModuleRuntime], *settings: Any) -> ModuleRuntime:
    return kind(module, *settings)


def _description(leaf: Any) -> Hashable:
    """What of an argument a program is made for. Raises Unsupported if it cannot be compared."""
    if isinstance(leaf, Tensor):
        return leaf.shape, torch.float32 if leaf.is_floating_point() else leaf.dtype
    if not isinstance(leaf, CONSTANTS):
        raise Unsupported(f"it is given a {type(leaf).__name__}")
    return type(leaf), repr(leaf)
