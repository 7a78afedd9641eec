"""Checkpoints: written so that a crash cannot lose the last good one, read so that a bad file cannot pass for a good one.

A file holds plain types and tensors only and loads with torch.load(weights_only=True) in a process without this code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from common.errors import RunError, UserError

FORMAT = 1


def save(checkpoint: dict, path: Path, *, keep: Path | None = None) -> None:
    """Writes `path` atomically: temporary file, fsync, read back with CRC, rename, fsync of the folder.

    The file that `path` was becomes `keep`. Raises RunError and leaves the old files alone if the disk is full or a
    tensor is not finite.
    """
    checkpoint = plain({**checkpoint, "format": FORMAT})
    _refuse_broken(checkpoint["model"], path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        with zipfile.ZipFile(temporary) as z:
            if z.testzip() is not None:
                raise OSError("what was read back differs from what was written")
        if keep is not None and path.exists():
            _link(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        need = sum(t.numel() * t.element_size() for t in _tensors(checkpoint))
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        reason = " ".join(str(error).split())
        raise RunError(
            f"cannot write {path}: {reason} (needs about {need} bytes, {free} are free); the previous checkpoint is intact"
        ) from None


def save_copy(path: Path, copy: Path) -> None:
    """`copy` becomes the same file as `path`, atomically, without writing it again where links are possible."""
    _link(path, copy)
    _sync_folder(copy.parent)


def _link(path: Path, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, target)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def load(path: str | Path, flag: str) -> dict:
    """The checkpoint's content on the CPU. UserError, naming `flag`, for a missing, damaged or unsafe file.

    A .safetensors file is a bare state dict; reading it needs that package.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: " + ("is a folder; name the checkpoint file" if path.is_dir() else "no such file"))
    if path.suffix == ".safetensors":
        return _load_safetensors(path, flag)
    damaged = UserError(f"{flag}: damaged checkpoint {path}; use another one (previous.pt and best.pt lie beside last.pt)")
    try:
        if zipfile.is_zipfile(path):  # torch.load itself does not notice a flipped byte
            with zipfile.ZipFile(path) as z:
                if z.testzip() is not None:
                    raise damaged
        # The official DeiT and t-ReX files carry their command line; nothing else beyond plain types is let in.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "global" in str(error):
            raise UserError(f"{flag} {path}: refused, the file holds more than tensors and plain types and could run code") from None
        raise damaged from None
    except (EOFError, RuntimeError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile):
        raise damaged from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: holds a {type(content).__name__}, not a checkpoint")
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(f"{flag} {path}: checkpoint format {content['format']}, this version reads {FORMAT}; use the version that wrote it")
    return content


def _load_safetensors(path: Path, flag: str) -> dict:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{flag} {path}: reading this kind of file needs a package: pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{flag}: damaged checkpoint {path} ({' '.join(str(error).split())[:120]})") from None


PREFIXES = ("module.", "_orig_mod.", "model.")


def weights(checkpoint: dict, *, ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint of ours, an official one, or a bare one; wrappers' prefixes removed.

    ema: the averaged weights; UserError if there are none.
    """
    names = ("ema", "model_ema") if ema else ("model", "state_dict")
    state = next((checkpoint[n] for n in names if isinstance(checkpoint.get(n), dict)), None)
    if state is None and ema:
        raise UserError("--use-ema: this checkpoint holds no averaged weights")
    state = checkpoint if state is None else state
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    for _ in range(3):
        for prefix in PREFIXES:
            if state and all(k.startswith(prefix) for k in state):
                state = {k[len(prefix) :]: v for k, v in state.items()}
    return state


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Strict load into a model of any precision; UserError with counts and examples if keys or shapes do not fit."""
    own = model.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape]
    problems = [
        f"{len(found)} {what}, e.g. {', '.join(found[:5])}"
        for what, found in (("keys missing", missing), ("keys not known", unexpected), ("shapes differ", shapes))
        if found
    ]
    if problems:
        raise UserError(f"{where}: does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state)


HEADS = ("head.", "head_dist.", "fc.", "classifier.", "heads.")  # classifiers: of the methods, of torchvision's models


def load_pretrained(
    model: torch.nn.Module,
    args,
    method: str,
    *,
    new_head: bool,
    say: Callable[[str], None],
    adapt: Callable | None = None,
    content: dict | None = None,
) -> None:
    """--weights into the model; a classifier for other classes is left fresh (only if new_head).

    adapt(model, state, content, say) changes the state dict in place to fit the model's resolution; content is the whole file,
    read here unless it is given.
    """
    content = load(args.weights, "--weights") if content is None else content
    if isinstance(content.get("model_name"), str) and content["model_name"] != args.model:
        raise UserError(
            f"--weights {args.weights}: holds {content.get('method')} {content['model_name']}, you asked for {method} {args.model}"
        )
    state = weights(content, ema=args.use_ema)
    narrow = {v.dtype for v in state.values()} & {torch.float16, torch.bfloat16}
    if narrow:
        say(f"weights in {', '.join(str(d).removeprefix('torch.') for d in narrow)} loaded into float32")
    if adapt is not None:
        adapt(model, state, content, say)
    own = model.state_dict()
    heads = [k for k in own if k in state and k.startswith(HEADS) and state[k].shape != own[k].shape]
    if heads and new_head:
        say(f"new head: the checkpoint has {len(state[heads[0]])} classes, the data {len(own[heads[0]])}")
        state.update({k: own[k] for k in heads})
    elif heads:
        raise UserError(
            f"--weights {args.weights}: has {len(state[heads[0]])} classes, the data {len(own[heads[0]])}; evaluation needs the same"
        )
    load_weights(model, state, f"--weights {args.weights}")


def take_part(model: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str) -> list[str]:
    """Fits a state dict, in place, to a model that takes its part `prefix` (a trunk); returns the keys that start afresh.

    A state dict without that prefix is taken for the part alone, in torchvision's form. Of all else, what has the same name
    and shape is taken too; the rest is the model's own. The part itself must fit: load_weights says where it does not.
    """
    if not any(k.startswith(prefix) for k in state):
        for key in list(state):
            state[prefix + key] = state.pop(key)
    own = model.state_dict()
    for key in [k for k in state if k not in own and (not k.startswith(prefix) or k.startswith(prefix + "fc."))]:
        del state[key]
    fresh = [k for k in own if not k.startswith(prefix) and (k not in state or state[k].shape != own[k].shape)]
    state.update({k: own[k] for k in fresh})
    return fresh


def plain(value):
    """`value` with tensors on the CPU in storage of their own and all else plain; TypeError for what a file may not hold."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.clone() if value.untyped_storage().nbytes() != value.numel() * value.element_size() else value
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f"a checkpoint may not hold a {type(value).__name__}: {value!r}")


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)


def _refuse_broken(state: dict, path: Path) -> None:
    broken = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise RunError(f"{path} not written: {len(broken)} tensors are not finite, e.g. {broken[0]}; the previous checkpoint is intact")
