"""t-ReX: Improving the generalization of supervised models (Sariyildiz, Kalantidis, Alahari, Larlus; arXiv:2206.15369).

New: supervised training that transfers. Multi-crop augmentation, a projector that is thrown away after training, and
class prototypes, computed on the fly from a memory of features (OCM), in place of learned class weights. Two models
with a ResNet-50: t-ReX, 78.0 top-1 on ImageNet with the best transfer (mean log odds 1.357 over 13 data sets), and
t-ReX*, 80.2 top-1 (log odds 1.078), after 100 epochs.

    torchrun --nproc_per_node 8 trex.py --model resnet50 --data /imagenet                    # t-ReX
    torchrun --nproc_per_node 8 trex.py --model resnet50 --data /imagenet --recipe trex_star # t-ReX*
    python trex.py --model resnet_nano --recipe shapes                                       # minutes on two CPU cores
    python trex.py --model resnet50 --weights runs/trex_resnet50/last.pt --export trex.pth   # encoder for torchvision

Checked here: state-dict keys, encoder features, projector outputs and logits of the official models, memory and
prototypes, schedule, weight-decay groups and each augmentation against the official components' numbers (tests/). Not
run here: ImageNet.

Axes: B images, D embedding, M memory, K classes, H x W pixels; crops of an image: one global, then eight local.

Written from the paper's text and from figures; the official code, whose licence forbids commercial use, differs in:
- a batch that does not fit the end of its memory is cut off there, and the rest lost; here the memory is a ring;
- its crops are decoded nine times; here once;
- its learning rate's warm-up includes both ends (followed here: its last step has the peak rate already).
"""

from __future__ import annotations

import copy
import math
import random
import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms.v2 import functional as adjust

# ---- Recipe ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The training of all models; the defaults are t-ReX."""

    epochs: Annotated[int, "passes over the data set", "1 or more"] = 100
    batch_size: Annotated[int, "images (not crops) per optimizer step, over all GPUs", "1 or more"] = 256
    optimizer: Annotated[str, "sgd (momentum 0.9)", ("sgd",)] = "sgd"
    lr: Annotated[float, "peak learning rate; unset: 0.1 x batch size / 256", "above 0"] = 0.1
    min_lr: Annotated[float, "what the cosine approaches", "0 or more"] = 1e-6
    warmup_lr: Annotated[float, "learning rate at step 0", "0 or more"] = 0.0
    warmup_epochs: Annotated[int, "epochs of linear warm-up", "0 or more"] = 10
    weight_decay: Annotated[float, "not on biases and BatchNorm", "0 or more"] = 1e-4
    clip_grad: Annotated[float | None, "largest norm of the whole gradient; none: no clipping", "above 0"] = None
    img_size: Annotated[tuple[int, int], "global crops and test images in pixels, S or HxW", "1 or more"] = (224, 224)
    local_size: Annotated[tuple[int, int], "local crops in pixels, S or HxW", "1 or more"] = (96, 96)
    local_crops: Annotated[int, "local crops per image; 0: none", "0 or more"] = 8
    global_scale: Annotated[float, "least share of the image's area in the global crop (up to 1)", "in (0, 1]"] = 0.25
    local_scale: Annotated[float, "largest share of the image's area in a local crop, from 0.05", "in [0.05, 1]"] = 0.25
    hidden_layers: Annotated[int, "hidden layers of the projector", "0 or more"] = 3
    memory_size: Annotated[int, "features in the memory; 0: learned class weights (plain variant)", "0 or more"] = 8192
    temperature: Annotated[float, "of the cosine softmax", "above 0"] = 0.1
    momentum: Annotated[float, "of the averaged network that fills the memory", "in [0, 1)"] = 0.999
    repeats: Annotated[int, "repeated augmentation: times an image is taken in a row", "1 or more"] = 1
    eval_crop_ratio: Annotated[float, "share of the resized image that the test crop keeps", "in (0, 1]"] = 0.875


RECIPES = {
    "trex": Recipe(),
    "trex_star": Recipe(global_scale=0.4, local_scale=0.4, hidden_layers=1),
    # The same with learned class weights instead of the memory.
    "trex_plain": Recipe(memory_size=0),
    "trex_star_plain": Recipe(global_scale=0.4, local_scale=0.4, hidden_layers=1, memory_size=0),
    # Fine-tuning on other data sets, which the paper does not do (it fits linear classifiers: common/transfer.py): the
    # settings of thesis section 2.4.6 for a ResNet-50; a cosine softmax on the encoder replaces projector and memory.
    "transfer": Recipe(
        epochs=240, batch_size=512, lr=0.01, warmup_epochs=0, local_crops=0, global_scale=0.08, hidden_layers=0,
        memory_size=0,
    ),
    # Not of the paper: images of your own (common.script.fit_own); the built-in data set, minutes on two CPU cores.
    "own": Recipe(
        epochs=30, lr=0.05, warmup_epochs=0, local_crops=0, global_scale=0.08, hidden_layers=0, memory_size=0,
    ),
    "shapes": Recipe(
        epochs=2, batch_size=32, lr=0.05, warmup_epochs=1, img_size=(48, 48), local_size=(32, 32), local_crops=2,
        global_scale=0.4, local_scale=0.4, hidden_layers=1, memory_size=512,
    ),
}

# ---- Architecture ----------------------------------------------------------------------------------------------------

MODELS = {  # encoders of torchvision's, with the width of their features
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "resnet_nano": 512,  # not of the paper: one block per stage, for the built-in data set and for tests
}


class HiddenLayer(nn.Module):
    """Linear, BatchNorm, GELU: (B, D) -> (B, 2048)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc = nn.Linear(dim, 2048)
        self.bn = nn.BatchNorm1d(2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.bn(self.fc(x)))


class Normalize(nn.Module):
    """Each row to length 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=1)


class Projector(nn.Module):
    """Encoder features (B, D) -> (B, 256): L2-normalised input, hidden layers of 2048, a bottleneck without bias."""

    def __init__(self, dim: int, hidden_layers: int):
        super().__init__()
        hidden = [HiddenLayer(dim if i == 0 else 2048) for i in range(hidden_layers)]
        self.layers = nn.Sequential(Normalize(), *hidden, nn.Linear(2048 if hidden else dim, 256, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Network(nn.Module):
    """Encoder and projector: a list of crop batches -> projections (crops x B, 256), crop after crop.

    Crops of one size go through the encoder together, all features through the projector together.
    """

    def __init__(self, name: str, hidden_layers: int):
        super().__init__()
        nano = name == "resnet_nano"
        self.encoder = ResNet(BasicBlock, [1, 1, 1, 1]) if nano else torchvision.models.get_model(name, weights=None)
        self.encoder.fc = nn.Identity()
        self.head = Projector(MODELS[name], hidden_layers)

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        features, start = [], 0
        while start < len(crops):
            end = start + 1
            while end < len(crops) and crops[end].shape[2:] == crops[start].shape[2:]:
                end += 1
            features.append(self.encoder(torch.cat(crops[start:end]) if end > start + 1 else crops[start]))
            start = end
        return self.head(torch.cat(features))


class MemoryBank(nn.Module):
    """Online class prototypes (OCM): the averaged network's last `size` projections, as they are, and their labels."""

    def __init__(self, dim: int, size: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("features", torch.randn(size, dim))
        self.register_buffer("labels", torch.randint(num_classes, (size,)))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))

    def prototypes(self) -> torch.Tensor:
        """(K, D): the sum of each class' features, L2-normalised; 0 for a class not in the memory. No gradient."""
        with torch.no_grad():
            of_class = F.one_hot(self.labels, self.num_classes).to(self.features.dtype)  # (M, K)
            return F.normalize(of_class.T @ self.features, dim=1)

    @torch.no_grad()
    def update(self, features: torch.Tensor, labels: torch.Tensor, skip: torch.Tensor | None = None) -> None:
        """Writes (B, D) features and (B,) labels over the oldest ones, around the end; of more than M the last M. skip
        (0-dim, 1 or 0): change nothing where it is 1, decided on the device."""
        size = len(self.labels)
        features, labels = features[-size:].to(self.features.dtype), labels[-size:]
        where = (self.ptr + torch.arange(len(labels), device=labels.device)) % size
        end = (self.ptr + len(labels)) % size
        changes = (self.features, where, features), (self.labels, where, labels), (self.ptr, ..., end)
        for buffer, index, new in changes:
            buffer[index] = new if skip is None else torch.where(skip > 0, buffer[index], new)


class ClassWeights(nn.Module):
    """Learned class weights of the plain variant, L2-normalised: prototypes() -> (K, D)."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(dim, num_classes, bias=False)

    def prototypes(self) -> torch.Tensor:
        return F.normalize(self.fc.weight, dim=1)


class TReX(nn.Module):
    """The training model: images (B, 3, H, W), or a list of crop batches -> logits (crops x B, K), crop after crop.

    With a memory, `model_ema` is the averaged copy of `model` that fills it. Logits are cosines over the temperature.
    """

    def __init__(self, name: str, num_classes: int, hidden_layers: int, memory_size: int, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature
        self.model = Network(name, hidden_layers)
        for module in self.model.head.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.memory = None
        if memory_size:
            self.memory = MemoryBank(256, memory_size, num_classes)
            self.model_ema = copy.deepcopy(self.model).requires_grad_(False)
        else:
            self.clf = ClassWeights(256, num_classes)

    def forward(self, crops: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        z = self.model([crops] if isinstance(crops, torch.Tensor) else crops)
        # In 16 bits cosines over 0.1 would be steps of 0.04.
        with torch.autocast("cuda" if z.is_cuda else "cpu", enabled=False):
            prototypes = (self.clf if self.memory is None else self.memory).prototypes()
            return F.normalize(z.float(), dim=1) @ prototypes.float().T / self.temperature

    def transfer_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, D) of the encoder: what linear classifiers on other data sets are given; the projector is thrown away."""
        return self.model.encoder(images)

    @torch.no_grad()
    def average(self, momentum: float) -> None:
        """model_ema <- momentum model_ema + (1 - momentum) model, parameters only."""
        torch._foreach_lerp_(list(self.model_ema.parameters()), list(self.model.parameters()), 1 - momentum)


def build_model(
    name: str, num_classes: int = 1000, img_size: int | tuple[int, int] | None = None, drop_path: float | None = None,
    *, hidden_layers: int = 3, memory_size: int = 8192,
) -> nn.Module:
    """A fresh training model on an encoder of MODELS (else KeyError). memory_size 0: plain variant. img_size and
    drop_path are not used: the encoder takes any size and has no stochastic depth."""
    if name not in MODELS:
        raise KeyError(name)
    return TReX(name, num_classes, hidden_layers, memory_size)


def options_of(state: dict[str, torch.Tensor]) -> dict[str, int]:
    """build_model's options for a full training model's state dict, as the official ones are: t-ReX* has one layer."""
    layers = sum(k.startswith("model.head.layers.") and k.endswith(".fc.weight") for k in state)
    return {"hidden_layers": layers, "memory_size": len(state.get("memory.labels", ()))}


def encoder_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder alone, with torchvision's names: `resnet50().load_state_dict(..., strict=False)` lacks fc only."""
    prefix = "model.encoder."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


# ---- Augmentation: multi-crop ----------------------------------------------------------------------------------------


# Adapted from deit.py: the range of the area is given
def random_resized_crop(
    height: int, width: int, rng: random.Random, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, crop height, crop width): area of the image in the range `scale`, aspect 3/4..4/3 (log-uniform), ten
    attempts; if none fits, the central crop with the aspect ratio clamped to that range."""
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return rng.randint(0, height - crop_height), rng.randint(0, width - crop_width), crop_height, crop_width
    crop_height, crop_width = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def colours(image: Image.Image, rng: random.Random, blur: float, solarize: float) -> Image.Image:
    """Jitter (brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1, in random order) with probability 0.8, grey with
    0.2, blur of radius 0.1..2 and solarisation above 128 with the given probabilities."""
    if rng.random() < 0.8:
        steps = [
            (adjust.adjust_brightness, rng.uniform(0.6, 1.4)), (adjust.adjust_contrast, rng.uniform(0.6, 1.4)),
            (adjust.adjust_saturation, rng.uniform(0.8, 1.2)), (adjust.adjust_hue, rng.uniform(-0.1, 0.1)),
        ]
        rng.shuffle(steps)
        for step, amount in steps:
            image = step(image, amount)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < blur:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    if rng.random() < solarize:
        image = adjust.solarize(image, 128)
    return image


# Adapted from deit.py: multi-crop, colour augmentation
class TrainTransform:
    """(uint8 image (3, H, W), rng) -> ((global crop (1, 3, *img_size), local crops (n, 3, *local_size)), no
    parameters), all in the loader's processes: an image is decoded once for its nine crops."""

    def __init__(self, recipe: Recipe):  # crops: number, size, scale, blur, solarisation
        self.crops = [(1, recipe.img_size, (recipe.global_scale, 1.0), 0.2, 0.2)]
        if recipe.local_crops:
            self.crops.append((recipe.local_crops, recipe.local_size, (0.05, recipe.local_scale), 0.5, 0.0))

    def __call__(self, image: torch.Tensor, rng: random.Random) -> tuple[tuple[torch.Tensor, ...], tuple]:
        from common import images

        batches = []
        for number, size, scale, blur, solarize in self.crops:
            crops = []
            for _ in range(number):
                top, left, height, width = random_resized_crop(*image.shape[1:], rng, scale)
                crop = images.resize(image[:, top : top + height, left : left + width], size)
                if rng.random() < 0.5:
                    crop = crop.flip(-1)
                crops.append(images.from_pil(colours(images.to_pil(crop), rng, blur, solarize)))
            batches.append(torch.stack(crops))
        return tuple(batches), ()


# ---- Schedule --------------------------------------------------------------------------------------------------------


def learning_rate(
    step: int, total: int, warmup: int, peak: float, min_lr: float = 1e-6, warmup_lr: float = 0.0
) -> float:
    """Of optimizer step `step` of `total`: linear over the `warmup` first ones, both ends included, then a cosine that
    approaches min_lr."""
    if step < warmup:
        return warmup_lr + (peak - warmup_lr) * step / max(1, warmup - 1)
    return min_lr + 0.5 * (peak - min_lr) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# ---- Training --------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None):
    """(arguments, the recipe with the flags given, the paper's recipe)."""
    from common import cli

    parser = cli.make_parser("trex", __doc__, Recipe, RECIPES, model="resnet50", recipe="trex")
    args = cli.parse(parser, argv, MODELS, RECIPES)
    return args, cli.override(RECIPES[args.recipe], args), RECIPES[args.recipe]


def make_model(args, recipe: Recipe, num_classes: int) -> TReX:
    """The training model of a command line."""
    return TReX(args.model, num_classes, recipe.hidden_layers, recipe.memory_size, recipe.temperature)


def take_encoder(model: nn.Module, state: dict, content: dict, say) -> None:
    """Fits --weights to the model: the encoder is taken, also in torchvision's form; what else has another name or
    shape starts afresh."""
    from common import checkpoint

    fresh = checkpoint.take_part(model, state, "model.encoder.")
    for key in (k for k in fresh if k.startswith("model_ema.")):  # the averaged network starts as a copy
        state[key] = state[key.replace("model_ema.", "model.", 1)]
    if fresh:
        parts = sorted({".".join(k.split(".")[:2]) for k in fresh})
        say(f"encoder taken from the checkpoint; new: {', '.join(parts)}")


def load_model(source: str, device: str = "cpu") -> tuple:
    """(model in eval mode, class names, transform) of a checkpoint: see common.models.load."""
    from common.models import load
    return load("trex", source, device)


def train(run) -> None:
    """The loop; what it starts from (data, network, what was saved) is common.script.set_up's."""
    from common import evaluate, script

    recipe = run.recipe
    data, model, wrapped, optimizer, precision, *_ = script.set_up(
        run, TrainTransform(recipe), make_model, adapt=take_encoder
    )
    total, warmup = recipe.epochs * data.steps, recipe.warmup_epochs * data.steps

    def lr_at(step: int) -> float:
        return learning_rate(step, total, warmup, recipe.lr, recipe.min_lr, recipe.warmup_lr)

    for epoch in range(run.epoch, recipe.epochs):
        wrapped.train()
        for step in run.steps(data):
            if recipe.memory_size:
                model.average(recipe.momentum)
            features, labels = [], []  # for the memory
            for batch in data.micro_batches():
                crops = [evaluate.normalize(c) for images in batch.images for c in images.unbind(1)]  # global first
                with precision.forward(wrapped):
                    loss = F.cross_entropy(wrapped(crops), batch.labels.repeat(len(crops)))
                precision.backward(loss)
                if recipe.memory_size:
                    with torch.no_grad(), precision.autocast():
                        features.append(model.model_ema(crops[:1]).float())
                    labels.append(batch.labels)
            lr = lr_at(epoch * data.steps + step)
            stats, skipped = precision.step(optimizer, lr, asked=run.asked())
            if recipe.memory_size:  # after the step: the batch is not among its own prototypes
                model.memory.update(run.gather(torch.cat(features)), run.gather(torch.cat(labels)), skip=skipped)
            run.after_step(stats, lr)
        record = run.end_of_training_epoch(lr_at((epoch + 1) * data.steps - 1)) | evaluate.validate(run)
        run.end_of_epoch(record, record.get("val_top1"))
    script.finish(run, ["train_loss", "val_loss"], ["val_top1", "val_top5"])


def export(run) -> None:
    """--export FILE.pth: the encoder in the form that torchvision's ResNets load."""
    from common import checkpoint
    from common.errors import UserError, one_line

    args = run.args
    file = args.weights or str(run.out / "last.pt")
    weights = encoder_weights(checkpoint.weights(checkpoint.load(file, "--weights")))
    if not weights:
        raise UserError(f"--weights {file}: holds no full t-ReX checkpoint (no model.encoder.*)")
    try:
        torch.save(checkpoint.plain(weights), args.export)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--export {args.export}: cannot be written ({one_line(error, 1000)})") from None
    run.say(f"wrote {args.export}: load with strict=False, fc.weight and fc.bias are left out")


def main() -> None:
    from common import script
    from common.run import Run

    args, recipe, paper = parse_args()
    if args.export and args.export.endswith((".pth", ".pt")):
        return export(Run("trex", args, recipe, paper))
    script.run_script(
        "trex", args, recipe, paper, MODELS, train=train, make_model=make_model,
        loss=lambda model, images, labels: F.cross_entropy(model(images), labels),
    )


if __name__ == "__main__":
    try:
        from common.script import launch
    except Exception as error:  # another common may raise anything
        print(f"error: {error}; needs torch 2.6, tqdm, our common/ (got {sys.modules.get('common')})", file=sys.stderr)
        sys.exit(2)
    launch(main)
