"""What every script does around its loop: what it is asked to do, and all that comes before the first step."""

import dataclasses
import functools
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from common import checkpoint, report
from common.cli import built, override
from common.data import TrainingData
from common.errors import UserError
from common.evaluate import Predict, evaluate_weights, logits_of, predict_images
from common.models import export, load_teacher, on_meta
from common.optim import EMA, make_optimizer
from common.precision import Precision
from common.run import Run
from common.run import launch as launch  # scripts take it from here: whatever is missing shows when they start
from common.sources import class_folders, open_data


def run_script(
    method: str, args, recipe, paper, models: dict, *, train: Callable[[Run], None], make_model: Callable,
    loss: Callable, adapt: Callable | None = None, predict: Predict = logits_of,
) -> None:
    """What the command line asks for: --list-models, --eval, --benchmark (of loss(model, images, labels)) or
    train(run). make_model(args, recipe, num_classes) builds a model; adapt, predict: see fit, evaluate."""
    if args.list_models:
        width, script = max(map(len, models)) + 1, importlib.import_module(method)
        for name, config in models.items():
            model = on_meta(lambda name=name: script.build_model(name, num_classes=1000))  # as in the paper
            row = config if isinstance(config, dict) else {"features": config}
            sizes = "  ".join(f"{k} {v}" for k, v in row.items())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            print(f"{name:{width}s} {trained / 1e6:7.2f} M parameters  {sizes}")
        return
    run = Run(method, args, recipe, paper)
    if args.eval or args.eval_data:
        evaluate_weights(run, make_model, adapt, predict)
    elif args.export:
        export(run, make_model, adapt)
    elif args.predict:
        predict_images(run, make_model, adapt, predict)
    elif args.benchmark:
        report.benchmark(run, lambda: built(make_model, args, recipe, 1000), loss)
    else:
        trained = args.recipe.startswith(("finetune", "transfer", "in21k_to", "own"))
        kept = args.resume != "auto" or any((run.out / file).exists() for file in ("last.pt", "previous.pt"))
        if trained and not (args.weights or args.resume and kept or args.show_batch):
            raise UserError(f"--recipe {args.recipe}: starts from a trained network; give --weights FILE")
        if args.recipe == "own" or args.fallback:
            fit_own(run)
        train(run)


def fit_own(run: Run) -> None:
    """Fits the recipe `own` to the N training images, where no flag says otherwise: N / 8 images a step (16 to 256, a
    power of two per rank), epochs for 1,000 steps (at most 300, at least the recipe's), a twentieth of them warm-up.
    Rates, given for 256 images, follow the batch's root, SGD's also that of 1,000 to 16,000 steps. Of no paper: README.
    Weights without --recipe (args.fallback is `own` then) keep the paper's recipe if it has ten steps an epoch here."""
    args, fallback = run.args, run.args.fallback
    options = dict(splits=("train",), coarse_labels=args.coarse_labels, say=lambda line: None)
    images, args.fallback = len(run.first(lambda: open_data(args.data, **options))["train"]), None
    if fallback and images < 10 * run.recipe.batch_size:
        run.say(f"--recipe own: {images} images are under ten steps an epoch of the paper's, --recipe {args.recipe}")
        args.recipe, run.paper = "own", fallback
    if args.recipe == "own":
        share = min(max(16, images // 8), images, 256) // run.world
        fitted = 2 ** max(1, share.bit_length() - 1) * run.world
        batch, paper = args.batch_size or fitted, run.paper
        epochs = args.epochs or max(paper.epochs, min(300, 1000 * batch // images))
        more = min(16, max(1, epochs * images / batch / 1000)) if paper.optimizer in ("sgd", "nesterov") else 1
        changes = {k: getattr(paper, k) * math.sqrt(fitted / 256 * more) for k in ("lr", "min_lr", "warmup_lr")}
        if hasattr(paper, "mix_group"):
            changes["mix_group"] = math.gcd(paper.mix_group, batch // run.world, args.micro_batch or 0)
        run.paper = dataclasses.replace(paper, batch_size=fitted, epochs=epochs, warmup_epochs=epochs // 20, **changes)
    run.recipe = override(run.paper, args)


def set_up(
    run: Run, transform: Callable, make_model: Callable, prepare: Callable | None = None, *,
    adapt: Callable | None = None, teacher: str | None = None, extra: Callable[[TrainingData], dict] | None = None,
) -> tuple:
    """(data, model, the model as it is trained, optimizer, precision, average of the weights or None, teacher or None),
    checked, loaded, resumed and said; --show-batch ends here. transform: for data.Samples; prepare(batch) -> (images
    before mixing, as the network sees them, ...) for pictures (None: several crops of an image, shown as they are);
    teacher: the default of a method that can distill; extra(data): further state, by its name in checkpoints."""
    args, recipe, taught = run.args, run.recipe, None
    on_meta(lambda: built(make_model, args, recipe, 2))  # a size that does not fit is told before the data is scanned
    if distills := teacher and recipe.distillation != "none" and not args.show_batch:
        # What is wrong with a teacher is told before a long listing.
        held = run.read(args.teacher_weights, "--teacher-weights") if args.teacher_weights else None
        teach = functools.partial(load_teacher, args, held, teacher, recipe.img_size, say=run.say)
        if (folder := Path(args.data, "train")).is_dir():
            taught = run.first(lambda: teach(class_folders(folder)))
    if recipe.optimizer != "lamb" and run.paper.optimizer == "lamb" and recipe.lr > 1e-3:
        run.say(f"warning: {recipe.optimizer} at LAMB's rate of {recipe.lr:g} is known to diverge; take 1e-3 or less")
    data = TrainingData(run, recipe, transform)
    run.data, run.num_classes = data, len(data.classes)
    if distills:
        taught = (taught or run.first(lambda: teach(data.classes))).to(run.device, memory_format=run.layout)
    torch.manual_seed(args.seed)
    model = make_model(args, recipe, run.num_classes)
    if args.weights:
        content, where = checkpoint.of_run(run), f"--weights {args.weights}"
        checkpoint.fit(model, content, where, run.say, ema=args.use_ema, adapt=adapt, new_head=True)
    model.to(run.device, memory_format=run.layout)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.lr, recipe.weight_decay)
    precision = Precision(run.amp, run.device, accumulation=data.accumulation, clip_grad=recipe.clip_grad)
    ema = EMA(model, recipe.ema) if getattr(recipe, "ema", 0) else None
    if args.show_batch:
        run.on_rank_0(lambda: report.show_batch(args.show_batch, data, prepare))
        run.say(f"wrote {args.show_batch}")
        sys.exit()

    run.open_folder()
    run.say(report.describe(run, lambda: make_model(args, recipe, run.num_classes), data))
    if taught or args.model.endswith("_distilled"):
        run.say(f"teacher  {taught.identity if taught else 'none: both heads learn the true label'}")
    wrapped = run.prepare(model, data.micro_batch)
    identity = data.identity() | {"path": args.data} | ({"teacher": taught and taught.identity} if teacher else {})
    averaged, further = ema and ema.model, extra(data) if extra else {}
    run.start(identity, model=model, optimizer=optimizer, scaler=precision, ema=averaged, **further)
    if run.epoch == run.step == 0:
        run.on_rank_0(lambda: report.show_batch(run.out / "batch.png", data, prepare))
    run.check_stop()
    return data, model, wrapped, optimizer, precision, ema, taught


def finish(run: Run, losses: list[str], accuracies: list[str]) -> None:
    """The end of training: curves.png shows these figures of the log over the epochs."""
    run.log({"status": "completed", "epochs": run.recipe.epochs, "best": run.best})
    panels = {"loss": losses, "accuracy, %": accuracies}
    if getattr(run.recipe, "loss", None) == "bce":  # validation has another loss
        panels = {"binary cross-entropy": losses[:1], "cross-entropy": losses[1:], "accuracy, %": accuracies}
    if run.rank == 0 and run.data.val is not None and not run.log_failed:
        try:
            rows = [r for r in report.read_log(run.out / "log.jsonl") if "epoch" in r and "status" not in r]
            curves = [{k: [(r["epoch"], r[k]) for r in rows if isinstance(r.get(k), (int, float))] for k in keys}
                      for keys in panels.values()]
            report.save_plot(run.out / "curves.png", curves, "epoch", list(panels), run.say)
        except (OSError, UserError) as error:
            run.say(f"warning: {error}")
