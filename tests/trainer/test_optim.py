"""The optimisers against others' of the same names."""

import pytest
import torch
from tiny_captioner import CNN, VIT
from torch import nn

import trainer  # noqa: F401  before timm, see trainer.torchvision_ops
from trainer.checkpoint import pack_optimizer, unpack_optimizer
from trainer.errors import ConfigError
from trainer.optim import Optim, build_optimizer


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[torch.Tensor]:
    for step in range(count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        module(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in module.parameters()]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


@pytest.mark.parametrize("count", [1, 4])
def test_lars_is_timm_s(count: int) -> None:
    from timm.optim import Lars

    ours, theirs = network(), network()
    config = Optim(name="lars", lr=0.3, weight_decay=1e-2, betas=(0.9, 0.99))
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 1e-2},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    peer = Lars(groups, lr=0.3, momentum=0.9, trust_coeff=1e-3, eps=0.0)
    found = steps(ours, build_optimizer(ours, config), count)
    for mine, other in zip(found, steps(theirs, peer, count), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_lars_leaves_what_has_no_gradient() -> None:
    module = network()
    module[2].requires_grad_(False)
    before = module[2].weight.clone()
    steps(module, build_optimizer(module, Optim(name="lars", lr=1.0)), 2)
    assert torch.equal(module[2].weight, before)
    assert not torch.equal(module[0].weight, network()[0].weight)


def test_adamw_steps_as_pytorch_s_plain_one_in_any_layout_and_after_a_pause() -> None:
    torch.manual_seed(0)
    ours = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    theirs = nn.Conv2d(3, 4, 2)
    theirs.load_state_dict(ours.state_dict())
    config = Optim(lr=0.1, weight_decay=0.0, betas=(0.9, 0.98))
    mine = build_optimizer(ours, config)
    peer = torch.optim.AdamW(theirs.parameters(), 0.1, (0.9, 0.98), weight_decay=0.0, foreach=False)
    for step in range(4):
        if step == 2:
            packed = {k: v.contiguous() for k, v in pack_optimizer(mine).items()}  # as files are
            mine = build_optimizer(ours, config)
            unpack_optimizer(mine, packed)
        torch.manual_seed(step)
        images = torch.randn(2, 3, 5, 5)
        for module, optimizer in ((ours, mine), (theirs, peer)):
            optimizer.zero_grad()
            module(images).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def rates(module: nn.Module, **keys: object) -> dict[str, float]:
    """Returns every parameter's share of the rate, by name."""
    optimizer = build_optimizer(module, Optim.model_validate(keys))
    shares = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    return {name: shares[id(p)] for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        (
            {**VIT, "depth": 3},
            {
                "cls_token": 0.125,
                "pos_embed": 0.125,
                "patch_embed.proj.weight": 0.125,
                "blocks.0.attn.qkv.weight": 0.25,
                "blocks.1.mlp.fc1.bias": 0.5,
                "blocks.2.norm1.weight": 1.0,
                "norm.weight": 1.0,
            },
        ),
        (  # a stem and seven stages
            CNN,
            {
                "conv_stem.weight": 1 / 128,
                "bn1.weight": 1 / 128,
                "blocks.0.0.conv_dw.weight": 1 / 64,
                "blocks.3.1.conv_pw.weight": 1 / 8,
                "blocks.5.0.bn1.bias": 0.5,
                "blocks.6.0.conv_pwl.weight": 1.0,
                "conv_head.weight": 1.0,
                "bn2.weight": 1.0,
            },
        ),
    ],
)
def test_a_layer_is_slower_than_the_one_above_it(make_captioner, encoder, expected) -> None:
    module = nn.ModuleDict({"captioner": make_captioner(encoder=encoder)})
    prefix = "captioner.encoder.backbone."
    found = rates(module, layer_decay=0.5)
    assert {name: found[prefix + name] for name in expected} == pytest.approx(expected)
    others = {share for name, share in found.items() if not name.startswith("captioner.encoder")}
    assert others == {1.0}
    scales = {"captioner.encoder": 0.1, f"{prefix}blocks.0": 0.01}
    scaled = rates(module, layer_decay=0.5, scales=scales)
    for name, share in expected.items():
        factor = 0.01 if name.startswith("blocks.0") else 0.1
        assert scaled[prefix + name] == pytest.approx(factor * share)


def test_layers_of_what_has_none_cannot_differ() -> None:
    with pytest.raises(ConfigError, match=r"optim\.layer_decay: there is no encoder with layers"):
        build_optimizer(network(), Optim(layer_decay=0.75))
