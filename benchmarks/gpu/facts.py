"""Facts of the machine and of the peers: what goals are set from, and what shares are shares of."""

from __future__ import annotations

import importlib
import math
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import device, rows
from benchmarks.gpu import store as stores
from benchmarks.gpu.parts import Context, NotRunError, Step
from benchmarks.providers import LAYOUTS
from benchmarks.shapes import GPU_FIRST, GPU_REST, SMOKE, Shape
from efficientvit_kernels.testing import official_relu_linear_attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COPY_BYTES = (2**22, 2**24, 2**26, 2**28, 2**30, 2**31)  # of one buffer; a copy moves twice that
L2_BYTES = (2**19, 2**20, 2**21, 2**22, 2**23)
MATRIX_SIZES = (2048, 4096, 8192)
PROBE_CHANNELS = (128, 256, 512, 1024)
PROBE_TOKENS = (4096, 8192, 16384)
COMPILE_S = 45.0  # what one autotuned compilation may take


def steps(context: Context) -> list[Step]:
    if context.quick:
        return _quick()
    first = GPU_FIRST
    return [
        *_machine(),
        *(Step(f"mma.sync against cuBLAS, C {c}", partial(mma_probe, c), 15.0) for c in PROBE_CHANNELS),
        *(_eager(shape, "float16") for shape in first),
        *(_compiled(shape, "float16", COMPILE_S) for shape in first[:6]),
        Step("depthwise convolution", partial(depthwise, first[:4])),
        *(Step(f"attention core, {shape.name}", partial(attention_core, shape)) for shape in first[:6]),
        *(_eager(shape, "bfloat16") for shape in first),
        *(_compiled(shape, "float16", COMPILE_S) for shape in first[6:]),
        *(_compiled(shape, "bfloat16", COMPILE_S) for shape in first[:4]),
        *(_eager(shape, dtype) for dtype in ("float32", "tf32") for shape in first[:6]),
        *(_eager(shape, "float16", training=True) for shape in first[:8]),
        *(_eager(shape, "float16") for shape in GPU_REST),
        *(_compiled(shape, "float16", COMPILE_S, training=True) for shape in first[:4]),
        *(_compiled(shape, "float32", COMPILE_S) for shape in first[:2]),
        *(_compiled(shape, "float16", COMPILE_S) for shape in GPU_REST),
    ]


def _machine() -> list[Step]:
    return [
        Step("device", describe),
        Step("copy", copy_bandwidth),
        Step("copy in L2", l2_bandwidth),
        Step("matrix products", matrix_roofs),
        Step("launch costs", launch_costs),
        Step("fused multiply-adds", fma_rates),
    ]


def _quick() -> list[Step]:
    """One of each kind."""
    shape = SMOKE[0]
    return [
        *_machine(),
        Step("mma.sync against cuBLAS, C 128", partial(mma_probe, 128)),
        Step("depthwise convolution", partial(depthwise, (shape,))),
        Step(f"attention core, {shape.name}", partial(attention_core, shape)),
        _eager(shape, "bfloat16"),
        _eager(shape, "float32", training=True),
        Step("compiled inference", partial(peers, shape, "float32", False, partial(rows.add_compiled, mode=None))),
    ]


def _eager(shape: Shape, dtype: str, training: bool = False) -> Step:
    what = "training" if training else "inference"
    return Step(f"eager {what} {dtype}, {shape.name}", partial(peers, shape, dtype, training, rows.add_eager), 5.0)


def _compiled(shape: Shape, dtype: str, least: float, training: bool = False) -> Step:
    what = "training" if training else "inference"
    run = partial(peers, shape, dtype, training, compiled_and_eager)
    return Step(f"compiled {what} {dtype}, {shape.name}", run, least)


def compiled_and_eager(row: rows.Row) -> None:
    """Beside the compiled ones the eager ones once more: ratios are taken within a run."""
    rows.add_eager(row)
    rows.add_compiled(row)


def peers(
    shape: Shape, dtype: str, training: bool, add: Callable[[rows.Row], None], context: Context
) -> dict[str, Any]:
    row = rows.make_row("lite_mla", shape, dtype, "nchw", training, context)
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # cuDNN's best for the peers
    try:
        add(row)
        checked = rows.check(row, context)
        return {"flops": row.flops, "fewest_bytes": row.fewest_bytes} | checked | rows.measure(row, context)
    finally:
        torch.backends.cudnn.benchmark = benchmark


def describe(context: Context) -> dict[str, Any]:
    names = ("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TRITON_CACHE_DIR", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS")
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu_threads": os.cpu_count(),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
        "torch_config": torch.__config__.show().splitlines(),
    }
    if not context.on_gpu:
        return found
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    keys = [key for key in dir(properties) if not key.startswith("_")]
    found["properties"] = {key: str(getattr(properties, key)) for key in keys}
    found["memory"] = {"free": free, "total": total, "L2": device.l2_bytes(context)}
    fields = ("clocks.max.sm", "clocks.max.mem", "power.limit", "persistence_mode", "mig.mode.current", "pstate")
    for name in fields:  # one by one: a field that a driver does not know spoils the whole answer
        found.setdefault("state", {}).update(stores.smi(name))
    return found


def copy_bandwidth(context: Context) -> dict[str, Any]:
    """GB/s, read and written bytes together, in a graph, for buffers that do not stay in the L2 cache."""
    sizes = (2**16,) if context.quick else COPY_BYTES
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        for size in sizes:
            sets = device.input_sets(size, context)
            pairs = [_random_pair(size // dtype.itemsize, dtype, context.device) for _ in range(sets)]
            us = device.best([partial(target.copy_, source) for target, source in pairs], context)
            found[f"{str(dtype).removeprefix('torch.')} {size} B"] = {"us": us, "gb_per_s": 2e-3 * size / us}
            del pairs
    return found


def l2_bandwidth(context: Context) -> dict[str, Any]:
    """The same for one pair of buffers that stays there."""
    found: dict[str, Any] = {}
    for size in (2**14,) if context.quick else L2_BYTES:
        target, source = _random_pair(size // 2, torch.float16, context.device)
        us = device.best([partial(target.copy_, source)], context)
        found[f"{size} B"] = {"us": us, "gb_per_s": 2e-3 * size / us}
    return found


def _random_pair(elements: int, dtype: torch.dtype, where: str) -> tuple[Tensor, Tensor]:
    source = torch.empty(elements, dtype=dtype, device=where).normal_()
    return torch.empty_like(source), source


def matrix_roofs(context: Context) -> dict[str, Any]:
    """TFLOP/s of torch.matmul on random square matrices."""
    found: dict[str, Any] = {}
    for name in ("float16", "bfloat16", "tf32", "float32"):
        for size in (64,) if context.quick else MATRIX_SIZES:
            left, right = (torch.randn(size, size, device=context.device).to(rows.DTYPES[name]) for _ in range(2))
            out = torch.empty_like(left)
            with device.tf32(name == "tf32"):
                us = device.best([partial(torch.matmul, left, right, out=out)], context, 4)
            found[f"{name} {size}"] = {"us": us, "tflops": 2e-6 * size**3 / us}
    return found


def launch_costs(context: Context) -> dict[str, Any]:
    """Microseconds per launch: on the device in a graph and in a stream, and on the CPU until the call returns."""
    x = torch.zeros(1, device=context.device)
    calls: dict[str, Callable[[], object]] = {"torch add_": partial(x.add_, 1)}
    found: dict[str, Any] = {}
    if context.on_gpu:
        try:
            probes = triton_probes(context)
            calls["triton, empty kernel"] = partial(probes.empty, x)
        except NotRunError as error:
            found["triton"] = str(error)
    for name, call in calls.items():
        call()
        found[f"{name}: in a stream"] = device.microseconds(device.in_stream([call], 500).run, context, 500)
        found[f"{name}: on the CPU"] = _cpu_us(call, 20 if context.quick else 2000, context)
        if context.on_gpu:
            graph = device.in_graph([call], 500)
            found[f"{name}: in a graph"] = device.microseconds(graph.run, context, 500)
            found[f"{name}: replay of a graph of one"] = _cpu_us(device.in_graph([call], 1).run, 500, context)
    found["empty_like: on the CPU"] = _cpu_us(partial(torch.empty_like, x), 20 if context.quick else 5000, context)
    return found


def _cpu_us(call: Callable[[], object], count: int, context: Context) -> float:
    """The queue of the device is long enough for a while; what is left of waiting shows in the other figures."""
    best = math.inf
    for _ in range(3):
        device.synchronize(context)
        start = time.perf_counter()
        for _ in range(min(count, 500)):
            call()
        best = min(best, (time.perf_counter() - start) / min(count, 500))
        device.synchronize(context)
    return 1e6 * best


def triton_probes(context: Context) -> Any:
    if not context.on_gpu:
        raise NotRunError("needs a GPU")
    try:
        return importlib.import_module("benchmarks.gpu.triton_probes")
    except ImportError as error:
        raise NotRunError(f"Triton is not there: {error}") from error


def fma_rates(context: Context) -> dict[str, Any]:
    """TFLOP/s of the units that depthwise convolutions run on: float32, and pairs of float16."""
    probes = triton_probes(context)
    found = {}
    elements = probes.FMA_BLOCK * 132 * 16
    for name, dtype, run in (("float32", torch.float32, probes.fma), ("half2", torch.float16, probes.half2)):
        x = torch.randn(elements, device=context.device).to(dtype)
        us = device.best([partial(run, x)], context, 4)
        found[name] = {"us": us, "tflops": 2e-6 * elements * probes.FMA_STEPS / us}
    return found


def mma_probe(channels: int, context: Context) -> dict[str, Any]:
    """The qkv product [3C, C] x [C, N] in float16: Triton with mma.sync, Triton as it compiles by default, cuBLAS."""
    probes = triton_probes(context)
    found: dict[str, Any] = {"how": "DISABLE_MMA_V3=1 keeps Triton from wgmma; `instructions` is what the PTX holds"}
    for tokens in PROBE_TOKENS:
        weight = torch.randn(3 * channels, channels, device=context.device).half() / math.sqrt(channels)
        x = torch.randn(channels, tokens, device=context.device).half()
        out, expected = (torch.empty(3 * channels, tokens, device=context.device).half() for _ in range(2))
        flops = 2.0 * 3 * channels * channels * tokens
        cublas = device.best([partial(torch.matmul, weight, x, out=expected)], context)
        entry: dict[str, Any] = {"cublas": {"us": cublas, "tflops": 1e-6 * flops / cublas}}
        for name, mma_sync in (("mma.sync", True), ("default", False)):
            entry[name] = _best_config(probes, weight, x, out, expected, mma_sync, context)
            entry[name] |= {"tflops": 1e-6 * flops / entry[name]["us"], "share": cublas / entry[name]["us"]}
        found[f"N {tokens}"] = entry
    return found


def _best_config(
    probes: Any, weight: Tensor, x: Tensor, out: Tensor, expected: Tensor, mma_sync: bool, context: Context
) -> dict[str, Any]:
    best: dict[str, Any] = {"us": math.inf}
    for config in probes.MATMUL_CONFIGS:
        try:
            compiled = probes.matmul(weight, x, out.zero_(), config, mma_sync)
            us = device.best([partial(probes.matmul, weight, x, out, config, mma_sync)], context)
        except Exception as error:  # a tile that does not fit this GPU
            best.setdefault("left_out", {})[str(config)] = rows.reason_of(error)
            continue
        if us < best["us"]:
            difference = float((out.float() - expected.float()).abs().max())
            best |= {
                "us": us,
                "config": list(config),
                "instructions": probes.instructions(compiled),
                "error": difference,
            }
    return best


def depthwise(shapes: tuple[Shape, ...], context: Context) -> dict[str, Any]:
    """cuDNN's depthwise 5 x 5 on qkv, in both layouts."""
    found = {}
    for shape in shapes:
        for layout, memory_format in LAYOUTS.items():
            for dtype in DTYPES[:2] if context.on_gpu else DTYPES[2:]:
                size = (shape.batch, 3 * shape.channels, shape.height, shape.width)
                x = torch.randn(size, device=context.device).to(dtype).contiguous(memory_format=memory_format)
                weight = torch.randn(size[1], 1, 5, 5, device=context.device).to(dtype)
                call = partial(F.conv2d, x, weight, padding=2, groups=size[1])
                with torch.no_grad():
                    us = device.best([call], context, 10)
                moved = 2 * x.nbytes + weight.nbytes
                key = f"{shape.name} {layout} {str(dtype).removeprefix('torch.')}"
                found[key] = {"us": us, "gb_per_s": 1e-3 * moved / us, "tflops": 2e-6 * 25 * x.numel() / us}
    return found


def attention_core(shape: Shape, context: Context) -> dict[str, Any]:
    """The official linear attention beside softmax attention (SDPA, quadratic in N) on the same q, k, v."""
    found = {}
    for dtype in DTYPES[:2] if context.on_gpu else DTYPES[2:]:
        size = (shape.batch, 3 * shape.groups * shape.dim, shape.height, shape.width)
        qkv = torch.randn(size, device=context.device).to(dtype)
        packed = qkv.reshape(shape.batch, shape.groups, 3, shape.dim, -1).mT
        q, k, v = (packed[:, :, i].contiguous() for i in range(3))  # [B, G, N, D]
        names = {
            "official": device.in_stream([partial(official_relu_linear_attention, qkv, shape.dim)], 4),
            "sdpa": device.in_stream([partial(F.scaled_dot_product_attention, q, k, v)], 4),
        }
        if context.on_gpu:
            names["official | graph"] = device.in_graph([partial(official_relu_linear_attention, qkv, shape.dim)], 4)
            names["sdpa | graph"] = device.in_graph([partial(F.scaled_dot_product_attention, q, k, v)], 4)
        with torch.no_grad():
            samples = device.interleaved(names, context)
        moved = qkv.nbytes * 4 // 3
        medians = device.medians(samples)
        found[str(dtype).removeprefix("torch.")] = {
            "median_us": medians,
            "gb_per_s": {name: 1e-3 * moved / us for name, us in medians.items()},
            "samples_us": device.rounded(samples),
        }
    return found
