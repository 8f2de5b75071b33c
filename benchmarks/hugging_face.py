"""Models of transformers: what can be pruned, their size with half of every group, and saving and loading them.

Networks are randomly initialised at the shapes of the named ones; large language models with few layers and small
vocabularies, to fit into memory. ``python -m benchmarks.hugging_face``
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.common import EVIDENCE, add_resume, computed, here, publish, quiet
from lightning_prune import PruningError, from_pretrained, prune, save_pretrained
from lightning_prune.api.inspecting import traced_model_for
from lightning_prune.structure import Structure, trace
from lightning_prune.structure.tracing import output_tensors

#: Layers that make the queries of an attention, and the inner widths of feed-forward layers.
QUERIES = re.compile(r"\.(q|query|q_proj|qkv_proj|c_attn)$")
INNER = re.compile(r"\.(intermediate\.dense|fc1|wi|wi_0|gate_proj|gate_up_proj|c_fc|pwconv1)$")
IDS = torch.randint(3, 8000, (1, 32), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS}
DECODER = {"vocab_size": 8000, "num_hidden_layers": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**DECODER, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8}
FEW_KEYS = {**DECODER, "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2}


def image(size: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))}


def sound() -> dict[str, Any]:
    return {"input_features": torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))}


Network = tuple[str, Mapping[str, Any], Callable[[], dict[str, Any]]]
#: Class, options of its configuration (by default, those of the base size), and inputs, by name.
NETWORKS: dict[str, Network] = {
    "BERT-base, encoder": ("BertModel", {}, lambda: TEXT),
    "BERT-base, classifier": ("BertForSequenceClassification", {}, lambda: TEXT),
    "GPT-2": ("GPT2LMHeadModel", {}, lambda: TEXT),
    "Llama (1B, 4 layers)": (
        "LlamaForCausalLM",
        {
            **DECODER,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
        },
        lambda: TEXT,
    ),
    "Mistral (2048 wide, 4 layers)": (
        "MistralForCausalLM",
        {
            **DECODER,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 7168,
        },
        lambda: TEXT,
    ),
    "Qwen2 (1.5B, 4 layers)": (
        "Qwen2ForCausalLM",
        {
            **DECODER,
            "hidden_size": 1536,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
        },
        lambda: TEXT,
    ),
    "Phi-3 mini (2 layers)": (
        "Phi3ForCausalLM",
        {**DECODER, "num_hidden_layers": 2, "hidden_size": 3072, "num_attention_heads": 32, "intermediate_size": 8192},
        lambda: TEXT,
    ),
    "Phi-4 mini (2 layers)": (
        "Phi3ForCausalLM",
        {**DECODER, "num_hidden_layers": 2, "hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8}
        | {"intermediate_size": 8192, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
        lambda: TEXT,
    ),
    "T5-small": (
        "T5ForConditionalGeneration",
        {"decoder_start_token_id": 0},
        lambda: {**TEXT, "decoder_input_ids": IDS[:, :8]},
    ),
    "Whisper-tiny": (
        "WhisperForConditionalGeneration",
        {"d_model": 384, "encoder_attention_heads": 6, "decoder_attention_heads": 6, "encoder_ffn_dim": 1536}
        | {"decoder_ffn_dim": 1536, "encoder_layers": 4, "decoder_layers": 4},
        lambda: {**sound(), "decoder_input_ids": IDS[:, :8]},
    ),
    "ViT-B/16": ("ViTForImageClassification", {}, partial(image, 224)),
    "Swin-T": ("SwinForImageClassification", {}, partial(image, 224)),
    "CLIP ViT-B/32": ("CLIPModel", {}, lambda: {**TEXT, **image(224)}),
    "SegFormer-B0": ("SegformerForSemanticSegmentation", {}, partial(image, 128)),
    "ConvNeXtV2-T": ("ConvNextV2ForImageClassification", {}, partial(image, 128)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="these networks")
    add_resume(parser)
    arguments = parser.parse_args()
    quiet()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    file = EVIDENCE / "hugging_face" / "rows.jsonl"
    jobs = [{"network": name} for name in arguments.only]
    rows = list(computed(jobs, row, file, resume=arguments.resume))
    publish("hugging_face", {"transformers": transformers.__version__, "torch": torch.__version__}, tables(rows))


def row(job: dict[str, Any]) -> dict[str, Any]:
    kind, options, inputs = NETWORKS[job["network"]]
    torch.manual_seed(0)
    loads = getattr(transformers, kind)
    model, example = loads(loads.config_class(**options)).eval(), inputs()
    dense = sum(parameter.numel() for parameter in model.parameters())
    began, computing = perf_counter(), process_time()
    structure = trace(traced_model_for(model, example))
    analysed, analysed_cpu = perf_counter() - began, process_time() - computing
    began, computing = perf_counter(), process_time()
    prune(model, example, pruning_ratio=0.5)
    cut, cut_cpu = perf_counter() - began, process_time() - computing
    return {
        "params": dense,
        "reachable": structure.reachable,
        "heads": blocks(model, structure, QUERIES),
        "features": blocks(model, structure, QUERIES, within=True),
        "inner": blocks(model, structure, INNER),
        "streams": sum(is_stream(group.name) for group in structure.groups),
        "left": sum(parameter.numel() for parameter in model.parameters()) / dense,
        "seconds": {"analyse": analysed, "cut": cut, "analyse (CPU)": analysed_cpu, "analyse and cut (CPU)": cut_cpu},
        **saved(model, example),
    }


def blocks(
    model: nn.Module, structure: Structure, pattern: re.Pattern[str], *, within: bool = False
) -> tuple[int, int]:
    """Layers of a kind whose outputs can be pruned, and all of them; ``within``, by the features of their heads."""
    names = [name for name, _ in model.named_modules() if pattern.search(f".{name}")]
    made = {name for group in structure.groups if bool(group.within) == within for name in group.producers}
    return len(made & {*names}), len(names)


def is_stream(name: str) -> bool:
    name = name.partition("#")[0]
    return not QUERIES.search(f".{name}") and not INNER.search(f".{name}")


def saved(model: Any, example: dict[str, Any]) -> dict[str, Any]:
    """How the model is saved, and whether the loaded one gives the same outputs and generates."""
    with tempfile.TemporaryDirectory() as place:
        began = perf_counter()
        try:
            way = save_pretrained(model, Path(place) / "small", example)
        except PruningError as error:
            return {"way": "none", "reason": str(error)}
        seconds = perf_counter() - began
        load = type(model).from_pretrained if way.way == "config" else partial(from_pretrained, type(model))
        loaded = load(Path(place) / "small")
    with torch.no_grad():
        pairs = zip(output_tensors(loaded(**example)), output_tensors(model(**example)), strict=True)
        difference = max(float((one - other).abs().max()) for one, other in pairs if one.is_floating_point())
    return {
        "way": way.way,
        "changes": dict(way.changes),
        "reason": way.reason,
        "difference": difference,
        "generates": generates(loaded, example),
        "save": seconds,
    }


def generates(model: Any, example: dict[str, Any]) -> bool | None:
    """Whether greedy tokens with a cache are those without; none for a network that does not generate."""
    if not model.can_generate():
        return None
    prompt = {name: value for name, value in example.items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tokens = [model.generate(**prompt, **options, use_cache=cache) for cache in (True, False)]
    return torch.equal(*tokens)


def tables(rows: list[dict[str, Any]]) -> str:
    head = [
        "network",
        "parameters",
        "reachable: parameters, MACs",
        "attentions that lose heads",
        "features of heads",
        "inner widths",
        "streams",
        "left at half of every group",
        "way back",
        "largest difference",
        "`generate` with cache = without",
        "seconds to analyse, to analyse and cut (CPU seconds)",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for one in rows:
        reach, spent = one["reachable"], one["seconds"]
        changes = ", ".join(f"`{name}={value}`" for name, value in one.get("changes", {}).items())
        cells = [
            one["network"],
            f"{one['params'] / 1e6:.1f} M",
            f"{reach['params']:.1%}, {reach['macs']:.1%}",
            "{} of {}".format(*one["heads"]),
            "{} of {}".format(*one["features"]),
            "{} of {}".format(*one["inner"]),
            str(one["streams"]),
            f"{one['left']:.1%}",
            f"configuration: {changes}" if one["way"] == "config" else one["way"],
            f"{one['difference']:.1g}" if "difference" in one else "–",
            {True: "yes", False: "no", None: "–"}[one.get("generates")],
            f"{spent['analyse']:.1f} ({spent['analyse (CPU)']:.1f}), {spent['cut']:.1f} "
            f"({spent['analyse and cut (CPU)']:.1f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"- {one['network']}: {one['reason']}" for one in rows if one.get("reason")]
    return "\n".join([*lines, "", "Why a history is needed:", "", *reasons])


if __name__ == "__main__":
    here()
    main()
