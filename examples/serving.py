"""Serve the model and ask it for pictures by HTTP, as any program can.

pip install '.[serve]'
python examples/serving.py
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The same as: coalescer-fast serve --port 0, which takes a free port and prints the address once it answers.
command = [sys.executable, "-m", "coalescer_fast", "serve", "--port", "0"]
server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def generate(**arguments: object) -> list[dict]:
    """Pictures of a request. The openai client does the same, with base_url=f"{address}/v1"."""
    body = json.dumps(arguments).encode()
    request = urllib.request.Request(f"{address}/v1/images/generations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)["data"]


try:
    said = server.stdout.readline() if server.stdout else ""
    found = re.search(r"http://\S+", said)
    if found is None:
        raise SystemExit("the server has not started")
    address = found[0]
    print(said, end="")

    # Requests that arrive together are drawn together; each picture has the bits that it has alone.
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: generate(prompt=prompt, seed=1), ("octopus", "pizza", "rocket", "owl")))
    for [picture] in answers:
        print(picture["revised_prompt"], f"{picture['quality']:.2f}")
    Path("served.png").write_bytes(base64.b64decode(answers[0][0]["b64_json"]))

    # A wrong request is answered by a sentence that says what to do.
    try:
        generate(prompt="octopus", size="1024x1024")
    except urllib.error.HTTPError as error:
        print(error.code, json.load(error)["error"]["message"])
finally:
    server.terminate()  # finishes what runs
    server.wait()
