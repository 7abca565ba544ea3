"""Full-precision logits of a Hugging Face folder, to compare a file with: the one place of the runtime with torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtime.perplexity import ReferenceLogits


def reference_logits(folder: Path) -> ReferenceLogits:
    """A function from int32 [n] tokens to float32 [n, vocab] logits of the model in `folder`.

    Raises ImportError without torch and transformers, ValueError when `folder` holds no model.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(f"a reference needs torch ({error}); run: pip install 'mobiquant[calibrate]'") from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: expected a Hugging Face model folder, found no config.json")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()

    return logits
