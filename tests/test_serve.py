"""`hf-arch serve`: an OpenAI client talks to a server of one of our models; as docs/tools.md says."""

import os
import signal
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import openai
import pytest
import torch

import tools_page
from hf_arch import byte_tokenizer, cli, find

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


def save(folder, name: str):
    torch.manual_seed(0)
    row = find(name)
    config = row.tiny_config("ForCausalLM", vocab_size=256, initializer_range=0.3, bos_token_id=254, eos_token_id=255)
    model, tokenizer = row.load("ForCausalLM")(config), byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return at.getsockname()[1]


def wait_until(url: str, process: subprocess.Popen, log, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urlopen(url, timeout=5).close()
            return
        except URLError:
            time.sleep(0.3)
    raise RuntimeError(f"The server did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(its address, the model that it serves, its tokenizer). The cache of the Hub holds another of ours."""
    folder = tmp_path_factory.mktemp("serve")
    model, tokenizer = save(folder / "my-model", "retnet")
    cached = folder / "home" / "hub" / "models--ann--tiny"
    save(cached / "snapshots" / "0123", "mixtral")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    program, *told, port = tools_page.command("Serving")
    assert program == "hf-arch" and port == "8000"
    port = str(free_port())
    offline = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_arch", *told, port, "--device", "cpu"],
            cwd=folder,
            env=os.environ | offline,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(f"http://localhost:{port}/health", process, log)
            yield f"http://localhost:{port}/v1", model, tokenizer
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
            said = log.read_text()
            assert "Application shutdown complete" in said and "Traceback" not in said
        finally:
            process.kill()


def expected(model, tokenizer, messages, tokens: int) -> str:
    """What generate() says, greedily."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=255)
    return tokenizer.decode(said[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_page_and_what_is_said_are_those_of_generate(server):
    url, model, tokenizer = server
    names = tools_page.run("Serving", {"http://localhost:8000/v1": url})
    said = expected(model, tokenizer, names["messages"], 24)
    assert names["answer"].choices[0].message.content == said
    assert 3 < names["answer"].usage.completion_tokens <= 24
    assert "".join(names["pieces"]) == said and len(names["pieces"]) > 3


def test_a_text_goes_on(server):
    url, model, tokenizer = server
    client = openai.OpenAI(base_url=url, api_key="none")
    found = client.completions.create(model="my-model", prompt="once", max_tokens=5, temperature=0)
    ids = tokenizer("once", return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=255)
    assert found.choices[0].text == tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_list_of_models_knows_ours(server):
    client = openai.OpenAI(base_url=server[0], api_key="none")
    assert [model.id for model in client.models.list()] == ["ann/tiny"]


def test_another_model_is_refused(server):
    client = openai.OpenAI(base_url=server[0], api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="ann/tiny", messages=[{"role": "user", "content": "hello"}])
    assert "pinned to 'my-model'" in refused.value.response.text


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr("hf_arch.serve.is_serve_available", lambda: False)
    assert cli.main(["serve", "my-model", "--port", "8000"]) == 2
    assert "pip install 'hf-arch[serve]'" in capsys.readouterr().err


def test_options_are_those_of_transformers(monkeypatch):
    given = []
    monkeypatch.setattr("hf_arch.serve.app", lambda arguments, prog_name: given.append(arguments))
    for told in (["--help"], ["my-model", "--port", "1", "--compile"], ["--device", "cpu", "my-model"], []):
        assert cli.main(["serve", *told]) == 0
        assert given.pop() == ["serve", *told]
