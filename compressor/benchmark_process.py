"""One measurement of `compress bench`, run as `python -m compressor.benchmark_process JOB RESULT`.

JOB and RESULT are JSON files. Nothing is imported before it is needed: the peak memory of this process is what the
runtime and the model take. Times start after the imports. A job has

    driver       torch | genai | onnxruntime
    source       the folder to load
    ours         whether it is one that compressor wrote
    library      whether compressor.register_ops adds the fused kernels
    ids          token ids, a list [T]; batch: of an encoder, how many such rows at once
    new_tokens   decode steps after the first token
    threads      of the runtime
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor.kernels import native
from compressor.own_process import peak_bytes

DECODE_LIMIT_S = 10.0  # a slow runtime decodes for this long instead of all tokens; the rate is the same
ENCODER_RUNS = 10

Job = dict[str, Any]
Step = Callable[[], None]


def decode(load: Callable[[], tuple[Step, Step]], job: Job) -> dict[str, float]:
    """Seconds to load, milliseconds to the first token, tokens per second of the steps after it.

    `load` gives (begin: a new sequence, its prompt and its first token; step: one more token).
    """
    seconds, (begin, step) = _timed(load)
    begin()  # once without being measured: memory is allocated and the weights are paged in
    step()
    first, _ = _timed(begin)
    start, done = time.perf_counter(), 0
    while done < job["new_tokens"] and (done == 0 or time.perf_counter() - start < DECODE_LIMIT_S):
        step()
        done += 1
    return {
        "load_s": seconds,
        "first_token_ms": first * 1e3,
        "tokens_per_s": done / (time.perf_counter() - start),
    }


def encode(load: Callable[[], Callable[[int], None]], job: Job) -> dict[str, float]:
    """Seconds to load, milliseconds of one sequence, sequences per second in batches. `load` gives run(batch)."""
    seconds, run = _timed(load)
    run(1)
    run(job["batch"])
    one, _ = _timed(lambda: [run(1) for _ in range(ENCODER_RUNS)])
    many, _ = _timed(lambda: [run(job["batch"]) for _ in range(ENCODER_RUNS)])
    return {
        "load_s": seconds,
        "latency_ms": one / ENCODER_RUNS * 1e3,
        "sequences_per_s": job["batch"] * ENCODER_RUNS / many,
    }


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def run_genai(job: Job) -> dict[str, float]:
    import onnxruntime_genai as genai

    session: dict[str, Any] = {"intra_op_num_threads": job["threads"]}
    source = str(Path(job["source"]).resolve())
    if job["library"]:
        library = native.path()
        session["custom_ops_library"] = str(library)
        os.chdir(library.parent)  # genai takes a library from the model's folder or the current one only
    length = len(job["ids"]) + 1 + job["new_tokens"]

    def load() -> tuple[Step, Step]:
        config = genai.Config(source)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        model = genai.Model(config)
        parameters = genai.GeneratorParams(model)
        # min_length keeps an end token from being chosen
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator: Any = None

        def begin() -> None:
            nonlocal generator
            generator = None  # the cache of the one before is given back first
            generator = genai.Generator(model, parameters)
            generator.append_tokens(job["ids"])
            generator.generate_next_token()

        return begin, lambda: generator.generate_next_token()

    return decode(load, job)


def run_onnxruntime(job: Job) -> dict[str, float]:
    """An encoder's graph."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = job["threads"]
    if job["library"]:
        native.register_ops(options)

    def load() -> Callable[[int], None]:
        graph = str(Path(job["source"]) / "model.onnx")
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = {i.name for i in session.get_inputs()}

        def run(batch: int) -> None:
            ids = np.tile(np.array(job["ids"], np.int64), (batch, 1))
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            session.run(None, {name: value for name, value in feeds.items() if name in names})

        return run

    return encode(load, job)


def run_torch(job: Job) -> dict[str, float]:
    import torch

    from compressor.folder import load as load_folder
    from compressor.model import load_model

    torch.set_num_threads(job["threads"])
    prompt = torch.tensor([job["ids"]])

    def load_it() -> torch.nn.Module:
        return load_folder(job["source"]).model() if job["ours"] else load_model(job["source"]).model

    def load_encoder() -> Callable[[int], None]:
        model = load_it()

        def run(batch: int) -> None:
            model(input_ids=prompt.expand(batch, -1))

        return run

    def load_decoder() -> tuple[Step, Step]:
        model, output = load_it(), None

        def forward(ids: torch.Tensor, past: Any) -> None:
            nonlocal output
            output = model(input_ids=ids, past_key_values=past, use_cache=True)

        def step() -> None:
            assert output is not None
            forward(output.logits[:, -1:].argmax(-1), output.past_key_values)

        return lambda: forward(prompt, None), step

    with torch.inference_mode():
        return encode(load_encoder, job) if job["batch"] else decode(load_decoder, job)


DRIVERS = {"genai": run_genai, "onnxruntime": run_onnxruntime, "torch": run_torch}


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    figures = DRIVERS[job["driver"]](job)
    Path(result_path).write_text(json.dumps({**figures, "peak_bytes": peak_bytes()}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
