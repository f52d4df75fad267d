"""PEFT's own tests of HiRA, at the installed version, over the package: ``python -m tests.peft.upstream``.

They are fetched from PyPI and run three times, in about 5 minutes: on PEFT as it is, with its HiRA layers accelerated,
and with RLRR in the place of HiRA. The command exits with 1 if a test that PEFT passes fails with accelerated layers.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tarfile
import types
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SUBJECTS = ("peft", "accelerated", "rlrr")


def main() -> int:
    """Print what each subject passes, and which tests it does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    files = ["test_custom_models.py", "test_config.py"]
    parser.add_argument("files", nargs="*", default=files, help="files of PEFT's tests; most others need the Hub")
    files = parser.parse_args().files
    with TemporaryDirectory() as folder:
        tests = fetch(Path(folder))
        outcomes = {subject: run(subject, tests, files) for subject in SUBJECTS}
    for subject, found in outcomes.items():
        print(f"{subject}: {dict(collections.Counter(found.values()))}")
        print("".join(f"  {name}\n" for name, outcome in found.items() if outcome in ("FAILED", "ERROR")))
    passed = [name for name, outcome in outcomes["peft"].items() if outcome == "PASSED"]
    worse = [name for name in passed if outcomes["accelerated"].get(name) != "PASSED"]
    return int(bool(worse) or not passed)


def fetch(folder: Path) -> Path:
    """Download the installed PEFT's source and unpack its tests as the package ``peft_tests``."""
    import peft

    options = ["--no-binary", "peft", "--no-deps", "--no-build-isolation", "--quiet", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"peft=={peft.__version__}"], check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    tests = folder / "peft_tests"
    tests.mkdir()
    (tests / "__init__.py").touch()
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member)
            if content is not None and re.fullmatch(r"[^/]+/tests/[^/]+\.py", member.name):
                (tests / Path(member.name).name).write_bytes(content.read())
    return tests


def run(subject: str, tests: Path, files: list[str]) -> dict[str, str]:
    """Run the tests of a subject.

    Returns:
        The name of each test to its outcome, as pytest prints it.
    """
    options = ["-q", "-rA", "--tb=line", "-p", "tests.peft.upstream", "-c", os.devnull]
    command = [sys.executable, "-m", "pytest", *options, *(str(tests / file) for file in files)]
    done = subprocess.run(command, env=os.environ | {"RLRR_UPSTREAM": subject}, capture_output=True, text=True)
    found = re.findall(r"^(PASSED|FAILED|ERROR) .*?::(.+?)(?: - .*)?$", done.stdout, re.M)
    if not found:
        raise RuntimeError(f"{subject}: no test ran:\n{done.stdout}{done.stderr}")
    # the name of the config's class is part of a test's name
    return {name.replace("RlrrConfig", "HiraConfig"): outcome for outcome, name in found}


def pytest_configure() -> None:
    """Change PEFT as the subject says, before its tests import it."""
    for name, needed in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
        if name not in sys.modules:  # PEFT's helpers import these; no test here uses them
            stand_in = types.ModuleType(name)
            setattr(stand_in, needed, type(needed, (), {}))
            sys.modules[name] = stand_in
    import peft
    from peft.tuners.hira import HiraModel

    from rlrr_kernels.peft import RlrrConfig, accelerate_hira

    if os.environ["RLRR_UPSTREAM"] == "rlrr":
        peft.HiraConfig = RlrrConfig
    if os.environ["RLRR_UPSTREAM"] == "accelerated":
        inject = HiraModel.inject_adapter

        def inject_and_accelerate(self: Any, model: Any, *args: Any, **options: Any) -> None:
            inject(self, model, *args, **options)
            accelerate_hira(model)

        HiraModel.inject_adapter = inject_and_accelerate


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave the tests of HiRA; for RLRR, those of linears and transformers' Conv1D without dropout."""
    import peft

    def is_case(item: Any) -> bool:
        given = getattr(item, "callspec", None)
        if given is None or given.params.get("config_cls", given.params.get("config_class")) is not peft.HiraConfig:
            return False
        if peft.HiraConfig.__name__ == "HiraConfig":
            return True
        config = given.params.get("config_kwargs", {})
        of_others = str(given.params.get("model_id")).startswith("Conv") or "emb" in config.get("target_modules", ())
        return not of_others and "hira_dropout" not in config

    items[:] = [item for item in items if is_case(item)]


if __name__ == "__main__":
    sys.exit(main())
