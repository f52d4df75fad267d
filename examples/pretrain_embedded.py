"""Pretrain the embedded ViT on Fashion-MNIST and write the weights the package ships.

The 60,000 training images come from the Debian package ``dataset-fashion-mnist``
(``apt-get install dataset-fashion-mnist``; MIT licence), or from any folder with
the four original ``*-ubyte.gz`` files::

    python examples/pretrain_embedded.py --epochs 16

The last epoch is kept whatever its accuracy: the 10,000 test images choose
nothing and are only reported.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from rlrr_kernels.finetune.data import FASHION_MNIST_FOLDER, read_fashion_mnist
from rlrr_kernels.finetune.embedded import EMBEDDED_MODEL, WEIGHTS

AUGMENT = v2.Compose([v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip()])


def prepare(images: torch.Tensor, augment: bool) -> torch.Tensor:
    """uint8 ``[B, 1, 28, 28]`` to normalised float32; one crop and flip for each 8 images."""
    if augment:
        images = torch.cat([AUGMENT(chunk) for chunk in images.split(8)])
    return images.float() / 127.5 - 1


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.inference_mode():
        hits = [
            (model(prepare(x, augment=False)).argmax(1) == y).sum()
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    return float(sum(hits)) / len(labels)


CARD = """\
# vit_embedded_patch7_28.fashion_mnist

A vision transformer of {parameters:,} parameters (28 x 28 grey input, patch 7, width 128, depth 5, 4 heads),
stored in float16. It is there so that `rlrr-finetune` and `make demo` work without a download; it is no
model to build on.

| | |
| --- | --- |
| data | Fashion-MNIST, 60,000 training images (Zalando Research, MIT licence) |
| licence of the weights | Apache-2.0, as the package |
| command | `python examples/pretrain_embedded.py {arguments}` |
| accuracy | {test_accuracy} on the 10,000 test images, with the stored weights |
| schedule | {epochs} epochs; the last is kept, the test images chose nothing |
| input | values in [-1, 1]: mean 0.5, standard deviation 0.5 |
| made with | PyTorch {torch}, timm {timm}, on a CPU |
"""


def write_card(weights: Path) -> None:
    """Write what the file's own metadata says beside it, to read."""
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    options = json.loads(metadata["args"])
    arguments = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    weights.with_suffix(".md").write_text(CARD.format(parameters=parameters, arguments=arguments, **metadata))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FASHION_MNIST_FOLDER, help="folder with the *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_x, train_y = read_fashion_mnist(args.data, "train")
    test_x, test_y = read_fashion_mnist(args.data, "t10k")
    model = timm.create_model(EMBEDDED_MODEL, num_classes=10, drop_path_rate=0.1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=args.weight_decay)
    steps = len(train_y) // args.batch_size
    scheduler = CosineLRScheduler(
        optimizer, t_initial=args.epochs * steps, warmup_t=2 * steps, warmup_lr_init=1e-6, t_in_epochs=False
    )
    start = time.time()
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(train_y))[: steps * args.batch_size].split(args.batch_size)
        bar = tqdm(order, desc=f"epoch {epoch + 1}/{args.epochs}", mininterval=15)
        for step, index in enumerate(bar):
            scheduler.step_update(epoch * steps + step)
            logits = model(prepare(train_x[index], augment=True))
            loss = F.cross_entropy(logits, train_y[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        print(f"epoch {epoch + 1}: test accuracy {accuracy(model, test_x, test_y):.4f}, {time.time() - start:.0f} s")

    # fp16 halves the file; what is reported is what the stored weights do
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in state.items()})
    card = {
        "data": "Fashion-MNIST, 60,000 training images (MIT licence)",
        "epochs": str(args.epochs),
        "seed": str(args.seed),
        "test_accuracy": f"{accuracy(model, test_x, test_y):.4f}",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "args": json.dumps({k: v for k, v in vars(args).items() if k not in ("out", "data")}),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out, metadata=card)
    write_card(args.out)
    print(f"wrote {args.out} ({args.out.stat().st_size / 2**20:.2f} MiB), test accuracy {card['test_accuracy']}")


if __name__ == "__main__":
    main()
