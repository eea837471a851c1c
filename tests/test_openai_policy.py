"""openai: against a server that misbehaves in every known way."""

import asyncio
import email.utils
import json
import threading
import time
from dataclasses import dataclass

import pytest

from common import actions, openai_policy, policies
from common.errors import InfraError, InputError
from common.policies import Answer, PolicyFlags, StudentFlags, TeacherFlags
from tests.servers import Server, cut, cut_in_the_middle, drip, good, hang, refuse
from tests.test_policies import CHAT, act, open_policy


@pytest.fixture
def serve(monkeypatch):
    """serve(script...) -> (server, policy): time runs two hundred times faster between tries."""
    monkeypatch.setattr(openai_policy, "BACKOFF", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    opened = []

    def start(*script, role="student", models=("m",), **options):
        server = Server(*script, models=models)
        opened.append((server, open_policy(f"openai:m@{server.url}", role, **options)))
        return opened[-1]

    yield start
    for server, policy in opened:
        policy.close()
        server.stop()


def test_a_good_answer_and_what_was_sent(serve):
    extra = {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False}}
    server, policy = serve(good("hello"), temperature=0.7, top_p=0.9, extra=extra)
    answer = act(policy, [CHAT[0], CHAT[1] | {"exit_code": 0}], seed=2**40 + 5)
    assert (answer.text, answer.finish_reason, answer.tokens_in, answer.tokens_cached, answer.tokens_out,
            answer.logprob) == ("hello", "stop", 11, 8, 2, -1.0)  # fmt: skip
    assert server.requests == [{"model": "m", "messages": CHAT, "temperature": 0.7, "top_p": 0.9, "max_tokens": 16,
                                "seed": 5, "logprobs": True} | extra]  # fmt: skip
    assert server.headers[0]["authorization"] == "Bearer none"
    assert server.paths == ["/v1/chat/completions"]
    assert policy.describe()["model"] == "openai:m"  # the address may change, the work stays the same
    assert policy.describe()["extra"] == extra


def test_the_teacher_is_not_asked_for_logprobs(serve):
    server, policy = serve(good("hello"), role="teacher")
    act(policy)
    assert "logprobs" not in server.requests[0]


def test_an_episode_is_one_session_and_its_name_stays_here(serve):
    server, policy = serve(good("hello"))
    for episode in ("0/1/django__django-1/0", "0/1/django__django-1/0", "0/1/django__django-1/1"):
        act(policy, episode=episode)
    one, two, three = [headers["x-session-id"] for headers in server.headers]
    assert one == two != three and "django" not in json.dumps(server.headers)


@pytest.mark.parametrize(
    "answer, text, finish_reason",
    [
        (good(None, None), "", "stop"),
        (good("ls \ud83d", "tool_calls"), "ls ?", "stop"),
        (good("ls", "length"), "ls", "length"),
        (good("half an", "content_filter"), "half an", "content_filter"),
        (good(None, "content_filter"), "", "content_filter"),
        # Azure and OpenRouter refuse the conversation: no failure of the machine, and no reason to end the run
        (refuse(400, "The response was filtered due to the prompt triggering Azure OpenAI's content management policy",
                "content_filter"), "", "content_filter"),
        (refuse(403, "Your input was flagged"), "", "content_filter"),
    ],
    ids=["null", "tool-calls", "length", "filtered", "filtered-null", "azure-filter", "openrouter-filter"],
)  # fmt: skip
def test_unusual_answers(serve, answer, text, finish_reason):
    server, policy = serve(answer)
    got = act(policy)
    assert (got.text, got.finish_reason) == (text, finish_reason)
    assert len(server.requests) == 1
    if finish_reason == "content_filter":
        assert "content filter" in actions.wrong_with("```bash\nls\n```", finish_reason)


def test_an_answer_without_usage_and_logprobs(serve):
    status, headers, body = good("hello", usage=False)
    del body["choices"][0]["logprobs"]
    _, policy = serve((status, headers, body))
    answer = act(policy)
    assert (answer.text, answer.tokens_in, answer.tokens_out, answer.logprob) == ("hello", None, None, None)


# ---------------------------------------------------------------- trouble

TROUBLE = {
    "429": refuse(429, "slow down"), "500": refuse(500, "oops"), "503": refuse(503, "loading"),
    "502-html": (502, {"content-type": "text/html"}, "<html>bad gateway</html>"), "408": refuse(408, "timeout"),
    "409": refuse(409, "conflict"), "cut": cut, "cut-inside": cut_in_the_middle, "hang": hang, "drip": drip,
    "torn-json": (200, {}, '{"id": "1", "choices": [{"ind'), "no-choices": (200, {}, {"choices": []}),
    "empty": (200, {}, "{}"), "null-choices": (200, {}, {"choices": None}),
    "html": (200, {"content-type": "text/html"}, "x"),
    "null": (200, {}, "null"), "null-message": (200, {}, {"choices": [{"message": None}]}),
    "error-200": (200, {}, {"error": {"message": "Provider returned error", "code": 502}}),
    "abort": good("half", "abort"), "error-inside": good("half", "error"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_trouble_that_passes(serve, monkeypatch, trouble):
    if trouble in (hang, drip):
        monkeypatch.setattr(openai_policy, "REQUEST_TIMEOUT", 0.5)
    server, policy = serve(trouble, trouble, good("hello"))
    assert act(policy).text == "hello"
    assert len(server.requests) == 3


@pytest.mark.parametrize("finish, known", [("max_tokens", "length"), ("MAX_TOKENS", "length"), ("model_length", "length"),
                                           ("content_filter", "content_filter"), ("end_turn", "stop"), (None, "stop")])  # fmt: skip
def test_how_gateways_say_that_an_answer_was_cut_off(serve, finish, known):
    _, policy = serve(good("hello", finish))
    assert act(policy).finish_reason == known


def test_a_server_that_broke_off_is_asked_again(serve):
    server, policy = serve(good("hel", "insufficient_system_resource"), good("hello"))
    assert act(policy).text == "hello" and len(server.requests) == 2


@pytest.mark.parametrize("bad", [None, float("-inf"), "x"])
def test_of_a_token_without_a_log_probability_nothing_is_known(serve, bad):
    status, headers, body = good("hello")
    body["choices"][0]["logprobs"]["content"][1]["logprob"] = bad
    _, policy = serve((status, headers, body))
    assert act(policy).logprob is None


def test_words_of_a_gateway_whose_metadata_is_a_text(serve):
    _, policy = serve((400, {}, {"error": {"message": "no", "metadata": "the model is on holiday"}}))
    with pytest.raises(InputError, match="HTTP 400: no the model is on holiday"):
        act(policy)


def test_trouble_that_stays(serve):
    server, policy = serve(refuse(500, "the engine is dead"))
    with pytest.raises(InfraError, match="given up after 5 tries .*the engine is dead"):
        act(policy)
    assert len(server.requests) == 5


def test_nobody_there(serve):
    server, policy = serve(good("hello"))
    server.stop()
    with pytest.raises(InfraError, match="given up after 5 tries"):
        act(policy)


def test_slow_is_not_dead(serve):
    def slowly(handler):
        time.sleep(0.7)
        return good("hello")

    server, policy = serve(slowly)
    assert act(policy).seconds > 0.7
    assert len(server.requests) == 1


def test_retry_after_in_seconds_and_as_a_date(serve):
    server, policy = serve(refuse(429, "slow down", headers={"retry-after": "0.4"}), good("hello"))
    act(policy)
    assert 0.4 <= server.times[1] - server.times[0] < 2
    server, policy = serve(refuse(429, "slow down", headers={"retry-after": "0"}))  # that would be no waiting at all
    openai_policy.BACKOFF = 0.04
    with pytest.raises(InfraError):
        act(policy)
    assert server.times[-1] - server.times[0] > 0.75 * 0.04 * (1 + 2 + 4 + 8)
    date = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2 from now
    server, policy = serve(refuse(503, "loading", headers={"retry-after": date}), good("hello"))
    act(policy)
    assert 0.8 < server.times[1] - server.times[0] < 3


def test_no_waiting_beyond_the_window(serve):
    """Asked to wait for an hour: given up at once, and the task is tried again at the end."""
    server, policy = serve(refuse(429, "slow down", headers={"retry-after": "3600"}))
    with pytest.raises(InfraError, match="after 1 tries"):
        act(policy)


def test_backoff_grows_and_is_seeded(serve, monkeypatch):
    waits = []

    async def note(seconds):
        waits.append(seconds)

    monkeypatch.setattr(openai_policy.asyncio, "sleep", note)
    for seed in (1, 1, 2):
        _, policy = serve(refuse(500, "oops"))
        with pytest.raises(InfraError):
            act(policy, seed=seed)
    assert waits[:4] == waits[4:8] != waits[8:]
    assert all(0.75 <= wait / (0.01 * 2**i) <= 1.25 for i, wait in enumerate(waits[:4]))


@pytest.mark.parametrize(
    "answer",
    [
        refuse(401, "Incorrect API key provided"), refuse(403, "not allowed"), refuse(402, "Insufficient credits"),
        refuse(404, "The model `m` does not exist."), refuse(400, "temperature must be at most 2"),
        refuse(400, "max_tokens is too large: 9000. This model supports at most 4096 completion tokens"),
        refuse(429, "You exceeded your current quota", code="insufficient_quota"),
    ],
    ids=["401", "403", "402", "404", "400", "400-max-tokens", "quota"],
)  # fmt: skip
def test_what_can_never_work_is_fatal_in_the_servers_own_words(serve, answer):
    server, policy = serve(answer)
    with pytest.raises(InputError) as caught:
        act(policy)
    assert answer[2]["error"]["message"] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_wrong_model_gets_the_list_of_those_that_there_are(serve):
    _, policy = serve(refuse(404, "The model `m` does not exist."), models=["qwen3-8b", "mm", "llama"])
    with pytest.raises(InputError, match=r"does not exist. x \(its models: mm, (qwen3-8b, llama|llama, qwen3-8b)\)$"):
        act(policy)
    _, policy = serve(refuse(404, "Not Found"), models=[f"other-{i}" for i in range(300)] + ["m-1"])
    with pytest.raises(InputError, match=r"its models: m-1, other-.* and 291 more\)$"):
        act(policy)
    _, policy = serve(refuse(404, "Not Found"), models=None)
    with pytest.raises(InputError, match="lists no models: is the address right"):
        act(policy)


# ---------------------------------------------------------------- limits

TOO_LONG = {
    "openai": (400, "This model's maximum context length is 4096 tokens. However, your messages resulted in 5000.",
               "context_length_exceeded"),
    "openai-5": (400, "Your input exceeds the context window of this model. Please adjust your input and try again.",
                 "invalid_request_error"),
    "azure": (400, "This model's maximum context length is 2048 tokens. However, you requested 2100 tokens (2000 in "
                   "the messages, 100 in the completion). Please reduce the length of the messages or completion.", None),
    "vllm-v1": (400, "The decoder prompt (length 5000) is longer than the maximum model length of 4096.", None),
    "vllm-max-tokens": (400, "'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum context "
                             "length is 2048 tokens and your request has 1800 input tokens (512 > 2048 - 1800).", None),
    "vllm-new": (400, "You passed 4000 input tokens and requested 512 output tokens. However, the model's context length "
                      "is only 4096 tokens.", "400"),
    "sglang": (400, "The input (5000 tokens) is longer than the model's context length (4096 tokens).", None),
    "sglang-total": (400, "Requested token count exceeds the model's maximum context length of 4096 tokens.", None),
    "sglang-scheduler": (400, "Input length (5000 tokens) exceeds the maximum allowed length (4090 tokens). Use a "
                              "shorter input or enable --allow-auto-truncate.", None),
    "llama.cpp": (400, "the request exceeds the available context size, try increasing it",
                  "exceed_context_size_error"),
    "llama.cpp-old": (500, "input is too large to process. increase the physical batch size", None),
    "tgi": (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` "
                 "tokens and 100 `max_new_tokens`", None),
    "tgi-inputs": (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000", None),
    "anthropic": (400, "prompt is too long: 213462 tokens > 200000 maximum", None),
    "anthropic-total": (400, "input length and `max_tokens` exceed context limit: 174167 + 64000 > 200000, decrease "
                             "input length or `max_tokens` and try again", None),
    "openrouter": (400, "This endpoint's maximum context length is 16384 tokens. However, you requested about 94307 "
                        "tokens (94307 of text input). Please reduce the length of either one.", "400"),
    "gemini": (400, "The input token count (1196265) exceeds the maximum number of tokens allowed (1048575).", None),
    "xai": (400, "This model's maximum prompt length is 131072 but the request contains 537812 tokens.", None),
    "mistral": (400, "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context "
                     "length", None),
    "bedrock": (400, "Input is too long for requested model.", None),
    "kimi": (400, "Invalid request: Your request exceeded model token limit: 8192", None),
    "proxy": (413, "Request Entity Too Large", None),
}  # fmt: skip


@pytest.mark.parametrize("status, message, code", TOO_LONG.values(), ids=TOO_LONG)
def test_too_long_is_a_context_limit(serve, status, message, code):
    server, policy = serve(refuse(status, message, code))
    with pytest.raises(policies.ContextLimit):
        act(policy)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        (422, {}, {"error": TOO_LONG["tgi"][1], "error_type": "validation"}),  # TGI's own form
        (400, {}, {"object": "error", "message": TOO_LONG["sglang"][1], "type": "BadRequestError"}),  # SGLang
        (400, {}, {"error": {"message": "Provider returned error", "code": 400, "metadata": {  # OpenRouter, of others
            "raw": '{"error": {"message": "prompt is too long: 213462 tokens > 200000 maximum"}}'}}}),
        (200, {}, {"error": {"message": TOO_LONG["openrouter"][1], "code": 400}}),
        (413, {"content-type": "text/html"}, "<html>413</html>"), (413, {}, ""),
    ],
    ids=["tgi", "sglang", "openrouter-raw", "openrouter-200", "nginx", "no-body"],
)  # fmt: skip
def test_servers_put_their_words_in_different_places(serve, answer):
    _, policy = serve(answer)
    with pytest.raises(policies.ContextLimit):
        act(policy)


def test_too_many_tokens_a_minute_is_no_context_limit(serve):
    server, policy = serve(refuse(429, "rate limit of tokens: reduce the length of the prompt"), good("hello"))
    assert act(policy).text == "hello"


def test_max_context_is_ours_too(serve):
    """The server would take more than --max-context: its own count, 11 of the prompt and 2 of the answer, decides."""
    _, policy = serve(good("hello"), max_context=13)
    assert act(policy).tokens_in == 11
    _, policy = serve(good("hello"), max_context=12)
    with pytest.raises(policies.ContextLimit, match="13 tokens with the answer"):
        act(policy)


def test_servers_that_know_fewer_fields(serve):
    """No log-probabilities; max_tokens under its newer name. Found out once, remembered for the next request."""
    server, policy = serve(refuse(400, "logprobs are not supported by this model"),
                           refuse(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
                           good("hello"))  # fmt: skip
    act(policy)
    act(policy)
    assert len(server.requests) == 4
    assert "logprobs" not in server.requests[3] and server.requests[3]["max_completion_tokens"] == 16


def ask_at_once(policy, n: int) -> list[Answer]:
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(act(policy))) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_many_find_out_at_once_that_a_server_knows_fewer_fields(serve):
    """Eight first requests are under way when the first refusal comes: each asks again, none is lost."""
    together = threading.Barrier(8, timeout=10)

    def answer(handler):
        if "logprobs" in handler.body:
            together.wait()
            return refuse(400, "logprobs are not supported by this model")
        if "max_tokens" in handler.body:
            return refuse(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return good("hello")

    _, policy = serve(answer, inflight=8)
    assert len(ask_at_once(policy, 8)) == 8


def test_many_threads_at_once_and_the_limit_in_flight(serve):
    def slowly(handler):
        time.sleep(0.1)
        return good("hello")

    server, policy = serve(slowly, batch=40, inflight=5)
    answers = ask_at_once(policy, 30)
    assert [answer.text for answer in answers] == ["hello"] * 30
    assert 2 <= server.most <= 5
    assert max(answer.seconds for answer in answers) < 0.5  # the wait for a place in flight is not the server's time


def test_connections_are_kept(serve, monkeypatch):
    monkeypatch.setattr(openai_policy, "CONNECTIONS", 3)
    server, policy = serve(good("hello"), batch=8)
    for _ in range(5):
        ask_at_once(policy, 8)
    assert len(server.requests) == 40 and server.connections <= 8
    for _ in range(5):
        act(policy)
    assert server.connections <= 8


def test_close_and_go_on(serve):
    server, policy = serve(good("hello"))
    policy.close()
    act(policy)
    policy.close()
    assert act(policy).text == "hello" and server.connections == 2


def test_two_policies_share_the_loop(serve):
    (_, one), (_, two) = serve(good("one")), serve(good("two"))
    assert (act(one).text, act(two).text) == ("one", "two")
    assert sum(thread.name == "openai" for thread in threading.enumerate()) == 1
    assert openai_policy.event_loop().is_running()
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()  # the caller's thread has none


# ---------------------------------------------------------------- keys and extra fields


@dataclass(kw_only=True)
class Collect(TeacherFlags, StudentFlags, PolicyFlags):
    """The policy flags of 01."""


def test_keys(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert open_policy("openai:m@http://localhost:1/v1").key == "none"
    assert open_policy("openai:m@http://gpu-box:1/v1").key == "none"  # nobody sends keys without https
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        open_policy("openai:m@https://api.example.com/v1")
    flags = Collect(teacher_key_env="TEACHER_KEY")
    for url in ("https://api.example.com/v1", "http://localhost:1/v1"):  # asked for by name, it must be there
        with pytest.raises(InputError, match="TEACHER_KEY"):
            open_policy(f"openai:m@{url}", "teacher", **flags.options("teacher"))
    monkeypatch.setenv("TEACHER_KEY", "secret")
    teacher = open_policy("openai:m@https://api.example.com/v1", "teacher", **flags.options("teacher"))
    assert teacher.key == "secret" and "secret" not in json.dumps(teacher.describe())
    with pytest.raises(InputError, match="OPENAI_API_KEY"):  # the teacher's key is not sent to the student's server
        open_policy("openai:m@https://api.example.com/v1", "student", **flags.options("student"))


def test_a_refused_key_is_named_by_its_variable(serve, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "secret")
    _, policy = serve(refuse(401, "Unauthorized"), role="teacher", key_env="TEACHER_KEY")
    with pytest.raises(InputError, match="HTTP 401: Unauthorized.*environment variable TEACHER_KEY") as caught:
        act(policy)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("field", ["model", "messages", "temperature", "max_tokens", "n", "stream", "tools", "seed"])
def test_extra_fields_that_are_ours_are_refused(field):
    flags = Collect(student_extra=json.dumps({"top_k": 2, field: 1}))
    with pytest.raises(InputError, match=f"--student-extra: the field '{field}' cannot be set there: "):
        open_policy("openai:m@http://localhost:1/v1", **flags.options("student"))


def test_extra_fields_that_nobody_takes_are_refused():
    with pytest.raises(InputError, match="--teacher-extra is for servers and hf:, not for oracle"):
        open_policy("oracle", "teacher", extra={"top_k": 2})
    for text in ("{", "[1]", "3", '{"chat_template_kwargs": "x"}'):
        with pytest.raises(InputError, match="--teacher-extra"):
            Collect(teacher_extra=text).options("teacher")
    with pytest.raises(InputError, match="--teacher-inflight must be at least 1, not 0"):
        open_policy("openai:m@http://localhost:1/v1", "teacher", inflight=0)
