"""Files from strangers and from broken disks: one clear error or exactly what they say; nothing in between."""

import contextlib
import errno
import json
import os
import time
import warnings
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save
from torch import nn

from rlrr_kernels import apply_rlrr, load_adapter, load_official_adapter, save_adapter
from rlrr_kernels.analysis import sources
from rlrr_kernels.checkpoint import load_npz_backbone
from rlrr_kernels.finetune.backbone import load_backbone
from rlrr_kernels.finetune.data.arrays import read_npz
from rlrr_kernels.finetune.data.tasks import read_json_list, read_text_list
from rlrr_kernels.finetune.saved_run import open_run
from rlrr_kernels.io import checks, reading
from rlrr_kernels.io.reading import read_safetensors
from tests.checkpoint.test_official import published_vit
from tests.reliability import bombs, hostile
from tests.reliability.memory import peak_growth
from tests.reliability.mutations import mutated
from tests.small_models import stir

#: Format -> how many mutated files of it, and what makes its target.
FORMATS = {
    "adapter_config.json": (1500, lambda f: hostile.adapter(f, "adapter_config.json")),
    "adapter_model.safetensors": (1500, lambda f: hostile.adapter(f, "adapter_model.safetensors")),
    "published.pth": (1200, lambda f: hostile.official(f, zipped=True)),
    "published.pth, legacy": (1000, lambda f: hostile.official(f, zipped=False)),
    "backbone.npz": (500, lambda f: hostile.backbone(f, ".npz")),
    "backbone.pth": (500, lambda f: hostile.backbone(f, ".pth")),
    "backbone.safetensors": (500, lambda f: hostile.backbone(f, ".safetensors")),
    "state": (900, hostile.unfinished),
    "metrics.json": (500, hostile.metrics),
    "sweep.json": (400, hostile.sweep),
    "tuned.json": (600, hostile.tuned),
    "vtab list": (400, lambda f: hostile.lists(f, "vtab")),
    "fgvc list": (400, lambda f: hostile.lists(f, "fgvc")),
    "images.npz": (400, lambda f: hostile.images(f, "npz")),
    "images-idx3-ubyte.gz": (300, lambda f: hostile.images(f, "idx")),
    "peft config": (300, lambda f: hostile.peft(f, "adapter_config.json")),
    "peft weights": (300, lambda f: hostile.peft(f, "adapter_model.safetensors")),
}
#: Of each format so many files are read by the test that is not slow.
FEW = 80
#: Seconds of processor time and bytes of memory that no file of some kB may take beyond.
SECONDS, BYTES = 2.0, 256 * 2**20


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        *(pytest.param(name, range(FEW), id=f"few of {name}") for name in FORMATS),
        *(pytest.param(n, range(FEW, count), id=n, marks=pytest.mark.slow) for n, (count, _) in FORMATS.items()),
    ],
)
def test_a_mutated_file_is_refused_with_nothing_changed_or_is_exactly_what_it_says(tmp_path, name, numbers):
    folder = tmp_path / "files"
    target = FORMATS[name][1](folder)
    target.attempt()  # the whole file is good
    target.restore()
    beside = sorted(folder.rglob("*"))
    with peak_growth() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy and torch warn of headers that they then read
        for number in numbers:
            target.path.write_bytes(mutated(number, target.whole, target.other, *target.mutations))
            start = time.process_time()
            fault = _fault(target)
            if time.process_time() - start > SECONDS:
                fault = fault or f"took more than {SECONDS} s"
            if sorted(folder.rglob("*")) != beside:
                fault = fault or "files were left behind"
            if fault:
                kept = tmp_path / f"failing-{number}-{target.path.name}"
                kept.write_bytes(target.path.read_bytes())
                pytest.fail(f"mutated({number}, ...) of {name}, kept as {kept}: {fault}")
    assert memory.growth < BYTES


def _fault(target: hostile.Target) -> str | None:
    """What reading did wrong; None if it read the file, or refused it as it should."""
    try:
        target.attempt()
    except target.errors as error:
        if not any(words in str(error) for words in target.says):
            return f"the error does not name the file: {error!r:.300}"
        if not target.unchanged():
            return f"partly loaded, then {error!r:.300}"
        return None
    except Exception as error:
        return f"expected {' or '.join(kind.__name__ for kind in target.errors)}, got {error!r:.300}"
    target.restore()
    return None


class Code:
    """What a pickle of it does when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


#: Reader of pickled tensors -> what it does with (model, path).
PICKLES = {
    "load_official_adapter": load_official_adapter,
    "--checkpoint": load_backbone,
    "analyze --ssf": lambda model, path: sources.ssf_checkpoint(path, {}),
    "analyze --full": lambda model, path: sources.full_checkpoint(path, {}),
}
PLACES = {
    "alone": lambda code, state: code,
    "beside tensors": lambda code, state: {**state, "head.bias": code},
    "as a name": lambda code, state: {**state, code: torch.zeros(1)},
    "deep": lambda code, state: {"state_dict": state, "args": [{"a": (code,)}]},
    "on a tensor": lambda code, state: {**state, "head.bias": with_hook(state["head.bias"], code)},
}


def with_hook(tensor, code):
    parameter = nn.Parameter(tensor.clone())
    parameter.extra = code  # attributes of tensors are pickled with them
    return parameter


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reader", PICKLES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_is_never_run(tmp_path, reader, place, zipped):
    canary, path, model = tmp_path / "canary", tmp_path / "a.pth", apply_rlrr(published_vit())
    torch.save(PLACES[place](Code(canary), hostile.published()), path, _use_new_zipfile_serialization=zipped)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"a\.pth.* is damaged or holds more than tensors; nothing in it was run"):
        PICKLES[reader](model, path)
    assert not canary.exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.load(path, weights_only=False)
    assert canary.exists()  # it would have


@pytest.mark.parametrize("reader", ["backbone", "images"])
def test_code_in_an_npz_is_never_run(tmp_path, reader):
    canary, path = tmp_path / "canary", tmp_path / "a.npz"
    np.savez(path, cls=np.array([Code(canary)], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz is damaged or no \.npz archive: cls\.npy holds Python objects"):
        load_npz_backbone(hostile.tiny_vit(), path) if reader == "backbone" else read_npz(path, 0)
    assert not canary.exists()


@pytest.mark.parametrize("kind", bombs.BOMBS)
def test_what_claims_gigabytes_is_refused_in_little_memory_and_time(tmp_path, kind):
    read, words = bombs.bomb(kind, tmp_path)
    start = time.process_time()
    # of a list as much as a list may have is read, of Fashion-MNIST's images as much as they have
    with peak_growth() as memory, pytest.raises(ValueError, match=words):
        read()
    assert memory.growth < (400 if kind in ("vtab", "fgvc") else 160) * 2**20
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("name", ["../a.jpg", "a/../../b.jpg", "/etc/passwd", "a\0b"])
def test_a_list_names_no_image_outside_of_its_folder(tmp_path, name):
    (tmp_path / "train.txt").write_text(f"a/../b.jpg 1\n{name} 1\n")
    with pytest.raises(ValueError, match=r"train\.txt:2: expected a path below "):
        read_text_list(tmp_path / "train.txt", tmp_path, 5)
    (tmp_path / "train.json").write_text(json.dumps({"b.jpg": 1, name: 2}))
    with pytest.raises(ValueError, match=r"train\.json: expected paths below the folder of images, got "):
        read_json_list(tmp_path / "train.json")


@pytest.mark.parametrize("name", ["local-dir:/tmp/evil", "hf-hub:stranger/model", "../../evil", "a\nb"])
@pytest.mark.parametrize("where", ["adapter", "run"])
def test_a_model_is_named_by_a_stranger_only_as_timm_knows_it(tmp_path, monkeypatch, name, where):
    """timm would fetch and read what other names stand for."""
    adapter = tmp_path / "run" / "adapter"
    save_adapter(apply_rlrr(hostile.tiny_vit()), adapter)
    if where == "adapter":
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model"] |= {"architecture": name, "tag": None}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    else:
        (tmp_path / "run" / "metrics.json").write_text(
            json.dumps({"settings": {"model": name, "seed": 0, "pretrained": False}, "protocol": "final", "classes": 3})
        )
    monkeypatch.setattr("timm.create_model", lambda *given, **more: pytest.fail("it was created"))
    with pytest.raises(ValueError, match="model: timm does not know"):
        open_run(adapter if where == "adapter" else tmp_path / "run", {}).model()


def test_an_adapter_of_links_is_read_as_a_hub_keeps_it_and_other_files_are_refused_at_once(tmp_path):
    """A hub's cache is made of links out of the folder; a device or a pipe would be read for ever."""
    model = stir(apply_rlrr(hostile.tiny_vit()))
    save_adapter(model, tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (links / path.name).symlink_to(path)
    loaded = dict(load_adapter(hostile.tiny_vit(), links).named_parameters())
    assert all(torch.equal(p, loaded[name]) for name, p in model.named_parameters() if p.requires_grad)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for make in (lambda path: os.symlink("/dev/zero", path), os.mkfifo, os.mkdir):
            (links / name).unlink()
            make(links / name)
            with pytest.raises(ValueError, match=f"snapshot is not an adapter folder: it has no {name}"):
                load_adapter(hostile.tiny_vit(), links)
            (links / name).rmdir() if make is os.mkdir else None
            if not os.path.lexists(links / name):
                (links / name).symlink_to(tmp_path / "blobs" / name)
        (links / name).unlink(missing_ok=True)
        (links / name).symlink_to(tmp_path / "blobs" / name)


def test_a_key_that_is_there_twice_is_named_whatever_the_file(tmp_path):
    save_adapter(apply_rlrr(hostile.tiny_vit()), tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace("{", '{"parameters": 1,', 1))
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON: 'parameters' is there twice"):
        load_adapter(hostile.tiny_vit(), tmp_path)
    data = save({"a": torch.zeros(2), "b": torch.ones(2)}).replace(b'"b"', b'"a"')
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a safetensors file: .*'a' is there twice"):
        read_safetensors(tmp_path / "a.safetensors")
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("cls.npy", b"")
    with pytest.raises(ValueError, match=r"a\.npz is damaged or no \.npz archive: it has an array twice"):
        load_npz_backbone(hostile.tiny_vit(), tmp_path / "a.npz")


@pytest.mark.parametrize(
    "read",
    [checks.read_json, read_safetensors, reading.read_pickled, reading.read_state_dict, reading.npz_headers],
)
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, read):
    def refuse(*given):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    torch.save({}, tmp_path / "a.pth")
    for module in (reading, checks):
        monkeypatch.setattr(module, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"a\.pth cannot be read: .*Permission denied"):
        read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a{99999999999999}", "is no pattern"),
        ("(", "is no pattern"),
        ("(a*)*b", "or a simple pattern"),
        (".*.*.*x", None),
    ],
)
def test_patterns_of_a_stranger_take_no_time(tmp_path, pattern, words):
    """Names in its file may be long, and are matched only where the base has them."""
    tensors = {"blocks.0.mlp.fc1": (4, 3), "blocks." + 3000 * "a": (4, 3)}
    state = {f"{n}.lora_{ab}.weight": torch.zeros(2, k) if ab == "A" else torch.zeros(m, 2)
             for n, (m, k) in tensors.items() for ab in "AB"}  # fmt: skip
    (tmp_path / "adapter_model.safetensors").write_bytes(save(state))
    config = {"peft_type": "LORA", "lora_alpha": 8, "alpha_pattern": {pattern: 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    start = time.process_time()
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        sources.lora_adapter(tmp_path, {"blocks.0.mlp.fc1": torch.zeros(4, 3)})
    assert time.process_time() - start < SECONDS


def test_an_adapter_of_a_model_without_a_head_opens(tmp_path):
    save_adapter(apply_rlrr(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)), tmp_path)
    assert open_run(tmp_path, {}).classes == 0


def test_what_was_read_stays_as_it_was_whatever_becomes_of_the_file(tmp_path):
    """safetensors gives tensors that lie in the file: written over they change, cut off they end the process."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"a": torch.ones(100_000)}))
    tensor = read_safetensors(path).tensors["a"]
    path.write_bytes(save({"a": torch.zeros(100_000)}))
    assert tensor.sum() == 100_000
    os.truncate(path, 0)
    assert tensor.sum() == 100_000
