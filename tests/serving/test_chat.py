"""OpenAI's interface, asked by OpenAI's own client over a real socket."""

import base64
import json
import socket

import openai
import pytest
from live import expected, running
from tiny_bundle import black_picture, picture

from exports.registry import Registry


@pytest.fixture(scope="module")
def live(tmp_path_factory, tiny_bundles):
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.one)
    with running(root, max_body_bytes=2_000_000) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    url = f"http://127.0.0.1:{live.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def data_url(body, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(body).decode()}"


def says(*images, text="What is in this picture?"):
    """Returns a message of a person who shows images by their URLs."""
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in images]
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def ask(client, photo, **fields):
    fields.setdefault("model", "tiny")
    fields.setdefault("messages", [says(data_url(photo))])
    return client.chat.completions.create(**fields)


def test_a_conversation_gets_the_caption_of_its_image(live, client, tiny_captioner, photos):
    [wanted] = expected(tiny_captioner, photos[1])
    answer = ask(client, photos[1], temperature=0.2, top_p=0.9, seed=1, user="me")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", wanted["text"])
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == "tiny@1"
    assert answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (0, wanted["tokens"])
    assert usage.total_tokens == wanted["tokens"]


def test_what_a_conversation_says_changes_nothing_and_its_last_image_counts(client, photos):
    alone = ask(client, photos[1]).choices[0].message.content
    messages = [
        {"role": "system", "content": "Answer in French."},
        says(data_url(photos[0]), text="First"),
        {"role": "assistant", "content": None},
        says(data_url(photos[1], "image/jpeg"), text="And this one?"),
        {"role": "user", "content": "In one word, please."},
    ]
    assert ask(client, photos[1], messages=messages).choices[0].message.content == alone


def test_n_captions_are_the_n_best(client, tiny_captioner, photos):
    for count, beams in ((3, 4), (6, 6)):
        answer = ask(client, photos[2], n=count)
        wanted = expected(tiny_captioner, photos[2], num_beams=beams, num_captions=count)
        assert [one.message.content for one in answer.choices] == [one["text"] for one in wanted]
        assert [one.index for one in answer.choices] == list(range(count))
        assert answer.usage.completion_tokens == sum(one["tokens"] for one in wanted)


def test_max_tokens_cut_a_caption_and_say_so(client, tiny_captioner, photos):
    for name in ("max_tokens", "max_completion_tokens"):
        cut = ask(client, photos[0], **{name: 2})
        [wanted] = expected(tiny_captioner, photos[0], max_new_tokens=2)
        assert cut.choices[0].message.content == wanted["text"]
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage.completion_tokens == 2
        [whole] = ask(client, photos[0], **{name: 100_000}).choices
        assert whole.finish_reason == "stop"


def test_our_own_parameters_stand_beside_openais(client, tiny_captioner, photos):
    ours = {"num_beams": 3, "prefix": "a dog", "length_penalty": 0.5}
    answer = ask(client, photos[0], extra_body=ours)
    [wanted] = expected(tiny_captioner, photos[0], **ours)
    assert answer.choices[0].message.content == wanted["text"]
    assert answer.usage.prompt_tokens == 2  # a, dog
    assert answer.usage.total_tokens == 2 + wanted["tokens"]
    with pytest.raises(openai.UnprocessableEntityError, match="num_beams"):
        ask(client, photos[0], extra_body={"num_beams": 99})


def test_a_stream_holds_the_same_words(client, photos):
    whole = ask(client, photos[3], n=2)
    chunks = list(ask(client, photos[3], n=2, stream=True, stream_options={"include_usage": True}))
    texts, ends, roles = ["", ""], [None, None], [None, None]
    *parts, last = chunks
    for chunk in parts:
        assert (chunk.object, chunk.model, chunk.usage) == ("chat.completion.chunk", "tiny@1", None)
        [choice] = chunk.choices
        assert ends[choice.index] is None  # nothing comes after the end
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] = roles[choice.index] or choice.delta.role
        ends[choice.index] = choice.finish_reason
    assert texts == [one.message.content for one in whole.choices]
    assert ends == [one.finish_reason for one in whole.choices]
    assert roles == ["assistant", "assistant"]
    assert last.choices == []
    assert last.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(parts) > 6
    assert all(chunk.usage is None for chunk in ask(client, photos[3], stream=True))


def test_a_stream_ends_as_the_protocol_asks(live, photos):
    body = {"messages": [says(data_url(photos[0]))], "stream": True}
    answer = live.client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"]
    *events, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: ")) for event in events)


def test_models_are_listed_and_described(live, client):
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "cutline")
    assert model.created == 1767225600  # 2026-01-01
    assert live.client.get("/v1/models").json()["models"][0]["active"]["version"] == "1"


WRONG = {
    "an address": (422, {"messages": [says("https://example.com/cat.jpg")]}, "data:"),
    "no base64": (400, {"messages": [says("data:image/png;base64,?")]}, "base64"),
    "no data URL": (400, {"messages": [says("data:image/png,raw")]}, "base64"),
    "no image": (422, {"messages": [{"role": "user", "content": "Hello"}]}, "image_url"),
    "no url": (
        422,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "image_url",
    ),
    "sound": (
        422,
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "input_audio",
    ),
    "two images": (422, {"messages": [says(*[data_url(picture(0))] * 2)]}, "2 images"),
    "no messages": (422, {"messages": []}, "messages"),
    "text as an image": (415, {"messages": [says(data_url(b"Dear reader"))]}, "types"),
    "half an image": (400, {"messages": [says(data_url(picture(0)[:60]))]}, "damaged"),
    "unknown model": (404, {"model": "gpt-4o"}, "gpt-4o"),
    "too many captions": (422, {"n": 17}, "n: "),
    "no tokens": (422, {"max_tokens": 0}, "max_tokens"),
    "a number as text": (422, {"n": "2"}, "n: "),
    "logprobs": (422, {"logprobs": True}, "logprobs"),
    "tools": (422, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "JSON": (422, {"response_format": {"type": "json_object"}}, "response_format"),
    "stop words": (422, {"stop": ["dog"]}, "stop"),
    "too many bytes": (413, {"messages": [says("x" * 2_000_000)]}, "2000000"),
    "a model without an answer": (500, {"messages": [says(data_url(black_picture()))]}, "tiny@1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_openais_words(client, photos, name):
    status, fields, words = WRONG[name]
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, photos[0], extra_body=fields)
    assert caught.value.status_code == status
    body = caught.value.response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert words in body["error"]["message"]
    assert ask(client, photos[0]).choices


def test_codes_are_names_that_programs_know(client, live, photos):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, photos[0], model="gpt-4o")
    assert caught.value.code == "model_not_found"
    missing = live.client.get("/v1/chat/completions")
    assert (missing.status_code, missing.json()["error"]["code"]) == (405, "method_not_allowed")
    assert live.client.get("/v1/nothing").headers["content-type"] == "application/problem+json"


def test_a_server_that_has_no_room_or_no_model_says_so(tmp_path, photos):
    body = {"messages": [says(data_url(photos[0]))]}
    with running(tmp_path, wait=False) as live:
        answer = live.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "server_error"
        assert live.client.get("/v1/models").json()["data"] == []


def test_limits_hold_for_this_door_too(tmp_path, tiny_bundles, photos):
    Registry(tmp_path).publish(tiny_bundles.one)
    with running(tmp_path, max_held_bytes=1, max_body_bytes=3000, stall_s=0.5) as live:
        large = live.client.post("/v1/chat/completions", content=b"x" * 2999)
        assert large.status_code == 400  # a lone body always fits
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as stalled:
            stalled.sendall(head + b"{")
            answer = b"".join(iter(lambda: stalled.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'{"error":{' in answer
        counted = live.metrics()
        assert counted["cutline_requests_total", "400", "chat"] == 1
        assert counted["cutline_requests_total", "408", "chat"] == 1
        assert counted[("cutline_request_seconds_count",)] == 2
