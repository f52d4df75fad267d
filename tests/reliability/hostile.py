"""What the fuzz tests feed: for each file that the package reads a whole one, and what must hold after reading any."""

from __future__ import annotations

import gzip
import io
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load, save
from timm.models import load_state_dict
from torch import Tensor, nn
from tqdm import tqdm

from rlrr_kernels import FusedRLRRLinear, apply_rlrr, load_adapter, load_official_adapter, save_adapter
from rlrr_kernels.analysis import sources
from rlrr_kernels.backends import tuned as measured
from rlrr_kernels.checkpoint import adapter_metadata, load_npz_backbone
from rlrr_kernels.finetune.backbone import load_backbone
from rlrr_kernels.finetune.commands.results import find_results
from rlrr_kernels.finetune.commands.sweep_folder import Plan, SweepFolder
from rlrr_kernels.finetune.data.arrays import read_fashion_mnist, read_npz
from rlrr_kernels.finetune.data.tasks import read_json_list, read_text_list
from rlrr_kernels.finetune.saved_run import check_settings, check_state, open_run, read_state
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.finetune.trainer import Trainer
from tests.checkpoint.test_npz import google_arrays
from tests.checkpoint.test_official import adapter_only, of_fixture, published_vit
from tests.finetune.runs import prepared
from tests.reliability.mutations import (
    Mutation,
    header_and_body,
    json_values,
    lines,
    raw_bytes,
    record_inside,
    safetensors_header,
    unpacked,
    zip_entries,
)
from tests.small_models import stir
from tests.tune.entries import PROBLEM, TILE, entry, file_of


@dataclass
class Target:
    """One kind of file.

    Attributes:
        path: where it is read from; ``whole`` is what lies there at first.
        attempt: reads it, and asserts that what came of it is what the file says.
        mutations: that fit its format.
        errors: what reading may raise, all of them documented.
        says: words of which an error must have one; by default the folder's path.
        victim: a model that is as before after an error.
        other: a second whole file, for splices.
    """

    path: Path
    attempt: Callable[[], None]
    mutations: tuple[Mutation, ...]
    errors: tuple[type[Exception], ...] = (ValueError,)
    says: tuple[str, ...] = ()
    victim: nn.Module | None = None
    whole: bytes = b""
    other: bytes = b""
    before: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = self.whole or self.path.read_bytes()
        self.says = self.says or (str(self.path.parent),)
        if self.victim is not None:
            self.before = {name: t.clone() for name, t in self.victim.state_dict().items()}

    def unchanged(self) -> bool:
        """Whether the victim is bit for bit as it was."""
        return self.victim is None or all(
            torch.equal(t.view(torch.uint8), self.before[name].view(torch.uint8))
            for name, t in self.victim.state_dict().items()
        )

    def restore(self) -> None:
        if self.victim is not None:
            with torch.no_grad():
                for name, tensor in self.victim.state_dict().items():
                    tensor.copy_(self.before[name])


def tiny_vit(seed: int = 0) -> nn.Module:
    """One block of 8 features, 8 pixels: an adapter of some kB."""
    torch.manual_seed(seed)
    arch = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **arch).eval()


def same_bits(parameter: Tensor, expected: Tensor | np.ndarray) -> bool:
    """Whether a float32 parameter is ``expected``, NaN for NaN."""
    return torch.allclose(parameter, torch.as_tensor(expected).float(), rtol=0, atol=0, equal_nan=True)


def adapter(folder: Path, name: str) -> Target:
    """``name`` of an adapter folder, loaded into a prepared model and looked at by ``rlrr-analyze``'s reader."""
    model = stir(apply_rlrr(tiny_vit()))
    save_adapter(model, folder, {"dataset": "digits", "accuracy": "0.5"})
    victim = apply_rlrr(tiny_vit())
    base = {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, FusedRLRRLinear)}
    weights = folder / "adapter_model.safetensors"

    def attempt() -> None:
        load_adapter(victim, folder)
        parameters = dict(victim.named_parameters())
        said = load(weights.read_bytes())
        assert said
        assert all(same_bits(parameters[n], values) for n, values in said.items())
        assert all(isinstance(text, str) for text in adapter_metadata(folder).values())
        sources.rlrr_adapter(folder, base)

    header = name.endswith(".safetensors")
    other = save({"blocks.0.attn.qkv.scale_out": torch.zeros(24, 1)}, {"format": "pt"})
    mutations = (safetensors_header, raw_bytes, safetensors_header) if header else (json_values, json_values, raw_bytes)
    return Target(folder / name, attempt, mutations, victim=victim, other=other)


def published() -> dict[str, Tensor]:
    """An adapter for :func:`tests.checkpoint.test_official.published_vit` as the published code saves it."""
    return adapter_only(of_fixture("state/", torch.float32))


def official(folder: Path, zipped: bool) -> Target:
    """A ``.pth`` of the published code, in torch's zip format or the one before."""
    folder.mkdir()
    path = folder / "published.pth"
    torch.save(published(), path, _use_new_zipfile_serialization=zipped)
    victim = apply_rlrr(published_vit().float())

    def attempt() -> None:
        load_official_adapter(victim, path)
        said = torch.load(path, map_location="cpu", weights_only=True)
        stem = "transformer.encoder.layer.0"
        got = {"head.weight": victim.head.weight, f"{stem}.attn.out.scale_line": victim.blocks[0].attn.proj.scale_out}
        assert all(same_bits(parameter, said[name]) for name, parameter in got.items())

    buffer = io.BytesIO()
    torch.save({"head.weight": torch.zeros(3, 8)}, buffer, _use_new_zipfile_serialization=zipped)
    mutations = (zip_entries, raw_bytes, zip_entries) if zipped else (raw_bytes,)
    return Target(path, attempt, mutations, victim=victim, other=buffer.getvalue())


def backbone(folder: Path, suffix: str) -> Target:
    """Weights that ``--checkpoint`` names."""
    folder.mkdir()
    path, model, victim = folder / f"backbone{suffix}", stir(tiny_vit()), tiny_vit(1)
    if suffix == ".npz":
        np.savez(path, **google_arrays(model))
    elif suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        path.write_bytes(save(model.state_dict()))

    def attempt() -> None:
        if suffix == ".npz":
            load_npz_backbone(victim, path)
            with np.load(path) as arrays:
                block = "Transformer/encoderblock_0/MlpBlock_3"
                said = {"norm.weight": arrays["Transformer/encoder_norm/scale"]}
                said |= {"blocks.0.mlp.fc1.weight": arrays[f"{block}/Dense_0/kernel"].T}
        else:
            load_backbone(victim, path)
            if suffix == ".safetensors":
                said = {n: t for n, t in load(path.read_bytes()).items() if not n.startswith("head.")}
            else:
                state = load_state_dict(str(path), device="cpu", weights_only=True)
                said = {n: state[n] for n in ("norm.bias", "blocks.0.mlp.fc1.bias")}
        assert all(same_bits(victim.get_parameter(n), values) for n, values in said.items())

    mutations = (safetensors_header if suffix == ".safetensors" else zip_entries, raw_bytes)
    return Target(path, attempt, mutations, victim=victim)


def unfinished(folder: Path) -> Target:
    """The state of a run that is to be resumed."""
    folder.mkdir()
    ready = prepared(folder, sizes=(8, 8, 8), method="linear", ema=0.5)
    trainer = Trainer(ready.settings, ready.model, ready.splits, ready.device)
    trainer.train_epoch(tqdm(disable=True))
    settings = ready.settings.to_dict()
    epoch = {"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.1, "val_loss": 2.1, "val_accuracy": 0.2, "lr": 0.1}
    agreed = {"settings": settings, "processes": 1, "images": {"train": 8, "val": 8, "test": 8}, "classes": 10,
              "data_fingerprint": ready.splits.fingerprint}  # fmt: skip
    metrics = {"run": str(folder), "protocol": "choose-epoch", **agreed, "epochs": [epoch], "train_seconds": 1.0,
               "best_epoch": 1, "interrupted": False, "finished": False}  # fmt: skip
    trainer.state(trainer.trained(), {**agreed, "metrics": metrics}).write(folder)
    path = folder / "state" / "last.safetensors"

    def attempt() -> None:
        trainer.epoch, start = 0, {n: t.numpy().tobytes() for n, t in trainer.state(None, {}).tensors.items()}
        state = read_state(folder)
        check_settings(state.record["settings"], ready.settings, "the run to resume")
        check_state(state, **{name: agreed[name] for name in ("processes", "images", "classes")})
        try:
            trainer.load(state)
        except ValueError:
            left = trainer.state(None, {}).tensors
            assert {n: t.numpy().tobytes() for n, t in left.items()} == start
            raise
        said = load(path.read_bytes())
        assert same_bits(trainer.parameters["head.bias"], said["trained/head.bias"])
        assert (
            trainer.epoch
            == json.loads(json.loads(header_and_body(path.read_bytes())[0])["__metadata__"]["record"])["epoch"]
        )

    mutations = (safetensors_header, record_inside, record_inside, raw_bytes)
    return Target(path, attempt, mutations, says=(str(folder), "resume"), victim=trainer.model)


def metrics(folder: Path) -> Target:
    """``metrics.json``, as ``eval``, ``merge``, ``export`` and ``table`` read it."""
    save_adapter(stir(apply_rlrr(tiny_vit())), folder / "adapter")
    epochs = [{"epoch": 1, "train_loss": 2.0, "val_loss": 2.1, "val_accuracy": 0.2}]
    values = {"settings": Settings().to_dict(), "classes": 3, "epochs": epochs, "best_epoch": 1, "test_accuracy": 0.5,
              "protocol": "choose-epoch", "finished": True}  # fmt: skip
    path = folder / "metrics.json"
    path.write_text(json.dumps(values, indent=2))

    def attempt() -> None:
        run = open_run(folder, {})
        assert type(run.classes) is int
        assert run.classes >= 1
        results, _ = find_results([folder])
        assert all(0 <= result.accuracy <= 1 for result in results)

    says = (str(folder), "checkpoint: ")  # the second, of weights that are not where it says
    return Target(path, attempt, (json_values, json_values, raw_bytes), (ValueError, FileNotFoundError), says)


def sweep(folder: Path) -> Target:
    """``sweep.json``, as the same command reads it to go on."""
    plan = Plan.of(Settings(), [1e-3], [1e-4], [0.0], [0])
    record = SweepFolder.open(folder, plan)
    point = plan.points[0]
    record.add_search(point, 0, {"epochs": [{"epoch": 1, "val_accuracy": 0.5, "val_loss": 1.0}], "best_epoch": 1})
    record.add_final(point, 0, {"test_accuracy": 0.5, "test_loss": 1.0})
    path = folder / "sweep.json"

    def attempt() -> None:
        data, found = path.read_bytes(), SweepFolder.open(folder, plan)
        for name, kept in (("runs", found.search), ("final", found.final)):
            said = [json.dumps(each) for each in json.loads(data)[name]]  # as text, in which NaN is NaN
            assert {json.dumps(each) for each in kept.values()} <= set(said)

    return Target(path, attempt, (json_values, json_values, raw_bytes))


def tuned(folder: Path) -> Target:
    """The user's part of the measured entries."""
    folder.mkdir()
    rows = [entry(), entry(64, math.inf, layer=None, kernel="grad_scales"), entry(7, backend="triton", tile=TILE)]
    path = file_of(folder / "tuned.json", *rows)
    problems = [PROBLEM, PROBLEM._replace(kernel="grad_scales"), PROBLEM._replace(m=7)]

    def attempt() -> None:
        # the file's name is for the caller to say: a warning of the launcher, or the command
        for raw in measured.read(path):
            try:
                found = measured.parse(raw)
            except ValueError:
                continue
            for problem in problems:
                found.serves(problem)
                found.distance(problem.m)

    return Target(path, attempt, (json_values, json_values, raw_bytes), says=("",))


def lists(folder: Path, layout: str) -> Target:
    """A list of images of VTAB-1k or FGVC."""
    folder.mkdir()
    if layout == "vtab":
        path = folder / "train800.txt"
        path.write_text("".join(f"images/train/{i:06}.jpg {i % 5}\n" for i in range(40)))

        def attempt() -> None:
            for each in read_text_list(path, folder, 5):
                assert 0 <= each.label < 5
                assert Path(each.path).is_relative_to(folder)
                assert ".." not in Path(each.path).parts

        return Target(path, attempt, (raw_bytes, lines))
    path = folder / "train.json"
    path.write_text(json.dumps({f"a/{i}.jpg": i % 5 for i in range(40)}))

    def attempt_json() -> None:
        assert read_json_list(path) == json.loads(path.read_bytes())

    return Target(path, attempt_json, (json_values, json_values, raw_bytes))


def images(folder: Path, layout: str) -> Target:
    """Images in a ``.npz``, or in Fashion-MNIST's files."""
    folder.mkdir()
    pixels, labels = np.arange(6 * 28 * 28, dtype=np.uint8).reshape(6, 28, 28), np.arange(6) % 3
    if layout == "npz":
        path = folder / "images.npz"
        arrays = {f"{s}_{w}": a for s in ("train", "test") for w, a in (("images", pixels), ("labels", labels))}
        np.savez_compressed(path, **arrays)

        def attempt() -> None:
            parts = read_npz(path, 0)
            with np.load(path) as said:
                assert parts.test.labels.tolist() == said["test_labels"].tolist()
                assert parts.test.images.flatten().tolist() == said["test_images"].flatten().tolist()
                assert len(parts.train) + len(parts.val) == len(said["train_labels"])
                assert len(parts.class_names) == 1 + max(*said["train_labels"], *said["test_labels"])

        return Target(path, attempt, (zip_entries, raw_bytes), (ValueError, FileNotFoundError))
    path = folder / "train-images-idx3-ubyte.gz"
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">II", 2049, 6) + bytes(6)))
    path.write_bytes(gzip.compress(struct.pack(">IIII", 2051, 6, 28, 28) + pixels.tobytes()))

    def attempt_idx() -> None:
        got, _ = read_fashion_mnist(folder, "train")
        assert got.shape == (6, 1, 28, 28)

    return Target(path, attempt_idx, (raw_bytes, unpacked))


def peft(folder: Path, name: str) -> Target:
    """A LoRA folder as PEFT writes it, read by ``rlrr-analyze``."""
    folder.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": 8, "alpha_pattern": {"blocks.0.mlp.fc1": 4}, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    stems = {"attn.qkv": (24, 8), "mlp.fc1": (32, 8)}
    state, base = {}, {}
    for stem, (n, k) in stems.items():
        state[f"base_model.model.blocks.0.{stem}.lora_A.weight"] = torch.randn(2, k)
        state[f"base_model.model.blocks.0.{stem}.lora_B.weight"] = torch.randn(n, 2)
        base[f"blocks.0.{stem}"] = torch.randn(n, k)
    (folder / "adapter_model.safetensors").write_bytes(save(state))

    def attempt() -> None:
        assert sources.lora_adapter(folder, base).updates

    header = name.endswith(".safetensors")
    return Target(folder / name, attempt, (safetensors_header, raw_bytes) if header else (json_values, raw_bytes))
