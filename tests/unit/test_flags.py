"""llama-server's flags as the embedded server reads them."""

from __future__ import annotations

import pytest

from llama_smart_proxy.backends.llamacpp.embedded import complete, to_params
from llama_smart_proxy.backends.llamacpp.flags import SWITCHES, UsageError, parse


def test_flags_are_read_in_every_spelling_of_llama_server() -> None:
    short = "-m f -c 1 -np 2 -t 3 -b 4 -ub 5 -ngl 6 -fa on -ctk q8_0 -kvu -a a,b"
    long = (
        "--model f --ctx-size 1 --parallel 2 --threads 3 --batch-size 4 --ubatch_size 5 --n-gpu-layers 6 "
        "--flash-attn enabled --cache-type-k q8_0 --kv-unified --alias a --alias b"
    )
    assert parse(short.split(), {}) == parse(long.split(), {})


def test_the_last_of_two_equal_flags_wins_and_switches_can_be_undone() -> None:
    written = "--port 1 --port 2 --jinja --no-jinja --no-slots --slots -n -1"
    fields = parse(written.split(), {})
    assert fields == {"port": 2, "use_jinja": False, "endpoint_slots": True, "n_predict": -1}


def test_slots_are_automatic_unless_given() -> None:
    assert complete(parse(["-m", "f"], {})).items() >= {"n_parallel": 4, "kv_unified": True}.items()
    assert "kv_unified" not in complete(parse(["-m", "f", "-np", "3"], {}))


def test_keys_come_from_the_environment_and_from_the_flag() -> None:
    assert parse(["--api-key", "b,c"], {"LLAMA_API_KEY": "a"})["api_keys"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--frobnicate"], "unknown flag '--frobnicate'"),
        (["--ctx", "1"], "unknown flag '--ctx'"),
        (["--port=1"], "unknown flag '--port=1'"),
        (["file.gguf"], "unknown flag 'file.gguf'"),
        (["-c"], "-c needs a value"),
        (["-c", "many"], "-c 'many': invalid literal"),
        (["-np", "0"], "-np '0': must not be 0"),
        (["--pooling", "max"], "--pooling 'max': must be one of none, mean, cls, last, rank"),
        (["--chat-template-file", "/nowhere"], "--chat-template-file '/nowhere': .*No such file"),
        (["--slot-save-path", "/nowhere"], "--slot-save-path '/nowhere': not a directory"),
    ],
)
def test_a_bad_command_line_is_named(arguments: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse(arguments, {})


def test_every_flag_in_the_tables_sets_a_field_the_wheel_has() -> None:
    wheel = pytest.importorskip("xllamacpp", reason="the wheel xllamacpp (extra: embedded) is not installed")
    for _, fields in SWITCHES:
        to_params(wheel, fields)
    words = (
        "-m f --host ::1,127.0.0.1 --port 1 -a a --tags t --api-key k -c 1 -np 1 -n 1 --keep 1 -b 1 -ub 1 -t 1 -tb 1 "
        "--threads-http 1 --poll 1 -to 1 --sse-ping-interval 1 --cors-origins o -ngl all -mg 0 -sm row -fa auto "
        "-fit off -fitc 1 -lm dio --numa numactl -ctk f32 -ctv iq4_nl -cram 1 --cache-reuse 1 -ctxcp 1 -cms 1 "
        "--slot-save-path / -sps 0.5 --pooling mean --embd-normalize 1 --rope-scaling yarn --rope-freq-base 1 "
        "--rope-freq-scale 1 --yarn-orig-ctx 1 --yarn-ext-factor 1 --yarn-attn-factor 1 --yarn-beta-slow 1 "
        "--yarn-beta-fast 1 --chat-template chatml --chat-template-file /dev/null --chat-template-kwargs {} "
        "--reasoning-format deepseek-legacy --reasoning-budget 1 -rea on -mm p --media-path / --image-min-tokens 1 "
        "--image-max-tokens 1 --lora a,b --lora-scaled c:0.5 -s -1 --temp 0 --top-k 1 --top-p 1 --min-p 0 --typical 1 "
        "--xtc-probability 0 --xtc-threshold 1 --repeat-last-n 1 --repeat-penalty 1 --presence-penalty 1 "
        "--frequency-penalty 1 --dynatemp-range 1 --dynatemp-exp 1 --mirostat 1 --mirostat-lr 1 --mirostat-ent 1 -lv 3"
    )
    params = to_params(wheel, complete(parse(words.split(), {})))
    assert params.hostnames == ["::1", "127.0.0.1"]
    assert [(lora.path, lora.scale) for lora in params.lora_adapters] == [("a", 1.0), ("b", 1.0), ("c", 0.5)]
    assert params.sampling.user_sampling_config == 0b111111111110
    assert params.timeout_read == params.timeout_write == 1
