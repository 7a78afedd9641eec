"""The command line every script shares: run flags by hand, one flag per Recipe field, errors in one line."""

import argparse
import dataclasses
import difflib
import os
import typing

import torch
import torchvision

from common.errors import UserError, one_line


class Parser(argparse.ArgumentParser):
    """argparse that never abbreviates, and answers a wrong flag with the nearest ones and exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--debug", action="store_true", help="show tracebacks of expected errors")

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            if flag in ("--local-rank", "--local_rank"):
                self.error(f"{flag} comes from the old torch.distributed.launch; start with torchrun instead")
            near = difflib.get_close_matches(flag, self._option_string_actions, n=3, cutoff=0.4)
            self.error(f"unknown flag {flag}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help"))
        for name, value in vars(found).items():
            if "" in (value if isinstance(value, list) else [value]):
                self.error(f"--{name.replace('_', '-')}: is empty")
            if name in RUN_RULES:
                check_rule(name, value, RUN_RULES[name])
        return found

    def error(self, message: str):
        raise UserError(message)


def make_parser(method: str, doc: str, recipe_class: type, recipes, *, model: str, recipe: str,
                teacher: str | None = None, grad_checkpoint: bool = False) -> Parser:
    """The flags of every script: model and recipe (with these defaults), what a run needs, one flag per recipe field.
    teacher: the default one (None: the method does not distill); grad_checkpoint: models can recompute activations."""
    parser = Parser(prog=f"{method}.py", description=doc.split("\n\nChecked")[0])
    flag = parser.add_argument
    flag("--model", default=model, metavar="NAME", help=f"see --list-models; default: {model}")
    flag("--recipe", metavar="NAME", help=f"{', '.join(recipes)}; default: {recipe}, or shapes without data")
    parser.paper = recipe
    flag("--list-models", action="store_true", help="print the models and stop")
    flag("--show-batch", metavar="FILE", help="write what the network is fed as FILE.png (or .jpg) and stop")
    flag("--benchmark", action="store_true", help="measure images/s and peak memory of training and inference and stop")
    if teacher:
        flag("--teacher", metavar="NAME", help=f"a classifier of torchvision's; default: {teacher}, as in the thesis")
        weights = "of that classifier, or a checkpoint of any script here; default: torchvision's weights"
        flag("--teacher-weights", metavar="FILE", help=weights)
    if grad_checkpoint:
        memory = "recompute activations in the backward pass: less memory for one more forward pass"
        flag("--grad-checkpoint", action="store_true", default=None, help=memory)
    _add_run_flags(parser)
    _add_recipe_flags(parser, recipe_class)
    return parser


def add_network_flags(flag) -> None:
    """Of every command that feeds a network images."""
    flag("--use-ema", action="store_true", help="evaluate, or start from, the averaged weights of --weights")
    flag("--workers", type=int, metavar="N", help="loader processes per rank; default: its cores, at most 16")
    flag("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    text = "of pixels in 0..1, that images are normalised by; default: as --weights of ours, else ImageNet's"
    for name, what in (("--mean", "mean"), ("--std", "deviation")):
        flag(name, nargs=3, type=float, metavar=tuple("RGB"), help=f"{what} {text}")


def _add_run_flags(parser: Parser) -> None:
    flag = parser.add_argument_group("data").add_argument
    flag("--data", metavar="DATA", help="FOLDER, FILE.tar, NAME:FOLDER, shapes: README; default: $IMAGENET, shapes")
    flag("--val-data", metavar="PATH", help="validation images not in --data: folder or tar; none: train without")
    flag("--coarse-labels", metavar="FILE", help="JSON, class name to coarse class; trained on by --data DATA@coarse")
    flag = parser.add_argument_group("run").add_argument
    add_network_flags(flag)
    flag("--out", metavar="FOLDER", help="checkpoints and log go here; default: runs/METHOD_MODEL")
    flag("--resume", nargs="?", const="auto", metavar="FILE", help="checkpoint to go on from; no FILE: --out's newest")
    flag("--allow-changes", action="store_true", help="let --resume go on though recipe or data differ")
    flag("--weights", metavar="FILE", help="start from these weights (ours or official ones), with a fresh optimizer")
    flag("--save-steps", type=int, default=0, metavar="N", help="write last.pt every N steps and at epochs' ends")
    flag("--seed", type=int, default=0, metavar="N", help="of weights, order, augmentation and mixing; default: 0")
    flag("--amp", choices=("bf16", "fp16", "fp32"), help="precision; default: fp32, but bf16 to train on CUDA")
    flag("--micro-batch", type=int, metavar="N", help="images per rank and forward pass; default: at most 256")
    flag("--compile", action="store_true", help="torch.compile the model")
    flag("--timeout", type=int, default=600, metavar="S", help="seconds ranks wait for each other; default: 600")
    flag("--tensorboard", action="store_true", help="also write TensorBoard events to --out")
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--eval", action="store_true", help="evaluate --weights (or last.pt of --out) on --data instead of training")
    flag("--eval-data", nargs="+", metavar="PATH", help="evaluate on these folders or tars (ImageNet-V2, ...) too")
    flag("--real-labels", metavar="FILE", help="ImageNet-Real's real.json: also report accuracy against these labels")
    flag("--predict", nargs="+", metavar="PATH", help="print the classes of these images or folders by --weights")
    flag("--export", metavar="FILE", help="write --weights as a program for any batch: FILE.onnx or FILE.pt2")
    flag("--top", type=int, default=5, metavar="N", help="of --predict: how many classes; default: 5")


def _add_recipe_flags(parser: Parser, recipe_class: type) -> None:
    """One flag per field of the Recipe dataclass, Annotated[type, help] or [type, help, rule of check_rule]."""
    group = parser.add_argument_group("recipe (unset: that of --recipe, in brackets the default recipe's)")
    for name, hint in typing.get_type_hints(recipe_class, include_extras=True).items():
        kind, text = typing.get_args(hint)[:2]
        flag, default = "--" + name.replace("_", "-"), getattr(recipe_class, name)
        shown = "x".join(map(str, default)) if isinstance(default, tuple) else default
        group.add_argument(flag, type=converter(kind), metavar="X", help=f"{text} [{shown}]".replace("%", "%%"))


def converter(kind):
    """str -> value of the annotated type; a size is "224" or "224x160", None is "none": ... here, None: not given."""
    options = [o for o in typing.get_args(kind) or (kind,) if o is not type(None)]

    def convert(text: str):
        if type(None) in typing.get_args(kind) and text.lower() == "none":
            return ...
        if kind == tuple[int, int]:
            height, width = map(int, text.split("x") * (1 if "x" in text else 2))
            return height, width
        return bool(("false", "true").index(text.lower())) if kind is bool else options[0](text)

    convert.__name__ = "size" if kind == tuple[int, int] else getattr(kind, "__name__", "number")
    return convert


def parse(parser: Parser, argv: list[str] | None, models, recipes) -> argparse.Namespace:
    """The arguments; UserError unless model and recipe are known (torchvision/NAME: one there; SCRIPT/NAME: later)."""
    args = parser.parse_args(argv)
    if args.model.startswith("torchvision/") and "torchvision/NAME" in models:
        check_torchvision("--model torchvision/", args.model.removeprefix("torchvision/"))
    elif "/" not in args.model or "SCRIPT/NAME" not in models:
        check_choice("--model", args.model, models)
    each = "eval,eval_data predict export benchmark show_batch list_models retrieve filters attention_maps,branch_norms"
    given = [[n for n in names.split(",") if vars(args).get(n)] for names in each.split()]
    if len(asked := [f"--{names[0].replace('_', '-')}" for names in given if names]) > 1:
        raise UserError(f"{' and '.join(asked)}: ask for one at a time")
    others = args.eval_data or args.predict or args.benchmark or args.list_models or args.export
    if args.data is None and not others and args.recipe != "shapes" and os.environ.get("IMAGENET"):
        args.data, args.note = os.environ["IMAGENET"], "no --data: took $IMAGENET"
    elif args.data is None and not others:
        args.data, args.recipe = "shapes", args.recipe or "shapes"
        args.note = "no --data: the built-in data set shapes; the paper's run takes --data /imagenet (or $IMAGENET)"
    args.fallback = recipes["own"] if args.weights and args.recipe is None and not (others or args.eval) else None
    args.recipe = args.recipe or parser.paper
    check_choice("--recipe", args.recipe, recipes)
    return args


def override(paper, args: argparse.Namespace):
    """The paper's recipe with the flags that were given; UserError for values that cannot be. One rule for all methods:
    without --lr every rate that is not given changes in proportion to the batch size; a constant one stays constant."""
    given = {k: None if v is ... else v for k, v in vars(args).items() if v is not None and k in vars(paper)}
    if args.lr is None:
        share = given.get("batch_size", paper.batch_size) / paper.batch_size
        given = {k: v * share for k, v in vars(paper).items() if k in ("lr", "min_lr", "warmup_lr")} | given
    elif paper.min_lr == paper.lr:
        given = {"min_lr": args.lr} | given
    recipe = dataclasses.replace(paper, **given)
    for name, hint in typing.get_type_hints(type(recipe), include_extras=True).items():
        for rule in typing.get_args(hint)[2:]:
            check_rule(name, getattr(recipe, name), rule)
    if (warmup := recipe.warmup_epochs) >= recipe.epochs and not getattr(args, "fallback", None):  # else fit_own asks
        raise UserError(f"--warmup-epochs {warmup}: must be less than --epochs {recipe.epochs}; or --recipe own")
    for flag, low in (("--min-lr", recipe.min_lr), ("--warmup-lr", recipe.warmup_lr)):
        if low > recipe.lr:
            raise UserError(f"--lr {recipe.lr}: is below {flag} {low}, the rate would rise; lower {flag} too")
    if getattr(recipe, "distillation", None) == "none":
        refuse(args, ("teacher", "teacher_weights"), "has no effect without a teacher; add --distillation hard")
    elif getattr(args, "teacher", None) is not None:
        check_torchvision("--teacher", args.teacher)
    return recipe


def differences(recipe, paper, whose: str = "paper") -> list[str]:
    """["batch_size 1024 (paper: 2048)", ...]"""
    return [f"{k} {v} ({whose}: {getattr(paper, k)})" for k, v in vars(recipe).items() if v != getattr(paper, k)]


RULES = {  # in a Recipe field's annotation: which numbers it may have
    "2 or more": lambda v: 2 <= v <= 10**9,  # who gives a larger number has mistyped it
    "1 or more": lambda v: 1 <= v <= 10**9,
    "0 or more": lambda v: 0 <= v <= 10**9,
    "above 0": lambda v: 0 < v <= 10**9,
    "0 or more, at most 1024": lambda v: 0 <= v <= 1024,
    "in [0, 1)": lambda v: 0 <= v < 1,
    "in [0, 1]": lambda v: 0 <= v <= 1,
    "in (0, 1]": lambda v: 0 < v <= 1,
    "in [0.05, 1]": lambda v: 0.05 <= v <= 1,
}
RUN_RULES = {"workers": "0 or more, at most 1024", "save_steps": "0 or more", "seed": "0 or more",
             "micro_batch": "1 or more", "timeout": "1 or more", "top": "1 or more", "mean": "in [0, 1]",
             "seeds": "1 or more", "img_size": "1 or more", "eval_crop_ratio": "in (0, 1]", "std": "in (0, 1]"}


def check_rule(name: str, value, rule: str | tuple) -> None:
    """UserError unless a flag's value (None: not given; of several all) is in `rule` or obeys a key of RULES."""
    flag, values = f"--{name.replace('_', '-')}", value if isinstance(value, tuple | list) else (value,)
    if isinstance(rule, tuple):
        check_choice(flag, value, rule)
    elif value is not None and not all(map(RULES[rule], values)):
        raise UserError(f"{flag} {value}: must be {rule}{' and at most 10^9' * (max(values) > 10**9)}")


def built(make_model, args: argparse.Namespace, recipe, num_classes: int):
    """make_model(args, recipe, num_classes); a size or an option that does not fit its model is the user's mistake."""
    try:
        model = make_model(args, recipe, num_classes)
        if "/" in args.model and not hasattr(args, "task"):  # others, which tell when used; on meta: training
            device = next(model.parameters()).device
            with torch.no_grad():
                answer = model.train(device.type == "meta")(torch.zeros(2, 3, *recipe.img_size, device=device))
            if not isinstance(answer, torch.Tensor):
                raise ValueError("it has auxiliary outputs, which are not trained here")
        return model
    except NotImplementedError:  # on the meta device: see models.on_meta
        raise
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"--model {args.model} (--img-size, ...): {one_line(error, 300)}") from None


def refuse(args: argparse.Namespace, flags: tuple[str, ...], why: str) -> None:
    """UserError for the first of `flags` that was given: it would have no effect."""
    for flag in flags:
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')}: {why}")


def check_choice(flag: str, value: str, choices) -> None:
    """UserError with the nearest names and the full list, unless value is one of choices."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{flag} {value}: unknown; {hint}all: {', '.join(choices)}")


def check_torchvision(flag: str, name: str) -> None:
    """UserError unless torchvision has a classifier of that name."""
    check_choice(flag, name, torchvision.models.list_models(torchvision.models))
