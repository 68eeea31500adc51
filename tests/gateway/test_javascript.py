"""OpenAI's JavaScript client, where there are Node.js and npm's registry."""

import shutil
import subprocess

import pytest

VERSION = "6.49.0"
SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "nanoserve-builtin", temperature = 0;
const messages = [{ role: "user", content: "What is TTFT?" }];
const say = (value) => console.log(JSON.stringify(value));

const whole = await client.chat.completions.create({ model, temperature, messages });
say(whole.choices[0].message.content);
let text = "";
for await (const chunk of await client.chat.completions.create({ model, temperature, messages, stream: true }))
  text += chunk.choices[0]?.delta?.content ?? "";
say(text);
const response = await client.responses.create({ model, temperature, input: "What is TTFT?" });
say(response.output_text);
text = "";
for await (const event of client.responses.stream({ model, temperature, input: "What is TTFT?" }))
  if (event.type === "response.output_text.delta") text += event.delta;
say(text);
try {
  await client.chat.completions.create({ model: "gpt-4", messages });
} catch (error) {
  say(error instanceof OpenAI.NotFoundError);
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("javascript")
    (folder / "test.mjs").write_text(SCRIPT)
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs Node.js and npm")
    command = ["npm", "install", "--no-audit", "--no-fund", f"openai@{VERSION}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm's registry does not answer")
    if done.returncode != 0:
        pytest.skip(f"npm cannot install openai: {done.stderr[-300:]}")
    return folder


def test_the_javascript_client(served, folder):
    command = ["node", "test.mjs", f"{served.url}/v1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    *texts, is_typed = done.stdout.splitlines()
    assert len(texts) == 4
    assert len(set(texts)) == 1
    assert "time to first token" in texts[0]
    assert is_typed == "true"
