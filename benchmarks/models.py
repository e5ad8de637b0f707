"""`bench --set models`: whole models in inference, and whether they gain what LiteMLA's own speed-up predicts.

In one run of shuffled blocks: the model in plain torch (eager), with its norms folded, and compiled; the same of ours;
what runtimes make of it; and, on the inputs that they get in the model, all its LiteMLAs alone, eager and ours. With

    share = time of the LiteMLAs in eager / time of the model in eager
    predicted = 1 / (1 - share + share / speed-up of the LiteMLAs)
    gain_reached = (measured - 1) / (predicted - 1)

where every quotient is the median over rounds of the one in a round. The interval of `gain_reached` is that of 1000
resamplings of the rounds, 5 to 95 %. Where the share is small the gain is within the noise, and the interval says so.

Alone, a small layer finds its weights in a cache, where in the model it reads them from memory: its speed-up is larger
alone. So the same is predicted from times that hooks take in the model, too ("inside"); what is then missing from the
gain, the rest of the model has lost.

On one thread the same figures are taken from processor time, too ("processor_time"): where other programs run beside it
they scatter less than the time that passes, and hold no waiting. On more threads waiting costs processor time.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from benchmarks.model_cases import CASES, ModelCase, fused_copy, lite_mla_paths, make_reference
from benchmarks.peers import compiled, fold, make_peers
from benchmarks.providers import LAYOUTS, Provider, Settings, Step, random_tensors, tensors, torch_provider
from benchmarks.timing import COUNTED_CALLS, Samples, median_seconds, ratios, shuffled_blocks
from efficientvit_kernels.testing import native_calls, rule_t, triton_launches
from efficientvit_kernels.verify import record_inputs

PEERS = ("eager", "eager_folded", "torch.compile", "onnxruntime", "openvino")
OURS = ("ours", "ours_folded", "ours_compiled")
LAYERS = ("layers_eager", "layers_ours")  # the LiteMLAs alone
AGAIN = "eager_again"
MOST_ROUNDS, LEAST_ROUNDS = 30, 6
# Other than ours: another order of sums through a hundred layers, and the runtimes' eps of 1e-6.
TOLERANCE = 1e-3
RESAMPLINGS = 1000


@dataclass
class ModelWork:
    """One row: a case with every provider that can run, and why the others cannot."""

    case: ModelCase
    settings: Settings
    device: torch.device
    models: dict[str, nn.Module]  # "eager" and "ours"
    providers: dict[str, Provider]
    left_out: dict[str, str] = field(default_factory=dict)

    def inputs(self, number: int) -> list[Tensor]:
        """Random images, others for each round."""
        return random_tensors([self.case.dims], self.settings.dtype, self.settings.layout, number + 1)


def cases_of(device: str, wanted: list[str] | None) -> list[ModelCase]:
    known = [case.name for case in CASES[device]]
    for name in wanted or []:
        if name not in known:
            raise ValueError(f"bench: shape must be one of {', '.join(known)}, got {name!r}")
    return [case for case in CASES[device] if not wanted or case.name in wanted]


def check_options(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The wanted peers.

    Raises: ValueError: an option that does not go with whole models.
    """
    if arguments.passes == "training":
        raise ValueError("bench: pass must be inference for the set models, got training")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device must be one that is available, got cuda")
    names = PEERS if arguments.peers in (None, "all") else tuple(arguments.peers.split(","))
    for name in names:
        if name not in PEERS:
            raise ValueError(f"bench: peers must be all or some of {','.join(PEERS)}, got {name!r}")
    return names


def measure_model(
    case: ModelCase, settings: Settings, device: str, peers: tuple[str, ...], rounds: int | None
) -> dict[str, Any]:
    """The row of `case`: judged, then timed; a row whose numbers fail gets no figures."""
    work = make_work(case, settings, torch.device(device), peers)
    row: dict[str, Any] = {"case": asdict(case), "lite_mlas": len(lite_mla_paths(work.models["eager"]))}
    row |= check(work)
    row["notes"] = {name: provider.note for name, provider in work.providers.items() if provider.note}
    row["left_out"] = work.left_out
    if "failed" in row:
        return row
    with torch.no_grad():
        rounds = rounds or rounds_of(case, work.providers["eager"].bind(work.inputs(0), []))
        row["rounds"] = rounds
        processor: dict[str, list[float]] = {}
        row |= figures(shuffled_blocks(lambda number: _steps(work, number, processor), rounds, training=False))
        if device == "cpu" and settings.threads == 1:
            row["processor_time"] = figures(counted(processor))
        row["memory"] = {name: _peak(work, provider) for name, provider in _measurable(work).items()}
        if device == "cpu":
            row["inside"] = inside(work, rounds)
    return row


def make_work(case: ModelCase, settings: Settings, device: torch.device, peers: tuple[str, ...]) -> ModelWork:
    """Every provider has weights of its own, all of the same values."""
    eager = make_reference(case, settings).to(device)
    models = {"eager": eager, "ours": fused_copy(eager)}
    makers: dict[str, Callable[[], Provider]] = {
        "ours_folded": lambda: torch_provider(fold(models["ours"]), settings),
        "ours_compiled": lambda: compiled(models["ours"], settings),
    }
    wanted = {"ours_folded": "eager_folded", "ours_compiled": "torch.compile"}  # each beside its counterpart
    providers = {name: torch_provider(model, settings) for name, model in models.items()}
    runtimes = {} if device.type == "cpu" else dict.fromkeys(("onnxruntime", "openvino"), "on the CPU only")
    found, left_out = make_peers(eager, settings, [name for name in peers if name not in runtimes], [case.dims])
    left_out |= {name: reason for name, reason in runtimes.items() if name in peers}
    for name, make in makers.items():
        if wanted[name] in peers:
            try:
                found[name] = make()
            except Exception as error:  # whatever a compiler raises
                left_out[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    providers = {name: _on(device, provider) for name, provider in (providers | found).items()}
    return ModelWork(case, settings, device, models, providers, left_out)


def _on(device: torch.device, provider: Provider) -> Provider:
    """With inputs on `device`, and calls that end when the device has."""
    if device.type == "cpu":
        return provider

    def bind(inputs: list[Tensor], grad_outs: list[Tensor]) -> Step:
        step = provider.bind([tensor.to(device) for tensor in inputs], grad_outs)

        def synchronised() -> object:
            out = step()
            torch.cuda.synchronize(device)
            return out

        return synchronised

    return Provider(bind, provider.note)


def check(work: ModelWork) -> dict[str, Any]:
    """Outputs against float64: ours under rule T, eager as its baseline; peers that are wrong are dropped."""
    inputs, errors = work.inputs(-1), {}
    with torch.no_grad():
        truth_model = copy.deepcopy(work.models["eager"]).double()
        (truth,) = tensors(truth_model(*(tensor.double().to(work.device) for tensor in inputs)))
        del truth_model
        results: dict[str, Tensor] = {}
        for name, provider in list(work.providers.items()):
            before = native_calls() + triton_launches()
            try:
                (results[name],) = tensors(provider.bind(inputs, [])())
            except Exception as error:
                if name in work.models:
                    raise
                work.left_out[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                del work.providers[name]
                continue
            if name == "ours":
                native = native_calls() + triton_launches() - before >= len(lite_mla_paths(work.models["ours"]))
    truth = truth.cpu()
    largest = truth.abs().max()
    errors = {name: float((out.cpu().double() - truth).abs().max() / largest) for name, out in results.items()}
    for name in [name for name in errors if name not in work.models]:
        if not errors[name] <= max(TOLERANCE, 4 * errors["eager"]):
            work.left_out[name] = f"its results are wrong: relative error {errors[name]:.3g}"
            del work.providers[name]
    verdict = rule_t(results["ours"].cpu(), truth, results["eager"].cpu())
    result: dict[str, Any] = {"relative_errors": errors, "check": asdict(verdict), "ran_natively": native}
    if not verdict.ok:
        result["failed"] = str(verdict)
    elif not native:
        result["failed"] = "ours did not run in native kernels"
    return result


def rounds_of(case: ModelCase, step: Step) -> int:
    """As many rounds as `case.seconds` has eager calls, within limits."""
    step()
    start = time.perf_counter()
    step()
    return min(MOST_ROUNDS, max(LEAST_ROUNDS, round(case.seconds / (time.perf_counter() - start))))


def _steps(work: ModelWork, number: int, processor: dict[str, list[float]]) -> dict[str, Step]:
    """Every provider on the round's images, and the LiteMLAs alone on what they get of them.

    Each call's seconds of processor time are added to `processor`.
    """
    inputs = work.inputs(number)
    steps = {name: provider.bind(inputs, []) for name, provider in work.providers.items()}
    paths, eager = lite_mla_paths(work.models["eager"]), work.models["eager"]
    given: dict[str, Tensor] = {}
    with record_inputs(eager, paths, given):
        eager(*(x.to(work.device, memory_format=LAYOUTS[work.settings.layout]) for x in inputs))
    for name, who in zip(LAYERS, ("eager", "ours"), strict=True):
        pairs = [(work.models[who].get_submodule(path), given[path]) for path in paths]
        steps[name] = _synchronised(work.device, lambda pairs=pairs: [layer(x) for layer, x in pairs])  # type: ignore[misc]
    steps[AGAIN] = work.providers["eager"].bind(inputs, [])
    return {name: _noting(step, processor.setdefault(name, [])) for name, step in steps.items()}


def _noting(step: Step, seconds: list[float]) -> Step:
    def noted() -> object:
        start = time.process_time()
        out = step()
        seconds.append(time.process_time() - start)
        return out

    return noted


def counted(processor: dict[str, list[float]]) -> Samples:
    """Blocks of the counted calls: the first call of each block is not one."""
    length = 1 + COUNTED_CALLS
    return {
        name: [seconds[i + 1 : i + length] for i in range(0, len(seconds), length)]
        for name, seconds in processor.items()
    }


def _synchronised(device: torch.device, step: Step) -> Step:
    return _on(device, Provider(lambda inputs, grad_outs: step)).bind([], [])


def figures(samples: Samples) -> dict[str, Any]:
    """Medians over all counted calls; speed-ups are medians over rounds of the quotient in a round."""
    over = {name: ratios(samples[name], samples["ours"]) for name in samples if name not in ("ours", AGAIN, *LAYERS)}
    peers = {name: statistics.median(values) for name, values in over.items() if name not in OURS}
    own = {name: statistics.median(ratios(samples["eager"], samples[name])) for name in samples if name in OURS}
    best = min(peers, key=lambda name: peers[name])
    fastest = max(own, key=lambda name: own[name])
    return {
        "median_ms": {name: 1e3 * median_seconds(blocks) for name, blocks in samples.items()},
        "best_ms": {name: 1e3 * min(map(min, blocks)) for name, blocks in samples.items()},
        "speed_up_over": peers,
        "eager_over_each_of_ours": own,
        "best_peer": best,
        "fastest_of_ours": fastest,
        "best_of_ours_over_best_peer": statistics.median(ratios(samples[best], samples[fastest])),
        "self_check": statistics.median(ratios(samples[AGAIN], samples["eager"])),
        **prediction(samples),
        "samples_ms": {name: [[1e3 * value for value in block] for block in samples[name]] for name in samples},
    }


def predicted_gain(share: float, speed_up: float) -> float:
    """Amdahl's law."""
    return 1 / (1 - share + share / speed_up)


def prediction(samples: Samples) -> dict[str, Any]:
    """What the LiteMLAs' share and speed-up predict for the model, and how much of it came; see the module's words."""
    shares = ratios(samples[LAYERS[0]], samples["eager"])
    speed_ups = ratios(samples[LAYERS[0]], samples[LAYERS[1]])
    measured = ratios(samples["eager"], samples["ours"])

    def reached(rounds: list[int]) -> tuple[float, float, float, float, float]:
        share, speed_up, gain = (
            statistics.median([values[i] for i in rounds]) for values in (shares, speed_ups, measured)
        )
        predicted = predicted_gain(share, speed_up)
        quotient = (gain - 1) / (predicted - 1) if predicted != 1 else float("nan")
        return share, speed_up, predicted, gain, quotient

    every = list(range(len(measured)))
    share, speed_up, predicted, gain, quotient = reached(every)
    draw = random.Random(0)
    quotients = sorted(reached(draw.choices(every, k=len(every)))[-1] for _ in range(RESAMPLINGS))
    return {
        "share": share,
        "layers_speed_up": speed_up,
        "predicted": predicted,
        "measured": gain,
        "measured_over_predicted": gain / predicted,
        "gain_reached": quotient,
        "gain_reached_interval": [quotients[RESAMPLINGS // 20], quotients[-RESAMPLINGS // 20]],
    }


def _measurable(work: ModelWork) -> dict[str, Provider]:
    """The providers whose memory torch allocates."""
    return {name: p for name, p in work.providers.items() if name not in ("onnxruntime", "openvino")}


def _peak(work: ModelWork, provider: Provider) -> int:
    """The most bytes that one call has allocated at once, beside inputs and weights."""
    step = provider.bind(work.inputs(0), [])
    if work.device.type == "cpu":
        return peak_bytes(step, training=False)
    torch.cuda.reset_peak_memory_stats(work.device)
    before = torch.cuda.memory_allocated(work.device)
    step()
    return torch.cuda.max_memory_allocated(work.device) - before


def inside(work: ModelWork, rounds: int) -> dict[str, Any]:
    """Where the time of a call goes, measured in the model: each LiteMLA, and all the rest; medians in ms.

    A gain that does not come although the layers alone are faster shows here: as layers that are slower in the model
    than alone, or as a rest that is slower behind ours ("rest", ours over eager). On one thread in processor time.
    """
    clock = time.process_time if work.settings.threads == 1 else time.perf_counter
    calls: dict[str, list[dict[str, float]]] = {name: [] for name in work.models}
    timed = {name: _timed_copy(model, clock) for name, model in work.models.items()}
    for number in range(rounds):
        x = work.inputs(number)[0]
        for name in random.Random(number).sample(list(timed), len(timed)):
            model, spent = timed[name]
            model(x)
            start = clock()
            model(x)
            whole = clock() - start
            lite_mla = sum(spent.values())
            calls[name].append({**spent, "lite_mla": lite_mla, "rest": whole - lite_mla, "whole": whole})
    pairs = list(zip(calls["eager"], calls["ours"], strict=True))
    share = statistics.median(call["lite_mla"] / call["whole"] for call in calls["eager"])
    quotients = {
        part: statistics.median(eager[part] / ours[part] for eager, ours in pairs) for part in ("lite_mla", "rest")
    }
    result: dict[str, Any] = {"rounds": rounds, "share": share, "layers_speed_up": quotients["lite_mla"]}
    result |= {"rest_eager_over_ours": quotients["rest"], "predicted": predicted_gain(share, quotients["lite_mla"])}
    for name, found in calls.items():
        medians = {part: 1e3 * statistics.median(call[part] for call in found) for part in found[0]}
        parts = {f"{part}_ms": medians.pop(part) for part in ("lite_mla", "rest", "whole")}
        result[name] = {**parts, "layers_ms": medians}
    return result


def _timed_copy(model: nn.Module, clock: Callable[[], float]) -> tuple[nn.Module, dict[str, float]]:
    """The model over the same weights, with hooks that note the seconds of each LiteMLA: some microseconds a layer."""
    same: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin, spent = copy.deepcopy(model, same), dict[str, float]()
    for path in lite_mla_paths(twin):

        def enter(module: nn.Module, inputs: Any, path: str = path) -> None:
            spent[path] = -clock()

        def leave(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
            spent[path] += clock()

        layer = twin.get_submodule(path)
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    return twin, spent
