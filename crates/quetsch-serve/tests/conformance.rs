//! Requests as public clients send them, and the answers that their protocols ask for: `fixtures/requests.json`.
//! Numbers in it are transformers', not ours.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Response, fixture, start};
use inference::ModelInferRequest;
use inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use prost::Message;
use serde_json::{Value, json};

#[allow(missing_docs, clippy::all)]
mod inference {
    include!(concat!(env!("OUT_DIR"), "/inference.rs"));
}

/// float32 on both sides, in another order of sums (docs/numerics.md).
const TOLERANCE: f64 = 1e-5;

fn cases(part: &str) -> Vec<Value> {
    let file = std::fs::read(fixture("requests.json")).unwrap();
    let mut all: Value = serde_json::from_slice(&file).unwrap();
    let cases: Vec<Value> = serde_json::from_value(all[part].take()).unwrap();
    assert!(cases.len() > 1, "{part}");
    cases
}

/// Why `found` is not `want`; numbers within the tolerance, `{"$": kind}` is any of that kind.
fn difference(want: &Value, found: &Value, at: &str) -> Option<String> {
    let no = |what: &str| Some(format!("{at}: {what}: expected {want}, found {found}"));
    if let Some(kind) = want.get("$").and_then(Value::as_str) {
        let text = found.as_str();
        let good = match kind {
            "string" => text.is_some_and(|t| !t.is_empty()),
            "integer" => found.is_u64(),
            "classify" => text.and_then(|t| t.strip_prefix("classify-")).is_some_and(|hex| hex.len() == 32),
            other => panic!("{other}"),
        };
        return if good { None } else { no("kind") };
    }
    match (want, found) {
        (Value::Object(w), Value::Object(f)) => {
            // `parameters` of an output say how it travelled.
            let keys = |o: &serde_json::Map<String, Value>| {
                let mut keys: Vec<_> = o.keys().filter(|k| *k != "parameters").cloned().collect();
                keys.sort();
                keys
            };
            if keys(w) != keys(f) {
                return no("keys");
            }
            w.iter().find_map(|(key, value)| difference(value, &f[key], &format!("{at}.{key}")))
        }
        (Value::Array(w), Value::Array(f)) if w.len() == f.len() => {
            (0..w.len()).find_map(|i| difference(&w[i], &f[i], &format!("{at}[{i}]")))
        }
        (Value::Number(w), Value::Number(f)) => {
            let (w, f) = (w.as_f64().unwrap(), f.as_f64().unwrap());
            if (w - f).abs() <= TOLERANCE { None } else { no("number") }
        }
        (w, f) if w == f => None,
        _ => no("value"),
    }
}

fn base64(text: &str) -> Vec<u8> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => panic!("{c}"),
    };
    let digits: Vec<u8> = text.bytes().filter(|c| *c != b'=').map(value).collect();
    let bits = |group: &[u8]| (0..4).fold(0u32, |n, i| n << 6 | u32::from(*group.get(i).unwrap_or(&0)));
    let bytes = |group: &[u8]| bits(group).to_be_bytes()[1..group.len()].to_vec();
    digits.chunks(4).flat_map(bytes).collect()
}

fn body(case: &Value) -> Vec<u8> {
    match (&case["body_base64"], &case["body"]) {
        (Value::String(bytes), _) => base64(bytes),
        (_, Value::Null) => vec![],
        (_, json) => json.to_string().into_bytes(),
    }
}

/// Values of a tensor that came as bytes.
fn values(datatype: &str, mut bytes: &[u8]) -> Value {
    match datatype {
        "FP32" => bytes.as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect(),
        _ => {
            let mut texts = vec![];
            while let Some((length, rest)) = bytes.split_first_chunk() {
                let (text, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
                texts.push(String::from_utf8(text.to_vec()).unwrap());
                bytes = rest;
            }
            texts.into()
        }
    }
}

/// The JSON of an answer, with tensors that stand behind it put into their places.
fn answer(found: &Response) -> Value {
    let Some(length) = found.header("inference-header-content-length") else {
        return if found.bytes.is_empty() { Value::Null } else { found.json() };
    };
    let (json, mut bytes) = found.bytes.split_at(length.parse().unwrap());
    let mut answer: Value = serde_json::from_slice(json).unwrap();
    for output in answer["outputs"].as_array_mut().unwrap() {
        if let Some(size) = output["parameters"]["binary_data_size"].as_u64() {
            let (own, rest) = bytes.split_at(size as usize);
            output["data"] = values(output["datatype"].as_str().unwrap(), own);
            bytes = rest;
        }
    }
    assert!(bytes.is_empty());
    answer
}

fn replay(part: &str) {
    let server = start(|_| {});
    for case in cases(part) {
        // A connection each: after a refusal the server may close before it has read the body.
        let mut client = server.connect();
        let text = |key: &str| case[key].as_str().unwrap();
        let headers: Vec<_> = case["headers"].as_object().unwrap().iter().collect();
        let headers: Vec<_> = headers.iter().map(|(k, v)| (k.as_str(), v.as_str().unwrap())).collect();
        let found = client.send(text("method"), text("path"), &headers, &body(&case));
        let name = format!("{part}, {}", text("name"));
        assert_eq!(found.status, case["status"].as_u64().unwrap() as u16, "{name}: {}", found.body);
        if let Some(e) = difference(&case["answer"], &answer(&found), "answer") {
            panic!("{name}: {e}");
        }
    }
}

#[test]
fn text_embeddings_inference() {
    replay("tei");
}

#[test]
fn hugging_face_inference_client() {
    replay("hugging_face");
}

#[test]
fn open_inference_protocol_rest() {
    replay("oip_rest");
}

#[test]
fn vllm() {
    replay("vllm");
}

#[tokio::test(flavor = "multi_thread")]
async fn open_inference_protocol_grpc() {
    let server = tokio::task::spawn_blocking(|| start(|c| c.grpc_port = Some(0))).await.unwrap();
    let address = format!("http://{}", server.grpc.unwrap());
    let channel = tonic::transport::Channel::from_shared(address).unwrap().connect().await.unwrap();
    let mut client = GrpcInferenceServiceClient::new(channel);
    for case in cases("oip_grpc") {
        let request = ModelInferRequest::decode(&body(&case)[..]).unwrap();
        let typed = request.raw_input_contents.is_empty();
        let found = client.model_infer(request).await.unwrap().into_inner();
        let mut raw = found.raw_output_contents.iter();
        let outputs: Vec<Value> = found
            .outputs
            .into_iter()
            .map(|o| {
                let data: Value = match (typed, o.contents) {
                    (false, None) => values(&o.datatype, raw.next().unwrap()),
                    (true, Some(c)) if o.datatype == "FP32" => c.fp32_contents.into(),
                    (true, Some(c)) => {
                        c.bytes_contents.into_iter().map(|b| String::from_utf8(b).unwrap()).collect()
                    }
                    (_, contents) => panic!("{contents:?}"),
                };
                json!({ "name": o.name, "shape": o.shape, "datatype": o.datatype, "data": data })
            })
            .collect();
        assert!(raw.next().is_none());
        let found = json!({ "model_name": found.model_name, "model_version": found.model_version,
                            "id": found.id, "outputs": outputs });
        if let Some(e) = difference(&case["answer"], &found, "answer") {
            panic!("{}: {e}", case["name"]);
        }
    }
    tokio::task::spawn_blocking(move || drop(server)).await.unwrap();
}
