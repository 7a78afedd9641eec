"""Trained classifiers, whatever made them: a checkpoint of one of the scripts, or a model of torchvision's."""

import argparse
import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn

from common import checkpoint, evaluate
from common.cli import built, check_choice
from common.errors import UserError, one_line
from common.images import PIXELS, eval_transform, from_pil, pixels_note, pixels_of
from common.run import Run


def from_checkpoint(content: dict, where: str, img_size: tuple[int, int], say: Callable, *, name: str | None = None,
                    ema: bool = False, headless: bool = False, classes: int = 0) -> nn.Module:
    """The model of a script's checkpoint (ema: its averaged weights), or SCRIPT/MODEL `name` with weights that do not
    name it (official ones; {}: fresh, for so many classes), for `img_size`; headless: a file without the classifier
    gets a new one. Some scripts have options_of, for their recipe, and fit_resolution."""
    method, _, model_name = (name or f"{content['method']}/{content['model_name']}").partition("/")
    if not method.isidentifier() or not Path(__file__).parents[1].joinpath(f"{method}.py").is_file():
        raise UserError(f"{f'--model {name}' if name else where}: needs {method}.py, which is not beside common/")
    script, recipe = importlib.import_module(method), checkpoint.recipe_of(content)
    if name:  # as its own command line builds it
        check_choice(f"--model {method}/", model_name, script.MODELS)
        recipe = vars(script.parse_args(["--model", model_name, "--data", "shapes"])[1])
        recipe |= script.options_of(checkpoint.weights(content)) if hasattr(script, "options_of") else {}
    try:
        recipe = script.Recipe(**{**recipe, "img_size": tuple(img_size)})
    except TypeError as error:
        raise UserError(f"{where}: was written by another version of {method}.py ({error})") from None
    args, adapt = argparse.Namespace(model=model_name, grad_checkpoint=False), getattr(script, "fit_resolution", None)
    model = built(script.make_model, args, recipe, classes or len(checkpoint.classes_of(content)) or 1000)
    if content:
        checkpoint.fit(model, content, where, say, ema=ema, adapt=adapt, new_head=headless)
    return model


def load(method: str, source: str, device: str = "cpu") -> tuple[nn.Module, list[str], Callable]:
    """What every script's load_model returns, for a path, an address or "official:NAME". Of official files: ImageNet's
    own class names for the numbers, the crop of the script's default recipe. UserError for what cannot be had."""
    address = checkpoint.official_address(method, source) if source.startswith("official:") else source
    content, where = checkpoint.load(address, "load_model"), f"load_model {source}"
    if "method" not in content:
        if (row := checkpoint.OFFICIAL.get(method, {}).get(Path(address).stem)) is None:
            raise UserError(f"{where}: does not say which model it holds; official files keep their names")
        content |= {"method": method, "model_name": row[0], "recipe": {"img_size": (row[1],) * 2, **dict(*row[3:])}}
    recipe = vars(importlib.import_module(method).Recipe()) | content["recipe"]
    classes, size, ratio = checkpoint.classes_of(content, named=True), recipe["img_size"], recipe["eval_crop_ratio"]
    model = from_checkpoint(content, where, size, print).to(device).eval()

    def transform(image: Image.Image | str | Path) -> torch.Tensor:
        pixels = from_pil(image.convert("RGB")) if hasattr(image, "convert") else evaluate.read_file(image, "transform")
        return evaluate.normalize(eval_transform(pixels, size, ratio)[None], pixels_of(content))[0]

    return model, classes, transform


def export(run: Run, make_model: Callable, adapt: Callable | None) -> None:
    """--export FILE.pt2 (torch.export) or FILE.onnx: --weights as a program, normalised images (B, 3, H, W) of any
    number B, of the recipe's size or --img-size, to what the network answers."""
    file, batch = Path(run.args.export), ({0: torch.export.Dim.DYNAMIC},)
    if file.suffix not in (".onnx", ".pt2"):
        raise UserError(f"--export {file}: its name must end in .onnx or .pt2")
    model, recipe, _ = evaluate.trained_model(run, make_model, adapt)
    images = torch.zeros(2, 3, *recipe.img_size, device=run.device)
    program = torch.export.export(model, (images,), dynamic_shapes=batch, strict=False).run_decompositions({})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".pt2":
            torch.export.save(program, file)
        else:
            large = sum(p.nbytes for p in model.parameters()) > 2**31 - 2**20  # too large for one file
            torch.onnx.export(program, f=file, dynamo=True, external_data=large, verbose=False)
    except (ImportError, OSError, RuntimeError) as error:
        hint = "; pip install onnx onnxscript" if isinstance(error, ImportError) else ""
        raise UserError(f"--export {file}: cannot be written ({one_line(error.__cause__ or error)}{hint})") from None
    taken = f"images (batch, 3, {images.shape[2]}, {images.shape[3]}), normalised"
    run.say(f"wrote {file}: {taken}{pixels_note() or ' as by load_model'}")


def fingerprint(model: nn.Module) -> str:
    """Of a model's structure and values: another one computes something else."""
    sha = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        sha.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
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
    """torchvision's classifier `name` with the weights of a file's `content`, or with torchvision's own, downloaded
    (None; `flag` is what a message names then). headless: a file without the classifier gets a fresh one."""
    if content is None:
        try:
            return torchvision.models.get_model(name, weights="DEFAULT")
        except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: what came has another hash
            raise UserError(f"{name}: its weights cannot be downloaded ({error}); pass {flag} FILE") from None
    state, classes = checkpoint.weights(content), len(checkpoint.classes_of(content))
    if not classes and not headless:
        raise UserError(f"{where}: holds neither a checkpoint of a script here nor weights of a torchvision classifier")
    model = torchvision.models.get_model(name, weights=None, num_classes=classes or 1000)
    if not classes:
        state |= {k: v for k, v in model.state_dict().items() if k.startswith(checkpoint.HEADS)}
    checkpoint.load_weights(model, state, f"{where}, as {name}")
    return model


def load_teacher(args, content, default: str, size: tuple[int, int], classes: list[str], say: Callable) -> nn.Module:
    """A trained classifier in eval mode, without gradient: --teacher-weights, of this content (None: not given), or
    torchvision's --teacher (else `default`) with its weights or its own; its attribute identity names model, weights.
    UserError, before a download, unless it tells `classes` apart; if it cannot be had or take images of `size`."""
    name, where = args.teacher or default, f"--teacher-weights {args.teacher_weights}"
    if ours := content is not None and isinstance(content.get("method"), str):
        name = f"{content['method']} {content['model_name']}"
        if args.teacher and content["model_name"] != f"torchvision/{args.teacher}":
            raise UserError(f"{where}: holds {name}, you asked for --teacher {args.teacher}; leave it out")
    downloaded = content is None and torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
    known = downloaded or checkpoint.classes_of(content)
    if len(known) not in (0, len(classes)):
        counts = f"has {len(known)} classes, the data {len(classes)}"
        raise UserError(f"teacher {name}: {counts}; give --teacher-weights of a classifier of these")
    for number, (own, wanted) in enumerate(zip(known if ours else [], classes)):
        if own != wanted:
            raise UserError(f"teacher {name}: its class {number} is {own!r}, the data's is {wanted!r}")
    if ours:
        model = from_checkpoint(content, where, size, lambda line: say(f"teacher: {line}"))
    else:
        model = from_torchvision(name, content, where, "--teacher-weights")
    try:
        model.eval().requires_grad_(False)(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        why = f"cannot take images of --img-size {size[0]}x{size[1]} ({one_line(error)})"
        raise UserError(f"teacher {name}: {why}") from None
    model.identity = f"{name} {fingerprint(model)[:8]}"
    own = pixels_of(content or {})  # what it was trained with; images come normalised for the student
    model.register_forward_pre_hook(lambda _, inputs: None if own == PIXELS else
                                    evaluate.normalize(evaluate.denormalize(inputs[0]), own))
    return model
