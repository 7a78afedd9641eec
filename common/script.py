"""What every script does around its loop: what it is asked to do, and all that comes before the first step."""

import sys
from collections.abc import Callable

import torch

from common import checkpoint, report
from common.cli import built
from common.data import TrainingData
from common.errors import UserError
from common.evaluate import Predict, eval_loader, evaluate_weights, logits_of, predict_images
from common.models import Teacher, on_meta
from common.optim import EMA, make_optimizer
from common.precision import Precision
from common.run import Run


def run_script(
    method: str, args, recipe, paper, models: dict, *, train: Callable[[Run], None], make_model: Callable,
    loss: Callable, adapt: Callable | None = None, predict: Predict = logits_of,
) -> None:
    """What the command line asks for: --list-models, --eval, --benchmark (of loss(model, images, labels)) or
    train(run). make_model(args, recipe, num_classes) builds a model; adapt, predict: see fit, evaluate."""
    if args.list_models:
        width = max(map(len, models)) + 1
        for name, config in models.items():
            config = config if isinstance(config, dict) else {"features": config}
            print(f"{name:{width}s} " + "  ".join(f"{k} {v}" for k, v in config.items()))
        return
    run = Run(method, args, recipe, paper)
    if args.eval or args.eval_data:
        evaluate_weights(run, make_model, adapt, predict)
    elif args.predict:
        predict_images(run, make_model, adapt, predict)
    elif args.benchmark:
        report.benchmark(run, lambda: built(make_model, args, recipe, 1000), loss)
    else:
        train(run)


def set_up(
    run: Run, transform: Callable, make_model: Callable, prepare: Callable | None = None, *,
    adapt: Callable | None = None, teacher: str | None = None, extra: Callable[[TrainingData], dict] | None = None,
) -> tuple:
    """(data, model, the model as it is trained, optimizer, precision, average of the weights or None, teacher or None),
    checked, loaded, resumed and said; --show-batch ends here. transform: for data.Samples; prepare(batch) -> (images
    before mixing, as the network sees them, ...) for pictures (None: several crops of an image, shown as they are);
    teacher: the default of a method that can distill; extra(data): further state, by its name in checkpoints."""
    args, recipe = run.args, run.recipe
    on_meta(lambda: built(make_model, args, recipe, 2))  # a size that does not fit is told before the data is scanned
    taught = None
    if teacher and recipe.distillation != "none" and not args.show_batch:
        taught = run.first(lambda: Teacher(args, teacher, recipe.img_size, run.say))
    data = TrainingData(run, recipe, transform)
    run.num_classes = len(data.classes)
    if taught:
        taught.check(data.classes)
        taught.model.to(run.device, memory_format=run.layout)
    torch.manual_seed(args.seed)
    model = make_model(args, recipe, run.num_classes)
    if args.weights:
        content, where = checkpoint.of_run(run), f"--weights {args.weights}"
        checkpoint.fit(model, content, where, run.say, ema=args.use_ema, adapt=adapt, new_head=True)
    elif args.recipe.startswith(("finetune", "transfer", "in21k_to")) and not (args.resume or args.show_batch):
        raise UserError(f"--recipe {args.recipe}: starts from a trained network; give --weights FILE")
    model.to(run.device, memory_format=run.layout)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.lr, recipe.weight_decay)
    precision = Precision(run.amp, run.device, accumulation=data.accumulation, clip_grad=recipe.clip_grad)
    ema = EMA(model, recipe.ema) if getattr(recipe, "ema", 0) else None
    if args.show_batch:
        if run.rank == 0:
            report.show_batch(args.show_batch, data, prepare)
        run.say(f"wrote {args.show_batch}")
        sys.exit()

    run.open_folder()
    run.say(report.describe(run, lambda: make_model(args, recipe, run.num_classes), data))
    if taught:
        run.say(f"teacher  {taught.identity}")
    wrapped = run.prepare(model, data.micro_batch)
    identity = data.identity() | ({"teacher": taught and taught.identity} if teacher else {})
    averaged, further = ema and ema.model, extra(data) if extra else {}
    run.start(identity, model=model, optimizer=optimizer, scaler=precision, ema=averaged, **further)
    if run.rank == 0 and run.epoch == run.step == 0:
        report.show_batch(run.out / "batch.png", data, prepare)
    run.check_stop()
    run.val_loader = data.val and eval_loader(data.val, recipe.img_size, recipe.eval_crop_ratio, data.micro_batch, run)
    return data, model, wrapped, optimizer, precision, ema, taught


def finish(run: Run, *panels: list[str]) -> None:
    """The end of training: curves.png gets a panel of the log's figures over the epochs for each list."""
    run.log({"status": "completed", "epochs": run.recipe.epochs, "best": run.best})
    if run.rank == 0 and run.val_loader is not None:
        report.save_curves(run.out / "curves.png", run.out / "log.jsonl", list(panels), run.say)
