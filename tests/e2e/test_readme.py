"""The README's first curl and its SDK snippet, run as they stand against the default model; only the port is another."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMAND = Path(sys.executable).with_name("grok-server")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (ROOT / "models" / "grok-1-tiny").is_dir(), reason="there is no default model in models/grok-1-tiny"),
]


def snippet(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(block for block in blocks if containing in block)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address that the command prints once it is ready."""
    log = tmp_path_factory.mktemp("serve") / "stderr"
    with (
        log.open("w") as stderr,
        subprocess.Popen([COMMAND, "serve", "--port", "0"], stdout=subprocess.PIPE, stderr=stderr, text=True) as server,
    ):
        assert server.stdout is not None
        try:
            ready = next((match for line in server.stdout if (match := re.match(r"Ready on (http://\S+)", line))), None)
            assert ready, f"the server ended with status {server.wait()}: {log.read_text()[-2000:]}"
            yield ready[1]
        finally:
            server.terminate()


def looks_like_english(text: str) -> bool:
    words = re.findall(r"[A-Za-z']+", text)
    return len(words) > 20 and len({"the", "a", "and", "to", "was", "he", "she", "it", "of", "in"} & {word.lower() for word in words}) >= 4


def test_the_curl_of_the_readme_answers_in_english(url: str):
    command = snippet("sh", "curl ").replace("http://127.0.0.1:8000", url).replace("curl ", "curl -sS --fail-with-body ", 1)

    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=120).stdout

    completion = json.loads(answer)
    assert completion["object"] == "text_completion"
    assert looks_like_english(completion["choices"][0]["text"])


def test_the_sdk_snippet_of_the_readme_prints_english(url: str):
    program = snippet("python", "OpenAI").replace("http://127.0.0.1:8000", url)

    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120).stdout

    assert looks_like_english(printed)
