"""What a run shows about itself: size, cost, speed, pictures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid

from common.cli import differences
from common.data import TrainingData
from common.evaluate import denormalize
from common.images import to_pil
from common.models import on_meta
from common.optim import make_optimizer
from common.precision import Precision, check_amp
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
    """--benchmark: images/s and peak memory of training steps and of inference, on random images that are in memory.

    build() makes the model for 1000 classes; loss(model, images, labels) is the method's.
    """
    args, recipe = run.args, run.recipe
    check_amp(run.amp, run.device)
    batch = args.micro_batch or (64 if run.device.type == "cuda" else 8)
    parameters, gmacs = count(build, recipe.img_size)
    model = build().to(run.device)
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
    cost = f"{parameters / 1e6:.2f} M parameters, {gmacs:.3f} GMACs"
    run.say(f"{args.model}, {cost}, batch {batch} per rank, {run.amp}, {machine}")
    for name, step, products in (("training", train_step, 3), ("inference", inference, 1)):
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
    fields = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(recipe).items())
    ours = " (but this recipe is none of the paper's)" if args.recipe == "shapes" else ""
    return (
        f"model    {args.model}, {cost}, {len(data.classes)} classes\n"
        f"data     {args.data}, {images}\n"
        f"batch    {recipe.batch_size} = {batch}, {run.workers} workers per rank\n"
        f"steps    {recipe.epochs} epochs x {data.steps}\n"
        f"recipe   {args.recipe}: {fields}\n"
        f"differs from the paper: {'; '.join(differences(recipe, run.paper)) or 'nothing'}{ours}"
    )


def show_batch(path: str | Path, data: TrainingData, prepare: Callable) -> None:
    """PNG of the run's first 16 images. prepare(batch) -> (images before mixing, as the network sees them, ...)."""
    before, after, *_ = prepare(data.first_images(16))
    rows = []
    for title, images in (("before mixing", before), ("after mixing: what the network is fed", after)):
        pixels = denormalize(images[:16]).clamp(0, 255).round().to(torch.uint8).cpu()
        rows.append((title, [to_pil(make_grid(pixels, nrow=8, padding=2, pad_value=255))]))
    save_sheet(path, rows)


def show_crops(path: str | Path, data: TrainingData) -> None:
    """PNG of the run's first 8 images' crops: one row of pictures per crop."""
    crops = [crop[:8].cpu() for batch in data.first_images(8).images for crop in batch.unbind(1)]
    save_sheet(path, [(f"crop {i + 1} of {len(crops)}", [to_pil(c) for c in crop]) for i, crop in enumerate(crops)])


def save_sheet(path: str | Path, rows: list[tuple[str, list[Image.Image]]], gap: int = 4) -> None:
    """PNG of rows of pictures, each row below its title, if it has one."""
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def cividis(values: torch.Tensor) -> Image.Image:
    """(H, W) in 0..1 -> a picture in the colours of the cividis map: its ends and its middle, linear in between."""
    grey = Image.fromarray((255 * values.clamp(0, 1)).round().to(torch.uint8).cpu().numpy())
    return ImageOps.colorize(grey, black=(0, 34, 78), mid=(124, 123, 120), white=(254, 232, 56))


def save_json(path: str | Path, content) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_log(path: str | Path) -> list[dict]:
    """Records of a log.jsonl; a last line cut short by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def save_curves(path: str | Path, log: str | Path, panels: list[list[str]]) -> None:
    """PNG with one panel per list of keys, each key's value over the epochs of a log.jsonl."""
    records = [r for r in read_log(log) if "epoch" in r and "status" not in r]
    curves = [{k: [(r["epoch"], r[k]) for r in records if isinstance(r.get(k), (int, float))] for k in keys} for keys in panels]
    save_plot(path, curves, "epoch")


def save_plot(path: str | Path, panels: list[dict[str, list[tuple[float, float]]]], x_label: str) -> None:
    """PNG with one panel per dictionary: name of a curve to its points (x, y), x from 0."""
    width, height, left, colours = 420, 260, 52, ("#1f5fa8", "#c8551b", "#3c8a3c", "#7a4ea3")
    sheet = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(sheet)
    for panel, curves in enumerate(panels):
        points = [p for curve in curves.values() for p in curve]
        if not points:
            continue
        values = [y for _, y in points]
        low, high = min(values), max(max(values), min(values) + 1e-9)
        last = max(1, max(x for x, _ in points))
        x0, y0, x1, y1 = panel * width + left, 24, panel * width + width - 14, height - 28

        def place(x, y):
            return x0 + (x1 - x0) * x / last, y1 - (y1 - y0) * (y - low) / (high - low)

        draw.rectangle((x0, y0, x1, y1), outline="#999999")
        for share in (0, 0.5, 1):
            draw.text((panel * width + 4, y1 - (y1 - y0) * share - 6), f"{low + share * (high - low):.4g}", fill="black")
            draw.text((x0 + (x1 - x0) * share - 6, y1 + 4), f"{share * last:.3g}", fill="black")
        draw.text((x1 - 6 * len(x_label), y1 + 14), x_label, fill="black")
        for i, (name, curve) in enumerate(curves.items()):
            draw.text((x0 + 8 + 110 * i, 6), name, fill=colours[i])
            places = [place(*p) for p in curve]
            if len(places) > 1:
                draw.line(places, fill=colours[i], width=2)
            for x, y in places:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colours[i])
    sheet.save(path)


def save_scatter(path: str | Path, points: dict[str, tuple[float, float]], x_label: str, y_label: str) -> None:
    """PNG of named points (x, y); those on the upper right of the convex hull, which no mixture of others beats, are
    stars."""
    width, height, x0, y0, x1, y1 = 640, 480, 64, 28, 480, 440
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    xy = np.array(list(points.values()), dtype=float)
    low, high = xy.min(0), xy.max(0)
    margin = np.where(high > low, 0.06 * (high - low), 0.5)
    low, high = low - margin, high + margin
    draw.rectangle((x0, y0, x1, y1), outline="#999999")
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = low + share * (high - low)
        draw.text((x0 + (x1 - x0) * share - 12, y1 + 5), f"{x:.4g}", fill="black")
        draw.text((6, y1 - (y1 - y0) * share - 6), f"{y:.3g}", fill="black")
    draw.text((x0, y1 + 20), x_label, fill="black")
    draw.text((6, 8), y_label, fill="black")
    best = upper_right_hull(list(points.values()))
    for name, point in points.items():
        x = x0 + (x1 - x0) * (point[0] - low[0]) / (high[0] - low[0])
        y = y1 - (y1 - y0) * (point[1] - low[1]) / (high[1] - low[1])
        if point in best:
            spikes = [
                (x + r * math.sin(i * math.pi / 5), y - r * math.cos(i * math.pi / 5)) for i in range(10) for r in [9 if i % 2 == 0 else 4]
            ]
            draw.polygon(spikes, fill="#c8551b")
        else:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill="#1f5fa8")
        draw.text((x + 9, y - 12), name, fill="black")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def upper_right_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the convex hull from the highest point to the rightmost one."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if hull and hull[-1][0] == x:
            continue
        while len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (y - hull[-2][1]) >= (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    top = max(range(len(hull)), key=lambda i: hull[i][1])
    return hull[top:]
