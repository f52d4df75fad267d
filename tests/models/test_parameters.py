"""Parameters that train: which get weight decay, and how many there are."""

from rlrr_kernels import apply_rlrr, count_parameters, param_groups, print_trainable_parameters
from tests.small_models import small_vit


def test_weight_decay_falls_on_what_the_published_code_decays():
    model = apply_rlrr(small_vit())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = param_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    given = {names[id(p)] for p in decayed["params"]}
    assert {n.rpartition(".")[2] for n in given if n.startswith("blocks.")} == {"scale_out", "scale_in"}
    assert {n for n in given if not n.startswith("blocks.")} == {
        "head.weight",
        "patch_embed.norm.ssf_scale",
        "patch_embed.norm.ssf_shift",
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(plain["params"]) == len(trained)


def test_full_fine_tuning_does_not_decay_norms_and_positions():
    model = small_vit()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in param_groups(model, 0.05)[0]["params"]}
    assert "blocks.0.attn.qkv.weight" in decayed
    assert not {n for n in decayed if "norm" in n or n.endswith("bias") or n in ("pos_embed", "cls_token")}


def test_print_trainable_parameters(capsys):
    model = apply_rlrr(small_vit())
    print_trainable_parameters(model)
    trainable, total = count_parameters(model)
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}\n"
    )
