"""Weights in, a Decoder out: from the safetensors files of a Hugging Face folder, or seeded at random.

Owns the names that Hugging Face gives to tensors, the fusing of q, k, v and of gate, up, and the choice of a dtype.
Files are mapped, checked as a whole before the first byte is copied, then copied tensor by tensor into memory of our
own: a model that stayed in the mapping would pay for page faults in the middle of a request. Pickles are never opened.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headway.models.config import DecoderConfig, ModelError, read_config
from headway.models.decoder import Decoder, Layer, Linear
from headway.models.layers import rope_table

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_STORED_DTYPES = ("F32", "BF16", "F16")
_INIT_STD = 0.02
_CHUNK = 1 << 20  # elements drawn at a time: the order of draws, hence part of what a seed means


def load(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", num_positions: int | None = None
) -> Decoder:
    """The model in `folder`, cast to `dtype`. `num_positions` is the longest context that it will be asked for.

    Raises ModelError when anything is missing, damaged or of another shape than config.json says.
    """
    config = read_config(folder)
    shapes = tensor_shapes(config)
    with _Checkpoint(folder) as checkpoint:
        checkpoint.check(shapes)

        def take(names: Sequence[str]) -> Tensor:
            stacked = torch.empty(_stacked(shapes, names), dtype=dtype, device=device)
            row = 0
            for name in names:
                part = checkpoint.tensor(name)
                stacked[row : row + part.shape[0]].copy_(part)
                row += part.shape[0]
            return stacked

        return _assemble(config, take, rope_table(config, num_positions or config.max_positions, device))


def random_decoder(
    config: DecoderConfig,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    num_positions: int | None = None,
) -> Decoder:
    """A model of random weights: matrices normal with deviation 0.02, norms one, biases zero.

    The values are a function of the seed; the dtype only rounds them, and neither device nor thread count matter.
    """
    shapes = tensor_shapes(config)
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.empty(_CHUNK)

    def take(names: Sequence[str]) -> Tensor:
        shape = _stacked(shapes, names)
        if names[0].endswith("bias"):
            return torch.zeros(shape, dtype=dtype, device=device)
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        weight = torch.empty(shape, dtype=dtype, device=device)
        for part in weight.view(-1).split(_CHUNK):
            part.copy_(buffer[: len(part)].normal_(std=_INIT_STD, generator=generator))
        return weight

    return _assemble(config, take, rope_table(config, num_positions or config.max_positions, device))


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this shape holds, by its Hugging Face name."""
    hidden, middle = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        for name, size_out, size_in, has_bias in (
            ("self_attn.q_proj", config.q_size, hidden, config.qkv_bias),
            ("self_attn.k_proj", config.kv_size, hidden, config.qkv_bias),
            ("self_attn.v_proj", config.kv_size, hidden, config.qkv_bias),
            ("self_attn.o_proj", hidden, config.q_size, config.o_bias),
            ("mlp.gate_proj", middle, hidden, config.mlp_bias),
            ("mlp.up_proj", middle, hidden, config.mlp_bias),
            ("mlp.down_proj", hidden, middle, config.mlp_bias),
        ):
            shapes[f"{at}{name}.weight"] = (size_out, size_in)
            if has_bias:
                shapes[f"{at}{name}.bias"] = (size_out,)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{at}self_attn.q_norm.weight"] = (config.head_size,)
            shapes[f"{at}self_attn.k_norm.weight"] = (config.head_size,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _stacked(shapes: dict[str, tuple[int, ...]], names: Sequence[str]) -> tuple[int, ...]:
    return (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])


def _assemble(config: DecoderConfig, take: Callable[[Sequence[str]], Tensor], rope: Tensor) -> Decoder:
    """Build the Decoder; `take` gives the named tensors stacked into one, in that order."""

    def linear(at: str, names: Sequence[str], has_bias: bool) -> Linear:
        weight = take([f"{at}{name}_proj.weight" for name in names])
        return Linear(weight, take([f"{at}{name}_proj.bias" for name in names]) if has_bias else None)

    def layer(number: int) -> Layer:
        at = f"model.layers.{number}."
        attention, mlp = f"{at}self_attn.", f"{at}mlp."
        return Layer(
            input_norm=take([f"{at}input_layernorm.weight"]),
            qkv=linear(attention, "qkv", config.qkv_bias),
            q_norm=take([f"{attention}q_norm.weight"]) if config.qk_norm else None,
            k_norm=take([f"{attention}k_norm.weight"]) if config.qk_norm else None,
            o=linear(attention, "o", config.o_bias),
            post_norm=take([f"{at}post_attention_layernorm.weight"]),
            gate_up=linear(mlp, ("gate", "up"), config.mlp_bias),
            down=linear(mlp, ("down",), config.mlp_bias),
        )

    embedding = take(["model.embed_tokens.weight"])
    layers = tuple(layer(number) for number in range(config.num_layers))
    final_norm = take(["model.norm.weight"])
    head = embedding if config.tie_embeddings else take(["lm_head.weight"])
    return Decoder(config, embedding, layers, final_norm, Linear(head), rope)


class _Checkpoint:
    """The safetensors files of a folder, mapped while the `with` block is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}  # tensor name -> open file
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            for path in _shards(self.folder):
                file = self._stack.enter_context(_open(path))
                self._files |= dict.fromkeys(file.keys(), file)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Every tensor is there, of its shape, in a dtype that can be cast, and there are no others."""
        again = "download the model again."
        for name, shape in shapes.items():
            if name not in self._files:
                raise ModelError(f"The weights in {self.folder} lack the tensor {name}: {again}")
            part = self._files[name].get_slice(name)
            if tuple(part.get_shape()) != shape:
                found = tuple(part.get_shape())
                raise ModelError(f"{name} in {self.folder} has the shape {found}, config.json says {shape}: {again}")
            if part.get_dtype() not in _STORED_DTYPES:
                raise ModelError(
                    f"{name} in {self.folder} is stored as {part.get_dtype()}: "
                    "give the original float32, bfloat16 or float16 weights."
                )
        for name in sorted(self._files.keys() - shapes.keys()):
            # a tied head and the buffers of old releases may be stored beside what they are made from
            if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
                raise ModelError(
                    f"The weights in {self.folder} hold {name}, for which config.json has no place: {again}"
                )

    def tensor(self, name: str) -> Tensor:
        """A view of the mapping; copy it before the block ends."""
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{name} in {self.folder} cannot be read ({error}): download the model again.") from error
        return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} lacks {path.name}, which its index names: download it again.") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}): download it again.") from error


def _shards(folder: Path) -> list[Path]:
    """The files that together hold the model: those that the index names, or the only one there is."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not an index of safetensors files: download it again.") from error
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ModelError(f"{index} must name files in its own folder: download it again.")
        return [folder / name for name in sorted(names)]
    files = sorted(folder.glob("*.safetensors"))
    if folder / _SINGLE in files:
        return [folder / _SINGLE]
    if len(files) == 1:
        return files
    if files:
        raise ModelError(f"{folder} holds {len(files)} safetensors files but no {INDEX}: download the index too.")
    pickles = [path.name for ending in ("bin", "pt", "pth") for path in sorted(folder.glob(f"*.{ending}"))]
    if pickles:
        raise ModelError(f"{pickles[0]} in {folder} is a pickle, which is never opened: convert it to safetensors.")
    raise ModelError(f"{folder} holds no *.safetensors file: download the model's weights.")


def choose_dtype(stored: str, device: torch.device | str, *, is_compiled: bool = False) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why. On a CPU bfloat16 is measured first: without hardware for it torch is slow.
    `is_compiled`: operators of our own have it, for which it is half as much to read and nothing more to compute."""
    if stored not in ("bfloat16", "float16"):
        return torch.float32, f"float32, because the weights are stored as {stored}"
    if is_compiled:
        return torch.bfloat16, "bfloat16, for which operators are compiled here"
    if torch.device(device).type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bfloat16, which this device computes natively"
        return torch.float32, "float32, because this device does not compute bfloat16 natively"
    prefill = _bf16_ratio(num_rows=32, size_out=2048)  # many rows: bound by arithmetic
    decode = _bf16_ratio(num_rows=1, size_out=6144)  # one row against 24 MiB in float32: bound by memory
    measured = f"a matmul takes {prefill:.2f} (prefill) and {decode:.2f} (decode) of float32's time"
    if prefill * decode < 1:
        return torch.bfloat16, f"bfloat16, in which {measured}"
    return torch.float32, f"float32, because in bfloat16 {measured}"


def _bf16_ratio(num_rows: int, size_out: int) -> float:
    """Time of a matmul in bfloat16 over that in float32.

    On one thread, in turn, the best of several: with more threads a busy neighbour would decide the outcome.
    """
    pairs = {
        dtype: (torch.ones(num_rows, 1024, dtype=dtype), torch.ones(size_out, 1024, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    seconds = dict.fromkeys(pairs, math.inf)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(6):  # the first one compiles; the best one is the least disturbed
            for dtype, (x, weight) in pairs.items():
                begun = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - begun)
    finally:
        torch.set_num_threads(num_threads)
    return seconds[torch.bfloat16] / seconds[torch.float32]
