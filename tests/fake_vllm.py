"""What `vllm serve` looks like from outside: a process with a child, a key, health, adapters, answers.

args=--fail WORDS: prints what an engine prints that cannot start. args=--slow SECONDS: comes up late.
The answer is the name of the model that was asked and the question; "die" in a question kills the first process.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser("vllm serve", allow_abbrev=False)
parser.add_argument("serve")
parser.add_argument("model")
for flag in ("--host", "--served-model-name", "--max-model-len", "--gpu-memory-utilization", "--fail",
             "--data-parallel-size", "--quantization", "--api-server-count"):  # fmt: skip
    parser.add_argument(flag)
for flag in ("--port", "--max-lora-rank", "--tensor-parallel-size"):
    parser.add_argument(flag, type=int)
parser.add_argument("--slow", type=float, default=0)
for flag in ("--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
             "--enable-lora"):  # fmt: skip
    parser.add_argument(flag, action="store_true")
args = parser.parse_args()
names = [args.served_model_name]


class Handler(BaseHTTPRequestHandler):
    def answer(self, value: dict, code: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def refuse(self, words: str, code: int = 400) -> None:
        self.answer({"error": {"message": words, "code": code}}, code)

    def do_GET(self):
        if self.path == "/health":
            return self.answer({})
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            return self.refuse("Unauthorized", 401)
        longest = 4096 if args.max_model_len == "auto" else int(args.max_model_len)
        self.answer({"data": [{"id": name, "max_model_len": longest} for name in names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            return self.refuse("Unauthorized", 401)
        if self.path == "/v1/load_lora_adapter":
            config = json.load(open(body["lora_path"] + "/adapter_config.json"))
            if body["lora_name"] in names:
                return self.refuse("The lora adapter has already been loaded.")
            if config["r"] > args.max_lora_rank:
                return self.refuse(f"LoRA rank {config['r']} is greater than max_lora_rank {args.max_lora_rank}.")
            names.append(body["lora_name"])
            return self.answer({})
        if body["model"] not in names:
            return self.refuse(f"The model `{body['model']}` does not exist.", 404)
        said = body["messages"][-1]["content"]
        if "die" in said:
            os.kill(os.getpid(), signal.SIGKILL)
        self.answer({"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [{
            "index": 0, "finish_reason": "stop",
            "message": {"role": "assistant", "content": f"{body['model']}: {said}"}}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}})  # fmt: skip

    def log_message(self, *_):
        pass


print("INFO 11-24 00:05:08 [core.py:1] loading", " ".join(sys.argv), flush=True)
subprocess.Popen(["sleep", "600"])
if args.fail:
    print(f"(EngineCore pid=7) ERROR 11-24 00:05:08 [core.py:317] ValueError: {args.fail}")
    print("(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
    sys.exit(1)
if int(args.data_parallel_size or 1) > 1 and args.api_server_count != "1":  # as the real one
    sys.exit("ValueError: VLLM_ALLOW_RUNTIME_LORA_UPDATING cannot be used with api_server_count > 1")
time.sleep(args.slow)
ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()
