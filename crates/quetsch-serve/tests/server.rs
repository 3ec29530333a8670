//! A real server on loopback: protocols, limits, overload, draining.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used)] // helpers of tests are tests too

mod common;

use common::{Client, JSON, fixture, start, start_cold};
use quetsch::metrics::{softmax, top_k};
use quetsch::runtime::Classifier;
use quetsch_serve::{ApiKey, Config, HeaderValue, ModelSource};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const TEXTS: [&str; 4] =
    ["I lost my card, what can I do?", "Why was I charged TWICE?", "top up", "我的银行卡丢了!"];

/// What `quetsch predict` says: labels and scores in falling order.
fn expected(dir: &str, text: &str) -> Vec<(String, f32)> {
    let classifier = Classifier::load(&fixture(dir), None).unwrap();
    let logits = classifier.logits(&[text], 1).unwrap();
    ranked(&classifier, logits)
}

fn ranked(classifier: &Classifier, logits: Vec<f32>) -> Vec<(String, f32)> {
    let mut scores = logits.clone();
    softmax(&mut scores);
    top_k(&logits, logits.len()).into_iter().map(|i| (classifier.labels()[i].clone(), scores[i])).collect()
}

fn list(predictions: &Value) -> Vec<(String, f32)> {
    let one = |p: &Value| {
        assert_eq!(p.as_object().unwrap().keys().collect::<Vec<_>>(), ["score", "label"]);
        (p["label"].as_str().unwrap().to_owned(), p["score"].as_f64().unwrap() as f32)
    };
    predictions.as_array().unwrap().iter().map(one).collect()
}

#[test]
fn tei_predict_answers_as_predict_does() {
    let server = start(|_| {});
    let single = server.post("/predict", &json!({ "inputs": TEXTS[0] }));
    assert_eq!((single.status, list(&single.json())), (200, expected("tiny_student", TEXTS[0])));
    for name in
        ["x-compute-time", "x-compute-characters", "x-compute-tokens", "x-total-time", "x-tokenization-time"]
            .into_iter()
            .chain(["x-queue-time", "x-inference-time"])
    {
        let value = single.header(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert!(value.parse::<u64>().is_ok(), "{name}: {value}");
    }
    assert_eq!(single.header("x-compute-type"), Some("cpu"));
    assert_eq!(single.header("x-compute-characters"), Some("30"));
    assert_eq!(single.header("x-compute-tokens"), Some("12"));

    let batch: Vec<_> = TEXTS.iter().map(|t| [t]).collect();
    let batch = server.post("/predict", &json!({ "inputs": batch }));
    let answers: Vec<_> = batch.json().as_array().unwrap().iter().map(list).collect();
    assert_eq!(answers, TEXTS.map(|t| expected("tiny_student", t)));

    // One string in a list is a text, two are a pair.
    let one = server.post("/predict", &json!({ "inputs": [TEXTS[1]] }));
    assert_eq!(list(&one.json()), expected("tiny_student", TEXTS[1]));
    let classifier = Classifier::load(&fixture("tiny_student"), None).unwrap();
    let pair = classifier.tokenizer().encode_pair("my card", "is lost", classifier.max_length()).unwrap();
    let want = ranked(&classifier, classifier.model().logits(&[pair], 1).unwrap());
    let found = server.post("/predict", &json!({ "inputs": ["my card", "is lost"] }));
    assert_eq!(list(&found.json()), want);
    let mixed = server.post("/predict", &json!({ "inputs": [["top up"], ["my card", "is lost"]] }));
    assert_eq!(list(&mixed.json()[1]), want);

    let raw = server.post("/predict", &json!({ "inputs": TEXTS[0], "raw_scores": true, "top_k": 2 }));
    let mut logits = classifier.logits(&[TEXTS[0]], 1).unwrap();
    logits.sort_by(|a, b| b.total_cmp(a));
    assert_eq!(list(&raw.json()).iter().map(|(_, s)| *s).collect::<Vec<_>>(), logits[..2]);
}

#[test]
fn long_texts_are_cut_or_refused() {
    let server = start(|_| {});
    let classifier = Classifier::load(&fixture("tiny_student"), None).unwrap();
    let (first, last) = ("card ".repeat(30), " pin".repeat(10));
    let long = first.clone() + &last;
    let rows = [
        (json!({ "inputs": long }), first.as_str()),
        (json!({ "inputs": long, "truncate": true, "truncation_direction": "right" }), first.as_str()),
        (json!({ "inputs": long, "truncate": true, "truncation_direction": "left" }), {
            // 14 tokens are kept beside [CLS] and [SEP]: 4 of the beginning's, 10 of the end's
            "card card card card pin pin pin pin pin pin pin pin pin pin"
        }),
    ];
    for (body, same_as) in rows {
        let want = ranked(&classifier, classifier.logits(&[same_as], 1).unwrap());
        let found = server.post("/predict", &body);
        assert_eq!((found.status, found.header("x-compute-tokens")), (200, Some("16")), "{body}");
        assert_eq!(list(&found.json()), want, "{body}");
    }
    let refused = server.post("/predict", &json!({ "inputs": long, "truncate": false }));
    assert_eq!(refused.status, 422);
    let message = "Input validation error: `inputs` must have less than 16 tokens. Given: 42";
    assert_eq!(refused.json(), json!({ "error": message, "error_type": "Validation" }));
}

#[test]
fn info_health_and_metrics() {
    let server = start(|_| {});
    let info = server.get("/info").json();
    let labels = ["lost_card", "double_charge", "change_pin", "top_up", "abroad"];
    for (i, label) in labels.iter().enumerate() {
        assert_eq!(info["model_type"]["classifier"]["id2label"][i.to_string()], *label);
        assert_eq!(info["model_type"]["classifier"]["label2id"][label], i);
    }
    let fields = [
        ("model_id", json!("tiny")),
        ("model_sha", Value::Null),
        ("model_dtype", json!("float32")),
        ("max_concurrent_requests", json!(512)),
        ("max_input_length", json!(16)),
        ("max_client_batch_size", json!(32)),
        ("auto_truncate", json!(true)),
        ("version", json!(env!("CARGO_PKG_VERSION"))),
    ];
    for (name, want) in fields {
        assert_eq!(info[name], want, "{name}");
    }
    for path in ["/health", "/ping"] {
        let found = server.get(path);
        assert_eq!((found.status, found.body.as_str()), (200, ""), "{path}");
    }
    server.post("/predict", &json!({ "inputs": "top up" }));
    server.post("/predict", &json!({ "inputs": "" }));
    let metrics = server.get("/metrics").body;
    let names = [
        "te_request_count{method=\"single\"}",
        "te_request_success{method=\"single\"}",
        "te_request_failure{err=\"validation\"}",
        "te_request_duration_bucket",
        "te_request_tokenization_duration_sum",
        "te_request_queue_duration_count",
        "te_request_inference_duration_bucket",
        "te_batch_next_size_bucket",
        "te_batch_next_tokens_sum",
        "te_queue_size",
    ];
    for name in names {
        assert!(metrics.contains(name), "{name}\n{metrics}");
    }
    assert!(!metrics.contains("top up"));
}

#[test]
fn open_inference_protocol() {
    let server = start(|_| {});
    let rows = [
        (
            "/v2",
            json!({ "name": "quetsch", "version": env!("CARGO_PKG_VERSION"), "extensions": ["binary_tensor_data"] }),
        ),
        ("/v2/health/live", json!({ "live": true })),
        ("/v2/health/ready", json!({ "ready": true })),
        ("/v2/models/tiny/ready", json!({ "name": "tiny", "ready": true })),
        ("/v2/models/bert/versions/1/ready", json!({ "name": "bert", "ready": true })),
    ];
    for (path, want) in rows {
        let found = server.get(path);
        assert_eq!((found.status, found.json()), (200, want), "{path}");
    }
    let metadata = server.get("/v2/models/tiny").json();
    assert_eq!((&metadata["name"], &metadata["versions"]), (&json!("tiny"), &json!(["1"])));
    assert_eq!(metadata["inputs"][0], json!({ "name": "text", "datatype": "BYTES", "shape": [-1] }));
    for path in ["/v2/models/none", "/v2/models/tiny/versions/2", "/v2/models/none/ready"] {
        let found = server.get(path);
        assert_eq!(found.status, 404, "{path}");
        assert!(found.json()["error"].is_string(), "{path}");
    }

    for dir in ["tiny_student", "tiny_bert"] {
        let name = if dir == "tiny_student" { "tiny" } else { "bert" };
        let classifier = Classifier::load(&fixture(dir), None).unwrap();
        let labels = classifier.labels().len();
        let logits = classifier.logits(&TEXTS[..2], 1).unwrap();
        let want: Vec<_> = TEXTS[..2].iter().flat_map(|t| expected(dir, t).into_iter().take(2)).collect();
        let input = json!({ "name": "text", "shape": [2], "datatype": "BYTES", "data": &TEXTS[..2] });
        let body = json!({ "id": "42", "inputs": [input], "parameters": { "top_k": 2 } });
        let found = server.post(&format!("/v2/models/{name}/infer"), &body).json();
        let data = |i: usize| found["outputs"][i]["data"].as_array().unwrap();
        let head = [&found["model_name"], &found["model_version"], &found["id"]];
        assert_eq!(head, [&json!(name), &json!("1"), &json!("42")]);
        for (i, (output, kind, width)) in
            [("label", "BYTES", 2), ("score", "FP32", 2), ("logits", "FP32", labels)].into_iter().enumerate()
        {
            let o = &found["outputs"][i];
            let head = (&o["name"], &o["datatype"], &o["shape"]);
            assert_eq!(head, (&json!(output), &json!(kind), &json!([2, width])));
        }
        let pairs = data(0).iter().zip(data(1));
        let pairs: Vec<_> =
            pairs.map(|(l, s)| (l.as_str().unwrap().to_owned(), s.as_f64().unwrap() as f32)).collect();
        assert_eq!(pairs, want, "{dir}");
        assert_eq!(data(2).iter().map(|x| x.as_f64().unwrap() as f32).collect::<Vec<_>>(), logits, "{dir}");

        // Ids that are padded, nested and masked give the same logits.
        let e = classifier.encode(&TEXTS[..2], 1).unwrap();
        let width = e.iter().map(|e| e.ids.len()).max().unwrap();
        let pad = |e: &[u32], with| (0..width).map(|i| e.get(i).copied().unwrap_or(with)).collect::<Vec<_>>();
        let ids: Vec<_> = e.iter().map(|e| pad(&e.ids, 0)).collect();
        let mask: Vec<_> = e.iter().map(|e| pad(&vec![1; e.ids.len()], 0)).collect();
        let tensor = |name: &str, data: Value| json!({ "name": name, "shape": [2, width], "datatype": "INT64", "data": data });
        let inputs = [tensor("input_ids", json!(ids)), tensor("attention_mask", json!(mask))];
        let body = json!({ "inputs": inputs, "outputs": [{ "name": "logits" }] });
        let found = server.post(&format!("/v2/models/{name}/versions/1/infer"), &body).json();
        assert_eq!(found["outputs"].as_array().unwrap().len(), 1);
        let found = found["outputs"][0]["data"].as_array().unwrap();
        assert_eq!(found.iter().map(|x| x.as_f64().unwrap() as f32).collect::<Vec<_>>(), logits, "{dir}");
    }
}

#[test]
fn vllm_classify() {
    let server = start(|_| {});
    let classifier = Classifier::load(&fixture("tiny_bert"), None).unwrap();
    let mut probs = classifier.logits(&[TEXTS[0]], 1).unwrap();
    softmax(&mut probs);
    let tokens = classifier.encode(&[TEXTS[0]], 1).unwrap()[0].ids.len();
    for (path, input) in [("/classify", json!(TEXTS[0])), ("/v1/classify", json!([TEXTS[0]]))] {
        let found = server.post(path, &json!({ "model": "bert", "input": input, "user": "x" })).json();
        let id = found["id"].as_str().unwrap();
        assert!(id.strip_prefix("classify-").is_some_and(|hex| hex.len() == 32), "{id}");
        assert_eq!((&found["object"], &found["model"]), (&json!("list"), &json!("bert")));
        assert!(found["created"].as_u64().unwrap() > 1_700_000_000);
        let data = &found["data"][0];
        assert_eq!((&data["index"], &data["num_classes"]), (&json!(0), &json!(probs.len())));
        assert_eq!(data["label"], expected("tiny_bert", TEXTS[0])[0].0);
        let found_probs: Vec<f32> = serde_json::from_value(data["probs"].clone()).unwrap();
        assert_eq!(found_probs, probs);
        let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0,
                            "prompt_tokens_details": null });
        assert_eq!(found["usage"], usage);
    }
    let found = server.post("/classify", &json!({ "model": "none", "input": "a" }));
    assert_eq!((found.status, &found.json()["error"]["type"]), (404, &json!("NotFoundError")));
}

#[test]
fn bad_requests_have_the_right_status() {
    let server = start(|c| {
        c.limits.payload_limit = 10_000;
        c.limits.max_text_bytes = 1_000;
    });
    let many: Vec<_> = (0..33).map(|_| ["a"]).collect();
    let infer = "/v2/models/tiny/infer";
    let long = "a".repeat(1_001);
    let rows = [
        ("/predict", "{", 400, "Validation"),
        ("/predict", "", 400, "Validation"),
        ("/predict", "\u{0}", 400, "Validation"),
        ("/predict", &"[".repeat(5_000), 400, "Validation"),
        ("/predict", "[]", 422, "Validation"),
        ("/predict", "{}", 422, "Validation"),
        ("/predict", r#"{"inputs": 1}"#, 422, "Validation"),
        ("/predict", r#"{"inputs": []}"#, 422, "Validation"),
        ("/predict", r#"{"inputs": ["a", "b", "c"]}"#, 422, "Validation"),
        ("/predict", r#"{"inputs": [["a", "b", "c"]]}"#, 422, "Validation"),
        ("/predict", r#"{"inputs": [["a"], "b"]}"#, 422, "Validation"),
        ("/predict", r#"{"inputs": [[]]}"#, 422, "Validation"),
        ("/predict", r#"{"inputs": "a", "truncation_direction": "up"}"#, 422, "Validation"),
        ("/predict", r#"{"inputs": "a", "top_k": 0}"#, 422, "Validation"),
        ("/predict", r#"{"inputs": "a", "raw_scores": "yes"}"#, 422, "Validation"),
        ("/predict", r#"{"inputs": ""}"#, 400, "Empty"),
        ("/predict", r#"{"inputs": [["a"], [""]]}"#, 400, "Empty"),
        ("/predict", &json!({ "inputs": many }).to_string(), 422, "Validation"),
        ("/predict", &json!({ "inputs": long }).to_string(), 422, "Validation"),
        ("/predict", &" ".repeat(10_001), 413, "Validation"),
        ("/classify", "{}", 400, ""),
        ("/classify", r#"{"input": []}"#, 400, ""),
        ("/classify", r#"{"input": [1.5]}"#, 400, ""),
        ("/classify", r#"{"input": [219]}"#, 400, ""), // no such token
        ("/classify", &json!({ "input": long }).to_string(), 400, ""),
        ("/classify", &" ".repeat(10_001), 413, ""),
        ("/", r#"{"inputs": ["a", 1], "parameters": {}}"#, 422, "Validation"),
        ("/", r#"{"inputs": "a", "parameters": {"top_k": 0}}"#, 422, "Validation"),
        ("/", r#"{"inputs": "a", "parameters": {"function_to_apply": "tanh"}}"#, 422, "Validation"),
        ("/", r#"{"inputs": "", "parameters": {}}"#, 400, "Empty"),
        ("/v2/models/none/infer", r#"{"inputs": []}"#, 404, ""),
        (infer, r#"{"inputs": []}"#, 400, ""),
        (infer, r#"{"inputs": [{"name": "text", "shape": [-1], "datatype": "BYTES", "data": []}]}"#, 400, ""),
        (infer, r#"{"inputs": [{"name": "text", "shape": [0], "datatype": "BYTES", "data": []}]}"#, 400, ""),
        (
            infer,
            r#"{"inputs": [{"name": "input_ids", "shape": [1, 1], "datatype": "INT64", "data": [219]}]}"#,
            400,
            "",
        ),
        (
            infer,
            r#"{"inputs": [{"name": "input_ids", "shape": [1, 17], "datatype": "INT64",
                   "data": [2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2]}]}"#,
            400,
            "",
        ),
        (
            infer,
            r#"{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}],
                   "outputs": [{"name": "no"}]}"#,
            400,
            "",
        ),
    ];
    for (path, body, status, kind) in rows {
        let found = server.connect().send("POST", path, &[JSON], body.as_bytes());
        let body = &body[..body.len().min(60)];
        assert_eq!(found.status, status, "{path} {body:?}: {}", found.body);
        let error = found.json();
        assert!(error["error"].is_string() || error["error"]["message"].is_string(), "{path} {body}: {error}");
        assert_eq!(error["error_type"].as_str().unwrap_or(""), kind, "{path} {body}");
    }
    let body = br#"{"inputs": "a"}"#;
    let binary = [JSON, ("Inference-Header-Content-Length", "2")];
    let rows = [
        ("POST", "/predict", &[("Content-Type", "text/plain")][..], 415),
        ("POST", "/predict", &[], 415),
        ("GET", "/predict", &[], 405),
        ("GET", "/nothing", &[], 404),
        ("POST", infer, &binary, 400),      // `{"` is no JSON
        ("POST", "/predict", &[JSON], 200), // the server is as it was
    ];
    for (method, path, headers, status) in rows {
        let found = server.connect().send(method, path, headers, body);
        assert_eq!(found.status, status, "{method} {path} {headers:?}");
    }
}

#[test]
fn keys_and_request_ids() {
    let server = start(|c| c.api_key = Some(ApiKey::new("secret")));
    let body = br#"{"inputs": "a"}"#;
    let rows = [
        (None, 401),
        (Some("Bearer secret"), 200),
        (Some("Bearer secre"), 401),
        (Some("Bearer secrets"), 401),
        (Some("Bearer "), 401),
        (Some("secret"), 401),
        (Some("Basic secret"), 401),
    ];
    for (key, status) in rows {
        let headers: Vec<_> = key.map(|k| ("Authorization", k)).into_iter().chain([JSON]).collect();
        let found = server.connect().send("POST", "/predict", &headers, body);
        assert_eq!(found.status, status, "{key:?}");
        assert_eq!(found.header("www-authenticate"), (status == 401).then_some("Bearer"), "{key:?}");
    }
    for path in ["/info", "/v2", "/v2/models/tiny"] {
        assert_eq!(server.get(path).status, 401, "{path}");
    }
    for path in ["/health", "/ping", "/metrics", "/v2/health/live", "/v2/health/ready"] {
        assert_eq!(server.get(path).status, 200, "{path} needs no key");
    }
    let id = |given: &[(&str, &str)]| {
        server.connect().send("GET", "/health", given, b"").header("x-request-id").unwrap().to_owned()
    };
    assert_eq!(id(&[("X-Request-Id", "abc-1")]), "abc-1");
    assert_eq!(id(&[("X-Request-Id", "a b")]).len(), 32);
    assert_ne!(id(&[]), id(&[]));
}

#[test]
fn pages_of_other_origins_may_not_ask_unless_they_are_named() {
    let asked = [("Origin", "https://a.example"), ("Access-Control-Request-Method", "POST")];
    let allowed = |origins: &[&'static str]| {
        let server = start(|c| c.cors_allow_origin = origins.iter().map(|o| HeaderValue::from_static(o)).collect());
        let mut client = server.connect();
        let preflight = client.send("OPTIONS", "/predict", &asked, b"");
        let simple = client.send("GET", "/health", &asked[..1], b"");
        [preflight, simple].map(|r| r.header("access-control-allow-origin").map(str::to_owned))
    };
    assert_eq!(allowed(&[]), [None, None]);
    assert_eq!(allowed(&["https://b.example"]), [None, None]);
    let named = Some("https://a.example".to_owned());
    assert_eq!(allowed(&["https://b.example", "https://a.example"]), [named.clone(), named]);
}

#[test]
fn the_page_is_whole_and_asks_nobody_else() {
    let server = start(|c| c.api_key = Some(ApiKey::new("secret")));
    let page = server.get("/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
    assert!(page.body.ends_with("</html>\n"));
    assert!(!page.body.contains("://"), "nothing from elsewhere");
}

#[test]
fn overload_gives_200_and_429_only() {
    let server = start(|c| {
        c.threads = 1;
        c.limits.max_concurrent_requests = 32;
    });
    let batch: Vec<_> = (0..32).map(|i| [TEXTS[i % 4]]).collect();
    let body = json!({ "inputs": batch });
    let want = server.post("/predict", &body).body;
    let hammer = || {
        let mut client = server.connect();
        let mut counts = (0, 0);
        for _ in 0..60 {
            let found = client.post("/predict", &body);
            match found.status {
                200 => {
                    assert_eq!(found.body, want);
                    counts.0 += 1;
                }
                429 => {
                    assert_eq!(found.header("retry-after"), Some("1"));
                    assert_eq!(found.json()["error_type"], "Overloaded");
                    counts.1 += 1;
                }
                other => panic!("{other}: {}", found.body),
            }
        }
        counts
    };
    let counts: Vec<(u32, u32)> = std::thread::scope(|s| {
        let clients: Vec<_> = (0..12).map(|_| s.spawn(hammer)).collect();
        clients.into_iter().map(|c| c.join().unwrap()).collect()
    });
    let (good, refused) = counts.into_iter().fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    assert!(good > 0 && refused > 0, "{good} answered, {refused} refused");
    assert_eq!(server.post("/predict", &body).body, want, "recovered");
}

/// `Expect: 100-continue` shows that the server has taken a request before its body is there.
fn accepted(client: &mut Client, length: usize) {
    client.head("POST", "/predict", &[JSON, ("Expect", "100-continue")], length);
    assert_eq!(client.read().unwrap().status, 100);
}

#[test]
fn stopping_answers_what_was_accepted() {
    let mut server = start(|_| {});
    let body = json!({ "inputs": TEXTS[0] }).to_string();
    let mut clients: Vec<_> = (0..8).map(|_| server.connect()).collect();
    clients.iter_mut().for_each(|c| accepted(c, body.len()));
    let mut idle = server.connect();
    assert_eq!(idle.send("GET", "/health", &[], b"").status, 200);
    server.stop();
    assert!(idle.read().is_none(), "an idle connection is closed");
    for client in &mut clients {
        client.write(body.as_bytes());
        let found = client.read().unwrap();
        assert_eq!((found.status, list(&found.json())), (200, expected("tiny_student", TEXTS[0])));
        assert_eq!(found.header("connection"), Some("close"));
    }
    let address = server.address;
    server.finish().unwrap();
    assert!(std::net::TcpStream::connect(address).is_err(), "nobody listens any more");
}

/// Requests whose bytes are still in the operating system when the server is told to stop, on kept-alive and on new
/// connections.
#[test]
fn stopping_answers_what_was_sent() {
    let mut server = start(|_| {});
    let body = json!({ "inputs": TEXTS[0] }).to_string();
    let mut clients: Vec<_> = (0..16).map(|_| server.connect()).collect();
    for client in &mut clients[..8] {
        assert_eq!(client.send("GET", "/health", &[], b"").status, 200, "kept alive");
    }
    for client in &mut clients {
        client.head("POST", "/predict", &[JSON], body.len());
        client.write(body.as_bytes());
    }
    server.stop();
    for client in &mut clients {
        let found = client.read().expect("an answer");
        assert_eq!((found.status, list(&found.json())), (200, expected("tiny_student", TEXTS[0])));
    }
    server.finish().unwrap();
}

#[test]
fn stopping_has_a_limit() {
    let server = start(|c| c.limits.drain_timeout = Duration::from_millis(200));
    let mut client = server.connect();
    accepted(&mut client, 100);
    let begin = Instant::now();
    let error = server.finish().unwrap_err().to_string();
    assert!(error.contains("1 connections unanswered"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn slow_clients_are_let_go() {
    let server = start(|c| {
        c.limits.header_timeout = Duration::from_millis(200);
        c.limits.body_timeout = Duration::from_millis(200);
        c.limits.max_connections = 1;
    });
    // Each would keep the only connection for ever.
    let mut slow = server.connect();
    accepted(&mut slow, 100);
    assert_eq!(slow.read().unwrap().status, 408);
    drop(slow);
    // Nor may one take its answers slowly: 100 of 40 KB are more than the sockets hold.
    let mut slow = server.connect();
    let batch: Vec<_> = (0..32).map(|i| [TEXTS[i % 4]]).collect();
    let body = json!({ "inputs": batch }).to_string();
    for _ in 0..2_000 {
        slow.head("POST", "/predict", &[JSON], body.len());
        if !slow.try_write(body.as_bytes()) {
            break;
        }
    }
    assert_eq!(server.get("/health").status, 200, "its connection is free again");
    drop(slow);
    let mut slow = server.connect();
    slow.write(b"POST /predict HTTP/1.1\r\nHost:");
    assert!(slow.read().is_none_or(|r| r.status == 408));
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_server_that_cannot_start_says_why() {
    let source = |name: &str, dir: &str| ModelSource { name: name.into(), path: fixture(dir) };
    let rows = [
        (vec![source("a", "no_such_model")], "no_such_model"),
        (vec![source("a", "tiny_student"), source("a", "tiny_bert")], "two models are called `a`"),
        (vec![], "no model to serve"),
    ];
    for (models, want) in rows {
        let mut config = Config::new(models);
        config.port = 0;
        let error = start_cold(config).unwrap().outcome().unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let taken = start(|_| {});
    let mut config = Config::new(vec![source("a", "tiny_student")]);
    config.port = taken.address.port();
    let error = start_cold(config).err().unwrap().to_string();
    assert!(error.contains("cannot listen on 127.0.0.1:"), "{error}");
}
