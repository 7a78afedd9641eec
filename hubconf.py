"""Entry points of torch.hub, one per script: torch.hub.load(REPOSITORY, "deit3", "vit_b", pretrained=True)."""

import importlib

dependencies = ["torch", "torchvision", "numpy", "tqdm"]


def _entry(script: str):
    def make(model: str, pretrained: bool = False, **options):
        module = importlib.import_module(script)
        return module.load_model(f"official:{model}")[0] if pretrained else module.build_model(model, **options)

    make.__doc__ = f"""A model of {script}.py: see its --list-models, and build_model for the options. pretrained: with
    the official weights, in eval mode, where there are such (common/official.json); UserError where not."""
    return make


deit, grafit, cait, resmlp, patchconvnet, trex, deit3 = map(
    _entry, ("deit", "grafit", "cait", "resmlp", "patchconvnet", "trex", "deit3")
)
