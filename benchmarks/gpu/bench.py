"""Our backends beside the peers, in one run: times in a stream and in a graph, memory, launches, shares of roofs."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import device, rows
from benchmarks.gpu.calls import runnable
from benchmarks.gpu.parts import Context, FailedError, Step
from benchmarks.providers import LAYOUTS
from benchmarks.shapes import GPU_FIRST, GPU_REST, SINGLE_OPS, SMOKE, Shape
from benchmarks.timing import geometric_mean
from efficientvit_kernels._launch_plan import launch_plan

ROOF_BYTES, ROOF_SIZE = 2**30, 8192
COMPILE_S = 60.0


def steps(context: Context) -> list[Step]:
    if context.quick:
        return [_step("lite_mla", SMOKE[0], "float32", "nchw", training, False) for training in (False, True)] + [
            _step(op, SMOKE[0], "float32", "channels_last", False, False)
            for op in ("relu_linear_attention", "multiscale_aggregate")
        ]
    first, attention = GPU_FIRST[:10], ("relu_linear_attention", "multiscale_aggregate")
    singles = (*SINGLE_OPS, *GPU_FIRST[4:9])
    return [
        *[_step("lite_mla", shape, "float16", "nchw", False, True) for shape in first[:4]],
        *[_step(op, shape, "float16", "nchw", False, False) for op in attention for shape in singles],
        *[_step("lite_mla", shape, "float16", "channels_last", False, False) for shape in first],
        *[_step("lite_mla", shape, "float16", "nchw", True, True) for shape in first[:2]],
        *[_step("lite_mla", shape, "float16", "nchw", False, True) for shape in first[4:]],
        *[_step("lite_mla", shape, "float16", "nchw", True, True) for shape in first[2:6]],
        *[_step(op, shape, "float16", "nchw", True, False) for op in attention for shape in singles],
        *[_step("lite_mla", shape, "bfloat16", "nchw", False, index < 4) for index, shape in enumerate(first)],
        *[_step("lite_mla", shape, "float16", "nchw", False, True) for shape in GPU_FIRST[10:]],
        *[_step(op, shape, "bfloat16", "channels_last", False, False) for op in attention for shape in singles],
        *[_step("lite_mla", shape, "bfloat16", "nchw", True, False) for shape in first],
        *[_step("lite_mla", shape, dtype, "nchw", False, False) for dtype in ("float32", "tf32") for shape in first],
        *[_step("lite_mla", shape, "float32", "nchw", True, False) for shape in first[:4]],
        *[_step("lite_mla", shape, "float16", layout, False, False) for layout in LAYOUTS for shape in GPU_REST],
        *[_step("lite_mla", shape, "float16", "channels_last", True, False) for shape in first],
    ]


def _step(op: str, shape: Shape, dtype: str, layout: str, training: bool, compile_too: bool) -> Step:
    what = "training" if training else "inference"
    name = f"{op} {what} {dtype} {layout}, {shape.name}"
    return Step(
        name, partial(measure, op, shape, dtype, layout, training, compile_too), COMPILE_S if compile_too else 8
    )


def measure(
    op: str, shape: Shape, dtype: str, layout: str, training: bool, compile_too: bool, context: Context
) -> dict[str, Any]:
    """No figure for ours where its numbers are wrong."""
    row = rows.make_row(op, shape, dtype, layout, training, context)
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # cuDNN's best for the peers
    try:
        rows.add_ours(row, runnable(context.device))
        rows.add_eager(row)
        if compile_too:
            rows.add_compiled(row)
        found: dict[str, Any] = {"op": op, "shape": shape.name, "dtype": dtype, "layout": layout, "training": training}
        found |= {"flops": row.flops, "fewest_bytes": row.fewest_bytes} | rows.check(row, context)
        if "failed" in found:
            raise FailedError(found["failed"][:500], found)
        found |= rows.measure(row, context)
    finally:
        torch.backends.cudnn.benchmark = benchmark
    found |= {"plan": planned(row)} if "ours cuda" in row.providers else {}
    return found | shares(found, roofs(context, dtype)) | ratios(found["median_us"])


def planned(row: rows.Row) -> dict[str, Any]:
    """What the launch plan of the CUDA kernels holds for this layer on this GPU, where the introspection module is: a
    library that was built elsewhere comes without it.
    """
    shape = row.shape
    if row.op.name != "lite_mla" or len(shape.scales) != 1:
        return {}
    gpu: Any = torch.cuda.get_device_properties(0)
    try:
        whole = launch_plan(
            *(shape.batch, shape.channels, shape.height, shape.width),
            head_dim=shape.dim,
            kernel_size=shape.scales[0],
            fp32=row.settings.dtype == torch.float32,
            multiprocessors=gpu.multi_processor_count,
            max_shared_bytes=gpu.shared_memory_per_block_optin,
        )
    except ImportError as error:
        return {"not_known": rows.reason_of(error)}
    parts = ("forward", "backward") if row.settings.training else ("inference",)
    return {part: whole[part] for part in parts}


@functools.cache
def _roofs(where: str, quick: bool, dtype: str) -> dict[str, float]:
    context = Context(where, quick)
    elements = (2**16 if quick else ROOF_BYTES) // rows.DTYPES[dtype].itemsize
    source = torch.empty(elements, device=where, dtype=rows.DTYPES[dtype]).normal_()
    target = torch.empty_like(source)
    copy = device.best([partial(target.copy_, source)], context, 4)
    size = 64 if quick else ROOF_SIZE // (2 if dtype == "float32" else 1)
    left, right = (torch.randn(size, size, device=where).to(rows.DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(left)
    with device.tf32(dtype == "tf32"):
        product = device.best([partial(torch.matmul, left, right, out=out)], context, 4)
    return {"copy_gb_per_s": 2e-3 * source.nbytes / copy, "matrix_tflops": 2e-6 * size**3 / product}


def roofs(context: Context, dtype: str) -> dict[str, float]:
    """Measured once per process, in the run whose figures are compared with them."""
    return _roofs(context.device, context.quick, dtype)


def shares(found: dict[str, Any], roof: dict[str, float]) -> dict[str, Any]:
    """GB/s of the fewest bytes and TFLOP/s of the formula, and what part of the roofs they are."""
    rates = {}
    for name, us in found["median_us"].items():
        gb_per_s, tflops = 1e-3 * found["fewest_bytes"] / us, 1e-6 * found["flops"] / us
        rates[name] = {
            "gb_per_s": gb_per_s,
            "tflops": tflops,
            "share_of_copy": gb_per_s / roof["copy_gb_per_s"],
            "share_of_matrix": tflops / roof["matrix_tflops"],
        }
    return {"roofs": roof, "rates": rates}


def ratios(median_us: dict[str, float]) -> dict[str, Any]:
    """The best time of each family of peers over the best of ours, in the same column."""
    found: dict[str, float] = {}
    for column in ("graph", "stream"):
        times: dict[str, float] = {}
        for name, us in median_us.items():
            provider, where = name.split(" | ")
            if where == column:
                family = provider.split()[0]
                times[family] = min(us, times.get(family, us))
        for family in times.keys() - {"ours"}:
            if "ours" in times:
                found[f"{family} over ours | {column}"] = times[family] / times["ours"]
    return {"ratios": found}


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """Geometric means and least values of the ratios over the layers, per op, dtype, layout and direction."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for entry in content["steps"].values():
        row = entry.get("result", {})
        if entry["status"] != "ok" or not row.get("ratios"):
            continue
        group = f"{row['op']} {'training' if row['training'] else 'inference'} {row['dtype']} {row['layout']}"
        for name, value in row["ratios"].items():
            groups.setdefault(group, {}).setdefault(name, {})[row["shape"]] = value
    return {
        group: {
            name: {
                "geometric_mean": geometric_mean(list(values.values())),
                "least": min(values.values()),
                "least_at": min(values, key=values.__getitem__),
                "layers": len(values),
            }
            for name, values in by_name.items()
        }
        for group, by_name in groups.items()
    }
