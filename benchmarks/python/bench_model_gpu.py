"""Decode of a whole transformers model on a GPU: fp16 caches against KvarnCache, tokens per second and memory.

    python benchmarks/python/bench_model_gpu.py --out benchmarks/results

The model has an 8B model's shapes and random weights; speed does not depend on what they are. Caches are filled with Gaussian K and V, not
by reading a prompt. Engines:

    dynamic, eager   transformers' DynamicCache with sdpa: what model.generate does
    fp16, graph      K and V of fixed length written in place, sdpa without a mask, one CUDA graph per step: the best case of an fp16 cache
    kvarn, eager     KvarnCache on the fused path
    kvarn, graph     the same as one CUDA graph per step (kvarn.integrations.decode_graph), encoding of complete tiles included
"""

import argparse
import gc
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_measure import clocks, describe_gpu, machine_lines, markdown_table

from kvarn.integrations.decode_graph import DecodeGraph
from kvarn.integrations.transformers import KvarnCache, disable, enable

MODELS = {
    "llama-8b": ("LlamaConfig", {"num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 128256}),
    "qwen3-8b": ("Qwen3Config", {"num_hidden_layers": 36, "intermediate_size": 12288, "vocab_size": 151936}),
}
CHUNK = 8192  # tokens of synthetic K and V at once
TILE_STEPS = 128  # kvarn's steps are timed over whole tiles, so that the encoding of one is in


def make_model(name: str, layers: int) -> Any:
    kind, options = MODELS[name]
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 1 << 20}
    config = getattr(transformers, kind)(**shape, **{**options, **({"num_hidden_layers": layers} if layers else {})})
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def random_kv(config: Any, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16), torch.randn(shape, device="cuda", dtype=torch.bfloat16)


class InPlaceCache(transformers.DynamicCache):
    """K and V of a fixed number of tokens; every step writes the last one anew. Needs no mask, and its addresses never change."""

    def __init__(self, config: Any, batch: int, tokens: int) -> None:
        super().__init__()
        self.pairs = [random_kv(config, batch, tokens) for _ in range(config.num_hidden_layers)]
        self.tokens = tokens

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.pairs[layer]
        k[:, :, -1:], v[:, :, -1:] = key, value
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.tokens, 0


def dynamic_eager(model: Any, batch: int, context: int, args: Any) -> tuple[Callable[[], object], int]:
    disable(model)
    cache = transformers.DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        cache.update(*random_kv(model.config, batch, context), layer)
    token = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    return lambda: model(input_ids=token, past_key_values=cache), args.steps


def fp16_graph(model: Any, batch: int, context: int, args: Any) -> tuple[Callable[[], object], int]:
    disable(model)
    cache = InPlaceCache(model.config, batch, context + 1)
    token = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    position = torch.full_like(token, context)
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model(input_ids=token, position_ids=position, past_key_values=cache)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        logits = model(input_ids=token, position_ids=position, past_key_values=cache).logits

    def step(keep: Any = (cache, logits, token, position)) -> None:
        graph.replay()

    return step, args.steps


def kvarn_cache(model: Any, batch: int, context: int, args: Any) -> KvarnCache:
    enable(model)
    room = batch * (context + 4 * TILE_STEPS + args.steps)
    cache = KvarnCache(model.config, args.format, max_tokens=room, max_sequences=batch)
    chunk = max(1, CHUNK // batch)
    for start in range(0, context, chunk):
        for layer in range(model.config.num_hidden_layers):
            k, v = random_kv(model.config, batch, min(chunk, context - start))
            cache._check_shapes(k, v, layer)
            if layer == 0:
                cache._begin(k.shape[2], None)
            cache._write(layer, k, v)
    return cache


def kvarn_eager(model: Any, batch: int, context: int, args: Any) -> tuple[Callable[[], object], int]:
    cache = kvarn_cache(model, batch, context, args)
    token = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    return lambda: model(input_ids=token, past_key_values=cache), args.steps


def kvarn_graph(model: Any, batch: int, context: int, args: Any) -> tuple[Callable[[], object], int]:
    cache = kvarn_cache(model, batch, context, args)
    graph = DecodeGraph(model, cache)
    token = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    return lambda: graph.step(token), TILE_STEPS


ENGINES = {"dynamic, eager": dynamic_eager, "fp16, graph": fp16_graph, "kvarn, eager": kvarn_eager, "kvarn, graph": kvarn_graph}


@torch.inference_mode()
def measure(name: str, model: Any, batch: int, context: int, weights: int, args: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"engine": name, "batch": batch, "context": context}
    torch.cuda.reset_peak_memory_stats()
    try:
        step, steps = ENGINES[name](model, batch, context, args)
        torch.cuda.synchronize()
        row["held_gib"] = (torch.cuda.memory_allocated() - weights) / 2**30
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / steps
        row.update(ms=seconds * 1e3, tokens_per_s=batch / seconds, steps=steps)
    except (torch.OutOfMemoryError, MemoryError) as error:
        row["failed"] = f"out of memory ({type(error).__name__})"
    row["peak_gib"] = (torch.cuda.max_memory_allocated() - weights) / 2**30
    return row


def markdown(results: dict[str, Any]) -> str:
    lines = [f"# Decode of a whole model: {results['machine']['device']}", "", *machine_lines(results["machine"])]
    lines += [f"- model: {results['model']}", f"- clocks before: {results['clocks'][0]}", f"- clocks after: {results['clocks'][1]}", ""]
    lines += [
        "One step gives one token to every sequence. Wall-clock time of the host, over all steps. Memory without the weights: held is what",
        "the cache and the graph take, peak what was allocated at most, the filling of the cache included.",
        "",
    ]
    fp16 = {(row["batch"], row["context"]): row.get("tokens_per_s") for row in results["rows"] if row["engine"] == "fp16, graph"}
    body = []
    for row in results["rows"]:
        base = fp16.get((row["batch"], row["context"]))
        speed = row.get("tokens_per_s")
        body.append(
            [
                f"{row['batch']} x {row['context']:,}, {row['engine']}",
                f"{row['ms']:.2f}" if speed else row["failed"],
                f"{speed:,.1f}" if speed else "-",
                f"{speed / base:.2f}" if speed and base else "-",
                f"{row['held_gib']:.2f}" if "held_gib" in row else "-",
                f"{row['peak_gib']:.2f}",
            ]
        )
    header = ["sequences x context, engine", "ms per step", "tokens/s", "of fp16, graph", "held GiB", "peak GiB"]
    return "\n".join([*lines, *markdown_table(header, body), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--layers", type=int, default=0, help="layers of the model, where all do not fit")
    parser.add_argument("--format", default="k4v2_g128")
    shapes = ["1x2048", "1x8192", "1x32768", "1x131072", "8x8192", "8x32768"]
    parser.add_argument("--shapes", nargs="*", default=shapes, help="sequences x context")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=16, help="timed steps of the engines that do not encode")
    parser.add_argument("--seconds", type=float, default=420, help="no new measurement after this time")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"expected a CUDA device, got none with torch {torch.__version__}")
    start = time.perf_counter()
    torch.manual_seed(0)
    model = make_model(args.model, args.layers)
    weights = torch.cuda.memory_allocated()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    described = (
        f"{args.model} shapes, {model.config.num_hidden_layers} layers, {parameters * 1e-9:.2f} billion random parameters in bfloat16"
    )
    results: dict[str, Any] = {
        "machine": describe_gpu(["kvarn", "torch", "transformers"]),
        "model": described,
        "clocks": [clocks(), {}],
        "rows": [],
    }
    print(f"{described}, {weights / 2**30:.1f} GiB, made in {time.perf_counter() - start:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", str(results["machine"]["device"]).lower()).strip("-")
    file = args.out / f"gpu-model-{device}.json"
    for shape in args.shapes:
        batch, context = (int(part) for part in shape.split("x"))
        for name in args.engines:
            if time.perf_counter() - start > args.seconds:
                print(f"{shape}, {name}: left out after {args.seconds:.0f} s", flush=True)
                continue
            row = measure(name, model, batch, context, weights, args)
            gc.collect()
            torch.cuda.empty_cache()
            results["rows"].append(row)
            done = f"{row['ms']:.2f} ms, {row['tokens_per_s']:.1f} tokens/s" if "ms" in row else row["failed"]
            print(f"{shape}, {name}: {done}, peak {row['peak_gib']:.2f} GiB", flush=True)
            results["clocks"][1] = clocks()
            file.write_text(json.dumps(results, indent=1, default=str) + "\n")
            file.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
