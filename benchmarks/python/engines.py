"""One decode step of attention, by kvarn and by other libraries.

Every engine computes the same thing: one query token of `heads = kv_heads * gqa` heads against `tokens` cached tokens. It holds several
copies of its cache in different memory, so that a copy has left the processor's caches before it is read again.
"""

import ctypes
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np


class Unavailable(Exception):  # noqa: N818 - an answer, not an error
    """The engine cannot run here; the text says why."""


@dataclass
class Problem:
    k: np.ndarray  # [kv_heads, tokens, head_dim] float32
    v: np.ndarray  # [kv_heads, tokens, head_dim] float32
    q: np.ndarray  # [heads, head_dim] float32
    threads: int
    min_bytes: int  # an engine reads at least this much before it comes back to the same copy

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(kv_heads, tokens, head_dim, heads)"""
        return (*self.k.shape, self.q.shape[0])

    def copies(self, bytes_per_call: int) -> int:
        return max(2, -(-self.min_bytes // bytes_per_call))

    def exact(self) -> np.ndarray:
        """[heads, head_dim] float64: attention over the unquantised K and V."""
        kv_heads, _, dim, heads = self.shape
        out = np.empty((heads, dim))
        for h in range(heads):
            kv = h // (heads // kv_heads)
            scores = self.k[kv].astype(np.float64) @ self.q[h] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[h] = weights @ self.v[kv].astype(np.float64) / weights.sum()
        return out


def require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"Python package {module} is not installed")


class Kvarn:
    """Records of one format, encoded from the problem's K and V."""

    def __init__(self, problem: Problem, format_name: str):
        import kvarn

        self.ops = kvarn.ops
        kv_heads, tokens, dim, heads = problem.shape
        fmt = kvarn.Format(format_name)
        tile = fmt.tile_tokens
        if tokens % tile:
            raise Unavailable(f"{tokens} tokens are no multiple of the tile of {format_name}")
        tiles = tokens // tile
        self.plan = kvarn.Plan(
            fmt,
            head_dim=dim,
            num_kv_heads=kv_heads,
            dtype="float16",
            num_q_heads=heads,
            max_num_seqs=1,
            max_q_tokens=1,
            max_tiles=tiles,
            num_threads=problem.threads,
        )
        self.name = f"kvarn {format_name}"
        self.detail = self.plan.describe
        self.bytes_per_call = tiles * kv_heads * fmt.record_bytes(dim)
        copies = problem.copies(self.bytes_per_call)
        self.records = np.zeros((copies * tiles, kv_heads, fmt.record_bytes(dim)), np.uint8)
        self.fill(problem, tiles, tile)
        for copy in range(1, copies):
            self.records[copy * tiles : (copy + 1) * tiles] = self.records[:tiles]
        self.tables = [np.arange(c * tiles, (c + 1) * tiles, dtype=np.int32)[None] for c in range(copies)]
        self.q = problem.q.astype(np.float16)[None]
        self.out = np.empty_like(self.q)
        self.workspace = np.zeros(self.plan.workspace_bytes + 256, np.uint8)
        skip = -self.workspace.ctypes.data % 256
        self.workspace = self.workspace[skip : skip + self.plan.workspace_bytes]
        self.staging = np.zeros((1, 2, kv_heads, tile, dim), np.float16)
        self.seq_lens = np.array([tokens], np.int32)
        self.cu_q_lens = np.array([0, 1], np.int32)

    def fill(self, problem: Problem, tiles: int, tile: int) -> None:
        """Encodes copy 0, a few tiles at a time."""
        kv_heads, _, dim, _ = problem.shape
        group = min(tiles, 32)
        staging = np.zeros((group, 2, kv_heads, tile, dim), np.float16)
        for first in range(0, tiles, group):
            count = min(group, tiles - first)
            part = slice(first * tile, (first + count) * tile)
            k = np.ascontiguousarray(problem.k[:, part].transpose(1, 0, 2), dtype=np.float16)
            v = np.ascontiguousarray(problem.v[:, part].transpose(1, 0, 2), dtype=np.float16)
            self.ops.append(self.plan, k, v, np.arange(count * tile, dtype=np.int64), staging)
            slots = np.arange(count, dtype=np.int32)
            self.ops.encode(self.plan, staging, self.records, slots, slots + np.int32(first))
        self.last_staging, self.group = staging, group

    def encode(self, _: int = 0) -> None:
        """Encodes `group * kv_heads` tiles over the copy that is there."""
        slots = np.arange(self.group, dtype=np.int32)
        self.ops.encode(self.plan, self.last_staging, self.records, slots, slots)

    def run(self, i: int) -> None:
        self.ops.attend(
            self.plan,
            self.q,
            records=self.records,
            staging=self.staging,
            block_table=self.tables[i % len(self.tables)],
            seq_lens=self.seq_lens,
            cu_q_lens=self.cu_q_lens,
            out=self.out,
            workspace=self.workspace,
        )

    def result(self) -> np.ndarray:
        return self.out[0].astype(np.float64)


class TorchSdpa:
    """torch.nn.functional.scaled_dot_product_attention; the query heads of a KV head are the rows of one matrix."""

    def __init__(self, problem: Problem, dtype_name: str):
        require("torch")
        import torch

        torch.set_num_threads(problem.threads)
        kv_heads, _, dim, heads = problem.shape
        dtype = getattr(torch, dtype_name)
        self.name = f"torch SDPA, {dtype_name}"
        self.detail = f"{problem.threads} threads"
        k = torch.from_numpy(problem.k).to(dtype)[None]
        v = torch.from_numpy(problem.v).to(dtype)[None]
        self.q = torch.from_numpy(problem.q).to(dtype).view(1, kv_heads, heads // kv_heads, dim)
        self.bytes_per_call = 2 * k.numel() * k.element_size()
        self.copies = [(k, v)] + [(k.clone(), v.clone()) for _ in range(problem.copies(self.bytes_per_call) - 1)]
        self.attention = torch.nn.functional.scaled_dot_product_attention
        self.no_grad = torch.inference_mode
        self.out = None

    def run(self, i: int) -> None:
        with self.no_grad():
            self.out = self.attention(self.q, *self.copies[i % len(self.copies)])

    def result(self) -> np.ndarray:
        return self.out.float().numpy().reshape(-1, self.q.shape[-1]).astype(np.float64)


class OnnxRuntimeGqa:
    """ONNX Runtime's com.microsoft.GroupQueryAttention, past and present in one buffer; 8- and 4-bit caches have one scale per channel."""

    LEVELS: Mapping[int, int] = MappingProxyType({8: 127, 4: 7})

    def __init__(self, problem: Problem, bits: int):
        require("onnxruntime")
        require("onnx")
        import onnxruntime as ort

        kv_heads, tokens, dim, heads = problem.shape
        self.name = "ONNX Runtime GQA, " + ("fp32" if bits == 32 else f"int{bits} per channel")
        self.detail = f"{problem.threads} threads"
        options = ort.SessionOptions()
        options.intra_op_num_threads = problem.threads
        # Its idle threads would otherwise spin into the next engine's time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = ort.InferenceSession(self.model(heads, kv_heads, dim, bits), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise Unavailable(f"onnxruntime {ort.__version__} refuses this cache: {str(error).splitlines()[0][:120]}") from error
        k, k_scale = self.quantise(problem.k, bits)
        v, v_scale = self.quantise(problem.v, bits)
        self.bytes_per_call = k.nbytes + v.nbytes
        inputs = {
            "query": problem.q.reshape(1, 1, -1),
            "key": problem.k[:, -1].reshape(1, 1, -1).copy(),  # the step's own token takes the last position
            "value": problem.v[:, -1].reshape(1, 1, -1).copy(),
            "seqlens_k": np.array([tokens - 1], np.int32),
            "total_sequence_length": np.array([tokens], np.int32),
        }
        if bits != 32:
            inputs |= {"k_scale": k_scale, "v_scale": v_scale}
        self.out = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, heads * dim), np.float32))
        self.dim = dim
        self.bindings, self.kept = [], []
        for _ in range(problem.copies(self.bytes_per_call)):
            caches = [ort.OrtValue.ortvalue_from_numpy(x.copy()) for x in (k, v)]
            binding = self.session.io_binding()
            for name, value in inputs.items():
                binding.bind_cpu_input(name, value)
            for name, value in zip(("key", "value"), caches, strict=True):
                binding.bind_ortvalue_input(f"past_{name}", value)
                binding.bind_ortvalue_output(f"present_{name}", value)
            binding.bind_ortvalue_output("output", self.out)
            self.bindings.append(binding)
            self.kept.append((caches, inputs))

    @classmethod
    def quantise(cls, x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
        """([1, kv_heads, tokens, head_dim or half of it], scales [kv_heads, 1, head_dim])"""
        if bits == 32:
            return np.ascontiguousarray(x[None]), None
        levels = cls.LEVELS[bits]
        scale = np.abs(x).max(axis=1, keepdims=True) / levels
        codes = np.clip(np.rint(x / scale), -levels - 1, levels).astype(np.int8)
        if bits == 4:
            nibbles = (codes + 8).astype(np.uint8)
            return np.ascontiguousarray((nibbles[..., 0::2] | (nibbles[..., 1::2] << 4))[None]), scale.astype(np.float32)
        return np.ascontiguousarray(codes[None]), scale.astype(np.float32)

    @staticmethod
    def model(heads: int, kv_heads: int, dim: int, bits: int) -> bytes:
        from onnx import TensorProto, helper

        info = helper.make_tensor_value_info
        cache_type = {32: TensorProto.FLOAT, 8: TensorProto.INT8, 4: TensorProto.UINT8}[bits]
        cache_shape = [1, kv_heads, "capacity", dim // 2 if bits == 4 else dim]
        inputs = [info(name, TensorProto.FLOAT, [1, 1, n * dim]) for name, n in (("query", heads), ("key", kv_heads), ("value", kv_heads))]
        inputs += [info(name, cache_type, cache_shape) for name in ("past_key", "past_value")]
        inputs += [info(name, TensorProto.INT32, [1]) for name in ("seqlens_k", "total_sequence_length")]
        names, attributes = [i.name for i in inputs], {"num_heads": heads, "kv_num_heads": kv_heads}
        if bits != 32:
            attributes |= {"kv_cache_bit_width": bits, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
            inputs += [info(name, TensorProto.FLOAT, [kv_heads, 1, dim]) for name in ("k_scale", "v_scale")]
            names += ["", "", "", "", "", "k_scale", "v_scale"]  # no rotary caches, positions, bias or sinks
        outputs = [info("output", TensorProto.FLOAT, [1, 1, heads * dim])]
        outputs += [info(name, cache_type, cache_shape) for name in ("present_key", "present_value")]
        node = helper.make_node("GroupQueryAttention", names, [o.name for o in outputs], domain="com.microsoft", **attributes)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph([node], "attention", inputs, outputs)
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def run(self, i: int) -> None:
        self.session.run_with_iobinding(self.bindings[i % len(self.bindings)])

    def result(self) -> np.ndarray:
        return self.out.numpy().reshape(-1, self.dim).astype(np.float64)


class LlamaFlashAttention:
    """llama.cpp's ggml_flash_attn_ext on ggml's CPU backend, from the libraries inside llama-cpp-python."""

    TYPES: Mapping[str, int] = MappingProxyType({"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8})  # enum ggml_type

    class InitParams(ctypes.Structure):
        _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    def __init__(self, problem: Problem, cache_type: str):
        base, cpu = self.libraries()
        kv_heads, tokens, dim, heads = problem.shape
        self.name = f"llama.cpp flash attention, {cache_type}"
        self.detail = f"{problem.threads} threads"
        self.dim, self.base = dim, base
        kind = self.TYPES[cache_type]
        row_bytes = base.ggml_row_size(kind, dim)
        self.bytes_per_call = 2 * kv_heads * tokens * row_bytes
        copies = problem.copies(self.bytes_per_call)
        self.context = base.ggml_init(self.InitParams((self.bytes_per_call + (1 << 20)) * copies + (64 << 20), None, False))
        if not self.context:
            raise Unavailable("ggml_init failed")
        tensor = lambda t, *ne: base.ggml_new_tensor_4d(self.context, t, *ne)  # noqa: E731
        q = tensor(self.TYPES["f32"], dim, 1, heads, 1)
        self.write(q, problem.q)
        self.backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self.backend, problem.threads)
        packed = [self.convert(x, kind, row_bytes) for x in (problem.k, problem.v)]
        self.graphs = []
        for _ in range(copies):
            k, v = (tensor(kind, dim, tokens, kv_heads, 1) for _ in range(2))
            self.write(k, packed[0])
            self.write(v, packed[1])
            result = base.ggml_flash_attn_ext(self.context, q, k, v, None, dim**-0.5, 0.0, 0.0)
            graph = base.ggml_new_graph(self.context)
            base.ggml_build_forward_expand(graph, result)
            self.graphs.append((graph, result))
        self.shape = (heads, dim)
        self.last = self.graphs[0][1]

    @staticmethod
    def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
        require("llama_cpp")
        # Found without importing llama_cpp, which needs packages that this does not.
        spec = importlib.util.find_spec("llama_cpp")
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        try:
            base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
            cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise Unavailable(str(error)) from error
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        int64, real = ctypes.c_int64, ctypes.c_float
        for library, name, returns, arguments in (
            (base, "ggml_init", pointer, [LlamaFlashAttention.InitParams]),
            (base, "ggml_free", None, [pointer]),
            (base, "ggml_row_size", size, [integer, int64]),
            (base, "ggml_new_tensor_4d", pointer, [pointer, integer, int64, int64, int64, int64]),
            (base, "ggml_get_data", pointer, [pointer]),
            (base, "ggml_quantize_chunk", size, [integer, pointer, pointer, int64, int64, int64, pointer]),
            (base, "ggml_flash_attn_ext", pointer, [pointer, pointer, pointer, pointer, pointer, real, real, real]),
            (base, "ggml_new_graph", pointer, [pointer]),
            (base, "ggml_build_forward_expand", None, [pointer, pointer]),
            (base, "ggml_backend_graph_compute", integer, [pointer, pointer]),
            (base, "ggml_backend_free", None, [pointer]),
            (cpu, "ggml_backend_cpu_init", pointer, []),
            (cpu, "ggml_backend_cpu_set_n_threads", None, [pointer, integer]),
        ):
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise Unavailable(f"this llama-cpp-python has no {name}") from error
            function.restype, function.argtypes = returns, arguments
        return base, cpu

    def convert(self, x: np.ndarray, kind: int, row_bytes: int) -> np.ndarray:
        rows = x.size // self.dim
        if kind == self.TYPES["f16"]:
            return x.astype(np.float16)
        packed = np.empty(rows * row_bytes, np.uint8)
        source = np.ascontiguousarray(x, np.float32)
        self.base.ggml_quantize_chunk(kind, source.ctypes.data, packed.ctypes.data, 0, rows, self.dim, None)
        return packed

    def write(self, tensor: int, x: np.ndarray) -> None:
        data = np.ascontiguousarray(x)
        ctypes.memmove(self.base.ggml_get_data(tensor), data.ctypes.data, data.nbytes)

    def run(self, i: int) -> None:
        graph, self.last = self.graphs[i % len(self.graphs)]
        if self.base.ggml_backend_graph_compute(self.backend, graph) != 0:
            raise RuntimeError("ggml_backend_graph_compute failed")

    def result(self) -> np.ndarray:
        data = self.base.ggml_get_data(self.last)
        values = (ctypes.c_float * (self.shape[0] * self.shape[1])).from_address(data)
        return np.array(values, np.float64).reshape(self.shape)

    def __del__(self):
        if getattr(self, "backend", None):
            self.base.ggml_backend_free(self.backend)
        if getattr(self, "context", None):
            self.base.ggml_free(self.context)
