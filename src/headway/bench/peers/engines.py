"""Which engines are compared, in which precision, and what each of them reads. Knows how none of them is run."""

from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
OURS = "headway"


class Venv(NamedTuple):
    """An environment of its own: `requirements/NAME.txt`, less what breaks it, and what it asks of the machine."""

    name: str
    without: tuple[str, ...] = ()
    needs_compiler: bool = False

    @property
    def requirements(self) -> Path:
        return HERE / "requirements" / f"{self.name}.txt"


class Engine(NamedTuple):
    """One column of the page. `venv` is None for ourselves; `reads` names a form of the model (`convert.py`)."""

    name: str  # on the page
    group: str  # as in --only
    runner: str
    precision: str  # bf16 or int8
    reads: str
    venv: Venv | None


# torchvision and torchaudio come along as dependencies, built for another torch than the one that is there
OPENVINO = Venv("openvino")
LLAMA_CPP = Venv("llama.cpp", needs_compiler=True)
TRANSFORMERS = Venv("transformers")
VLLM = Venv("vllm", without=("torchvision", "torchaudio", "torchcodec"))
TO_OPENVINO = Venv("to-openvino", without=("torchvision",))
TO_GGUF = Venv("to-gguf")

ENGINES = (
    Engine("Headway", OURS, "ours", "bf16", "safetensors", None),
    Engine("Headway int8", OURS, "ours", "int8", "safetensors", None),
    Engine("OpenVINO", "openvino", "openvino", "bf16", "openvino-bf16", OPENVINO),
    Engine("OpenVINO int8", "openvino", "openvino", "int8", "openvino-int8", OPENVINO),
    Engine("llama.cpp", "llama.cpp", "llama_cpp", "bf16", "bf16.gguf", LLAMA_CPP),
    Engine("llama.cpp Q8_0", "llama.cpp", "llama_cpp", "int8", "q8_0.gguf", LLAMA_CPP),
    Engine("transformers", "transformers", "transformers", "bf16", "safetensors", TRANSFORMERS),
    Engine("vLLM", "vllm", "vllm", "bf16", "safetensors", VLLM),
)
GROUPS = tuple(dict.fromkeys(engine.group for engine in ENGINES if engine.group != OURS))
