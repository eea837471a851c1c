"""Who answers a state: specs, recorded turns, the engine behind hf:, a server that misbehaves in every known way."""

import email.utils
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny

from common import openai_policy, policies
from common.errors import InfraError, InputError

CHAT = [{"role": "system", "content": "Fix it."}, {"role": "user", "content": "total is wrong"}]
SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16}


def open_policy(spec: str, role: str = "student", **options):
    return policies.open_policy(spec, role=role, **(SAMPLING | options))


def act(policy, messages=CHAT, **at):
    return policy.act({"instance_id": at.pop("instance_id", "x")}, messages,
                      **({"seed": 1, "episode": "e", "turn": 0, "attempt": 0} | at))  # fmt: skip


# ---------------------------------------------------------------- specs

@pytest.mark.parametrize("spec", ["", "foo", "hf:", "openai:", "replay:", "oracle:", "oracel", "HF:x"])
def test_an_unknown_policy_lists_the_known_ones(spec):
    with pytest.raises(InputError, match="hf:MODEL.*openai:MODEL@URL.*oracle.*replay:FILE"):
        open_policy(spec)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("hf:/no/such/model", "no such directory"),
        ("hf:m,quant=int3", "neither nf4 nor none"),
        ("hf:m,adpater=x", "wanted hf:MODEL"),
        ("hf:m,adapter=/no/such", "adapter_config.json is missing"),
        ("openai:m", "wanted openai:MODEL@URL"),
        ("openai:m@localhost:8000", "wanted openai:MODEL@URL"),
        ("openai:@http://localhost:8000/v1", "wanted openai:MODEL@URL"),
    ],
)
def test_bad_specs(spec, words):
    with pytest.raises(InputError, match=words):
        open_policy(spec)


def test_sampling_out_of_range():
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(InputError, match="--temperature"):
            open_policy("oracle", **bad)


# ---------------------------------------------------------------- replay:

def write(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"replay:{path}"


def test_replay_answers_by_turn_and_attempt(tmp_path):
    spec = write(tmp_path / "turns.jsonl", {"instance_id": "a", "turns": ["one", "two"]},
                 {"instance_id": "a", "attempt": 1, "turns": ["uno"]})  # fmt: skip
    policy = open_policy(spec)
    assert [act(policy, instance_id="a", turn=t).text for t in (1, 0)] == ["two", "one"]  # whoever acted before
    assert act(policy, instance_id="a", attempt=1).text == "uno"
    assert act(policy, instance_id="a", attempt=2).text == "one"
    with pytest.raises(InputError, match="a, attempt 0: asked for turn 2, but only 2"):
        act(policy, instance_id="a", turn=2)
    with pytest.raises(InputError, match="nothing recorded for b, attempt 0"):
        act(policy, instance_id="b")


def test_replay_of_a_trajectory(tmp_path):
    said = [{"role": "assistant", "content": "one", "finish_reason": "length"}, {"role": "user", "content": "exit 0"},
            {"role": "assistant", "content": "two", "finish_reason": "stop"}]  # fmt: skip
    spec = write(tmp_path / "trajectories.jsonl", {"instance_id": "a", "attempt": 0, "messages": CHAT + said})
    policy = open_policy(spec)
    first, second = (act(policy, instance_id="a", turn=t) for t in (0, 1))
    assert (first.text, first.finish_reason, second.text) == ("one", "length", "two")
    with pytest.raises(InputError, match="attempt 1"):
        act(policy, instance_id="a", attempt=1)


@pytest.mark.parametrize(
    "lines, words",
    [
        ("", "no recorded turns"),
        ('{"instance_id": "a", "turns": "one"}\n', ":1: a: needs `turns`"),
        ('{"instance_id": "a"}\n', ":1: a: needs `turns`"),
        ('{"turns": ["one"]}\n', ":1: needs an instance_id"),
        ('{"instance_id": "a", "turns": []}\n{"instance_id"', ":2: not a JSON object"),
        ('{"instance_id": "a", "turns": []}\n' * 2, ":2: a, attempt None, is there twice"),
    ],
)
def test_replay_of_a_bad_file(tmp_path, lines, words):
    path = tmp_path / "turns.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=words):
        open_policy(f"replay:{path}")


# ---------------------------------------------------------------- hf:

@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen3", "tools"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_hf_answers_as_plain_transformers_does(tmp_path, arch, template):
    """Three turns with kept keys, greedy: the text of generate() on the prompt that the template itself renders."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny.model_dir(tmp_path, arch, template)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    policy = open_policy(f"hf:{path}", max_context=1000, batch=2)
    chat = list(CHAT)
    for turn in range(3):
        answer = act(policy, chat, turn=turn)
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        new = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True)
        assert (answer.tokens_in, answer.tokens_out) == (len(ids), len(new))
        ended = new[-1] in model.generation_config.eos_token_id
        assert answer.finish_reason == ("stop" if ended else "length")
        assert (answer.tokens_cached > 0) == (turn > 0)
        chat += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": f"exit {turn}\nls"}]
    policy.forget("e")
    assert act(policy, chat).tokens_cached == 0
    policy.close()


def test_hf_stops_where_the_template_ends_a_turn(tmp_path):
    """The template's end-of-turn token stops the answer even where the generation config does not name it."""
    path = tiny.model_dir(tmp_path, template="tools")
    config = tmp_path / path / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": 0}))
    policy = open_policy(f"hf:{path}")
    act(policy)
    assert policy.engine.stop == {0, policy.tokenizer.convert_tokens_to_ids("<|end|>")}
    policy.close()


def test_hf_respects_the_context(tmp_path):
    path = tiny.model_dir(tmp_path)
    n = act(open_policy(f"hf:{path}")).tokens_in
    roomy, tight, full = (open_policy(f"hf:{path}", max_context=n + more) for more in (5, 1, 0))
    assert act(roomy).tokens_out <= 5
    answer = act(tight)
    assert (answer.tokens_out, answer.finish_reason) == (1, "length")
    with pytest.raises(policies.ContextLimit):
        act(full)
    with pytest.raises(policies.ContextLimit):  # the model itself was made for 4096
        act(open_policy(f"hf:{path}", max_context=10**6), [{"role": "user", "content": "x 1 " * 4000}])


def test_hf_describes_itself_without_loading(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/tiny"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    policy = open_policy(f"hf:org/tiny,adapter={adapter},quant=nf4")
    one = policy.describe()
    assert {k: v for k, v in one.items() if k != "adapter_hash"} == {
        "model": "hf:org/tiny", "adapter": str(adapter), "quantisation": "nf4", "sampling": SAMPLING, "extra": {},
    }  # fmt: skip
    (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    assert open_policy(f"hf:org/tiny,adapter={adapter},quant=nf4").describe()["adapter_hash"] != one["adapter_hash"]
    assert open_policy(f"hf:org/tiny,adapter={adapter}").quant == "none"
    (adapter / "manifest.json").write_text('{"summary": {"quant": "nf4"}}')  # what 03_train.py leaves there
    assert open_policy(f"hf:org/tiny,adapter={adapter}").describe()["quantisation"] == "nf4"
    assert open_policy(f"hf:org/tiny,adapter={adapter},quant=none").quant == "none"
    with pytest.raises(InputError, match="made for elsewhere/tiny, not for org/other"):
        open_policy(f"hf:org/other,adapter={adapter}")


def test_hf_passes_template_arguments(tmp_path):
    """enable_thinking = false puts Qwen3's empty think block into the prompt."""
    path = tiny.model_dir(tmp_path, "qwen3", "qwen3")
    plain = act(open_policy(f"hf:{path}"))
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    quiet = open_policy(f"hf:{path}", extra=extra)
    assert act(quiet).tokens_in > plain.tokens_in
    assert quiet.describe()["extra"] == extra
    with pytest.raises(InputError, match="chat_template_kwargs, not top_k"):
        open_policy(f"hf:{path}", extra={"top_k": 3})


def test_counting(tmp_path):
    assert open_policy(f"hf:{tiny.model_dir(tmp_path)}").count("def total(items):") > 1
    assert open_policy("oracle").count("def") is None


# ---------------------------------------------------------------- openai:

GOOD = {
    "id": "1", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"},
                 "logprobs": {"content": [{"token": "h", "logprob": -0.5, "top_logprobs": []},
                                          {"token": "i", "logprob": -1.5, "top_logprobs": []}]}}],
    "usage": {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13,
              "prompt_tokens_details": {"cached_tokens": 8}},
}  # fmt: skip


class Server:
    """Answers requests by a script: each item is (status, headers, body) or a function of the handler."""

    def __init__(self, *script):
        self.script, self.requests, self.times = list(script), [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.requests.append(json.loads(body))
                outer.times.append(time.monotonic())
                outer.headers = {name.lower(): value for name, value in self.headers.items()}
                outer.path = self.path
                item = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if callable(item):
                    return item(self)
                status, headers, answer = item
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                usual = {"content-type": "application/json", "content-length": len(data)}
                for name, value in (usual | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    """serve(script...) -> (server, policy): time runs two hundred times faster between tries."""
    monkeypatch.setattr(openai_policy, "BACKOFF", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(*script, role="student", **options):
        servers.append(Server(*script))
        return servers[-1], open_policy(f"openai:m@{servers[-1].url}", role, **options)

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def refuse(status: int, message: str, code: str | None = None, headers: dict | None = None):
    return status, headers or {}, {"error": {"message": message, "type": "x", "code": code}}


def cut(handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def cut_in_the_middle(handler) -> None:
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "1", "choi')
    handler.wfile.flush()
    handler.close_connection = True


def hang(handler) -> None:
    time.sleep(4)
    handler.close_connection = True


def test_a_good_answer_and_what_was_sent(serve):
    server, policy = serve((200, {}, GOOD), temperature=0.7, top_p=0.9, extra={"top_k": 20})
    answer = act(policy, [CHAT[0], CHAT[1] | {"exit_code": 0}], seed=2**40 + 5)
    assert (answer.text, answer.finish_reason, answer.tokens_in, answer.tokens_cached, answer.tokens_out,
            answer.logprob) == ("hello", "stop", 11, 8, 2, -1.0)  # fmt: skip
    assert server.requests == [{"model": "m", "messages": CHAT, "temperature": 0.7, "top_p": 0.9, "max_tokens": 16,
                                "seed": 5, "logprobs": True, "top_k": 20}]  # fmt: skip
    assert server.headers["authorization"] == "Bearer none"
    assert server.path == "/v1/chat/completions"
    assert policy.describe()["model"] == "openai:m"  # the address may change, the work stays the same
    assert policy.describe()["extra"] == {"top_k": 20}


def test_the_teacher_is_not_asked_for_logprobs(serve):
    server, policy = serve((200, {}, GOOD), role="teacher")
    act(policy)
    assert "logprobs" not in server.requests[0]


def test_thin_answers(serve):
    """No usage, no content, a reasoning text beside it, an unusual finish reason."""
    thin = {"choices": [{"index": 0, "finish_reason": "content_filter",
                         "message": {"role": "assistant", "content": None, "reasoning_content": "hm"}}]}  # fmt: skip
    _, policy = serve((200, {}, thin))
    answer = act(policy)
    assert (answer.text, answer.finish_reason, answer.tokens_in, answer.tokens_out, answer.logprob) == (
        "", "stop", None, None, None)  # fmt: skip
    _, policy = serve((200, {}, GOOD | {"choices": [GOOD["choices"][0] | {"finish_reason": "length"}]}))
    assert act(policy).finish_reason == "length"


@pytest.mark.parametrize(
    "trouble",
    [
        refuse(429, "slow down"), refuse(500, "oops"), (502, {"content-type": "text/html"}, "<html>bad gateway</html>"),
        refuse(503, "loading"), refuse(408, "timeout"), refuse(409, "conflict"), cut, cut_in_the_middle, hang,
        (200, {}, '{"id": "1", "choices": [{"ind'), (200, {}, GOOD | {"choices": []}), (200, {}, "{}"),
        (200, {}, GOOD | {"choices": None}),
    ],
    ids=["429", "500", "502-html", "503", "408", "409", "cut", "cut-inside", "hang", "torn-json", "no-choices", "empty",
         "null-choices"],
)  # fmt: skip
def test_trouble_that_passes(serve, monkeypatch, trouble):
    if trouble is hang:
        monkeypatch.setattr(openai_policy, "REQUEST_TIMEOUT", 0.5)
    server, policy = serve(trouble, trouble, (200, {}, GOOD))
    assert act(policy).text == "hello"
    assert len(server.requests) == 3


def test_trouble_that_stays(serve):
    server, policy = serve(refuse(500, "the engine is dead"))
    with pytest.raises(InfraError, match="given up after 5 tries .*the engine is dead"):
        act(policy)
    assert len(server.requests) == 5


def test_nobody_there(serve):
    server, policy = serve((200, {}, GOOD))
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(InfraError, match="given up after 5 tries"):
        act(policy)


def test_retry_after_in_seconds_and_as_a_date(serve):
    server, policy = serve(refuse(429, "slow down", headers={"retry-after": "0.4"}), (200, {}, GOOD))
    act(policy)
    assert 0.4 <= server.times[1] - server.times[0] < 2
    date = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2 from now
    server, policy = serve(refuse(503, "loading", headers={"retry-after": date}), (200, {}, GOOD))
    act(policy)
    assert 0.8 < server.times[1] - server.times[0] < 3


def test_no_waiting_beyond_the_window(serve):
    """Asked to wait for an hour: given up at once, and the task is tried again at the end."""
    server, policy = serve(refuse(429, "slow down", headers={"retry-after": "3600"}))
    with pytest.raises(InfraError, match="after 1 tries"):
        act(policy)


def test_backoff_grows_and_is_seeded(serve, monkeypatch):
    waits = []
    monkeypatch.setattr(openai_policy.time, "sleep", waits.append)
    for seed in (1, 1, 2):
        _, policy = serve(refuse(500, "oops"))
        with pytest.raises(InfraError):
            act(policy, seed=seed)
    assert waits[:4] == waits[4:8] != waits[8:]
    assert all(0.75 <= wait / (0.01 * 2**i) <= 1.25 for i, wait in enumerate(waits[:4]))


@pytest.mark.parametrize(
    "answer",
    [
        refuse(401, "Incorrect API key provided"), refuse(403, "not allowed"),
        refuse(404, "The model `m` does not exist."), refuse(400, "temperature must be at most 2"),
        refuse(429, "You exceeded your current quota", code="insufficient_quota"),
    ],
    ids=["401", "403", "404", "400", "quota"],
)  # fmt: skip
def test_what_can_never_work_is_fatal_in_the_servers_own_words(serve, answer):
    server, policy = serve(answer)
    with pytest.raises(InputError) as caught:
        act(policy)
    assert answer[2]["error"]["message"] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "message, code",
    [
        ("This model's maximum context length is 4096 tokens. However, your messages resulted in 5000 tokens.",
         "context_length_exceeded"),
        ("This model's maximum context length is 2048 tokens. However, you requested 2100 tokens (2000 in the "
         "messages, 100 in the completion). Please reduce the length of the messages or completion.", None),
        ("The decoder prompt (length 5000) is longer than the maximum model length of 4096.", None),
        ("'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum context length is 2048 "
         "tokens and your request has 1800 input tokens (512 > 2048 - 1800).", None),
        ("The input (5000 tokens) is longer than the model's context length (4096 tokens).", None),
        ("Requested token count exceeds the model's maximum context length of 4096 tokens.", None),
        ("the request exceeds the available context size, try increasing it", "exceed_context_size_error"),
    ],
)
def test_too_long_is_a_context_limit(serve, message, code):
    server, policy = serve(refuse(400, message, code))
    with pytest.raises(policies.ContextLimit):
        act(policy)
    assert len(server.requests) == 1


def test_max_context_is_ours_too(serve):
    """The server would take more than --max-context: its own count of the prompt decides."""
    _, policy = serve((200, {}, GOOD), max_context=12)
    assert act(policy).tokens_in == 11
    _, policy = serve((200, {}, GOOD), max_context=11)
    with pytest.raises(policies.ContextLimit):
        act(policy)


def test_servers_that_know_fewer_fields(serve):
    """No log-probabilities; max_tokens under its newer name. Found out once, remembered for the next request."""
    server, policy = serve(refuse(400, "logprobs are not supported by this model"),
                           refuse(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
                           (200, {}, GOOD))  # fmt: skip
    act(policy)
    act(policy)
    assert len(server.requests) == 4
    assert "logprobs" not in server.requests[3] and server.requests[3]["max_completion_tokens"] == 16


def test_keys(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert open_policy("openai:m@http://localhost:1/v1").key == "none"
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        open_policy("openai:m@https://api.example.com/v1")
    with pytest.raises(InputError, match="TEACHER_KEY"):
        open_policy("openai:m@https://api.example.com/v1", "teacher", key_env="TEACHER_KEY")
    monkeypatch.setenv("TEACHER_KEY", "secret")
    teacher = open_policy("openai:m@https://api.example.com/v1", "teacher", key_env="TEACHER_KEY")
    assert teacher.key == "secret" and "secret" not in json.dumps(teacher.describe())
    with pytest.raises(InputError, match="OPENAI_API_KEY"):  # the teacher's key is not sent to the student's server
        open_policy("openai:m@https://api.example.com/v1", "student", key_env="TEACHER_KEY")


def test_many_threads_at_once(serve):
    server, policy = serve((200, {}, GOOD))
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(act(policy).text)) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["hello"] * 40
