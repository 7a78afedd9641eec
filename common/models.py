"""Trained classifiers, whatever made them: a checkpoint of one of the scripts, or a model of torchvision's."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

from common import checkpoint
from common.cli import check_choice
from common.errors import UserError

METHODS = Path(__file__).resolve().parent.parent  # the scripts lie beside common/


def find_script(method: str, where: str):
    """The module of a method's script; UserError if it is not here."""
    if not method.isidentifier() or not (METHODS / f"{method}.py").is_file():
        raise UserError(f"{where}: needs {method}.py, which does not lie beside common/")
    return importlib.import_module(method)


def from_checkpoint(content: dict, where: str, img_size: tuple[int, int], say: Callable[[str], None], *, ema: bool = False) -> nn.Module:
    """The model that a script's checkpoint holds, for images of `img_size`; UserError if its script is not here. ema: with the
    averaged weights.

    A script offers Recipe, make_model(args, recipe, num_classes) and, if its weights depend on the resolution,
    fit_resolution(model, state, content, say).
    """
    method = content["method"]
    script = find_script(method, where)
    known = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in content["recipe"].items()}
    try:
        recipe = script.Recipe(**{**known, "img_size": tuple(img_size)})
    except TypeError as error:
        raise UserError(f"{where}: was written by another version of {method}.py ({error})") from None
    args = argparse.Namespace(model=content["model_name"], grad_checkpoint=False)
    model = script.make_model(args, recipe, len(content["data"]["classes"]))
    _load(script, model, checkpoint.weights(content, ema=ema), content, where, say)
    return model


def from_official(method: str, name: str, content: dict, where: str, img_size: tuple[int, int], say, *, ema: bool = False) -> nn.Module:
    """Model `name` of a script with weights that do not name it, such as the official files."""
    script = find_script(method, f"--model {method}/{name}")
    check_choice(f"--model {method}/", name, script.MODELS)
    state = checkpoint.weights(content, ema=ema)
    heads = [v for k, v in state.items() if k.startswith(checkpoint.HEADS) and k.endswith(".weight")]
    try:
        model = script.build_model(name, len(heads[-1]) if heads else 1000, img_size)
    except ValueError as error:
        raise UserError(f"--img-size: {error}") from None
    _load(script, model, state, content, where, say)
    return model


def _load(script, model: nn.Module, state: dict, content: dict, where: str, say: Callable[[str], None]) -> None:
    if hasattr(script, "fit_resolution"):
        script.fit_resolution(model, state, content, say)
    checkpoint.load_weights(model, state, where)


def fingerprint(model: nn.Module) -> str:
    """Of a model's structure and values: another one computes something else."""
    sha = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """build() without memory for its weights and without a draw of random numbers."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
            return build().to("meta")


def from_torchvision(name: str, content: dict | None, where: str, flag: str, *, headless: bool = False) -> nn.Module:
    """torchvision's classifier `name` with the weights of a file's `content`, or with torchvision's own, downloaded (None; `flag`
    is what a message names instead). headless: the file may lack the classifier, which is then a fresh one."""
    if content is None:
        try:
            return torchvision.models.get_model(name, weights="DEFAULT")
        except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: what came has another hash
            raise UserError(f"{name}: its weights cannot be downloaded ({error}); fetch them yourself and pass {flag} FILE") from None
    state = checkpoint.weights(content)
    head = [v for k, v in state.items() if k.startswith(checkpoint.HEADS) and k.endswith(".weight") and v.ndim > 1]
    if not head and not headless:
        raise UserError(f"{where}: holds neither a checkpoint of a script here nor weights of a torchvision classifier")
    model = torchvision.models.get_model(name, weights=None, num_classes=len(head[-1]) if head else 1000)
    if not head:
        state |= {k: v for k, v in model.state_dict().items() if k.startswith(checkpoint.HEADS)}
    checkpoint.load_weights(model, state, f"{where}, as {name}")
    return model


def classifier_inputs(model: nn.Module, where: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """images (B, 3, H, W) -> features (B, D) for other tasks: model.transfer_features(images) if it has that, else what its
    classifier is given; of several classifiers the inputs side by side. UserError if there is none of the usual kind."""
    if hasattr(type(model), "transfer_features"):
        return model.transfer_features
    heads = [getattr(model, name.removesuffix("."), None) for name in checkpoint.HEADS]
    heads = [[m for m in head.modules() if isinstance(m, nn.Linear)][-1:] for head in heads if isinstance(head, nn.Module)]
    found = [linear for head in heads for linear in head]
    if not found or any(linear.out_features == 1 for linear in found):
        raise UserError(f"{where}: has no linear classifier over one feature vector per image; choose another model")
    inputs: list[torch.Tensor] = []
    for linear in found:
        linear.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))

    def embed(images: torch.Tensor) -> torch.Tensor:
        inputs.clear()
        model(images)
        return torch.cat(inputs, dim=1)

    return embed


def load_teacher(name: str | None, file: str | None, default: str, img_size: tuple[int, int], say: Callable[[str], None]) -> Teacher:
    """The teacher of a distillation; UserError if it cannot be had or cannot take images of `img_size`.

    file: a checkpoint of one of the scripts, which names its own model, or weights of torchvision's classifier `name`
    (None: `default`), or None for torchvision's own weights of that classifier.
    """
    flag, classes = "--teacher-weights", None
    content = checkpoint.load(file, flag) if file else {}
    if isinstance(content.get("method"), str):
        if name is not None and content["model_name"] != f"torchvision/{name}":
            raise UserError(
                f"{flag} {file}: holds {content['method']} {content['model_name']}, you asked for --teacher {name}; leave it out"
            )
        model = from_checkpoint(content, f"{flag} {file}", img_size, lambda line: say(f"teacher: {line}"))
        name, classes = f"{content['method']} {content['model_name']}", content["data"]["classes"]
    else:
        name = name or default
        model = from_torchvision(name, content if file else None, f"{flag} {file}", flag)
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            logits = model(torch.zeros(1, 3, *img_size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"teacher {name}: cannot take images of {img_size[0]}x{img_size[1]} ({' '.join(str(error).split())[:120]});"
            " choose another teacher or --img-size"
        ) from None
    return Teacher(name, model, classes, logits.shape[1])


class Teacher:
    """A trained classifier in eval mode and without gradient: images (B, 3, H, W) -> logits (B, K).

    identity names model and weights; num_classes is K, classes their names where the checkpoint tells them.
    """

    def __init__(self, name: str, model: nn.Module, classes: list[str] | None, num_classes: int):
        self.model, self.classes, self.num_classes = model, classes, num_classes
        crc = 0
        for tensor in model.state_dict().values():
            crc = zlib.crc32(tensor.numpy().tobytes(), crc)
        self.identity = f"{name} {crc:08x}"

    def check(self, classes: list[str]) -> None:
        """UserError unless the teacher's classes are the data's."""
        if self.num_classes != len(classes):
            raise UserError(
                f"teacher {self.identity}: has {self.num_classes} classes, the data {len(classes)}; train one on these data"
                " (--model torchvision/NAME) and pass its checkpoint as --teacher-weights"
            )
        if self.classes is not None and self.classes != classes:
            wrong = next(i for i, (a, b) in enumerate(zip(self.classes, classes)) if a != b)
            raise UserError(f"teacher {self.identity}: its class {wrong} is {self.classes[wrong]!r}, the data's is {classes[wrong]!r}")

    def to(self, device: torch.device) -> Teacher:
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)
