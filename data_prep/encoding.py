"""Text to token ids in worker processes: light to import, as nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer


def load_encoder(tokenizer_json: Path) -> Tokenizer:
    """Load a tokenizer for whole documents: `encoder.encode_batch_fast(texts, add_special_tokens=False)`.

    Text that spells a special token is encoded as plain text: a document cannot forge the end of a document. Nothing
    is truncated or padded, whatever the file says.
    """
    encoder = Tokenizer.from_file(str(tokenizer_json))
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder
