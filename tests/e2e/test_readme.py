"""What the README says to paste first, run as it stands against the default model; only the port is another."""

import json
import os
import re
import subprocess
import sys

import pytest
from server_process import COMMAND, ROOT, RunningServer

README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.timeout(300)


def snippet(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(block for block in blocks if containing in block)


def looks_like_english(text: str) -> bool:
    words = re.findall(r"[A-Za-z']+", text)
    return len(words) > 10 and len({"the", "a", "and", "to", "was", "he", "she", "it", "of", "in"} & {word.lower() for word in words}) >= 3


def test_the_curl_of_the_readme_answers_in_english(default_server: RunningServer):
    command = snippet("sh", "curl ").replace("http://127.0.0.1:8000", default_server.url).replace("curl ", "curl -sS --fail-with-body ", 1)

    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=120).stdout

    completion = json.loads(answer)
    assert completion["object"] == "text_completion"
    assert looks_like_english(completion["choices"][0]["text"])


def test_the_completion_in_a_terminal_of_the_readme_is_english(default_server: RunningServer):
    command = next(line for line in snippet("sh", "grok-server complete").splitlines() if "complete" in line)
    command = command.replace(".venv/bin/grok-server", str(COMMAND)).partition("#")[0]

    environment = os.environ | {"GROK_SERVER_URL": default_server.url}
    printed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=120, env=environment)

    assert looks_like_english(printed.stdout)
    assert printed.stderr == ""


def test_the_chat_of_the_readme_answers_what_is_piped_in(default_server: RunningServer):
    command = next(line for line in snippet("sh", "grok-server chat").splitlines() if "chat" in line)
    command = command.replace(".venv/bin/grok-server", str(COMMAND)).partition("#")[0] + " --seed 1 --max-tokens 60"

    environment = os.environ | {"GROK_SERVER_URL": default_server.url}
    said = "Tell me a story about a fox and a bird."
    printed = subprocess.run(["bash", "-c", command], input=said, capture_output=True, text=True, check=True, timeout=120, env=environment)

    assert len(re.findall(r"[a-z]+", printed.stdout)) >= 3  # so small a model writes words, and not to the point
    assert printed.stderr == ""


def test_the_sdk_snippet_of_the_readme_prints_english(default_server: RunningServer):
    program = snippet("python", "OpenAI").replace("http://127.0.0.1:8000", default_server.url)

    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120).stdout

    assert looks_like_english(printed)
