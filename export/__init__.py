"""From a calibrated checkpoint to one GGUF file: names, keys, order, verification (docs/format.md)."""
