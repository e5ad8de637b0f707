"""The peers: the official op sequence, and what compilers and runtimes make of it.

Every peer computes the same function of the same weights. One that cannot run, or whose results are wrong, is left out
by name and with the reason.
"""

from __future__ import annotations

import copy
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.providers import LAYOUTS, Dims, Provider, Settings, Step, tensors, torch_provider
from efficientvit_kernels import LiteMLA
from efficientvit_kernels.nn.conv import ConvLayer
from efficientvit_kernels.testing import official_relu_linear_attention

# The exporter takes the official eps for 0 and prunes its addition: NaN wherever relu(q) of a head is 0.
EXPORTED_EPS = 1e-6


class OfficialLiteMLA(nn.Module):
    """The official module's sequence of torch ops, over the submodules of `layer`.

    Convolution to qkv; depthwise and grouped convolution per scale; concatenation; relu of q and of k; v padded with a
    row of ones; two matrix products; division; convolution; norm.
    """

    def __init__(self, layer: LiteMLA) -> None:
        super().__init__()
        self.dim, self.eps = layer.dim, layer.eps
        self.qkv, self.aggreg, self.proj = layer.qkv, layer.aggreg, layer.proj
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        multi_scale = [qkv, *(aggregate(qkv) for aggregate in self.aggreg)]
        return self.proj(official_relu_linear_attention(multi_scale, self.dim, self.eps))  # type: ignore[no-any-return]


def fold(module: nn.Module) -> nn.Module:
    """A copy with the BatchNorm of every ConvLayer, all in eval mode, folded into its convolution."""
    folded = copy.deepcopy(module)
    for layer in folded.modules():
        if isinstance(layer, ConvLayer) and isinstance(layer.norm, nn.BatchNorm2d):
            layer.conv = fuse_conv_bn_eval(layer.conv, layer.norm)
            layer.norm = None
    return folded


def _has_folding(module: nn.Module) -> bool:
    return any(isinstance(layer, ConvLayer) and isinstance(layer.norm, nn.BatchNorm2d) for layer in module.modules())


class CannotRunError(Exception):
    """Why a peer is left out."""


Maker = Callable[[nn.Module, Settings, list[Dims]], Provider]


def make_peers(
    official: nn.Module, settings: Settings, wanted: Sequence[str], inputs: list[Dims]
) -> tuple[dict[str, Provider], dict[str, str]]:
    """The `wanted` peers that can run ("eager" is always there and not made here), and why the others cannot."""
    found, left_out = {}, {}
    for name in wanted:
        if name == "eager":
            continue
        try:
            found[name] = MAKERS[name](copy.deepcopy(official), settings, inputs)
        except CannotRunError as error:
            left_out[name] = str(error)
        except Exception as error:  # whatever a compiler or runtime raises
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return found, left_out


def _eager_folded(official: nn.Module, settings: Settings, inputs: list[Dims]) -> Provider:
    if settings.training:
        raise CannotRunError("for inference only")
    if not _has_folding(official):
        raise CannotRunError("nothing to fold in this op")
    return torch_provider(fold(official), settings)


def _eager_other_layout(official: nn.Module, settings: Settings, inputs: list[Dims]) -> Provider:
    other = next(layout for layout in LAYOUTS if layout != settings.layout)
    return torch_provider(official, settings, other, note=f"inputs and weights in {other}")


def _compiled(official: nn.Module, settings: Settings, inputs: list[Dims]) -> Provider:
    torch.compiler.reset()  # or the graphs of earlier shapes count towards the limit of recompilations
    return compiled(official, settings)


def compiled(official: nn.Module, settings: Settings, mode: str | None = None, layout: str | None = None) -> Provider:
    """torch.compile in one of its modes; in inference with the norm folded and the weights frozen."""
    options: dict[str, Any] = {}
    if mode is not None:
        from torch._inductor import list_mode_options

        options |= list_mode_options(mode)
    options |= {} if settings.training else {"freezing": True}
    module = official if settings.training else fold(official)
    graph: Any = torch.compile(module, dynamic=False, fullgraph=True, options=options or None)
    note = ", ".join(["inductor", *([mode] if mode else []), *([] if settings.training else ["freezing"])])
    return torch_provider(graph, settings, layout, note)


def _onnxruntime(official: nn.Module, settings: Settings, inputs: list[Dims]) -> Provider:
    runtime = _import("onnxruntime")

    def build(model: bytes, entry: str, value: str) -> Provider:
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry(f"session.{entry}", value)
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]

        def bind(given: list[Tensor], grad_outs: list[Tensor]) -> Step:
            feed = dict(zip(names, (tensor.contiguous().numpy() for tensor in given), strict=True))
            return lambda: session.run(None, feed)

        return Provider(bind, f"{entry}={value}" if settings.threads > 1 else "")

    def faster(model: bytes) -> Provider:
        """Threads that spin on after a run slow down whoever comes next: they stop then, or never spin."""
        choices = [build(model, "force_spinning_stop", "1"), build(model, "intra_op.allow_spinning", "0")]
        if settings.threads == 1:
            return choices[0]
        example = [torch.randn(dims) for dims in inputs]
        return min(choices, key=lambda choice: _median_seconds(choice.bind(example, [])))

    return exported(official, settings, inputs, faster)


def _openvino(official: nn.Module, settings: Settings, inputs: list[Dims]) -> Provider:
    runtime = _import("openvino")
    core = runtime.Core()
    # Without the precision hint it takes bfloat16 where the CPU has it.
    options = {"INFERENCE_NUM_THREADS": settings.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}

    def build(model: bytes) -> Provider:
        request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()

        def bind(given: list[Tensor], grad_outs: list[Tensor]) -> Step:
            feed = {i: tensor.contiguous().numpy() for i, tensor in enumerate(given)}
            return lambda: list(request.infer(feed, share_inputs=True, share_outputs=True).values())

        return Provider(bind)

    return exported(official, settings, inputs, build)


MAKERS: dict[str, Maker] = {
    "eager_folded": _eager_folded,
    "eager_other_layout": _eager_other_layout,
    "torch.compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
PEERS = ("eager", *MAKERS)


def exported(
    official: nn.Module, settings: Settings, inputs: list[Dims], build: Callable[[bytes], Provider]
) -> Provider:
    """What `build` makes of the module as an ONNX model, norms folded; the note says what differs from the official."""
    if settings.training:
        raise CannotRunError("for inference only")
    if settings.dtype != torch.float32:
        raise CannotRunError("exported in float32 only")
    module = fold(official)
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, LiteMLA)]
    # Of a whole model nobody can say which input would meet the pruned addition in one of its layers.
    prunes = bool(layers) or not _finite_at_zero(provider := build(to_onnx(module, inputs)), inputs)
    if prunes:
        for layer in layers or [module]:
            layer.eps = EXPORTED_EPS
        provider = build(to_onnx(module, inputs))
    notes = [*([provider.note] if provider.note else []), "NCHW inputs"]
    notes += [f"eps {EXPORTED_EPS:g}: the export drops the official one"] if prunes else []
    return Provider(provider.bind, "; ".join(notes))


def _finite_at_zero(provider: Provider, inputs: list[Dims]) -> bool:
    return all(bool(out.isfinite().all()) for out in tensors(provider.bind([torch.zeros(d) for d in inputs], [])()))


def to_onnx(module: nn.Module, inputs: list[Dims]) -> bytes:
    _import("onnx"), _import("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, tuple(torch.randn(dims) for dims in inputs), dynamo=True, verbose=False)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotRunError(f"{name} is not installed: pip install 'efficientvit_kernels[bench]'") from error


def _median_seconds(step: Step) -> float:
    step()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
