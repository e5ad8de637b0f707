"""Weights in and out of files: everything is checked before a model changes, and every failure is one CheckpointError.

A file is data from somebody else. Pickles are read with `weights_only=True`, so none of their code runs; sizes that a
file states are compared with the file's own before anything of that size is allocated.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._files import written_whole

T = TypeVar("T")

PICKLED = (".pt", ".pth", ".bin")
SAFETENSORS = ".safetensors"
SUFFIXES = (*PICKLED, SAFETENSORS)
CONTAINERS = ("state_dict", "model_state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
DIGEST = "tensors_sha256"  # metadata that save_weights writes: a safetensors file has no checksum of its own

# Tensors may share storage and archives may be compressed, so what a file unfolds to can exceed its size; by this much.
MAX_EXPANSION = 16
ALWAYS_ALLOWED = 1 << 20
SHOWN = 3  # keys of each kind in a message


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that does not fit the model; the message names the file and the cause."""

    def __init__(self, source: object, cause: str) -> None:
        super().__init__(f"checkpoint {source}: {cause}")
        self.source, self.cause = str(source), cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.cause)


class _RefusedError(Exception):
    """A cause found in a file, on its way to become a CheckpointError."""


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    strict: bool = True,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Loads a checkpoint into `model`, or leaves the model untouched and raises.

    Values are converted to the model's dtypes and devices. Only a `load_state_dict` hook of the model's own that raises
    can leave it half loaded: hooks run as ever.

    Args:
        model: any module with its parameters on a real device.
        source: .pt, .pth, .bin (a state dict, raw or under "state_dict", "model_state_dict", "model") or .safetensors;
            a local path, or "hf://organisation/repository[@revision]/file" (needs the package huggingface_hub).
            A prefix "module." or "_orig_mod." that all keys have is dropped.
        sha256: the file's digest in hex; any other file is refused.
        strict: keys that are missing or left over are errors. Otherwise only the keys common to both are loaded, of
            which there must be at least one; shapes must fit in any case.
        convert: makes the model's keys of the file's, such as `efficientvit_kernels.models.convert.timm_to_official`.

    Raises:
        CheckpointError: unreadable, damaged or malicious file, wrong digest, no state dict, keys, shapes or kinds of
            dtypes that do not fit, NaN or inf, or values that overflow in the model's dtype.
        ValueError, TypeError: wrong arguments; a model on the meta device.
        ImportError: safetensors or huggingface_hub is needed and not installed.
    """
    named = _state_of("load_weights", model)
    full_names = _strip_wrappers({name: name for name in named})
    targets = {short: named[name] for short, name in full_names.items()}
    state = _read(source, sha256, mapped=True)
    if convert is not None:
        try:
            state = convert(state)
        except ValueError as error:
            raise CheckpointError(source, f"cannot be converted: {error}") from error
    problems = _misfits(state, targets, strict)
    if problems:
        raise CheckpointError(source, f"does not fit {type(model).__name__}: {'; '.join(problems)}")
    try:
        model.load_state_dict({full_names[key]: value for key, value in state.items() if key in targets}, strict=strict)
    except RuntimeError as error:  # a hook of the model's that refuses: nothing else is left to refuse
        raise CheckpointError(source, f"refused by {type(model).__name__}: {_summary(error)}") from error


def read_state_dict(source: str | os.PathLike[str], *, sha256: str | None = None) -> dict[str, Tensor]:
    """The state dict of a checkpoint as plain CPU tensors in the file's dtypes; arguments and errors as `load_weights`.

    Values are not judged: NaN and inf are reported where they would enter a model.
    """
    return _read(source, sha256, mapped=False)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the state dict of `model` to a .safetensors, .pt, .pth or .bin file that appears whole or not at all.

    A .safetensors file carries the SHA-256 of its tensors, which reading compares; .pt files have checksums anyway.

    Raises:
        ValueError: another suffix. CheckpointError: the file cannot be written. ImportError: safetensors is missing.
    """
    state = _state_of("save_weights", model)
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"save_weights: path must end in one of {', '.join(SUFFIXES)}, got {path.name!r}")
    try:
        with written_whole(path, durable=True) as temporary:
            if path.suffix == SAFETENSORS:
                _write_safetensors(state, temporary)
            else:
                with open(temporary, "wb") as file:
                    torch.save(state, file)
    except ImportError:
        raise
    except Exception as error:
        raise CheckpointError(path, f"cannot be written: {_summary(error)}") from error


def _state_of(function: str, model: object) -> dict[str, Tensor]:
    """The state dict of `model`, which must be a module whose state is tensors with memory."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    state = dict(model.state_dict())
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError(f"{function}: model must have a state of tensors alone, got one with extra state")
    if any(value.is_meta for value in state.values()):
        raise ValueError(f"{function}: model must have memory (`model.to_empty(device=...)`), got the meta device")
    return {name: value.detach() for name, value in state.items()}


def _read(source: str | os.PathLike[str], sha256: str | None, mapped: bool) -> dict[str, Tensor]:
    """`mapped` tensors lie in the file's pages: no copy in memory, but they must not outlive the file's content."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"load_weights: source must be a path or hf:// reference, got {type(source).__name__}")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256)):
        raise ValueError(f"load_weights: sha256 must be 64 hexadecimal digits or None, got {sha256!r}")
    path = _locate(source)
    try:
        if path.suffix not in SUFFIXES:
            raise CheckpointError(source, f"its suffix must be one of {', '.join(SUFFIXES)}")
        if not path.is_file():
            raise CheckpointError(source, "is not a file" if path.exists() else "does not exist")
        if sha256 is not None:
            _check_digest(source, path, sha256)
        read = _read_safetensors if path.suffix == SAFETENSORS else _read_pickled
        return _strip_wrappers(read(path, mapped))
    except (CheckpointError, ImportError):
        raise
    except _RefusedError as error:
        raise CheckpointError(source, str(error)) from error
    except Exception as error:  # whatever the readers raise on damaged data: a dozen classes, torch's and Python's
        raise CheckpointError(source, _summary(error)) from error


def _locate(source: str | os.PathLike[str]) -> Path:
    """The local file of a path or hf:// reference."""
    text = os.fspath(source)
    if not text.startswith("hf://"):
        return Path(text)
    parts = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", text)
    if parts is None:
        raise CheckpointError(text, "the form is hf://organisation/repository[@revision]/file")
    repository, revision, name = parts.groups()
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"load_weights: {text} needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(hf_hub_download(repo_id=repository, filename=name, revision=revision))
    except Exception as error:  # no network, no such repository or file, no permission
        raise CheckpointError(text, f"cannot be fetched: {_summary(error)}") from error


def _check_digest(source: object, path: Path, sha256: str) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256.lower():
        raise CheckpointError(source, f"has SHA-256 {digest}, expected {sha256.lower()}")


def _read_pickled(path: Path, mapped: bool) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # the test that torch.load makes
    stored = _check_archive(path) if zipped else False
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and stored)
    for _ in range(len(CONTAINERS)):
        key = next(
            (key for key in CONTAINERS if isinstance(content, dict) and isinstance(content.get(key), dict)), None
        )
        content = content if key is None else content[key]
    return _plain_tensors(content, path.stat().st_size)


def _check_archive(path: Path) -> bool:
    """Whether all records are uncompressed; raises if they unfold to too much, or one is damaged.

    Torch's reader compares no checksums; without this, a flipped bit would become a weight.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        _check_size(sum(record.file_size for record in records), path.stat().st_size)
        damaged = archive.testzip()
        if damaged is not None:
            raise _RefusedError(
                f"damaged: the checksum of its record {damaged!r} is wrong (or it was saved without checksums,"
                " torch.serialization.set_crc32_options(False))"
            )
        return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _check_size(unfolded: int, size: int) -> None:
    if unfolded > MAX_EXPANSION * size + ALWAYS_ALLOWED:
        raise _RefusedError(f"unfolds to {unfolded} bytes from {size}, more than {MAX_EXPANSION} times its size")


def _plain_tensors(content: object, size: int) -> dict[str, Tensor]:
    """`content`, if it is a state dict of ordinary tensors whose elements all lie in a file of `size` bytes."""
    if not isinstance(content, Mapping):
        raise _RefusedError(f"is not a state dict: it holds a {type(content).__name__}")
    state = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise _RefusedError(f"is not a state dict: it has the key {key!r:.60} of type {type(key).__name__}")
        if not isinstance(value, Tensor):
            raise _RefusedError(f"is not a state dict: its entry {key!r:.60} is a {type(value).__name__}, not a tensor")
        # The class's own method: a pickle may set attributes on a tensor, `detach` among them.
        plain = Tensor.detach(value)
        ordinary = type(plain) in (Tensor, nn.Parameter) and plain.layout == torch.strided and not plain.is_quantized
        if not ordinary or plain.device.type != "cpu":
            raise _RefusedError(f"its entry {key!r:.60} is not a dense tensor in memory")
        state[key] = plain
    _check_size(sum(value.numel() * value.element_size() for value in state.values()), size)
    return state


def _read_safetensors(path: Path, mapped: bool) -> dict[str, Tensor]:
    safe_open = _safetensors().safe_open
    with safe_open(path, framework="pt", device="cpu") as file:
        state = _plain_tensors({name: file.get_tensor(name) for name in file.keys()}, path.stat().st_size)  # noqa: SIM118
        digest = (file.metadata() or {}).get(DIGEST)
    if digest is not None and digest != _tensors_digest(state):
        raise _RefusedError("damaged: its tensors do not have the SHA-256 that the file states for them")
    return state if mapped else {name: value.clone() for name, value in state.items()}


def _write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    _safetensors()
    from safetensors.torch import save_file

    # Contiguous, and no two in one storage: the format has neither strides nor aliases.
    seen: set[int] = set()
    dense = {}
    for name, value in state.items():
        value = value.cpu().contiguous()
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        dense[name] = value if whole and value.data_ptr() not in seen else value.clone()
        seen.add(value.data_ptr())
    save_file(dense, path, metadata={"format": "pt", DIGEST: _tensors_digest(dense)})


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "checkpoint: .safetensors files need the package safetensors: pip install safetensors"
        ) from error
    return safetensors


def _tensors_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        if value.numel():
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _strip_wrappers(state: dict[str, T]) -> dict[str, T]:
    while state and (prefix := next((p for p in WRAPPERS if all(key.startswith(p) for key in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _misfits(state: dict[str, Tensor], targets: dict[str, Tensor], strict: bool) -> list[str]:
    """What keeps `state` out of `targets`, one line per kind; empty if nothing does."""
    common = [key for key in targets if key in state]
    problems = []
    if strict:
        problems += _listed("missing", [key for key in targets if key not in state])
        problems += _listed("unexpected", [key for key in state if key not in targets])
    elif not common:
        problems.append("no key in common")
    shapes = [key for key in common if state[key].shape != targets[key].shape]
    problems += _listed(
        "of the wrong shape", shapes, lambda key: f" must be {list(targets[key].shape)}, got {list(state[key].shape)}"
    )
    kinds = [key for key in common if _kind(state[key]) != _kind(targets[key])]
    problems += _listed(
        "of the wrong dtype", kinds, lambda key: f" must be {_kind(targets[key])}, got {state[key].dtype}"
    )
    if problems:
        return problems
    bad = [key for key in common if not _finite_in(state[key], targets[key].dtype)]
    return _listed("not finite", bad, lambda key: f" has NaN, inf or more than {targets[key].dtype} holds")


def _listed(what: str, keys: list[str], detail: Callable[[str], str] = lambda key: "") -> list[str]:
    if not keys:
        return []
    shown = ", ".join(f"{key!r:.120}{detail(key)}" for key in keys[:SHOWN])
    more = f", and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return [f"{len(keys)} {what}: {shown}{more}"]


def _kind(value: Tensor) -> str:
    if value.dtype == torch.bool:
        return "bool"
    return "complex" if value.is_complex() else "floating-point" if value.is_floating_point() else "integer"


def _finite_in(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether every element is finite, also after conversion to `dtype`: conversion keeps the order of the extremes."""
    if value.is_complex():
        value, dtype = torch.view_as_real(value), dtype.to_real()
    if not value.is_floating_point() or value.numel() == 0:
        return True
    if value.element_size() == 1:
        value = value.float()  # no aminmax for 8-bit floats
    extremes = torch.stack(torch.aminmax(value)).to(dtype)
    return bool(extremes.double().isfinite().all())


def _summary(error: Exception) -> str:
    """The class of an error and the first line of its message.

    Torch's message for a refused pickle begins with advice to run the file's code all the same; that is left out.
    """
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and text.startswith("Weights only load failed"):
        text = re.split("WeightsUnpickler error: |\n\n", text, maxsplit=1)[-1]
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no further message")
    return f"{type(error).__name__}: {line:.300}"
