"""The command line every script shares: run flags by hand, one flag per Recipe field, errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import typing

import torchvision

from common.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse that never abbreviates, and answers a wrong flag with the nearest ones and exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            if flag in ("--local-rank", "--local_rank"):
                self.error(f"{flag} comes from the old torch.distributed.launch; start with torchrun instead")
            near = difflib.get_close_matches(flag, self._option_string_actions, n=3, cutoff=0.4)
            self.error(f"unknown flag {flag}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help"))
        return found

    def error(self, message: str):
        raise UserError(message)


def make_parser(method: str, doc: str, recipe_class: type, recipes, *, model: str, recipe: str) -> Parser:
    """The flags of every script: model and recipe (with these defaults), what a run needs, one flag per recipe field."""
    parser = Parser(prog=f"{method}.py", description=doc.split("\n\nChecked")[0])
    parser.add_argument("--model", default=model, metavar="NAME", help=f"see --list-models; default: {model}")
    parser.add_argument("--recipe", default=recipe, metavar="NAME", help=f"{', '.join(recipes)}; default: {recipe}")
    parser.add_argument("--list-models", action="store_true", help="print the models and stop")
    parser.add_argument("--show-batch", metavar="FILE", help="write what the network is fed as a PNG and stop")
    parser.add_argument("--benchmark", action="store_true", help="measure images/s and peak memory of training and inference and stop")
    _add_run_flags(parser)
    _add_recipe_flags(parser, recipe_class)
    return parser


def add_teacher_flags(parser: Parser, default: str) -> None:
    parser.add_argument("--teacher", metavar="NAME", help=f"a classifier of torchvision's; default: {default}, as in the thesis")
    parser.add_argument(
        "--teacher-weights", metavar="FILE", help="of that classifier, or a checkpoint of any script here; default: torchvision's weights"
    )


def _add_run_flags(parser: Parser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DATA", help="shapes, FOLDER, FILE.tar or NAME:FOLDER (see common/sources.py); default: shapes")
    data.add_argument(
        "--val-data", metavar="PATH", help="validation images, if not in --data: folder or tar of class folders; none: train without"
    )
    data.add_argument("--coarse-labels", metavar="FILE", help="JSON, class name to coarse class; then --data DATA@coarse trains on those")
    data.add_argument(
        "--workers", type=int, metavar="N", help="loader processes per rank; default: the cores shared among the ranks, at most 16"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="FOLDER", help="checkpoints and log go here; default: runs/METHOD_MODEL")
    run.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="go on from a checkpoint; auto (or no value): the newest good one in --out, if any",
    )
    run.add_argument("--allow-changes", action="store_true", help="let --resume go on although recipe or data differ from the checkpoint's")
    run.add_argument("--weights", metavar="FILE", help="start from these weights (ours or the official ones), with a fresh optimizer")
    run.add_argument("--save-steps", type=int, default=0, metavar="N", help="write last.pt every N steps too, besides at every epoch's end")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order, augmentation and mixing; default: 0")
    run.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    run.add_argument(
        "--amp", choices=("bf16", "fp16", "fp32"), help="precision of forward and backward; default: bf16 on CUDA, fp32 on the CPU"
    )
    run.add_argument(
        "--micro-batch", type=int, metavar="N", help="images per rank and forward pass; default: as many as --batch-size gives, at most 256"
    )
    run.add_argument("--compile", action="store_true", help="torch.compile the model")
    run.add_argument(
        "--timeout", type=int, default=600, metavar="SECONDS", help="how long ranks wait for each other before the run stops; default: 600"
    )
    run.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events to --out")
    run.add_argument("--debug", action="store_true", help="show tracebacks of expected errors")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--eval", action="store_true", help="evaluate --weights (or last.pt of --out) on --data instead of training")
    evaluation.add_argument(
        "--eval-data", nargs="+", metavar="PATH", help="evaluate on these folders or tars of class folders (ImageNet-V2, ...) too"
    )
    evaluation.add_argument("--real-labels", metavar="FILE", help="ImageNet-Real's real.json: also report accuracy against these labels")
    evaluation.add_argument("--use-ema", action="store_true", help="evaluate, or start from, the averaged weights of --weights")


def _add_recipe_flags(parser: Parser, recipe_class: type) -> None:
    """One flag per field of the Recipe dataclass, each Annotated[type, help] or Annotated[type, help, choices]."""
    group = parser.add_argument_group("recipe (unset: the paper's value)")
    for name, hint in typing.get_type_hints(recipe_class, include_extras=True).items():
        kind, help_text = typing.get_args(hint)[:2]
        group.add_argument("--" + name.replace("_", "-"), type=converter(kind), metavar="X", help=help_text.replace("%", "%%"))


def converter(kind):
    """str -> value of the annotated type; None is written "none", a size "224" or "224x160"."""
    options = typing.get_args(kind) or (kind,)

    def convert(text: str):
        if type(None) in options and text.lower() == "none":
            return None
        if kind == tuple[int, int]:
            sides = [int(s) for s in text.split("x")]
            if len(sides) not in (1, 2):
                raise ValueError
            return (sides[0], sides[-1])
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return next(o for o in options if o is not type(None))(text)

    convert.__name__ = "size" if kind == tuple[int, int] else getattr(kind, "__name__", "number")
    return convert


def override(recipe, args: argparse.Namespace):
    """The recipe with the flags that were given."""
    fields = [f.name for f in dataclasses.fields(recipe)]
    return dataclasses.replace(recipe, **{f: getattr(args, f) for f in fields if getattr(args, f) is not None})


def differences(recipe, paper) -> list[str]:
    """["batch_size 1024 (paper: 2048)", ...]"""
    pairs = [(f.name, getattr(recipe, f.name), getattr(paper, f.name)) for f in dataclasses.fields(recipe)]
    return [f"{name} {mine} (paper: {theirs})" for name, mine, theirs in pairs if mine != theirs]


# field: (allowed, in words); fields a recipe does not have are skipped
RANGES = {
    "epochs": (lambda v: v >= 1, "1 or more"),
    "batch_size": (lambda v: v >= 1, "1 or more"),
    "mix_group": (lambda v: v >= 1, "1 or more"),
    "lr": (lambda v: 0 < v < math.inf, "above 0"),
    "min_lr": (lambda v: 0 <= v < math.inf, "0 or more"),
    "warmup_lr": (lambda v: 0 <= v < math.inf, "0 or more"),
    "weight_decay": (lambda v: 0 <= v < math.inf, "0 or more"),
    "warmup_epochs": (lambda v: 0 <= v, "0 or more, and less than --epochs"),
    "drop_path": (lambda v: v is None or 0 <= v < 1, "in [0, 1)"),
    "smoothing": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "mixup": (lambda v: 0 <= v < math.inf, "0 (off) or more"),
    "cutmix": (lambda v: 0 <= v < math.inf, "0 (off) or more"),
    "repeats": (lambda v: v >= 1, "1 or more"),
    "clip_grad": (lambda v: v is None or 0 < v < math.inf, "none or above 0"),
    "color_jitter": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "layer_scale": (lambda v: v is None or 0 <= v < math.inf, "none, or 0 or more"),
    "ema": (lambda v: 0 <= v < 1, "0 (off), or below 1"),
    "dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "erasing": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "alpha": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "memory_size": (lambda v: v >= 0, "0 (none) or more"),
    "hidden_layers": (lambda v: v >= 0, "0 or more"),
    "local_crops": (lambda v: v >= 0, "0 (none) or more"),
    "local_size": (lambda v: min(v) >= 1, "1 or more"),
    "global_scale": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "local_scale": (lambda v: 0.05 <= v <= 1, "in [0.05, 1]"),
    "temperature": (lambda v: 0 < v < math.inf, "above 0"),
    "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "views": (lambda v: v >= 2, "2 or more"),
    "sigma": (lambda v: 0 < v < math.inf, "above 0"),
    "instance_weight": (lambda v: 0 <= v < math.inf, "0 or more"),
    "target_decay": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "proj_dim": (lambda v: v >= 1, "1 or more"),
    "tau": (lambda v: 0 < v < math.inf, "above 0"),
    "eval_crop_ratio": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "img_size": (lambda v: min(v) >= 1, "1 or more"),
}


def check_recipe(recipe) -> None:
    """UserError naming the first flag whose value is out of range, not among its choices, or does not go with another one."""
    for name, hint in typing.get_type_hints(type(recipe), include_extras=True).items():
        choices = typing.get_args(hint)[2:]
        if choices:
            check_choice(f"--{name.replace('_', '-')}", getattr(recipe, name), choices[0])
    for name, (allowed, words) in RANGES.items():
        if hasattr(recipe, name) and not allowed(getattr(recipe, name)):
            raise UserError(f"--{name.replace('_', '-')} {getattr(recipe, name)}: must be {words}")
    if recipe.warmup_epochs >= recipe.epochs:
        raise UserError(f"--warmup-epochs {recipe.warmup_epochs}: must be less than --epochs {recipe.epochs}")
    if recipe.min_lr > recipe.lr or recipe.warmup_lr > recipe.lr:
        low = "min-lr" if recipe.min_lr > recipe.lr else "warmup-lr"
        raise UserError(
            f"--lr {recipe.lr}: is below --{low} {getattr(recipe, low.replace('-', '_'))}, the rate would rise; lower --{low} too"
        )


def check_names(args: argparse.Namespace, models, recipes) -> None:
    """UserError unless --model is one of `models` or torchvision/NAME, and --recipe one of `recipes`; completes --data."""
    if args.model.startswith("torchvision/"):
        check_choice("--model torchvision/", args.model.removeprefix("torchvision/"), torchvision.models.list_models(torchvision.models))
    else:
        check_choice("--model", args.model, [*models, "torchvision/NAME"])
    check_choice("--recipe", args.recipe, recipes)
    if args.data is None and not args.eval_data:
        args.data = "shapes"


def refuse(args: argparse.Namespace, flags: tuple[str, ...], why: str) -> None:
    """UserError for the first of `flags` that was given: it would have no effect."""
    for flag in flags:
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')}: {why}")


def check_teacher(args: argparse.Namespace, distillation: str) -> None:
    """UserError for an unknown --teacher, or for its flags where there is no distillation."""
    if distillation == "none":
        refuse(args, ("teacher", "teacher_weights"), "has no effect without a teacher; add --distillation hard")
    elif args.teacher is not None:
        check_choice("--teacher", args.teacher, torchvision.models.list_models(torchvision.models))


def check_choice(flag: str, value: str, choices) -> None:
    """UserError with the nearest names and the full list, unless value is one of choices."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{flag} {value}: unknown; {hint}all: {', '.join(choices)}")
