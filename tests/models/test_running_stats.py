"""Running statistics of batch norms and the like: kept as they are if frozen, saved and restored if trained."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FrozenBatchNormAct2d
from torch import nn

from rlrr_kernels import RLRRConfig, apply_rlrr, disable_adapter, load_adapter, merge_and_unload, save_adapter
from tests.small_models import X


def xcit() -> nn.Module:
    """Batch norms in the patch embedding and beside the attention."""
    torch.manual_seed(0)
    small = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("xcit_nano_12_p16_224", **small).eval()


class Probe(nn.Module):
    """A small CNN whose head has a batch norm without parameters, as linear probes have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = 5
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 16))
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Sequential(nn.BatchNorm1d(16, affine=False), nn.Linear(16, 5))

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.norm(self.trunk(x)))


def probe() -> nn.Module:
    return Probe().eval()


TARGETS = {xcit: ["blocks.*.mlp.*"], probe: ["trunk.3"]}
MODELS = pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)


def trained(make, **options) -> nn.Module:
    """An adapted model after two steps, each after ``train()``, as in a loop over epochs."""
    model = apply_rlrr(make(), target_modules=TARGETS[make], **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(2):
        model.train()
        model(3 + 2 * X).square().sum().backward()
        optimizer.step()
        model.eval()
    return model


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith(("_mean", "_var", "_tracked"))}


@MODELS
@pytest.mark.parametrize("train_batch_norm", [False, True])
def test_a_saved_adapter_reproduces_the_model_and_disabling_gives_the_base(make, train_batch_norm, tmp_path):
    base, model = make(), trained(make, train_batch_norm=train_batch_norm)
    before, logits = buffers(base), model(X)
    moved = {name for name, b in buffers(model).items() if not torch.equal(b, before[name])}
    in_head = {name for name in before if name.startswith("head.0.")}
    assert moved == (before.keys() if train_batch_norm else in_head)
    assert {n for n, p in model.named_parameters() if "norm.weight" in n and p.requires_grad} == (
        {n for n, _ in base.named_parameters() if n == "norm.weight" and make is probe} if train_batch_norm else set()
    )
    # close, not equal: with AVX2, libraries' sums depend on how memory is aligned
    with disable_adapter(model):
        torch.testing.assert_close(model(X), base(X), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(X), logits, rtol=1e-4, atol=1e-6)
    assert (base(X) - logits).abs().max() > 1e-3
    save_adapter(model, tmp_path / "a")
    for fresh in (make(), trained(make, train_batch_norm=train_batch_norm)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_adapter(fresh, tmp_path / "a").eval()
        torch.testing.assert_close(loaded(X), logits, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(b, dict(model.named_buffers())[name]) for name, b in loaded.named_buffers())


def test_frozen_norms_stay_in_evaluation_in_copies_wrappers_and_parents():
    model = apply_rlrr(probe(), target_modules=["trunk.3"])
    for made in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        nn.Sequential(model),
        torch.compile(model),
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)),
    ):
        assert made.train() is made
        inner = next(m for m in made.modules() if isinstance(m, Probe))
        assert inner.training
        assert [m.training for m in (inner.trunk, inner.trunk[1], inner.norm, inner.head[0])] == [
            True,
            False,
            False,
            True,
        ]
    model.norm.weight.requires_grad_(True)  # by the user
    assert model.train().norm.training
    plain = merge_and_unload(model).train()
    assert plain.trunk[1].training
    assert "train" not in vars(plain)


def test_every_kind_of_running_statistic_is_frozen_and_nothing_else():
    norm = torch.nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm3d(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        BatchNormAct2d(4, drop_layer=nn.Dropout),
        EvoNorm2dB0(4),
        norm(nn.Linear(4, 4)),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        FrozenBatchNormAct2d(4),
        nn.InstanceNorm2d(4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Dropout(),
    )
    apply_rlrr(model, target_modules=["0"]).train()
    spectral = model[5].parametrizations.weight[0]
    assert [m.training for m in [*model[1:5], spectral, model[6]]] == [False] * 6
    assert all(m.training for m in [model, model[0], model[3].drop, model[5], *model[8:]])
    model[5].parametrizations.weight.original.requires_grad_(True)
    assert model.train()[5].parametrizations.weight[0].training
    option = apply_rlrr(copy.deepcopy(merge_and_unload(model)), target_modules=["0"], train_batch_norm=True).train()
    assert [m.training for m in [*option[1:5], option[6]]] == [True] * 4 + [False]
    assert [option[i].weight.requires_grad for i in (1, 2, 3, 4)] == [True] * 4
    assert not option[6].weight_orig.requires_grad
    with pytest.raises(TypeError, match=r"train_batch_norm: expected one of \(True, False\), got 'all'"):
        RLRRConfig(train_batch_norm="all")


def test_an_adapter_without_statistics_loads_with_a_warning(tmp_path, monkeypatch):
    model = trained(probe)
    with monkeypatch.context() as before:
        before.setattr("rlrr_kernels.checkpoint.adapter.trained_statistics", lambda model: {})
        save_adapter(model, tmp_path / "old")
    with pytest.warns(UserWarning, match=r"running statistics: head.0.num_batches_tracked, one of 3, keeps its value"):
        loaded = load_adapter(probe(), tmp_path / "old")
    assert torch.equal(loaded.head[1].weight, model.head[1].weight)
    assert loaded.head[0].num_batches_tracked == 0


def test_full_fine_tuning_is_saved_with_its_statistics(tmp_path):
    model = probe().train()
    model(3 + 2 * X)
    save_adapter(model.eval(), tmp_path / "a")
    assert torch.equal(load_adapter(probe(), tmp_path / "a")(X), model(X))
    frozen = probe()
    frozen.trunk.requires_grad_(False)
    save_adapter(frozen, tmp_path / "b")
    before = buffers(model)
    load_adapter(model, tmp_path / "b", check_base=False)
    assert {n.partition(".")[0] for n, b in buffers(model).items() if not torch.equal(b, before[n])} == {"head", "norm"}


def test_a_model_without_data_gets_its_statistics_too(tmp_path):
    model = trained(probe, train_batch_norm=True)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(probe().to("meta"), tmp_path / "a", check_base=False)
    assert torch.equal(loaded.norm.running_var, model.norm.running_var)
    assert loaded.trunk[0].weight.is_meta
