"""PatchConvNet: Augmenting convolutional networks with attention-based aggregation (Touvron, Cord, El-Nouby, Bojanowski,
Joulin, Synnaeve, Jegou; arXiv:2112.13692; thesis chapter 5).

New: a convnet of one resolution, made of patches from a convolutional stem and a column of identical blocks, topped by one
attention layer with one head: its single softmax says how much each patch counts, as one map or as one map per class.
PatchConvNet-S60 reaches 82.1 top-1 on ImageNet at 224 pixels, B120 84.1 (Table 5.1).

    torchrun --nproc_per_node 8 patchconvnet.py --model patchconvnet_s60 --data /imagenet      # the paper's run
    python patchconvnet.py --model patchconvnet_nano --recipe shapes                           # minutes on two CPU cores
    python patchconvnet.py --model patchconvnet_nano --weights runs/patchconvnet_patchconvnet_nano/last.pt --attention-maps a.jpg --out maps

Checked here: state-dict keys and logits of the official models, other resolutions, the pooling against its definition, the
augmentation by DeiT's numbers (tests/). Not run here: ImageNet.

Axes: B images, H x W patches, N = H W, C channels, K classes, T class tokens (1 or K).

Where the official code differs from what stands here:
- it keeps tokens (B, N, C) and transposes them around every block; here (B, H, W, C) goes through the whole column, 1 x 1
  convolutions are linear layers on it and the depth-wise ones see it as channels-last: nothing is copied;
- its maps must be square; here any size will do;
- its classifiers of one token per class are K layers, run one after the other; the keys are kept, the work is one product,
  in pieces of 128 classes, recomputed in the backward pass;
- the keys' bias gets there a gradient that is rounding noise (softmax cancels it); here it keeps its value and gets none;
- its kept branches under stochastic depth are computed for all samples and masked; here for the kept ones only;
- its starting values of LayerScale are 1e-4 for S60 and 1e-6 for S120, B120 and L60; the thesis gives none. Here: 1e-4 for S
  up to 60 blocks, else 1e-6;
- learning rate and mixup draw: as said in deit.py.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

# ---- Recipe: thesis section 5.2.3 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Section 5.2.3, training on ImageNet-1k; what depends on the model stands in MODELS."""

    epochs: Annotated[int, "passes over as many images as the data set has"] = 400
    batch_size: Annotated[int, "images per optimizer step, over all GPUs"] = 2048
    optimizer: Annotated[str, "lamb, adamw or sgd", ("lamb", "adamw", "sgd")] = "lamb"
    lr: Annotated[float, "peak learning rate, at that batch size"] = 3e-3
    min_lr: Annotated[float, "learning rate at the end of the cosine"] = 1e-5  # official code; the thesis gives none
    warmup_lr: Annotated[float, "learning rate at step 0"] = 1e-6  # official code; the thesis gives none
    warmup_epochs: Annotated[int, "epochs of linear warm-up"] = 5  # chapter 3
    weight_decay: Annotated[float, "not on biases, norms, LayerScale, class token; wider than S: 0.05"] = 0.01
    clip_grad: Annotated[float | None, "largest norm of the whole gradient; none: no clipping"] = None
    img_size: Annotated[tuple[int, int], "training and test resolution in pixels, S or HxW"] = (224, 224)
    repeats: Annotated[int, "repeated augmentation: times an image is taken in a row"] = 3
    augment: Annotated[str, "rand (RandAugment 9/0.5), auto (AutoAugment) or none", ("rand", "auto", "none")] = "rand"
    mixup: Annotated[float, "alpha of mixup's Beta law; 0: off"] = 0.8
    cutmix: Annotated[float, "alpha of cutmix's Beta law; 0: off"] = 1.0
    mix_group: Annotated[int, "images that share one mixup or cutmix draw (a GPU's batch in the official runs)"] = 64
    smoothing: Annotated[float, "label smoothing"] = 0.1
    drop_path: Annotated[float | None, "stochastic depth, the same rate in every block; unset: Table 5.8"] = None
    stem: Annotated[str, "conv, or linear projection of patches (Table 5.7)", ("conv", "linear")] = "conv"
    norm: Annotated[str, "of the column's blocks: layernorm or batchnorm (Table 5.8)", ("layernorm", "batchnorm")] = "layernorm"
    pooling: Annotated[str, "attention (one head), multi-head or average (Table 5.7)", ("attention", "multi-head", "average")] = "attention"
    class_tokens: Annotated[str, "single, or per_class: one token and one map for each class", ("single", "per_class")] = "single"
    eval_crop_ratio: Annotated[float, "share of the resized image that the test crop keeps"] = 1.0


RECIPES = {
    "in1k": Recipe(),
    # Section 5.2.3: batch 1024, rate "fixed" to 1e-5, weight decay 0.01, 10 epochs, drop-path less 0.1 (section 5.3.4).
    # Also for one token per class (Figure 5.6): --class-tokens per_class --img-size 224.
    "finetune": Recipe(epochs=10, batch_size=1024, lr=1e-5, min_lr=1e-5, warmup_epochs=0, img_size=(384, 384)),
    # Section 5.2.3: 90 epochs; repeated augmentation on ImageNet-1k only.
    "in21k": Recipe(epochs=90, repeats=1),
    "in21k_to_in1k": Recipe(epochs=100, batch_size=1024, lr=5e-4),
    # Table 5.5, "the procedure used in chapter 3": CaiT's rule (section 3.7.1.3), learning rate / 10 (Cars, Flowers,
    # iNaturalist) or / 100 (CIFAR), 1000 epochs (360 on iNaturalist). At 320: --img-size 320.
    "transfer": Recipe(epochs=1000, lr=3e-4, min_lr=1e-6),
    # Not of the thesis: the built-in data set in minutes on two CPU cores.
    "shapes": Recipe(
        epochs=6,
        batch_size=64,
        lr=1e-2,
        warmup_epochs=1,
        img_size=(48, 48),
        repeats=1,
        augment="none",
        mixup=0.0,
        cutmix=0.0,
        mix_group=8,
    ),
}
TRANSFER = {  # data set: what `transfer` changes for it
    "cifar10": dict(lr=3e-5),
    "cifar100": dict(lr=3e-5),
    "inat2018": dict(epochs=360),
    "inat2019": dict(epochs=360),
}


def paper_recipe(name: str, model: str, *, data: str = "") -> Recipe:
    """The recipe's row completed for a model and, for `transfer`, a data set."""
    recipe = RECIPES[name]
    if name == "transfer":
        recipe = dataclasses.replace(recipe, **TRANSFER.get(data.split(":")[0].split("@")[0], {}))
    row = MODELS.get(model, {})
    drop_path = row.get("drop_path")
    if drop_path and name in ("finetune", "in21k_to_in1k"):  # section 5.3.4
        drop_path = round(max(0.0, drop_path - 0.1), 4)
    if name == "in1k" and row.get("dim", 0) > 384:
        recipe = dataclasses.replace(recipe, weight_decay=0.05)
    return dataclasses.replace(recipe, drop_path=drop_path)


# ---- Architecture: section 5.2.1; drop rates: Table 5.8 ----------------------------------------------------------------

MODELS = {
    "patchconvnet_s20": dict(dim=384, depth=20, drop_path=0.0, layer_scale=1e-4),
    "patchconvnet_s36": dict(dim=384, depth=36, drop_path=0.05, layer_scale=1e-4),
    "patchconvnet_s60": dict(dim=384, depth=60, drop_path=0.15, layer_scale=1e-4),
    "patchconvnet_s120": dict(dim=384, depth=120, drop_path=0.2, layer_scale=1e-6),
    "patchconvnet_b36": dict(dim=768, depth=36, drop_path=0.2, layer_scale=1e-6),
    "patchconvnet_b60": dict(dim=768, depth=60, drop_path=0.3, layer_scale=1e-6),
    "patchconvnet_b120": dict(dim=768, depth=120, drop_path=0.4, layer_scale=1e-6),
    "patchconvnet_l60": dict(dim=1024, depth=60, drop_path=0.3, layer_scale=1e-6),  # not in Table 5.8: B60's rate
    "patchconvnet_l120": dict(dim=1024, depth=120, drop_path=0.4, layer_scale=1e-6),  # not in Table 5.8: B120's rate
    "resnet50_attention": dict(dim=2048, layer_scale=1e-4),  # section 5.3.4: this pooling on torchvision's ResNet-50
    # Not in the thesis: for the built-in data set and for tests; patches of 8 pixels from a stem of three convolutions.
    "patchconvnet_nano": dict(dim=64, depth=4, drop_path=0.0, layer_scale=0.1, stride=8),
}


class ConvStem(nn.Module):
    """Images (B, 3, H', W') -> patches (B, H, W, C): 3 x 3 convolutions of stride 2, each doubling the channels up to C,
    with a GELU between them; four of them: H = H'/16."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        steps = stride.bit_length() - 1
        widths = [3] + [dim >> (steps - 1 - i) for i in range(steps)]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


class LinearStem(nn.Module):
    """Images -> patches (B, H, W, C) by one linear projection, as in a ViT (Table 5.7)."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=stride, stride=stride)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).permute(0, 2, 3, 1).contiguous()


class SqueezeExcitation(nn.Module):
    """Channels rescaled by a gate made of their means (arXiv:1709.01507), x (B, H, W, C) -> same."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(dim, dim // 4, 1)
        self.conv_expand = nn.Conv2d(dim // 4, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(pointwise(self.conv_expand, F.relu(pointwise(self.conv_reduce, x.mean(dim=(1, 2), keepdim=True)))))


def pointwise(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A 1 x 1 convolution of (..., C) as the linear layer that it is."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class ConvBranch(nn.Module):
    """1 x 1, GELU, depth-wise 3 x 3, GELU, squeeze-and-excitation, 1 x 1 (Figure 5.1), (B, H, W, C) -> same.

    The attribute's name is the official checkpoints': there is neither query nor position in it.
    """

    def __init__(self, dim: int):
        super().__init__()
        depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.qkv_pos = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.GELU(), depthwise, nn.GELU(), SqueezeExcitation(dim), nn.Conv2d(dim, dim, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, gelu, depthwise, _, squeeze, last = self.qkv_pos
        x = gelu(pointwise(first, x))
        x = depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels-last both ways: views
        return pointwise(last, squeeze(gelu(x)))


# Copied from cait.py
@torch.compiler.disable
def kept_samples(batch: int, drop_rate: float, device: torch.device) -> tuple[torch.Tensor, float]:
    """Stochastic depth's draw: (indices of the samples that keep the branch, factor on their branch).

    Drawn on the CPU generator: the count is then known to the host and a GPU never has to be waited for.
    If no sample keeps it, sample 0 is returned with factor 0, so that every parameter still gets its (zero) gradient.
    """
    kept = (torch.rand(batch) >= drop_rate).nonzero().flatten()
    if len(kept) == 0:
        return torch.zeros(1, dtype=torch.long, device=device), 0.0
    if device.type == "cuda":
        kept = kept.pin_memory().to(device, non_blocking=True)
    return kept, 1 / (1 - drop_rate)


# Adapted from deit.py: one convolutional branch, LayerScale, stochastic depth on the kept samples only
class Block(nn.Module):
    """Block of the column, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, norm: str, layer_scale: float, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm1 = nn.BatchNorm2d(dim) if norm == "batchnorm" else nn.LayerNorm(dim, eps=1e-6)
        self.attn = ConvBranch(dim)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        normalized = self.norm1(x) if isinstance(self.norm1, nn.LayerNorm) else self.norm1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.gamma_1 * self.attn(normalized)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path == 0:
            return x + self.branch(x)
        if not isinstance(self.norm1, nn.LayerNorm):  # BatchNorm's statistics are those of all images
            return x + stochastic_depth(self.branch(x), self.drop_path, "row")
        kept, factor = kept_samples(len(x), self.drop_path, x.device)
        return x.index_add(0, kept, self.branch(x[kept]).to(x.dtype), alpha=factor)


# Adapted from deit.py: hidden width 3 C
class MLP(nn.Module):
    """Two linear layers with a GELU between them, hidden width 3 C, (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 3 * dim)
        self.fc2 = nn.Linear(3 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LearnedAggregation(nn.Module):
    """Cross-attention of class tokens (B, T, C) to the keys and values (B, h, L, C/h) of z (B, L, C): (B, T, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.k.bias.requires_grad_(False)  # softmax cancels it

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C) -> (B, h, L, C/h)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys(self, z: torch.Tensor) -> torch.Tensor:
        return self.split(F.linear(z, self.k.weight))

    def values(self, z: torch.Tensor) -> torch.Tensor:
        return self.split(self.v(z))

    def weights(self, tokens: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """How much each of L counts for each token: (B, h, T, L)."""
        q = self.split(self.q(tokens))
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.proj((self.weights(tokens, k).to(v.dtype) @ v).transpose(1, 2).flatten(2))


class AggregationBlock(nn.Module):
    """Attention-based pooling (section 5.2.1): class tokens (B, T, C), patches (B, N, C) -> class tokens, then an FFN.

    A single token is among the keys, as in CaiT; tokens of classes see the patches only, hence do not see each other and
    can be worked on in pieces.
    """

    def __init__(self, dim: int, heads: int, layer_scale: float, per_class: bool):
        super().__init__()
        self.per_class = per_class
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = LearnedAggregation(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def attended(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        return self.norm1(patches if self.per_class else torch.cat([tokens, patches], dim=1))

    def weights(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """The share of each patch in the weighted sum, (B, h, T, N)."""
        k = self.attn.keys(self.attended(tokens, patches))
        return self.attn.weights(self.norm1(tokens), k)[..., -patches.shape[1] :]

    def forward(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        z = self.attended(tokens, patches)
        return self.aggregate(tokens, self.attn.keys(z), self.attn.values(z))

    def aggregate(self, tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.gamma_1 * self.attn(self.norm1(tokens), k, v)
        return tokens + self.gamma_2 * self.mlp(self.norm2(tokens))


class PatchConvNet(nn.Module):
    """Images (B, 3, H', W') of any size -> logits (B, K).

    trunk None: the column of `depth` blocks; else a convnet, (B, 3, H', W') -> (B, C, H, W), in its place.
    """

    CLASSES_AT_ONCE = 128  # of per-class tokens: bounds the memory by B x 128 x 3 C, whatever K

    def __init__(
        self,
        dim: int,
        *,
        depth: int = 0,
        stride: int = 16,
        trunk: nn.Module | None = None,
        num_classes: int,
        drop_path: float = 0.0,
        layer_scale: float,
        stem: str,
        norm: str,
        pooling: str,
        class_tokens: str,
    ):
        super().__init__()
        self.grad_checkpoint, self.per_class = False, class_tokens == "per_class"
        if pooling != "average":
            self.cls_token = nn.Parameter(torch.zeros(1, num_classes if self.per_class else 1, dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if trunk is None:
            self.patch_embed = ConvStem(dim, stride) if stem == "conv" else LinearStem(dim, stride)
            self.blocks = nn.ModuleList(Block(dim, norm, layer_scale, drop_path) for _ in range(depth))
        else:
            self.trunk = trunk
        if pooling != "average":
            heads = dim // 48 if pooling == "multi-head" else 1  # CaiT's 48 channels per head
            self.blocks_token_only = nn.ModuleList([AggregationBlock(dim, heads, layer_scale, self.per_class)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if self.per_class:
            self.head = nn.ModuleList(nn.Linear(dim, 1) for _ in range(num_classes))
        else:
            self.head = nn.Linear(dim, num_classes)
        for module in self.modules():  # convolutions keep their default, as in the official code
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are not decayed all the same."""
        return {"cls_token"}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Patches before the pooling, (B, H, W, C)."""
        if hasattr(self, "trunk"):
            return self.trunk(images).permute(0, 2, 3, 1)
        x = self.patch_embed(images)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpoint and self.training else block(x)
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.features(images).flatten(1, 2)  # (B, N, C)
        if not hasattr(self, "cls_token"):
            return self.head(self.norm(patches.mean(dim=1)))
        if not self.per_class:
            tokens = self.cls_token.repeat(len(patches), 1, 1)
            return self.head(self.norm(self.blocks_token_only[0](tokens, patches))[:, 0])
        weight, bias = torch.cat([h.weight for h in self.head]), torch.cat([h.bias for h in self.head])  # (K, C), (K,)
        size = self.CLASSES_AT_ONCE
        pieces = zip(self.cls_token.split(size, dim=1), weight.split(size), bias.split(size))
        pool = self.blocks_token_only[0]
        z = pool.norm1(patches)
        k, v = pool.attn.keys(z), pool.attn.values(z)  # of the patches alone: the same for all classes
        run = (lambda *a: checkpoint(self.class_logits, *a, use_reentrant=False)) if self.training else self.class_logits
        return torch.cat([run(t, k, v, w, b) for t, w, b in pieces], dim=1)

    def class_logits(
        self, tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, T) of T classes with tokens (1, T, C), each by its own classifier (T, C), (T,)."""
        x = self.norm(self.blocks_token_only[0].aggregate(tokens.repeat(len(k), 1, 1), k, v))
        return torch.einsum("btc,tc->bt", x, weight.to(x.dtype)) + bias


def build_model(
    name: str,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    drop_path: float | None = None,
    *,
    class_tokens: str = "single",
    stem: str = "conv",
    norm: str = "layernorm",
    pooling: str = "attention",
) -> nn.Module:
    """A fresh model: a row of MODELS, or "torchvision/NAME" (then only num_classes is used).

    img_size is not needed: the model takes any (with stem "linear" multiples of the patch: then it is checked).
    drop_path None: Table 5.8's. class_tokens, stem, norm, pooling: Table 5.7, see Recipe. Raises KeyError for an unknown
    name, ValueError for options that do not go together.
    """
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None, num_classes=num_classes)
    config = dict(MODELS[name])
    if class_tokens == "per_class" and pooling == "average":
        raise ValueError("class_tokens per_class: average pooling has no class tokens")
    if name == "resnet50_attention":
        if (stem, norm) != ("conv", "layernorm"):
            raise ValueError("resnet50_attention: stem and norm are ResNet's own")
        trunk = nn.Sequential(*list(torchvision.models.resnet50(weights=None).children())[:-2])  # without pooling and fc
        config.update(trunk=trunk)
    else:
        config["drop_path"] = config["drop_path"] if drop_path is None else drop_path
        if stem == "linear":
            whole_patches(img_size or 224, config.get("stride", 16), name)
    return PatchConvNet(**config, num_classes=num_classes, stem=stem, norm=norm, pooling=pooling, class_tokens=class_tokens)


# Copied from deit.py
def whole_patches(img_size: int | tuple[int, int], patch: int, name: str) -> tuple[int, int]:
    """(H, W) of an image size S or (H, W); ValueError with the nearest good ones unless it is a multiple of the patch."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if any(s < patch or s % patch for s in size):
        near = " or ".join("x".join(str(max(patch, (s // patch + up) * patch)) for s in size) for up in (0, 1))
        raise ValueError(f"image size {size[0]}x{size[1]} is not a multiple of {name}'s patch of {patch}; the nearest are {near}")
    return size


def carry_over(model: nn.Module, state: dict[str, torch.Tensor], content: dict, say) -> None:
    """Weights of a single-token model for one with a token per class (section 5.2.1, done in a fine-tuning stage).

    Every class starts from the single token and from its own row of the classifier; all else stays. What changes is that
    the token is no longer among the keys.
    """
    from common.errors import UserError

    if not getattr(model, "per_class", False) or "head.weight" not in state:
        return
    K, found = model.cls_token.shape[1], len(state["head.weight"])
    if found != K:
        raise UserError(f"--class-tokens per_class: the weights have {found} classes, the data {K}; train a single token on them first")
    weight, bias = state.pop("head.weight"), state.pop("head.bias")
    state["cls_token"] = state["cls_token"].repeat(1, K, 1)
    state.update({f"head.{i}.weight": weight[i : i + 1] for i in range(K)} | {f"head.{i}.bias": bias[i : i + 1] for i in range(K)})
    say(f"class token and classifier carried over to {K} tokens, one per class")


# ---- Analysis: Figures 5.5 and 5.6 -------------------------------------------------------------------------------------


# Adapted from cait.py: one block, its share of every patch, per class where there are such tokens
@torch.no_grad()
def attention_maps(model: PatchConvNet, images: torch.Tensor, classes: list[int] | None = None) -> torch.Tensor:
    """Each patch's share in the pooling, mean over heads: (B, T, H, W), T = 1 or, with per-class tokens, len(classes)."""
    features = model.features(images)
    tokens = model.cls_token if classes is None or not model.per_class else model.cls_token[:, classes]
    weights = model.blocks_token_only[0].weights(tokens.expand(len(images), -1, -1), features.flatten(1, 2))
    return weights.mean(dim=1).unflatten(2, features.shape[1:3])


@torch.no_grad()
def vit_attention_map(vit: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A ViT's class token in its last block (of deit.py or deit3.py), mean over heads: (B, H, W)."""
    seen, attn = [], vit.blocks[-1].attn
    hook = attn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    vit(images)
    hook.remove()
    q, k, _ = attn.qkv(seen[0]).unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, L, C/h)
    weights = (q[:, :, :1] * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1).mean(dim=1)[:, 0]
    return weights[:, -vit.grid[0] * vit.grid[1] :].unflatten(1, vit.grid)


# Copied from cait.py
def saliency(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Figure 3.10: the first block's maps (B, h, H/p, W/p) -> (B, *size) in 0..1: mean over heads, upsampled,
    (x - min) / (max - min)."""
    x = F.interpolate(maps.mean(dim=1, keepdim=True).float(), size=size, mode="bicubic", align_corners=False)[:, 0]
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-12)


# ---- Augmentation: section 5.2.3 ---------------------------------------------------------------------------------------
#
# A loader process decodes, crops, flips and applies RandAugment; normalisation and mixing run on the device, a batch at a
# time.


# Copied from deit.py
def random_resized_crop(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, crop height, crop width): area 8-100% of the image, aspect 3/4..4/3 (log-uniform), ten attempts.

    If none fits: the central crop with the aspect ratio clamped to that range.
    """
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return rng.randint(0, height - crop_height), rng.randint(0, width - crop_width), crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < 3 / 4:
        crop_height = min(height, max(1, round(width / (3 / 4))))
    elif width / height > 4 / 3:
        crop_width = min(width, max(1, round(height * (4 / 3))))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


# Adapted from deit.py: no erasing
class TrainTransform:
    """The loader's part of the augmentation: (uint8 image (3, H, W), rng) -> (uint8 (3, *img_size), no parameters)."""

    def __init__(self, recipe: Recipe):
        self.size, self.policy = recipe.img_size, recipe.augment
        self.auto = v2.AutoAugment()

    def __call__(self, image: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, tuple[float, ...]]:
        from common.images import from_pil, resize, to_pil

        top, left, height, width = random_resized_crop(*image.shape[1:], rng)
        image = resize(image[:, top : top + height, left : left + width], self.size)
        if rng.random() < 0.5:
            image = image.flip(-1)
        if self.policy == "rand":
            image = from_pil(rand_augment(to_pil(image), rng))
        elif self.policy == "auto":  # torchvision's policy draws from torch's global generator: seed it for this image
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.getrandbits(63))
                image = self.auto(image)
        return image, ()


# Copied from deit.py
FILL = (124, 116, 104)  # round(255 * ImageNet mean)


# Copied from deit.py
def rand_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """RandAugment as DeiT uses it (timm's rand-m9-mstd0.5-inc1): two draws from 15 operations, each applied with
    probability 0.5 at magnitude N(9, 0.5) clipped to 0..10."""
    for _ in range(2):
        operation = rng.choice(OPERATIONS)
        if rng.random() <= 0.5:
            level = min(10.0, max(0.0, rng.gauss(9, 0.5))) / 10
            image = apply_operation(image, operation, level, -1 if rng.random() > 0.5 else 1)
    return image


# Copied from deit.py
OPERATIONS = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY")  # fmt: skip


# Copied from deit.py
def apply_operation(image: Image.Image, operation: str, level: float, sign: int) -> Image.Image:
    """One operation of RandAugment at level 0..1 ("increasing" variant: a higher level always changes more)."""

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)

    if operation == "AutoContrast":
        return ImageOps.autocontrast(image)
    if operation == "Equalize":
        return ImageOps.equalize(image)
    if operation == "Invert":
        return ImageOps.invert(image)
    if operation == "Rotate":
        return image.rotate(sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=FILL)
    if operation == "Posterize":
        bits = 4 - int(4 * level)
        return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)  # recent Pillow refuses 0 bits
    if operation == "Solarize":
        return ImageOps.solarize(image, 256 - int(256 * level))
    if operation == "SolarizeAdd":
        add = int(110 * level)
        return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)
    if operation in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, operation)(image).enhance(1 + sign * 0.9 * level)
    if operation == "ShearX":
        return affine(1, sign * 0.3 * level, 0, 0, 1, 0)
    if operation == "ShearY":
        return affine(1, 0, 0, sign * 0.3 * level, 1, 0)
    if operation == "TranslateX":
        return affine(1, 0, sign * 0.45 * level * image.width, 0, 1, 0)
    return affine(1, 0, 0, 0, 1, sign * 0.45 * level * image.height)


# Copied from deit.py
@dataclass(frozen=True)
class Mix:
    """One draw: share `lam` of the image itself, and cutmix's box (None: mixup) as (top, bottom, left, right) pixels."""

    lam: float
    box: tuple[int, int, int, int] | None = None


# Copied from deit.py
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


# Copied from deit.py
def cutmix_box(lam: float, height: int, width: int, cy: int, cx: int) -> Mix:
    """Box of about (1 - lam) of the area around (cy, cx), clipped to the image; lam becomes what the clipped box leaves.

    An odd side loses a pixel, as in the official code.
    """
    half_h, half_w = int(height * math.sqrt(1 - lam)) // 2, int(width * math.sqrt(1 - lam)) // 2
    top, bottom, left, right = max(cy - half_h, 0), min(cy + half_h, height), max(cx - half_w, 0), min(cx + half_w, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


# Copied from deit.py
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


# Copied from deit.py
def mix_targets(labels: torch.Tensor, mixes: list[Mix], num_classes: int, smoothing: float) -> torch.Tensor:
    """Labels (B,) -> soft targets (B, K): lam on the image's own label, 1 - lam on its partner's, both smoothed."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)
    return torch.cat([t * mix.lam + t.flip(0) * (1 - mix.lam) for t, mix in zip(targets.chunk(len(mixes)), mixes)])


# ---- Training: the only user of common ---------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None):
    """(arguments, the recipe with the flags given, the paper's recipe)."""
    from common import cli

    parser = cli.make_parser("patchconvnet", __doc__, Recipe, RECIPES, model="patchconvnet_s60", recipe="in1k")
    parser.add_argument(
        "--grad-checkpoint", action="store_true", help="recompute activations in the backward pass: less memory for one more forward pass"
    )
    parser.add_argument(
        "--attention-maps", nargs="+", metavar="IMAGE", help="write the pooling's maps (Figures 5.5, 5.6) to --out and stop"
    )
    parser.add_argument("--vit", metavar="FILE", help="of --attention-maps: also the map of this checkpoint of deit.py or deit3.py")
    args = parser.parse_args(argv)
    cli.check_names(args, MODELS, RECIPES)
    paper = paper_recipe(args.recipe, args.model, data=args.data or "")
    recipe = cli.override(paper, args)
    cli.check_recipe(recipe)
    if args.model not in MODELS:
        cli.refuse(args, ("stem", "norm", "pooling", "class_tokens"), "not for torchvision's models; leave it out")
    if "drop_path" not in MODELS.get(args.model, {}):
        cli.refuse(args, ("drop_path",), f"{args.model} has no stochastic depth; leave it out")
    if args.attention_maps is None:
        cli.refuse(args, ("vit",), "has no effect without --attention-maps")
    return args, recipe, paper


def make_model(args, recipe: Recipe, num_classes: int) -> nn.Module:
    """build_model for a command line; what does not fit is the user's mistake."""
    from common.errors import UserError

    options = dict(class_tokens=recipe.class_tokens, stem=recipe.stem, norm=recipe.norm, pooling=recipe.pooling)
    try:
        model = build_model(args.model, num_classes, recipe.img_size, recipe.drop_path, **options)
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from None
    if args.grad_checkpoint:
        if not hasattr(model, "blocks"):
            raise UserError(f"--grad-checkpoint: not for {args.model}")
        model.grad_checkpoint = True
    return model


def train(args, recipe: Recipe, paper: Recipe) -> None:
    """The whole run: data, model, loop, evaluation after every epoch."""
    from common.checkpoint import load_pretrained
    from common.data import TrainingData
    from common.evaluate import eval_loader, evaluate, normalize
    from common.models import on_meta
    from common.optim import cosine_lr, make_optimizer
    from common.precision import Precision, check_amp
    from common.report import describe, save_curves, show_batch
    from common.run import Run

    run = Run("patchconvnet", args, recipe, paper)
    check_amp(run.amp, run.device)
    on_meta(lambda: make_model(args, recipe, 2))  # a size that does not fit is told before the data is scanned
    data = TrainingData(run, recipe, TrainTransform(recipe))
    num_classes = len(data.classes)

    torch.manual_seed(args.seed)
    model = make_model(args, recipe, num_classes)
    if args.weights:
        load_pretrained(model, args, run.method, new_head=True, say=run.say, adapt=carry_over)
    model.to(run.device)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.lr, recipe.weight_decay)
    precision = Precision(run.amp, run.device, accumulation=data.accumulation, clip_grad=recipe.clip_grad)

    def lr_at(epochs: float) -> float:
        return cosine_lr(epochs, recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.min_lr, recipe.warmup_lr)

    def prepare(batch, groups) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(images before mixing, images as the network sees them, soft targets) on the device."""
        images, _, labels, _ = batch
        mixes = [draw_mix(recipe, random.Random(f"mix-{args.seed}-{run.epoch}-{run.step}-{g}")) for g in groups]
        images = normalize(images)
        return images, mix_images(images, mixes), mix_targets(labels, mixes, num_classes, recipe.smoothing)

    if args.show_batch:
        if run.rank == 0:
            show_batch(args.show_batch, data, prepare)
        return run.say(f"wrote {args.show_batch}")

    run.open_folder()
    run.say(describe(run, lambda: make_model(args, recipe, num_classes), data))
    wrapped = run.prepare(model, data.micro_batch)
    run.start(model=model, optimizer=optimizer, precision=precision, data=data.identity())
    if run.rank == 0 and run.epoch == run.step == 0:
        show_batch(run.out / "batch.png", data, prepare)
    run.check_stop()
    val_loader = data.val and eval_loader(data.val, recipe.img_size, recipe.eval_crop_ratio, data.micro_batch, run)

    for epoch in range(run.epoch, recipe.epochs):
        stream = data.epoch(epoch, run.step)
        wrapped.train()
        for step in run.steps(data.steps, recipe.batch_size):
            seen = []
            for micro in range(data.accumulation):
                batch = run.wait_for(stream)
                _, images, targets = prepare(batch, data.batches.groups(micro))
                run.seed_step(micro)
                with precision.forward(wrapped):
                    loss = F.cross_entropy(wrapped(images), targets)
                precision.backward(loss)
                seen.append(batch[3])
            lr = lr_at(epoch + step / data.steps)
            stats, skipped = precision.step(optimizer, lr, asked=run.asked())
            run.after_step(stats, lr, lambda seen=seen: data.names(torch.cat(seen)))
        record, score = run.end_of_training_epoch() | {"lr": lr_at(epoch + 1)}, None
        if val_loader is not None:
            metrics = evaluate(model, val_loader, run.device, precision.autocast, between=run.check_stop)
            score = metrics["top1"]
            record |= {f"val_{k}": v for k, v in metrics.items()}
        run.end_of_epoch(record, score)
    run.finish()
    if run.rank == 0 and val_loader is not None:
        save_curves(run.out / "curves.png", run.out / "log.jsonl", [["train_loss", "val_loss"], ["val_top1", "val_top5"]])


SAVED = ("img_size", "eval_crop_ratio", "stem", "norm", "pooling", "class_tokens")  # what an evaluation takes from the checkpoint


def evaluate_only(args, recipe: Recipe, paper: Recipe) -> None:
    """--eval: accuracy on the validation images, on ImageNet-Real's labels and on other test sets."""
    from common.evaluate import evaluate_weights
    from common.run import Run

    evaluate_weights(Run("patchconvnet", args, recipe, paper), make_model, saved=SAVED, adapt=carry_over)


def benchmark(args, recipe: Recipe, paper: Recipe) -> None:
    """--benchmark: images/s and peak memory of training steps and of inference."""
    from common import report
    from common.run import Run

    run = Run("patchconvnet", args, recipe, paper)
    report.benchmark(run, lambda: make_model(args, recipe, 1000), lambda model, images, labels: F.cross_entropy(model(images), labels))


def write_maps(args, recipe: Recipe, paper: Recipe) -> None:
    """--attention-maps: per image the map of the pooling over the image, per class for the three likeliest; a ViT's map."""
    from common import checkpoint
    from common.errors import UserError
    from common.evaluate import normalize, read_image, trained_model
    from common.models import from_checkpoint
    from common.report import cividis, save_sheet
    from common.run import Run

    run = Run("patchconvnet", args, recipe, paper)
    model, recipe, classes = trained_model(run, make_model, saved=SAVED, adapt=carry_over)
    if not isinstance(model, PatchConvNet) or recipe.pooling == "average":
        raise UserError("--attention-maps: this model has no attention in its pooling")
    vit = None
    if args.vit:
        content = checkpoint.load(args.vit, "--vit")
        if content.get("method") not in ("deit", "deit3"):
            raise UserError(f"--vit {args.vit}: is no checkpoint of deit.py or deit3.py")
        vit = from_checkpoint(content, f"--vit {args.vit}", recipe.img_size, run.say).to(run.device).eval()
    for file in args.attention_maps:
        image = read_image(file, recipe.img_size, recipe.eval_crop_ratio, "--attention-maps")
        x = normalize(image[None].to(run.device))
        with torch.no_grad():
            shares = model(x)[0].float().softmax(dim=0)
        best = shares.argsort(descending=True)[:3].tolist()
        maps = attention_maps(model, x, best)
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        titles = [f"{classes[c]} {shares[c]:.0%}" for c in best]
        grey = torch.tensor([0.299, 0.587, 0.114]) @ image.float().flatten(1) / 255
        rows = []
        for i in range(maps.shape[1]):
            shown = saliency(maps[:, i : i + 1], recipe.img_size)[0].cpu()
            title = f"map of {titles[i]}" if model.per_class else "pooling: " + "; ".join(titles)
            rows.append((title, [picture, cividis(shown), cividis(grey.view(recipe.img_size) * shown)]))
        if vit is not None:
            shown = saliency(vit_attention_map(vit, x)[:, None], recipe.img_size)[0].cpu()
            rows.append(("a ViT's class token, last block", [picture, cividis(shown), cividis(grey.view(recipe.img_size) * shown)]))
        target = run.out / f"{Path(file).stem}_attention.png"
        save_sheet(target, rows)
        run.say(f"wrote {target}: {'; '.join(titles)}")


def main() -> None:
    args, recipe, paper = parse_args()
    if args.list_models:
        for name, config in MODELS.items():
            print(f"{name:20s} " + "  ".join(f"{k} {v}" for k, v in config.items()))
    elif args.attention_maps:
        write_maps(args, recipe, paper)
    elif args.eval or args.eval_data:
        evaluate_only(args, recipe, paper)
    elif args.benchmark:
        benchmark(args, recipe, paper)
    else:
        train(args, recipe, paper)


if __name__ == "__main__":
    try:
        from common.run import launch
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("common"):
            raise
        print(
            "error: another package named common hides the one that lies beside patchconvnet.py; run in the folder of both", file=sys.stderr
        )
        sys.exit(2)
    launch(main)
