"""Quantized formats, one file each: how a source packs them (`accepts`, `unpack`)."""
