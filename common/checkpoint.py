"""Checkpoints: written so that a crash cannot lose the last good one, read so that a bad one cannot pass for good. They
hold plain types and tensors only and load with torch.load(weights_only=True) in a process without this code."""

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.models import ResNet50_Weights

from common.errors import RunError, UserError, one_line, watched
from common.images import use_pixels

FORMAT = 1
OFFICIAL_FILES = "https://dl.fbaipublicfiles.com/deit"
OFFICIAL = json.loads(Path(__file__).with_name("official.json").read_text())  # name: model, size, top-1, options
HEADS = ("head.", "head_dist.", "fc.", "classifier.", "heads.")  # classifiers: of the methods, of torchvision's models


def save(checkpoint: dict, path: Path, *, keep: Path | None = None) -> None:
    """Writes `path` atomically: temporary file, fsync, read back with CRC, rename, fsync of the folder; what it was
    becomes `keep`. RunError, with the old files left alone, if the disk is full or a tensor is not finite."""
    checkpoint = plain({**checkpoint, "format": FORMAT})
    broken = [k for k, v in {**checkpoint["model"], **(checkpoint.get("ema") or {})}.items() if not v.isfinite().all()]
    if broken:
        raise RunError(f"{path} not written: {len(broken)} tensors are not finite, e.g. {broken[0]}; the old is kept")
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
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
            keep.unlink(missing_ok=True)
            try:
                os.link(path, keep)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, keep)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        need = sum(t.nbytes for t in tree_leaves(checkpoint) if isinstance(t, torch.Tensor))
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        raise RunError(f"cannot write {path}: {one_line(error)} (needs about {need} bytes, {free} are free); "
                       "the previous checkpoint is intact") from None


def official_address(method: str, asked: str, model: str | None = None, size: int | None = None) -> str:
    """Of "official" (for this model and size) or "official:NAME" (a file, or a model: its first one); or UserError."""
    files, name, at = OFFICIAL.get(method, {}), asked.partition(":")[2] or model, f" at {size}" if size else ""
    fit = [file for file, row in files.items() if file == name or (row[0] == name and size in (None, row[1]))]
    if not fit:
        raise UserError(f"{asked}: no official file of {name}{at}; all: {', '.join(files) or 'none'}")
    return f"{OFFICIAL_FILES}/{fit[0]}.pth"


def load(path: str | Path, flag: str, checked: bool = False) -> dict:
    """The checkpoint's content on the CPU, of a .safetensors file its bare state dict; path: a file or an address.
    UserError, naming `flag`, for a missing, damaged or unsafe file; checked: another process has read every byte."""
    where, name, hint = f"{flag} {path}", str(path), "previous.pt and best.pt lie beside last.pt"
    if address := "://" in name:
        kept, hint = name.partition("?")[0].rpartition("/")[2], "remove it and it is fetched anew"
        path = Path(torch.hub.get_dir(), "checkpoints", kept)
    elif not os.path.isfile(path):
        raise UserError(f"{where}: " + ("is a folder; name the file in it" if os.path.isdir(path) else "no such file"))
    try:
        if address and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(name, str(path), next(iter(torch.hub.HASH_REGEX.findall(kept)), None))
        if name.endswith(".safetensors"):
            import safetensors.torch

            return safetensors.torch.load_file(path)
        if (zipped := zipfile.is_zipfile(path)) and not checked:
            with zipfile.ZipFile(path) as z:  # torch.load itself does not notice a flipped byte
                if sum(part.file_size for part in z.infolist()) > os.path.getsize(path):  # nobody packs weights
                    raise zipfile.BadZipFile
                for part in watched(z.namelist(), f"reading {path}", "parts", print, len(z.namelist())):
                    z.read(part)
        options = dict(map_location="cpu", weights_only=True)  # plain types alone, and official files' command line
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, mmap=zipped, **options)
    except ImportError:
        raise UserError(f"{where}: reading this kind of file needs a package: pip install safetensors") from None
    except Exception as error:  # which one depends on where the damage is
        if isinstance(error, pickle.UnpicklingError) and (kind := re.search(r"GLOBAL (\S+)", str(error))):
            hint = "where you trust it, load it yourself and keep its weights alone: torch.save(content['model'], FILE)"
            raise UserError(f"{where}: refused, holds a {kind[1]}, which could run code; {hint}") from None
        if isinstance(error, (PermissionError, MemoryError)):
            raise UserError(f"{where}: {getattr(error, 'strerror', None) or 'does not fit into memory'}") from None
        if not os.path.exists(path):
            raise UserError(f"{where}: cannot be downloaded ({one_line(error)}); fetch it yourself") from None
        raise UserError(f"{flag}: damaged checkpoint {path}; {hint}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}, not a checkpoint")
    if not isinstance(form := content.get("format", FORMAT), int) or form != FORMAT:
        raise UserError(f"{where}: checkpoint format {one_line(form, 40)}, not {FORMAT}; use the version that wrote it")
    return content


def weights(checkpoint: dict, *, ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of any checkpoint, without wrappers' prefixes; ema: the averaged one, UserError without."""
    names = ("ema", "model_ema") if ema else ("model", "state_dict", "teacher")  # DINO's network
    state = next((checkpoint[n] for n in names if isinstance(checkpoint.get(n), dict)), None if ema else checkpoint)
    if state is None:
        raise UserError("--use-ema: this checkpoint holds no averaged weights")
    state = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    foreign, wrappers = "method" not in checkpoint, ({"module"}, {"_orig_mod"}, {"model"}, {"encoder"})
    while (first := {k.partition(".")[0] for k in state}) in wrappers or (foreign and "backbone" in first):
        wrapper = "backbone" if "backbone" in first else first.pop()  # what lies beside one served its training
        state = {k.partition(".")[2]: v for k, v in state.items() if k.partition(".")[0] == wrapper}
    return state


def recipe_of(content: dict) -> dict:
    """The fields of the recipe that a checkpoint of ours was trained by; {} of an official or bare one."""
    return content["recipe"] if isinstance(content.get("recipe"), dict) else {}


def classes_of(content: dict, named: bool = False) -> list[str]:
    """Names of a checkpoint's classes, else numbers (named: of 1000 ImageNet's names); [] without a classifier."""
    if isinstance(data := content.get("data"), dict) and isinstance(data.get("classes"), list):
        return data["classes"]
    heads = [v for k, v in weights(content).items() if k.startswith(HEADS) and k.endswith(".weight") and v.ndim > 1]
    one_each = len(heads) > 1 and all(len(v) == 1 for v in heads)  # a classifier of its own for every class
    count = len(heads) if one_each else len(heads[-1]) if heads else 0
    return ResNet50_Weights.DEFAULT.meta["categories"] if named and count == 1000 else [str(i) for i in range(count)]


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Strict load into a model of any precision; UserError with counts and examples if keys or shapes do not fit."""
    own = model.state_dict()
    differ = [k for k in own if k in state and state[k].shape != own[k].shape]
    kinds = {"keys missing": sorted(own.keys() - state.keys()), "keys not known": sorted(state.keys() - own.keys()),
             "shapes differ": [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in differ],
             "not of plain numbers": [k for k, v in state.items() if v.layout != torch.strided or v.is_complex()
                                      or getattr(v, "is_quantized", False)]}
    problems = [f"{len(found)} {kind}, e.g. {', '.join(found[:5])}" for kind, found in kinds.items() if found]
    if problems:
        raise UserError(f"{where}: does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state)


def fit(model: torch.nn.Module, content: dict, where: str, say: Callable, *, ema: bool = False,
        adapt: Callable | None = None, new_head: bool = False) -> None:
    """A checkpoint's weights (ema: its averaged ones) into the model; UserError, naming `where`, if they do not fit.
    adapt(model, state, content, say) fits the state dict first, in place; new_head: another one starts anew, as it does
    where the file has none; what else such a file holds (MAE's decoder) is left."""
    state = weights(content, ema=ema)
    narrow = {v.dtype for v in state.values()} & {torch.float16, torch.bfloat16}
    if narrow:
        say(f"weights in {', '.join(str(d).removeprefix('torch.') for d in narrow)} loaded into float32")
    if adapt is not None:
        adapt(model, state, content, say)
    own = model.state_dict()
    fresh = {k: v for k, v in own.items() if k.startswith(HEADS)}
    if new_head and fresh and not any(k.startswith(HEADS) for k in state):
        unused = sorted(state.keys() - own.keys())
        told = f"; {len(unused)} keys not used: {', '.join(unused[:5])}" if unused else ""
        say(f"new head: the checkpoint has none{told}")
        state = {k: v for k, v in state.items() if k in own} | fresh
    heads = [k for k in own if k in state and k.startswith(HEADS) and state[k].shape != own[k].shape]
    if heads:
        numbers = f"{len(state[heads[0]])} classes, the data {len(own[heads[0]])}"
        if not new_head:
            raise UserError(f"{where}: has {numbers}; evaluation needs the same")
        say(f"new head: the checkpoint has {numbers}")
        state.update({k: own[k] for k in heads})
    load_weights(model, state, where)


def of_run(run) -> dict:
    """The content of --weights (last.pt of --out without it); UserError if it is another model's."""
    args = run.args
    args.weights = args.weights or str(run.out / "last.pt")
    if args.weights.partition(":")[0] == "official":
        args.weights = official_address(run.method, args.weights, args.model, min(run.recipe.img_size))
    content = run.read(args.weights, "--weights")
    if isinstance(held := content.get("model_name"), str) and held != args.model:
        raise UserError(f"--weights {args.weights}: holds {content.get('method')} {held}, you asked for {args.model}")
    use_pixels(args, content)
    return content


def take_part(model: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str) -> list[str]:
    """Fits a state dict (one without `prefix`: the part alone, in torchvision's form) in place to a model that takes
    the part `prefix`, and of all else what has the same name and shape; returns the keys that start afresh."""
    if not any(k.startswith(prefix) for k in state):
        for key in list(state):
            state[prefix + key] = state.pop(key)
    own = model.state_dict()
    for key in [k for k in state if k not in own and (not k.startswith(prefix) or k.startswith(prefix + "fc."))]:
        del state[key]
    fresh = [k for k in own if not k.startswith(prefix) and (k not in state or state[k].shape != own[k].shape)]
    state.update({k: own[k] for k in fresh})
    return fresh


def plain(content):
    """`content` with dense tensors on the CPU in storage of their own; TypeError for what is neither that nor plain."""

    def leaf(value):
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            return value.clone() if value.untyped_storage().nbytes() != value.nbytes else value
        if value is None or type(value) in (bool, int, float, str, bytes):
            return value
        raise TypeError(f"a checkpoint may not hold a {type(value).__name__}: {value!r}")

    return tree_map(leaf, content)
