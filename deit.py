"""DeiT: Training data-efficient image transformers & distillation through attention (Touvron, Cord, Douze, Massa,
Sablayrolles, Jegou; arXiv:2012.12877; thesis sections 3.2 to 3.4).

New: a recipe that trains a vision transformer on ImageNet-1k alone (81.8 top-1 for DeiT-B at 224 pixels, 83.1 after
fine-tuning at 384, Table 3.5), and the distillation token, whose own head learns the hard decision of a convnet (83.4
and 84.5, 84.2 and 85.2 after 1000 epochs).

    torchrun --nproc_per_node 8 deit.py --model deit_b --data /imagenet          # the paper's run
    torchrun --nproc_per_node 8 deit.py --model deit_b_distilled --data /imagenet # distilled from a RegNetY-16GF
    python deit.py --model deit_nano --recipe shapes                             # minutes on two CPU cores, no download

Checked here: state-dict keys and logits of the official models (each head too), distillation losses and gradients,
RandAugment pixel by pixel, erasing boxes, mixup and cutmix, schedule and weight-decay groups against the official
components' numbers (tests/). Not run here: ImageNet.

Axes: B images, N tokens, C channels, K classes, H x W pixels, p patch side, h heads.

Where the official code differs from what stands here:
- soft distillation: Eq. 3.2 prints KL(student, teacher), the official code and this one have KL(teacher || student);
  there it is divided by B K instead of B, hence K times weaker than the thesis writes it;
- Table 3.3 crosses out the label in usual distillation, Eq. 3.2 and 3.3, the official code and this one keep it
  (--alpha 1 leaves it out);
- evaluation of a distilled model averages the two heads' logits; the thesis adds their softmax outputs. `forward` in
  eval mode is the official mean, `predict`, which all accuracies here come from, is the thesis' sum;
- fine-tuning at a higher resolution refuses distillation, which the thesis uses; here it goes on. The official run
  trained in eval mode, hence without stochastic depth, as `finetune` does; the thesis does not say;
- without a teacher the distillation head gets no gradient; here it learns the true label too, as the class head does;
- its learning rate is constant within an epoch and one epoch late; here it follows the formula at every iteration; the
  peak alone follows the batch there, here the first and the last rate do too;
- its mixup draw is one per GPU, hence depends on the number of GPUs; here it is one per `mix_group` images of the
  global batch, whatever runs them;
- dropout (off but in Table 3.8) also falls on the MLP's hidden layer; here on embeddings and on the branches' output;
- without RandAugment or AutoAugment it jitters colours by 0.3; here nothing takes their place, as in the thesis;
- Table 3.8's SGD is Nesterov's there: --optimizer nesterov;
- repeated augmentation is silently off without torchrun; here it is not;
- its keys' bias gets a gradient that is rounding noise (softmax cancels that bias); here it gets none.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

# ---- Recipe: thesis Table 3.9 ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The column DeiT-B of Table 3.9, which serves every size; its fields are the columns of Table 3.8's ablation."""

    epochs: Annotated[int, "passes over as many images as the data set has", "1 or more"] = 300
    batch_size: Annotated[int, "images per optimizer step, over all GPUs", "1 or more"] = 1024
    optimizer: Annotated[str, "adamw, nesterov (Table 3.8) or sgd", ("adamw", "nesterov", "sgd")] = "adamw"
    lr: Annotated[float, "peak learning rate; unset: in proportion to the batch", "above 0"] = 1e-3
    min_lr: Annotated[float, "learning rate at the end of the cosine", "0 or more"] = 1e-5  # official code, as the next
    warmup_lr: Annotated[float, "learning rate at step 0", "0 or more"] = 1e-6  # the thesis gives none
    warmup_epochs: Annotated[int, "epochs of linear warm-up", "0 or more"] = 5
    weight_decay: Annotated[float, "not on biases, norms, class token, position embedding", "0 or more"] = 0.05
    clip_grad: Annotated[float | None, "largest norm of the whole gradient; none: no clipping", "above 0"] = None
    img_size: Annotated[tuple[int, int], "training and test resolution in pixels, S or HxW", "1 or more"] = (224, 224)
    repeats: Annotated[int, "repeated augmentation: times an image is taken in a row", "1 or more"] = 3
    augment: Annotated[str, "rand (RandAugment 9/0.5), auto (AutoAugment) or none", ("rand", "auto", "none")] = "rand"
    erasing: Annotated[float, "probability of random erasing", "in [0, 1]"] = 0.25
    mixup: Annotated[float, "alpha of mixup's Beta law; 0: off", "0 or more"] = 0.8
    cutmix: Annotated[float, "alpha of cutmix's Beta law; 0: off", "0 or more"] = 1.0
    mix_group: Annotated[int, "images that share one mixup or cutmix draw (officially: a GPU's)", "1 or more"] = 64
    smoothing: Annotated[float, "label smoothing", "in [0, 1)"] = 0.1
    drop_path: Annotated[float, "stochastic depth: rate of the last block, linear in depth from 0", "in [0, 1)"] = 0.1
    dropout: Annotated[float, "on the embeddings and on the output of every branch", "in [0, 1)"] = 0.0
    ema: Annotated[float, "decay of the averaged weights (Table 3.8: 0.99996); 0: none", "in [0, 1)"] = 0.0
    distillation: Annotated[str, "none, soft (Eq. 3.2) or hard (Eq. 3.3)", ("none", "soft", "hard")] = "none"
    alpha: Annotated[float, "weight of the teacher's term; unset: 0.5 (hard, Eq. 3.3), 0.1 (soft)", "in [0, 1]"] = 0.5
    tau: Annotated[float, "temperature of soft distillation (section 3.4.5)", "above 0"] = 3.0
    eval_crop_ratio: Annotated[float, "share of the resized image that the test crop keeps", "in (0, 1]"] = 0.875


RECIPES = {
    # Table 3.9. 1000 epochs (Table 3.5): --epochs 1000.
    "in1k": Recipe(),
    # Section 3.4.5: 25 epochs at 384, the training's augmentation. The rest: the official run (16 GPUs x 32 images, a
    # constant rate, no stochastic depth), the thesis gives none. A teacher is fine-tuned first (section 3.3).
    "finetune": Recipe(
        epochs=25, batch_size=512, lr=5e-6, min_lr=5e-6, weight_decay=1e-8, img_size=(384, 384), mix_group=32,
        drop_path=0.0,
    ),
    # Section 3.4.4 gives no numbers; CaiT's rule (section 3.7.1.3): the training recipe without distillation, learning
    # rates, peak and last, / 10 (Cars, Flowers, iNaturalist) or / 100 (CIFAR), 1000 epochs (360 on iNaturalist).
    "transfer": Recipe(epochs=1000, lr=1e-4, min_lr=1e-6),
    # Section 3.4.4, CIFAR-10 from scratch: 7200 epochs, images scaled to 224, the rest as on ImageNet.
    "cifar10": Recipe(epochs=7200),
    # Not of the thesis: images of your own (common.script.fit_own); the built-in data set, minutes on two CPU cores.
    "own": Recipe(epochs=30, lr=3e-4, warmup_epochs=0, repeats=1, augment="none", mixup=0.0, cutmix=0.0),
    "shapes": Recipe(
        epochs=6, batch_size=64, lr=2e-3, warmup_epochs=1, img_size=(48, 48), repeats=1, augment="none", erasing=0.0,
        mixup=0.0, cutmix=0.0, mix_group=8, drop_path=0.0,
    ),
}
TEACHER = "regnet_y_16gf"  # section 3.4.2; 82.9 top-1, as have torchvision's weights
TRANSFER = {  # data set: what `transfer` changes for it
    **dict.fromkeys(("cifar10", "cifar100"), dict(lr=1e-5, min_lr=1e-7)),
    **dict.fromkeys(("inat2018", "inat2019"), dict(epochs=360)),
}


def paper_recipe(name: str, model: str, *, distillation: str | None = None, data: str = "") -> Recipe:
    """The recipe's row completed for a model, a kind of distillation and, for `transfer`, a data set.
    A model with the distillation token learns from the hard decisions of its teacher (Eq. 3.3), except in transfer."""
    recipe = RECIPES[name]
    if name == "transfer":
        recipe = dataclasses.replace(recipe, **TRANSFER.get(data.split(":")[0].split("@")[0], {}))
    elif model.endswith("_distilled") and name not in ("own", "shapes"):
        recipe = dataclasses.replace(recipe, distillation="hard")
    return dataclasses.replace(recipe, alpha=0.1) if distillation == "soft" else recipe


# ---- Architecture: thesis section 3.2, distillation token 3.3; sizes: Table 3.1 --------------------------------------

MODELS = {
    "deit_ti": dict(dim=192, depth=12, heads=3, patch=16),
    "deit_s": dict(dim=384, depth=12, heads=6, patch=16),
    "deit_b": dict(dim=768, depth=12, heads=12, patch=16),
    "deit_nano": dict(dim=96, depth=3, heads=3, patch=8),  # not in the thesis: for the built-in data set and for tests
}
MODELS |= {f"{name}_distilled": {**config, "distilled": True} for name, config in MODELS.items()}


class PatchEmbed(nn.Module):
    """Images (B, 3, h p, w p) -> tokens (B, h w, C) of the grid (h, w): a p x p convolution of stride p, as one matrix
    product. AssertionError for images of another size, whose patches would get the places of others."""

    def __init__(self, dim: int, patch: int, grid: tuple[int, int]):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        B, (h, w), p = images.shape[0], self.grid, self.patch
        torch._assert(images.shape[1:] == (3, h * p, w * p), f"this model takes (B, 3, {h * p}, {w * p})")
        x = images.reshape(B, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, 3, p, p)
        return F.linear(x.reshape(B, h * w, 3 * p * p), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        # Softmax cancels the keys' bias: its gradient is rounding noise, which Adam and LAMB would blow up to full
        # steps (and make the result depend on how the batch is cut). It keeps its value and gets no gradient.
        bias = torch.cat([self.qkv.bias[:C], self.qkv.bias[C : 2 * C].detach(), self.qkv.bias[2 * C :]])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, N, C/h)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, hidden width 4 C, (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, C) -> (B, N, C); dropout and stochastic depth fall on each residual branch."""

    def __init__(self, dim: int, heads: int, drop_path: float, dropout: float):
        super().__init__()
        self.drop_path, self.dropout = drop_path, dropout
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def drop(self, branch: torch.Tensor) -> torch.Tensor:
        branch = F.dropout(branch, self.dropout, self.training)
        return stochastic_depth(branch, self.drop_path, "row", self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision transformer: images (B, 3, H, W) -> logits (B, K).

    With the distillation token (Figure 3.1): in training mode the pair (class head, distillation head), in eval mode
    the mean of the two, as the official models return it; `heads` gives the pair in either mode. The position embedding
    covers class token, distillation token and patches, in this order.
    """

    def __init__(
        self, dim: int, *, depth: int, heads: int, patch: int, distilled: bool = False, num_classes: int,
        img_size: tuple[int, int], drop_path: float, dropout: float,
    ):
        super().__init__()
        self.distilled, self.dropout = distilled, dropout
        self.grid = (img_size[0] // patch, img_size[1] // patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + distilled + self.grid[0] * self.grid[1], dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
            nn.init.trunc_normal_(self.dist_token, std=0.02)
        self.patch_embed = PatchEmbed(dim, patch, self.grid)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate, dropout) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        if distilled:
            self.head_dist = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():  # the patch projection keeps the convolution's default, as the official code does
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are not decayed; the distillation token is."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Class token, distillation token if there is one, and patches as the heads are given the tokens: (B, T, C)."""
        x = self.patch_embed(images)
        tokens = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        x = torch.cat([torch.cat(tokens, dim=1).expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def heads(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of the class head and, with the distillation token, of the distillation head, each (B, K)."""
        x = self.forward_features(images)
        return (self.head(x[:, 0]), self.head_dist(x[:, 1])) if self.distilled else (self.head(x[:, 0]),)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        logits = self.heads(images)
        return logits if self.distilled and self.training else sum(logits) / len(logits)


def build_model(
    name: str, num_classes: int = 1000, img_size: int | tuple[int, int] | None = None, drop_path: float | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """A fresh model: a row of MODELS, or "torchvision/NAME" (then only num_classes is used).
    img_size: pixels, S or (H, W), multiples of the patch; None: 224. drop_path None: Table 3.9's 0.1.
    Raises KeyError for an unknown name, ValueError for a size that does not fit.
    """
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None, num_classes=num_classes)
    config = MODELS[name]
    size = whole_patches(img_size or 224, config["patch"], name)
    drop_path = 0.1 if drop_path is None else drop_path
    return ViT(**config, num_classes=num_classes, img_size=size, drop_path=drop_path, dropout=dropout)


def whole_patches(img_size: int | tuple[int, int], patch: int, name: str) -> tuple[int, int]:
    """(H, W) of an image size S or (H, W); ValueError with the nearest good ones if patches do not fill it."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if any(s < patch or s % patch for s in size):
        near = " or ".join("x".join(str(max(patch, (s // patch + up) * patch)) for s in size) for up in (0, 1))
        given = f"image size {size[0]}x{size[1]} is not a multiple of {name}'s patch of {patch}"
        raise ValueError(f"{given}; the nearest are {near}")
    return size


def resize_pos_embed(pos_embed: torch.Tensor, grid: tuple[int, int], *, old_grid: tuple[int, int]) -> torch.Tensor:
    """Position embedding (1, prefix + N, C) for another grid than the old one: bicubic (a = -0.75), which about keeps
    the vectors' norm (section 3.4.5), not antialiased, in float32 or wider; prefix tokens stay."""
    prefix = pos_embed.shape[1] - old_grid[0] * old_grid[1]
    if old_grid == tuple(grid):
        return pos_embed
    patches = pos_embed[:, prefix:].to(torch.promote_types(pos_embed.dtype, torch.float32))
    patches = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :prefix], patches], dim=1)


def fit_resolution(model: nn.Module, state: dict[str, torch.Tensor], content: dict, say) -> None:
    """Resizes the position embedding in `state`, of the checkpoint `content`, to the model's resolution."""
    held = state.get("pos_embed")
    if held is None or held.ndim != 3 or not hasattr(model, "grid"):
        return
    prefix = model.pos_embed.shape[1] - math.prod(model.grid)
    try:
        old_grid = tuple(side // model.patch_embed.patch for side in content["recipe"]["img_size"])
    except (KeyError, TypeError):  # it does not say: the model's where that fits, else a square
        side = math.isqrt(max(0, held.shape[1] - prefix))
        old_grid = model.grid if held.shape == model.pos_embed.shape else (side, side)
    if old_grid != model.grid and held.shape[1] == prefix + math.prod(old_grid):  # else loading says what does not fit
        state["pos_embed"] = resize_pos_embed(held, model.grid, old_grid=old_grid)
        say(f"position embedding resized to {model.grid[0]} x {model.grid[1]} patches")


# ---- Loss: section 3.3 -----------------------------------------------------------------------------------------------


def distillation_loss(
    outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor,
    teacher_logits: torch.Tensor | None, kind: str = "none", alpha: float = 0.5, tau: float = 1.0,
) -> torch.Tensor:
    """(1 - alpha) CE(class head, targets) + alpha times the teacher's term on the distillation head, averaged over B.
    soft (Eq. 3.2): tau^2 KL(teacher || student), both softened by tau; hard (Eq. 3.3): CE with the teacher's decision.
    outputs: logits (B, K) of the only head, which then takes both terms ("usual" distillation), or the pair of heads.
    targets: class indices (B,) or soft targets (B, K). kind "none": the first term alone, unweighted.
    """
    if kind not in ("none", "soft", "hard"):
        raise ValueError(f"kind {kind!r}: must be none, soft or hard")
    class_logits, student = (outputs, outputs) if isinstance(outputs, torch.Tensor) else outputs
    base = F.cross_entropy(class_logits, targets)
    if kind == "none":
        return base
    if kind == "soft":
        log_student, log_teacher = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher_logits / tau, dim=1)
        distillation = tau**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    else:
        distillation = F.cross_entropy(student, teacher_logits.argmax(dim=1))
    return (1 - alpha) * base + alpha * distillation


def label_loss(outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the true label, without a teacher: of the only head, or the mean over both heads."""
    heads = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return sum(F.cross_entropy(logits, targets) for logits in heads) / len(heads)


def predict(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits (B, K) for evaluation; of a distilled model (section 3.3, rows of Table 3.3) "class" and "distillation":
    those of its heads, and "": the late fusion, the log of the mean of their softmax outputs."""
    if not getattr(model, "distilled", False):
        return {"": model(images)}
    class_logits, dist_logits = model.heads(images)
    fusion = torch.logaddexp(F.log_softmax(class_logits, dim=1), F.log_softmax(dist_logits, dim=1)) - math.log(2)
    return {"": fusion, "class": class_logits, "distillation": dist_logits}


# ---- Augmentation: Table 3.9 -----------------------------------------------------------------------------------------


def random_resized_crop(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, crop height, crop width): area 8-100% of the image, aspect 3/4..4/3 (log-uniform), ten attempts; if
    none fits, the central crop with the aspect ratio clamped to that range."""
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return rng.randint(0, height - crop_height), rng.randint(0, width - crop_width), crop_height, crop_width
    crop_height, crop_width = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def erasing_box(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Random erasing's (top, left, box height, box width): area 2-33% of the image, height/width 0.3..1/0.3
    (log-uniform); ten attempts at a box smaller than the image in both directions, else none: (0, 0, 0, 0)."""
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            return rng.randint(0, height - box_height), rng.randint(0, width - box_width), box_height, box_width
    return 0, 0, 0, 0


class TrainTransform:
    """A loader process' part; normalisation, erasing and mixing run on the device, a batch at a time.

    (uint8 image (3, H, W), rng) -> (uint8 (3, *img_size), parameters for `erase`: top, left, height, width of the box,
    seed of its noise; height 0: nothing is erased).
    """

    def __init__(self, recipe: Recipe):
        self.size, self.policy, self.erasing = recipe.img_size, recipe.augment, recipe.erasing
        self.auto = v2.AutoAugment(interpolation=v2.InterpolationMode.BICUBIC, fill=FILL)  # as officially

    def __call__(self, image: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, tuple[float, ...]]:
        from common import images

        top, left, height, width = random_resized_crop(*image.shape[1:], rng)
        image = images.resize(image[:, top : top + height, left : left + width], self.size)
        if rng.random() < 0.5:
            image = image.flip(-1)
        if self.policy == "rand":
            image = images.from_pil(rand_augment(images.to_pil(image), rng))
        elif self.policy == "auto":  # torchvision's policy draws from torch's global generator: seed it for this image
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.getrandbits(63))
                image = images.from_pil(self.auto(images.to_pil(image)))
        box = erasing_box(*self.size, rng) if rng.random() < self.erasing else (0, 0, 0, 0)
        return image, (*box, rng.getrandbits(24))  # whole numbers up to 2^24 are exact in float32


def erase(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Random erasing of normalised images (B, 3, H, W), in place: boxes (B, 5) of TrainTransform, which stay on the
    host, get standard normal noise. Each has a generator of its own: the noise depends on the image alone."""
    generator = torch.Generator(images.device)
    for image, (top, left, height, width, seed) in zip(images, parameters.int().tolist()):
        if height:
            noise = torch.randn((3, height, width), generator=generator.manual_seed(seed), device=images.device)
            image[:, top : top + height, left : left + width] = noise
    return images


FILL = (124, 116, 104)  # round(255 * ImageNet mean)


def rand_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """RandAugment as DeiT uses it (timm's rand-m9-mstd0.5-inc1): two draws from 15 operations, each applied with
    probability 0.5 at magnitude N(9, 0.5) clipped to 0..10."""
    for _ in range(2):
        operation = rng.choice(OPERATIONS)
        if rng.random() <= 0.5:
            level = min(10.0, max(0.0, rng.gauss(9, 0.5))) / 10
            image = apply_operation(image, operation, level, -1 if rng.random() > 0.5 else 1)
    return image


OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)


def apply_operation(image: Image.Image, operation: str, level: float, sign: int) -> Image.Image:
    """One operation of RandAugment at level 0..1 ("increasing" variant: a higher level always changes more)."""

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)

    if operation in ("AutoContrast", "Equalize", "Invert"):
        return getattr(ImageOps, operation.lower())(image)
    if operation in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, operation)(image).enhance(1 + sign * 0.9 * level)
    if operation == "Posterize":
        bits = 4 - int(4 * level)
        return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)  # recent Pillow refuses 0 bits
    if operation == "Solarize":
        return ImageOps.solarize(image, 256 - int(256 * level))
    if operation == "SolarizeAdd":
        add = int(110 * level)
        return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)
    if operation == "Rotate":
        return image.rotate(sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=FILL)
    if operation == "ShearX":
        return affine(1, sign * 0.3 * level, 0, 0, 1, 0)
    if operation == "ShearY":
        return affine(1, 0, 0, sign * 0.3 * level, 1, 0)
    if operation == "TranslateX":
        return affine(1, 0, sign * 0.45 * level * image.width, 0, 1, 0)
    return affine(1, 0, 0, 0, 1, sign * 0.45 * level * image.height)


class Mix(NamedTuple):
    """One draw: the image's own share `lam`, and cutmix's box (top, bottom, left, right) in pixels (None: mixup)."""

    lam: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(recipe: Recipe, rng: random.Random) -> Mix:
    """Cutmix or mixup with equal chances (one of them alone if the other's alpha is 0); lam from Beta(alpha, alpha)."""
    if not recipe.mixup and not recipe.cutmix:
        return Mix(1.0)
    cut = rng.random() < 0.5 if recipe.mixup and recipe.cutmix else bool(recipe.cutmix)
    alpha = recipe.cutmix if cut else recipe.mixup
    lam = rng.betavariate(alpha, alpha)
    if not cut:
        return Mix(lam)
    height, width = recipe.img_size
    return cutmix_box(lam, height, width, rng.randrange(height), rng.randrange(width))


def cutmix_box(lam: float, height: int, width: int, cy: int, cx: int) -> Mix:
    """Box of about (1 - lam) of the area around (cy, cx), clipped to the image; lam becomes what the clipped box
    leaves. An odd side loses a pixel, as in the official code."""
    half_h, half_w = int(height * math.sqrt(1 - lam)) // 2, int(width * math.sqrt(1 - lam)) // 2
    top, bottom = max(cy - half_h, 0), min(cy + half_h, height)
    left, right = max(cx - half_w, 0), min(cx + half_w, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_images(images: torch.Tensor, mixes: list[Mix]) -> torch.Tensor:
    """(B, 3, H, W) cut into len(mixes) groups; image i of a group is mixed with its image G-1-i by the group's draw."""
    groups = []
    for x, mix in zip(images.chunk(len(mixes)), mixes):
        if mix.box is not None:
            top, bottom, left, right = mix.box
            mixed = x.clone()
            mixed[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
            x = mixed
        elif mix.lam != 1:
            x = x * mix.lam + x.flip(0) * (1 - mix.lam)
        groups.append(x)
    return torch.cat(groups)


def mix_targets(labels: torch.Tensor, mixes: list[Mix], num_classes: int, smoothing: float) -> torch.Tensor:
    """Labels (B,) -> soft targets (B, K): lam on the image's own label, 1 - lam on its partner's, both smoothed."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)
    return torch.cat([t * mix.lam + t.flip(0) * (1 - mix.lam) for t, mix in zip(targets.chunk(len(mixes)), mixes)])


# ---- Training --------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None):
    """(arguments, the recipe with the flags given, the paper's recipe)."""
    from common import cli

    parser = cli.make_parser("deit", __doc__, Recipe, RECIPES, model="deit_b", recipe="in1k", teacher=TEACHER)
    args = cli.parse(parser, argv, [*MODELS, "torchvision/NAME"], RECIPES)
    paper = paper_recipe(args.recipe, args.model, distillation=args.distillation, data=args.data or "")
    recipe = cli.override(paper, args)
    if recipe.distillation == "none":
        cli.refuse(args, ("alpha", "tau"), "has no effect without a teacher; add --distillation hard or soft")
    if recipe.distillation == "hard":
        cli.refuse(args, ("tau",), "hard distillation has no temperature; use --distillation soft")
    if args.model not in MODELS:
        cli.refuse(args, ("drop_path", "dropout"), "torchvision's models have their own; leave it out")
    return args, recipe, paper


def make_model(args, recipe: Recipe, num_classes: int) -> nn.Module:
    """build_model for a command line."""
    return build_model(args.model, num_classes, recipe.img_size, recipe.drop_path, recipe.dropout)


def load_model(source: str, device: str = "cpu") -> tuple:
    """(model in eval mode, class names, transform) of a checkpoint, ours or official: see common.models.load."""
    from common.models import load
    return load("deit", source, device)


def train(run) -> None:
    """The loop; what it starts from (data, network, teacher, what was saved) is common.script.set_up's."""
    from common import evaluate, script
    from common.optim import cosine_lr

    recipe = run.recipe

    def prepare(batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(images before mixing, images as the network sees them, soft targets) on the device."""
        mixes = [draw_mix(recipe, run.rng("mix", group)) for group in batch.groups]
        images = erase(evaluate.normalize(batch.images), batch.parameters)
        targets = mix_targets(batch.labels, mixes, run.num_classes, recipe.smoothing)
        return images, mix_images(images, mixes), targets

    def lr_at(epochs: float) -> float:
        return cosine_lr(epochs, recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.min_lr, recipe.warmup_lr)

    data, model, wrapped, optimizer, precision, ema, teacher = script.set_up(
        run, TrainTransform(recipe), make_model, prepare, adapt=fit_resolution, teacher=TEACHER
    )
    for epoch in range(run.epoch, recipe.epochs):
        wrapped.train()
        for step in run.steps(data):
            for batch in data.micro_batches():
                _, images, targets = prepare(batch)
                with precision.forward(wrapped):
                    outputs = wrapped(images)
                    if teacher:
                        kind, alpha, tau = recipe.distillation, recipe.alpha, recipe.tau
                        loss = distillation_loss(outputs, targets, teacher(images), kind, alpha, tau)
                    else:
                        loss = label_loss(outputs, targets)
                precision.backward(loss)
            lr = lr_at(epoch + step / data.steps)
            stats, skipped = precision.step(optimizer, lr, asked=run.asked())
            if ema:
                ema.update(model, skip=skipped)
            run.after_step(stats, lr)
        record = run.end_of_training_epoch(lr_at(epoch + 1)) | evaluate.validate(run, predict)
        run.end_of_epoch(record, record.get("val_top1"))
    script.finish(run, ["train_loss", "val_loss"], ["val_top1", "val_top5"])


def main() -> None:
    from common import script

    script.run_script(
        "deit", *parse_args(), MODELS, train=train, make_model=make_model,
        adapt=fit_resolution, predict=predict, loss=lambda model, images, labels: label_loss(model(images), labels),
    )


if __name__ == "__main__":
    try:
        from common.script import launch
    except Exception as error:  # another common may raise anything
        print(f"error: {error}; needs torch 2.6, tqdm, our common/ (got {sys.modules.get('common')})", file=sys.stderr)
        sys.exit(2)
    launch(main)
