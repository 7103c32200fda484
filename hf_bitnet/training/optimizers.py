"""Parameter groups: latent weights, scales, norms, and the rest, each with its own learning rate and weight decay. Own.

The optimizer itself is Trainer's, whatever `optim` names: its groups are split after it was made and before it has state,
so that everything else in them (betas, GaLore's rank, ...) stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..surgery import trained_layers, trained_tables
from .arguments import QATArguments
from .cautious import make_cautious
from .mars import correct_gradients

_OPTIONS = ("latent_learning_rate", "scale_learning_rate", "latent_weight_decay")


def set_up(optimizer: Any, model: nn.Module, args: QATArguments) -> None:
    """Splits each group of a fresh optimizer by kind, in place, and changes its steps as asked to. Norms with a rate of
    their own are a kind.

    The rest comes first, because Trainer logs the learning rate of the first group. Raises ValueError when the arguments ask
    for what this optimizer cannot have.
    """
    kinds = _kinds(model, norms=args.norm_rate_factor != 1.0)
    held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if not isinstance(optimizer, torch.optim.Optimizer) or not trainable <= held:
        refuse_options(args, f"the optimizer of optim={str(args.optim)!r} manages the parameters itself")
        return
    groups = optimizer.param_groups
    optimizer.param_groups = []
    for kind in ("rest", "norm", "latent", "scale"):
        for group in groups:
            members = [p for p in group["params"] if kinds.get(id(p), "rest") == kind]
            if members:
                optimizer.add_param_group({**group, "params": members, "name": kind, **_settings(kind, args)})
    if args.cautious:  # first: it looks at the gradients themselves
        make_cautious(optimizer)
    if args.mars:
        correct_gradients(optimizer, args.mars)


def refuse_options(args: QATArguments, why: str) -> None:
    """Raises ValueError when something is asked for that would not be done."""
    asked = [name for name in _OPTIONS if getattr(args, name) is not None]
    asked += [name for name in ("scale_weight_decay", "cautious", "mars") if getattr(args, name)]
    asked += ["norm_rate_factor"] * (args.norm_rate_factor != 1.0)
    if asked:
        raise ValueError(
            f"{asked[0]}={getattr(args, asked[0])!r} cannot be used: {why}. Leave it out, or use optim='adamw_torch' without "
            "passing an optimizer"
        )


def _kinds(model: nn.Module, norms: bool) -> dict[int, str]:
    """id of parameter -> "norm" (if asked for), "latent" or "scale"."""
    kinds: dict[int, str] = {}
    if norms:  # ZeRO-3 keeps the shape elsewhere
        kinds = {id(p): "norm" for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) <= 1}
    for _, layer in trained_layers(model):
        kinds[id(layer.weight)] = "latent"
        for parameter in (layer.weight_scale, layer.ste_temperature):
            if isinstance(parameter, nn.Parameter):
                kinds[id(parameter)] = "scale"
    return kinds | {id(table.weight): "latent" for table in trained_tables(model)}


def _settings(kind: str, args: QATArguments) -> dict[str, float]:
    """What differs from the group that Trainer made."""
    wanted: dict[str, float | None] = {}
    if kind == "latent":
        wanted = {"lr": args.latent_learning_rate, "weight_decay": args.latent_weight_decay}
    elif kind == "norm":
        wanted = {"lr": args.learning_rate * args.norm_rate_factor}
    elif kind == "scale":
        wanted = {"lr": args.scale_learning_rate, "weight_decay": args.scale_weight_decay}
    return {key: value for key, value in wanted.items() if value is not None}
