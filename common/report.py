"""What a run shows about itself: size, cost, speed, pictures."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.flop_counter import FlopCounterMode

from common.cli import differences
from common.data import TrainingData
from common.evaluate import denormalize, save_file
from common.images import pixels_note, to_pil
from common.models import on_meta
from common.optim import make_optimizer
from common.precision import Precision
from common.run import Run


def count(build: Callable[[], torch.nn.Module], img_size: tuple[int, int]) -> tuple[int, float]:
    """(parameters, GMACs of one image's forward pass); matrix products and convolutions count, nothing is computed."""
    model = on_meta(build).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        model(torch.empty(1, 3, *img_size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9


def speed(step: Callable[[], None], images: int, device: torch.device, *, seconds: float = 5.0) -> tuple[float, float]:
    """(images per second, peak memory in MiB) of step(), which handles `images` images; memory is NaN on the CPU."""
    from torch.utils.benchmark import Timer  # looks for a compiler when it is imported

    step()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())  # waits for the GPU
    rate = images / timer.blocked_autorange(min_run_time=seconds).mean
    return rate, torch.cuda.max_memory_allocated(device) / 2**20 if cuda else math.nan


def benchmark(run: Run, build: Callable[[], torch.nn.Module], loss: Callable[..., torch.Tensor]) -> None:
    """--benchmark: images/s and peak memory of inference and of training steps, on random images that are in memory, of
    build()'s model for 1000 classes with the method's loss(model, images, labels)."""
    args, recipe = run.args, run.recipe
    batch = args.micro_batch or (64 if run.device.type == "cuda" else 8)
    parameters, gmacs = count(build, recipe.img_size)
    model = build().to(run.device, memory_format=run.layout)
    wrapped = run.prepare(model, batch)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.lr, recipe.weight_decay)
    precision = Precision(run.amp, run.device, clip_grad=recipe.clip_grad)
    images = torch.randn(batch, 3, *recipe.img_size, device=run.device)
    labels = torch.zeros(batch, dtype=torch.long, device=run.device)

    def train_step() -> None:
        with precision.forward(wrapped):
            value = loss(wrapped, images, labels)
        precision.backward(value)
        precision.step(optimizer, 1e-5)

    def inference() -> None:
        with torch.no_grad(), precision.autocast():
            model(images)

    machine = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    run.say(f"{args.model}, {parameters / 1e6:.2f} M parameters, {gmacs:.3f} GMACs, batch {batch} per rank, {run.amp},"
            f" {machine}")
    for name, step, products in (("inference", inference, 1), ("training", train_step, 3)):  # memory of inference alone
        wrapped.train(name == "training")
        rate, memory = speed(step, batch * run.world, run.device)
        tflops = products * 2 * gmacs * rate / run.world / 1e3
        peak = "" if math.isnan(memory) else f"  peak memory {memory:.0f} MiB"
        run.say(f"{name:9s} {rate:9.1f} images/s  {tflops:7.2f} TFLOP/s per rank{peak}")


def describe(run: Run, build: Callable[[], torch.nn.Module], data: TrainingData) -> str:
    """The banner of a training run."""
    args, recipe, size = run.args, run.recipe, run.recipe.img_size
    parameters, gmacs = count(build, size)
    cost = f"{parameters / 1e6:.2f} M parameters, {gmacs:.3f} GMACs at {size[0]} x {size[1]}"
    images = f"{len(data.source)} training images, {'no' if data.val is None else len(data.val)} validation images"
    batch = f"{run.world} ranks x {data.micro_batch} x {data.accumulation} accumulation, {run.amp} on {run.device.type}"
    ours = "this recipe is none of the paper's; from the recipe: " if args.recipe in ("own", "shapes") else ""
    differ = "; ".join(differences(recipe, run.paper, "recipe" if ours else "paper")) or "nothing"
    scaled = f"the recipe's {run.paper.lr:g} at batch {run.paper.batch_size}, in proportion to the batch"
    return (
        f"model    {args.model}, {cost}, {len(data.classes)} classes\n"
        f"data     {args.data}, {images}{pixels_note()}\n"
        f"batch    {recipe.batch_size} = {batch}, {run.workers} workers per rank\n"
        f"steps    {recipe.epochs} epochs x {data.steps}\n"
        f"rate     {recipe.lr:g} at its peak: {scaled if args.lr is None else 'given by --lr'}\n"
        f"recipe   {args.recipe}: {', '.join(f'{name} {value}' for name, value in vars(recipe).items())}\n"
        f"differs from the paper: {ours}{differ}"
    )


def show_batch(path: str | Path, data: TrainingData, prepare: Callable | None) -> None:
    """PNG of the run's first images: 16 by prepare(batch) -> (before mixing, as the network sees them, ...), or, where
    that is None, 8 as a row of pictures for each of their crops."""
    if prepare is None:
        crops = [crop[:8] for batch in data.first_images(8).images for crop in batch.unbind(1)]
        rows = [(f"crop {i + 1} of {len(crops)}", crop) for i, crop in enumerate(crops)]
    else:
        before, after = (denormalize(images[:16]).clamp(0, 255).round().to(torch.uint8).split(8)
                         for images in prepare(data.first_images(16))[:2])
        rows = [*zip(("before mixing", ""), before), *zip(("after mixing: what the network is fed", ""), after)]
    times = max(1, 96 // min(rows[0][1].shape[2:]))  # small images are shown larger
    save_sheet(path, [(title, [ImageOps.scale(to_pil(x), times, Image.Resampling.NEAREST) for x in images.cpu()])
                      for title, images in rows])


def save_sheet(path: str | Path, rows: list[tuple[str, list[Image.Image]]], gap: int = 4) -> None:
    """PNG of rows of pictures, each row below its title, if it has one. UserError if it cannot be written."""
    width = max(max(sum(p.width + gap for p in pictures) - gap, 7 * len(title) + 6) for title, pictures in rows)
    heights = [(14 if title else gap, max(p.height for p in pictures)) for title, pictures in rows]
    sheet = Image.new("RGB", (width, sum(map(sum, heights))), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for (title, pictures), (above, height) in zip(rows, heights):
        draw.text((3, top + 1), title.encode("ascii", "replace").decode(), fill="black")
        left = 0
        for picture in pictures:
            sheet.paste(picture, (left, top + above))
            left += picture.width + gap
        top += above + height
    save_file(path, sheet.save)


def cividis(values: torch.Tensor) -> Image.Image:
    """(H, W) in 0..1 -> a picture in the colours of the cividis map: its ends and its middle, linear in between."""
    grey = Image.fromarray((255 * values.clamp(0, 1)).round().to(torch.uint8).cpu().numpy())
    return ImageOps.colorize(grey, black=(0, 34, 78), mid=(124, 123, 120), white=(254, 232, 56))


def read_log(path: str | Path) -> list[dict]:
    """Records of a log.jsonl; a last line cut short by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def new_figure(path: str | Path, width: float, height: float, say: Callable[[str], None]):
    """A matplotlib figure of so many times 100 pixels, in time the picture `path`; None where that is not installed."""
    try:
        import matplotlib.figure
    except ImportError:
        say(f'{path}: not drawn, that needs matplotlib: pip install -e ".[plots]"')
        return None
    return matplotlib.figure.Figure((width, height), dpi=100, layout="constrained")


def save_plot(path: str | Path, panels: list[dict[str, list]], x_label: str, y_labels=None, say=print) -> bool:
    """PNG with one panel per dictionary, the name of a curve to its points (x, y), x whole. Whether it is drawn;
    UserError if it cannot be written."""
    if figure := new_figure(path, 4.2 * len(panels), 2.6, say):
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, curves, y_label in zip(row, panels, y_labels or [""] * len(panels)):
            axes.set(xlabel=x_label, ylabel=y_label)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(alpha=0.3)
            for name, points in curves.items():
                if points:
                    axes.plot(*zip(*points), ".-" if len(points) < 50 else "-", label=name)
                    axes.legend(fontsize="small")
        save_file(path, figure.savefig)
    return bool(figure)
