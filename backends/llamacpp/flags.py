"""The flags of llama-server that the embedded llama.cpp takes, and what each sets in the wheel's `CommonParams`.

Every spelling, value and default is llama-server's own. A flag that is not in the tables is refused: nothing is ignored
silently. Needs no wheel.

Source: llama.cpp `common/arg.cpp`, build b11434.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class UsageError(Exception):
    """The command line cannot be used; the message is one line."""


class Member(NamedTuple):
    """A member of one of the wheel's enumerations, by name, so that parsing needs no wheel."""

    enum: str
    name: str


def _one_of(enum: str, prefix: str, names: Mapping[str, str]) -> Callable[[str], Member]:
    def convert(text: str) -> Member:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return Member(enum, prefix + names[text])

    return convert


def _same(*names: str) -> dict[str, str]:
    return {name: name.upper() for name in names}


def _truth(text: str) -> int:
    """1 for on, 0 for off, -1 for auto, in every spelling llama-server knows."""
    for value, words in ((1, "on enabled true 1"), (0, "off disabled false 0"), (-1, "auto -1")):
        if text in words.split():
            return value
    raise ValueError("must be on, off or auto")


def _on_off(text: str) -> bool:
    value = _truth(text)
    if value < 0:
        raise ValueError("must be on or off")
    return bool(value)


def _flash(text: str) -> Member:
    names = {1: "ENABLED", 0: "DISABLED", -1: "AUTO"}
    return Member("llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_" + names[_truth(text)])


def _slots(text: str) -> int:
    value = int(text)
    if value == 0:
        raise ValueError("must not be 0")
    return value


def _layers(text: str) -> int:
    return {"auto": -1, "all": -2}[text] if text in ("auto", "all") else int(text)


def _seed(text: str) -> int:
    return int(text) % 2**32


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _hosts(text: str) -> tuple[str, ...]:
    if not (hosts := _list(text)):
        raise ValueError("needs at least one address")
    return tuple(hosts)


def _names(text: str) -> set[str]:
    return set(_list(text))


def _scaled_lora(text: str) -> tuple[str, float]:
    path, _, scale = text.rpartition(":")
    if not path:
        raise ValueError("must be FILE:SCALE")
    return path, float(scale)


def _loras(text: str) -> list[tuple[str, float]]:
    return [(path, 1.0) for path in _list(text)]


def _scaled_loras(text: str) -> list[tuple[str, float]]:
    return [_scaled_lora(item) for item in _list(text)]


def _file_text(text: str) -> str:
    return Path(text).read_text(encoding="utf-8")


def _directory(text: str) -> str:
    if not Path(text).is_dir():
        raise ValueError("not a directory")
    return text.rstrip("/") + "/"


def _template_arguments(text: str) -> dict[str, str]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return {str(key): json.dumps(item) for key, item in value.items()}


_KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_type = _one_of("ggml_type", "GGML_TYPE_", _same(*_KV_TYPES))
_pooling = _one_of("llama_pooling_type", "LLAMA_POOLING_TYPE_", _same("none", "mean", "cls", "last", "rank"))
_split = _one_of("llama_split_mode", "LLAMA_SPLIT_MODE_", _same("none", "layer", "row", "tensor"))
_rope = _one_of("llama_rope_scaling_type", "LLAMA_ROPE_SCALING_TYPE_", _same("none", "linear", "yarn"))
_numa = _one_of("ggml_numa_strategy", "GGML_NUMA_STRATEGY_", _same("distribute", "isolate", "numactl"))
_load = _one_of(
    "llama_load_mode",
    "LLAMA_LOAD_MODE_",
    {**_same("auto", "none", "mmap", "mlock"), "mmap+mlock": "MMAP_MLOCK", "dio": "DIRECT_IO"},
)
_thoughts = _one_of(
    "common_reasoning_format",
    "COMMON_REASONING_FORMAT_",
    {**_same("none", "auto", "deepseek"), "deepseek-legacy": "DEEPSEEK_LEGACY"},
)

# Spellings, the field of CommonParams they set, and what turns the text into its value.
VALUES: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("-m --model", "model.path", str),
    ("--host", "hostnames", _hosts),
    ("--port", "port", int),
    ("-a --alias", "model_alias", _names),
    ("--tags", "model_tags", _names),
    ("--api-key", "api_keys", _list),
    ("-c --ctx-size", "n_ctx", int),
    ("-np --parallel", "n_parallel", _slots),
    ("-n --predict --n-predict", "n_predict", int),
    ("--keep", "n_keep", int),
    ("-b --batch-size", "n_batch", int),
    ("-ub --ubatch-size", "n_ubatch", int),
    ("-t --threads", "cpuparams.n_threads", int),
    ("-tb --threads-batch", "cpuparams_batch.n_threads", int),
    ("--threads-http", "n_threads_http", int),
    ("--poll", "cpuparams.poll", int),
    ("-to --timeout", "timeout", int),
    ("--sse-ping-interval", "sse_ping_interval", int),
    ("--cors-origins", "cors_origins", str),
    ("-ngl --gpu-layers --n-gpu-layers", "n_gpu_layers", _layers),
    ("-mg --main-gpu", "main_gpu", int),
    ("-sm --split-mode", "split_mode", _split),
    ("-fa --flash-attn", "flash_attn_type", _flash),
    ("-fit --fit", "fit_params", _on_off),
    ("-fitc --fit-ctx", "fit_params_min_ctx", int),
    ("-lm --load-mode", "load_mode", _load),
    ("--numa", "numa", _numa),
    ("-ctk --cache-type-k", "cache_type_k", _type),
    ("-ctv --cache-type-v", "cache_type_v", _type),
    ("-cram --cache-ram", "cache_ram_mib", int),
    ("--cache-reuse", "n_cache_reuse", int),
    ("-ctxcp --ctx-checkpoints --swa-checkpoints", "n_ctx_checkpoints", int),
    ("-cms --checkpoint-min-step", "checkpoint_min_step", int),
    ("--slot-save-path", "slot_save_path", _directory),
    ("-sps --slot-prompt-similarity", "slot_prompt_similarity", float),
    ("--pooling", "pooling_type", _pooling),
    ("--embd-normalize", "embd_normalize", int),
    ("--rope-scaling", "rope_scaling_type", _rope),
    ("--rope-freq-base", "rope_freq_base", float),
    ("--rope-freq-scale", "rope_freq_scale", float),
    ("--yarn-orig-ctx", "yarn_orig_ctx", int),
    ("--yarn-ext-factor", "yarn_ext_factor", float),
    ("--yarn-attn-factor", "yarn_attn_factor", float),
    ("--yarn-beta-slow", "yarn_beta_slow", float),
    ("--yarn-beta-fast", "yarn_beta_fast", float),
    ("--chat-template", "chat_template", str),
    ("--chat-template-file", "chat_template", _file_text),
    ("--chat-template-kwargs", "default_template_kwargs", _template_arguments),
    ("--reasoning-format", "reasoning_format", _thoughts),
    ("--reasoning-budget", "sampling.reasoning_budget_tokens", int),
    ("-rea --reasoning", "enable_reasoning", _truth),
    ("-mm --mmproj", "mmproj.path", str),
    ("--media-path", "media_path", _directory),
    ("--image-min-tokens", "image_min_tokens", int),
    ("--image-max-tokens", "image_max_tokens", int),
    ("--lora", "lora_adapters", _loras),
    ("--lora-scaled", "lora_adapters", _scaled_loras),
    ("-s --seed", "sampling.seed", _seed),
    ("--temp --temperature", "sampling.temp", float),
    ("--top-k", "sampling.top_k", int),
    ("--top-p", "sampling.top_p", float),
    ("--min-p", "sampling.min_p", float),
    ("--typical --typical-p", "sampling.typ_p", float),
    ("--xtc-probability", "sampling.xtc_probability", float),
    ("--xtc-threshold", "sampling.xtc_threshold", float),
    ("--repeat-last-n", "sampling.penalty_last_n", int),
    ("--repeat-penalty", "sampling.penalty_repeat", float),
    ("--presence-penalty", "sampling.penalty_present", float),
    ("--frequency-penalty", "sampling.penalty_freq", float),
    ("--dynatemp-range", "sampling.dynatemp_range", float),
    ("--dynatemp-exp", "sampling.dynatemp_exponent", float),
    ("--mirostat", "sampling.mirostat", int),
    ("--mirostat-lr", "sampling.mirostat_eta", float),
    ("--mirostat-ent", "sampling.mirostat_tau", float),
    ("-lv --verbosity --log-verbosity", "verbosity", int),
)

# Spellings that take no value, and the fields they set.
SWITCHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--embedding --embeddings", {"embedding": True}),
    ("--rerank --reranking", {"embedding": True, "pooling_type": _pooling("rank")}),
    ("--jinja", {"use_jinja": True}),
    ("--no-jinja", {"use_jinja": False}),
    ("--ui --webui", {"ui": True}),
    ("--no-ui --no-webui", {"ui": False}),
    ("--metrics", {"endpoint_metrics": True}),
    ("--props", {"endpoint_props": True}),
    ("--slots", {"endpoint_slots": True}),
    ("--no-slots", {"endpoint_slots": False}),
    ("-kvu --kv-unified", {"kv_unified": True}),
    ("-no-kvu --no-kv-unified", {"kv_unified": False}),
    ("-kvo --kv-offload", {"no_kv_offload": False}),
    ("-nkvo --no-kv-offload", {"no_kv_offload": True}),
    ("--op-offload", {"no_op_offload": False}),
    ("--no-op-offload", {"no_op_offload": True}),
    ("--mmproj-auto", {"no_mmproj": False}),
    ("--no-mmproj --no-mmproj-auto", {"no_mmproj": True}),
    ("--mmproj-offload", {"mmproj_use_gpu": True}),
    ("--no-mmproj-offload", {"mmproj_use_gpu": False}),
    ("--repack", {"no_extra_bufts": False}),
    ("-nr --no-repack", {"no_extra_bufts": True}),
    ("--no-host", {"no_host": True}),
    ("--check-tensors", {"check_tensors": True}),
    ("--swa-full", {"swa_full": True}),
    ("-cb --cont-batching", {"cont_batching": True}),
    ("-nocb --no-cont-batching", {"cont_batching": False}),
    ("--context-shift", {"ctx_shift": True}),
    ("--no-context-shift", {"ctx_shift": False}),
    ("--cache-prompt", {"cache_prompt": True}),
    ("--no-cache-prompt", {"cache_prompt": False}),
    ("--cache-idle-slots", {"cache_idle_slots": True}),
    ("--no-cache-idle-slots", {"cache_idle_slots": False}),
    ("--warmup", {"warmup": True}),
    ("--no-warmup", {"warmup": False}),
    ("--perf", {"no_perf": False}),
    ("--no-perf", {"no_perf": True}),
    ("-sp --special", {"special": True}),
    ("--skip-chat-parsing", {"force_pure_content_parser": True}),
    ("--no-skip-chat-parsing", {"force_pure_content_parser": False}),
    ("--prefill-assistant", {"prefill_assistant": True}),
    ("--no-prefill-assistant", {"prefill_assistant": False}),
    ("--offline", {"offline": True}),
    ("-v --verbose --log-verbose", {"verbosity": 2**31 - 1}),
)

_VALUE_OF = {spelling: (field, convert) for names, field, convert in VALUES for spelling in names.split()}
_SWITCH_OF = {spelling: fields for names, fields in SWITCHES for spelling in names.split()}


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `CommonParams` that a command line sets, dotted where they are nested.

    Reads as llama-server does: exact spellings (`_` stands for `-` after `--`), the argument after a flag is its value
    in any form, the last of two wins, but lists, sets and tables add up. Raises: `UsageError`.
    """
    fields: dict[str, Any] = {}
    if key := environ.get("LLAMA_API_KEY"):
        fields["api_keys"] = _list(key)
    arguments = iter(argv)
    for written in arguments:
        flag = written.replace("_", "-") if written.startswith("--") else written
        if flag in _SWITCH_OF:
            fields.update(_SWITCH_OF[flag])
        elif flag in _VALUE_OF:
            field, convert = _VALUE_OF[flag]
            fields[field] = _added(fields.get(field), _converted(flag, next(arguments, None), convert))
        else:
            raise UsageError(f"unknown flag {written!r}: the embedded llama.cpp knows those that --help lists")
    return fields


def _converted(flag: str, text: str | None, convert: Callable[[str], Any]) -> Any:
    if text is None:
        raise UsageError(f"{flag} needs a value")
    try:
        return convert(text)
    except (ValueError, OSError) as error:
        raise UsageError(f"{flag} {text!r}: {error}") from error


def _added(old: Any, new: Any) -> Any:
    if isinstance(old, (set, dict)):
        return old | new
    return old + new if isinstance(old, list) else new


def usage() -> str:
    """Every spelling, one flag a line."""
    lines = [f"  {', '.join(names.split())} VALUE" for names, _, _ in VALUES]
    lines += [f"  {', '.join(names.split())}" for names, _ in SWITCHES]
    return "python -m llama_smart_proxy.backends.llamacpp.embedded -m FILE [flags], as in llama-server:\n" + "\n".join(
        lines
    )
