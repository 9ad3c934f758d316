"""What an operation of `common` with a Triton form must state about itself, and the list of all of them.

One entry serves four commands: `aot` compiles every kernel that the entry launches, at its real shapes, for sm_90;
`kernels` checks it against float64 and times it beside its peers on a GPU; `roofline` tells its least time; the tests
run all of them in miniature. So shapes, block sizes and options of a launch stand in one place, the function that
launches it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# Files of scripts/bench/cases; each has a list CASES.
OPERATIONS = ("ssd", "causal_conv1d", "gated_norm", "softcap_xent", "sigreg", "ffn", "muon", "fake_quantize")

Form = Callable[..., Any]  # called with the inputs by name; returns a tensor or a tuple of tensors


@dataclass(frozen=True)
class Work:
    """What one pass must do at least: bytes to and from memory, and FLOPs of matrix products (2 a multiply-add)."""

    bytes: int
    flops: int = 0


def roofline_ms(work: Sequence[Work], limits: Mapping[str, float]) -> float:
    """Least time of some passes one after another, at the measured ceilings."""
    return sum(
        1e3 * max(w.bytes / limits["copy_bytes_per_s"], w.flops / limits["bfloat16_flops_per_s"]) for w in work
    )


@dataclass(frozen=True)
class OpCase:
    """One operation at one set of real shapes.

    Attributes:
        name: "operation/where-it-occurs-dtype", unique.
        inputs: device -> arguments by name, for all forms. Must work on torch.device("meta") (no values, no .item()):
            that is how ahead-of-time compilation calls it. Tensors named in `gradients` require grad.
        triton_form, torch_form: ours, and the plain form, which must also take float64 tensors: it then is the truth.
        gradients: names of inputs whose gradients are compared and timed; empty for operations without a backward pass.
        forward, backward: the work behind the roofline time. backward is None without gradients.
        peers: name -> form through another package, imported inside the form, so that a missing one is reported.
        stack_reasons: kernel -> why it may spill registers. Any other kernel that spills fails.
        compile_slowly: leaves its compilation to the slow tests.
        miniature: overrides of `inputs` for tests on a CPU: device -> arguments, tiny. None: not run in miniature.
        choices: name -> another launch of ours, as a context in which it is the one: made without a GPU, the choice
            between them is to be settled by a clock.
    """

    name: str
    inputs: Callable[[torch.device], dict[str, Any]]
    triton_form: Form
    torch_form: Form
    gradients: tuple[str, ...]
    forward: Work
    backward: Work | None = None
    peers: Mapping[str, Form] = field(default_factory=dict)
    stack_reasons: Mapping[str, str] = field(default_factory=dict)
    compile_slowly: bool = False
    miniature: Callable[[torch.device], dict[str, Any]] | None = None
    choices: Mapping[str, Callable[[], AbstractContextManager]] = field(default_factory=dict)


def with_value(module: ModuleType, name: str, value: Any) -> Callable[[], AbstractContextManager]:
    """A choice: inside, something of a module is something else."""
    return functools.partial(mock.patch.object, module, name, value)


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors that a form returned, in order."""
    return [t for t in (outputs if isinstance(outputs, (tuple, list)) else (outputs,)) if isinstance(t, Tensor)]


def run_with_gradients(form: Form, inputs: Mapping[str, Any], gradients: tuple[str, ...]) -> list[Tensor]:
    """Outputs of a form, then the gradients of the sum of all outputs (each weighted by a fixed wave) by name."""
    outputs = tensors_of(form(**inputs))
    if not gradients:
        return outputs
    roots = [t for t in outputs if t.requires_grad]
    weights = []
    for t in roots:
        wave = torch.arange(t.numel(), device=t.device).remainder_(1009).double().mul_(7.0).cos_()
        weights.append(wave.to(t.dtype).view(t.shape))
    found = torch.autograd.grad(roots, [inputs[name] for name in gradients], weights)
    return [*(t.detach() for t in outputs), *found]


def cases_of(operations: Sequence[str] = OPERATIONS) -> list[OpCase]:
    """The entries of some operations. Only their files are imported."""
    found = []
    for name in operations:
        found += importlib.import_module(f"scripts.bench.cases.{name}").CASES
    names = [case.name for case in found]
    if len(set(names)) != len(names):
        raise ValueError(f"the catalogue names a case twice: {sorted(n for n in names if names.count(n) > 1)}")
    return found
