"""The whole server with `fake_engine_program.py` as its engine: `python fake_engine_server.py MODEL_DIR [engine arguments]`.

Listens on a free port; settings come from the environment.
"""

import sys
from pathlib import Path

from engine.errors import EngineError
from server.lifecycle import serve
from server.settings import load_settings

program = Path(__file__).with_name("fake_engine_program.py")
settings = load_settings({"model": sys.argv[1], "port": 0, "skip_tokenizer_init": True})
try:
    serve(settings, engine_command=(sys.executable, str(program), *sys.argv[2:]))
except EngineError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(getattr(error, "exit_status", 2))
