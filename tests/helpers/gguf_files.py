"""What an exported GGUF file holds."""

from __future__ import annotations

from pathlib import Path


def gguf(file: Path, architecture: str, tensors: dict) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
