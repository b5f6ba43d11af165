"""llama.cpp itself, by its C interface: next-token log-probabilities with and without a control vector file.

The wheel of xllamacpp exports the whole library. Its parameter structures change with every release, so they are
passed on as they come from llama.cpp, in blocks that are larger than any of them (x86-64 passes large structures on
the stack, where the rest is not looked at). The file is read by llama.cpp's own reader, `common_control_vector_load`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_float, c_int32, c_size_t, c_void_p
from pathlib import Path

import torch

_LOAD = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


class _Block(Structure):
    """A structure that is only passed on."""

    _fields_ = [("bytes", c_char * 1024)]


class _Vector(Structure):
    """`std::vector`."""

    _fields_ = [("begin", c_void_p), ("end", c_void_p), ("capacity", c_void_p)]


class _File(Structure):
    """`common_control_vector_load_info`: a factor and a `std::string`, which in manylinux wheels is one pointer."""

    _fields_ = [("strength", c_float), ("name", c_void_p)]


class _Name(Structure):
    """What that pointer points behind: length, capacity, number of owners (-1: not to be shared)."""

    _fields_ = [("length", c_size_t), ("capacity", c_size_t), ("owners", c_size_t), ("text", c_char * 1024)]


class _Data(Structure):
    """`common_control_vector_data`."""

    _fields_ = [("width", c_int32), ("values", _Vector)]


def missing() -> str | None:
    """Why llama.cpp cannot be asked here; None if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"needs Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if importlib.util.find_spec("xllamacpp") is None:
        return "pip install xllamacpp"
    return None if hasattr(_library(), _LOAD) else "this release of xllamacpp does not export llama.cpp"


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.submodule_search_locations
    return ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))))


class LlamaCpp:
    """A GGUF model in llama.cpp, on the CPU."""

    def __init__(self, model: Path) -> None:
        self.lib = _library()
        for name, result, arguments in (
            ("llama_model_default_params", _Block, []),
            ("llama_context_default_params", _Block, []),
            ("llama_model_load_from_file", c_void_p, [c_char_p, _Block]),
            ("llama_init_from_model", c_void_p, [c_void_p, _Block]),
            ("llama_model_get_vocab", c_void_p, [c_void_p]),
            ("llama_vocab_n_tokens", c_int32, [c_void_p]),
            ("llama_model_n_layer", c_int32, [c_void_p]),
            ("llama_batch_get_one", _Block, [POINTER(c_int32), c_int32]),
            ("llama_decode", c_int32, [c_void_p, _Block]),
            ("llama_get_logits", POINTER(c_float), [c_void_p]),
            ("llama_set_adapter_cvec", c_int32, [c_void_p, c_void_p, c_size_t, c_int32, c_int32, c_int32]),
            (_LOAD, None, [POINTER(_Data), POINTER(_Vector)]),
            ("llama_free", None, [c_void_p]),
            ("llama_log_set", None, [c_void_p, c_void_p]),
        ):
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self._quiet = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda *_: None)
        self.lib.llama_log_set(ctypes.cast(self._quiet, c_void_p), None)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(model).encode(), self.lib.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {model}"

    def logps(self, ids: Sequence[int], control_vector: Path | None = None, scale: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the token after `ids`, `(vocabulary,)`; as `--control-vector-scaled FILE scale`."""
        context = self.lib.llama_init_from_model(self.model, self.lib.llama_context_default_params())
        try:
            if control_vector is not None:
                self._steer(context, control_vector, scale)
            tokens = (c_int32 * len(ids))(*ids)
            assert self.lib.llama_decode(context, self.lib.llama_batch_get_one(tokens, len(ids))) == 0
            size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
            return torch.tensor(self.lib.llama_get_logits(context)[:size]).log_softmax(0)
        finally:
            self.lib.llama_free(context)

    def _steer(self, context: int, file: Path, scale: float) -> None:
        path = str(file).encode()
        name, data = _Name(len(path), len(path), 2**64 - 1, path), _Data()
        asked = _File(scale, ctypes.addressof(name) + _Name.text.offset)
        first = ctypes.addressof(asked)
        end = first + ctypes.sizeof(asked)
        getattr(self.lib, _LOAD)(byref(data), byref(_Vector(first, end, end)))
        if data.width <= 0:
            raise ValueError(f"llama.cpp refuses {file}")
        floats = (data.values.end - data.values.begin) // ctypes.sizeof(c_float)
        layers = self.lib.llama_model_n_layer(self.model)
        failed = self.lib.llama_set_adapter_cvec(context, data.values.begin, floats, data.width, 1, layers)
        assert failed == 0, "llama.cpp does not take the control vector"
