"""A model's folder as a GGUF file, for llama.cpp: `python -m runners.to_gguf FOLDER FILE bf16|q8_0`.

llama.cpp's own converter is not in its package. Vectors stay float32, as there; no vocabulary is written: ids are fed.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOPS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def main() -> None:
    folder, path, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    fields = json.loads((folder / "config.json").read_text(encoding="utf8"))
    writer = gguf.GGUFWriter(path, fields["model_type"])
    describe(writer, fields)
    for name, stored in tensors(folder / "model.safetensors"):
        if fields["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = fields["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            stored = paired(stored, heads)
        store(writer, theirs(name), stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, fields: dict[str, Any]) -> None:
    """The shape, and how positions turn."""
    head_size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    writer.add_vocab_size(fields["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_theta"])
    scaling = fields.get("rope_scaling")
    if scaling is not None:
        if scaling["rope_type"] != "llama3":
            raise ValueError(f"Rope scaling {scaling['rope_type']} is not converted: choose another model.")
        writer.add_tensor("rope_freqs.weight", slower(scaling, fields["rope_theta"], head_size))


def slower(scaling: dict[str, Any], theta: float, head_size: int) -> NDArray[np.float32]:
    """Llama 3's scaling: what each frequency is divided by."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    divided = []
    for index in range(0, head_size, 2):
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi * theta ** (index / head_size))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        divided.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divided, dtype=np.float32)


def tensors(path: Path) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Name and bfloat16 bits of every tensor of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    cells = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    for name, about in header.items():
        start, end = about["data_offsets"]
        yield name, np.array(cells[start:end]).view(np.uint16).reshape(about["shape"])


def theirs(name: str) -> str:
    """GGUF's name of a tensor."""
    stem, _, ending = name.rpartition(".")
    if stem in TOPS:
        return f"{TOPS[stem]}.{ending}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{ending}"


def paired(stored: NDArray[np.uint16], heads: int) -> NDArray[np.uint16]:
    """Rows as llama.cpp turns them: neighbours make a pair, where Hugging Face pairs the two halves of a head."""
    halves = stored.reshape(heads, 2, -1, *stored.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(stored.shape))


def store(writer: Any, name: str, stored: NDArray[np.uint16], kind: str) -> None:
    if stored.ndim == 1:
        writer.add_tensor(name, exact(stored))
    elif kind == "bf16":
        writer.add_tensor(name, stored.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        rounded = gguf.quants.quantize(exact(stored), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, rounded, raw_dtype=gguf.GGMLQuantizationType.Q8_0)


def exact(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (stored.astype(np.uint32) << 16).view(np.float32)


if __name__ == "__main__":
    main()
