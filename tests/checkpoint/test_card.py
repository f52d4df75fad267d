"""The README card: front matter that hubs can read, and code that loads the adapter."""

import timm
import torch
import yaml

from rlrr_kernels import apply_rlrr, load_adapter, save_adapter
from rlrr_kernels.finetune.embedded import EMBEDDED_MODEL
from tests.small_models import X, small_vit, stir


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def code_of(body):
    return body.split("```python\n")[1].split("```")[0]


def test_front_matter_names_base_model_library_and_tags(tmp_path):
    save_adapter(apply_rlrr(small_vit()), tmp_path / "a")
    front, body = card_of(tmp_path / "a")
    assert front == {
        "library_name": "rlrr_kernels",
        "tags": ["rlrr", "parameter-efficient-fine-tuning"],
        "base_model": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "pipeline_tag": "image-classification",
    }
    assert "RLRR adapter of `timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k`: 3,413 numbers" in body
    line = (
        'timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=True, num_classes=5, '
        "img_size=(32, 32))"
    )
    assert line in code_of(body)


def test_the_code_in_the_card_loads_the_adapter(tmp_path):
    """Of a model that timm does not know before a module of ours is imported, and that no hub has."""
    model = stir(apply_rlrr(timm.create_model(EMBEDDED_MODEL, pretrained=True, num_classes=3))).eval()
    save_adapter(model, tmp_path / "a")
    front, body = card_of(tmp_path / "a")
    assert "base_model" not in front
    assert "import rlrr_kernels.finetune.embedded\n" in code_of(body)
    names = {}
    exec(code_of(body).replace("path/to/this/folder", str(tmp_path / "a")), names)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(names["model"].eval()(x), model(x))


def test_a_model_of_another_library_is_left_to_the_reader(tmp_path):
    model = torch.nn.Linear(3, 2)
    save_adapter(model, tmp_path / "a")
    front, body = card_of(tmp_path / "a")
    assert front.keys() == {"library_name", "tags"}
    assert "the trained parameters of `Linear`: 8 numbers" in body
    assert "model = ...  # the model that was tuned" in code_of(body)
    compile(code_of(body), "card", "exec")


def test_metadata_is_a_table_that_no_text_breaks_out_of(tmp_path):
    save_adapter(small_vit(), tmp_path / "a", {"dataset": "a | b", "note": "two\nlines <script>", "accuracy": "0.98"})
    _, body = card_of(tmp_path / "a")
    assert "\n| dataset | a \\| b |\n| note | two lines &lt;script> |\n| accuracy | 0.98 |\n" in body
    assert torch.equal(load_adapter(small_vit(), tmp_path / "a")(X), small_vit()(X))
