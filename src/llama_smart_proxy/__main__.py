"""`python -m llama_smart_proxy`: the same as the command `llama-smart-proxy`."""

from __future__ import annotations

import sys

from llama_smart_proxy.proxy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
