//! Bodies and messages that nobody would send in good faith: the server refuses them in its protocols' words, and goes on.
#![allow(clippy::unwrap_used)]

mod common;

use common::{JSON, start};
use inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use inference::infer_parameter::ParameterChoice;
use inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use inference::{InferParameter, InferTensorContents, ModelInferRequest};
use proptest::prelude::*;
use serde_json::{Value, json};
use tonic::Code;

#[allow(missing_docs, clippy::all)]
mod inference {
    include!(concat!(env!("OUT_DIR"), "/inference.rs"));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
        Just(json!(2)),
        Just(json!("INT64")),
        Just(json!("BYTES")),
        Just(json!("input_ids")),
        Just(json!("text")),
    ];
    let key = prop_oneof![
        Just("inputs"),
        Just("input"),
        Just("truncate"),
        Just("truncation_direction"),
        Just("raw_scores"),
        Just("top_k"),
        Just("name"),
        Just("shape"),
        Just("datatype"),
        Just("data"),
        Just("parameters"),
        Just("outputs"),
        Just("id"),
    ];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..5)
                .prop_map(|pairs| Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())),
        ]
    })
}

/// Every route that reads a body.
const PATHS: [&str; 7] = [
    "/predict",
    "/",
    "/invocations",
    "/classify",
    "/v1/classify",
    "/v2/models/tiny/infer",
    "/v2/models/bert/versions/1/infer",
];

#[test]
fn no_body_gives_a_5xx_or_ends_the_server() {
    let server = start(|_| {});
    let name = || prop_oneof![Just("text"), Just("input_ids"), Just("attention_mask"), Just("token_type_ids")];
    let datatype = || prop_oneof![Just("BYTES"), Just("INT64"), Just("INT32"), Just("FP32")];
    let tensor = || {
        (name(), datatype(), prop::collection::vec(0..4usize, 0..3), any_json(), prop::option::of(0..99usize))
            .prop_map(|(name, datatype, shape, data, size)| match size {
                Some(size) => json!({ "name": name, "shape": shape, "datatype": datatype,
                                      "parameters": { "binary_data_size": size } }),
                None => json!({ "name": name, "shape": shape, "datatype": datatype, "data": data }),
            })
    };
    let body = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        any_json().prop_map(|v| v.to_string().into_bytes()),
        (any_json(), any_json())
            .prop_map(|(v, p)| { json!({ "inputs": v, "input": v, "parameters": p }).to_string().into_bytes() }),
        prop::collection::vec(tensor(), 0..4).prop_map(|t| json!({ "inputs": t }).to_string().into_bytes()),
    ];
    // Where the JSON of a body ends, says the client: the truth, or anything.
    let ends = prop::option::of(prop_oneof![(0..300usize).prop_map(|n| n.to_string()), ".{0,5}"]);
    let client = std::cell::RefCell::new(server.connect());
    proptest!(ProptestConfig::with_cases(300), |(body in body, ends in ends)| {
        let ends = ends.filter(|e| e.bytes().all(|b| (32..127).contains(&b)));
        let mut headers = vec![JSON];
        headers.extend(ends.as_deref().map(|e| ("Inference-Header-Content-Length", e)));
        for path in PATHS {
            // One connection for all: a panic would end it.
            let found = client.borrow_mut().send("POST", path, &headers, &body);
            prop_assert!(found.status < 500, "{path} {}: {}", found.status, found.body);
            prop_assert!(serde_json::from_str::<Value>(&found.body).is_ok(), "{path}: {}", found.body);
        }
    });
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn no_path_or_header_gives_a_5xx() {
    let server = start(|_| {});
    let part = "[a-zA-Z0-9%._~{}-]{0,12}";
    proptest!(ProptestConfig::with_cases(100), |(parts in prop::collection::vec(part, 0..5), id in "[ -~]{0,80}")| {
        let models = format!("/v2/models/{}", parts.join("/"));
        for path in [format!("/{}", parts.join("/")), models] {
            for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS"] {
                let headers = [("X-Request-Id", id.as_str()), ("Content-Type", id.as_str())];
                let found = server.connect().send(method, &path, &headers, b"{}");
                prop_assert!(found.status < 500, "{method} {path} {}: {}", found.status, found.body);
            }
        }
    });
}

fn any_tensor() -> impl Strategy<Value = InferInputTensor> {
    let name = prop_oneof![Just("text"), Just("input_ids"), Just("attention_mask"), Just("other")];
    let datatype = prop_oneof![Just("BYTES"), Just("INT64"), Just("INT32"), Just("FP32"), Just("")];
    let shape = prop::collection::vec(prop_oneof![0..4i64, any::<i64>()], 0..3);
    let bytes = prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..4);
    let numbers = prop::collection::vec(prop_oneof![0..300i64, any::<i64>()], 0..4);
    let contents = (bytes, numbers).prop_map(|(bytes_contents, int64_contents)| InferTensorContents {
        bytes_contents,
        int_contents: int64_contents.iter().map(|n| *n as i32).collect(),
        int64_contents,
        ..Default::default()
    });
    (name, datatype, shape, prop::option::of(contents)).prop_map(|(name, datatype, shape, contents)| {
        InferInputTensor { name: name.into(), datatype: datatype.into(), shape, contents, ..Default::default() }
    })
}

fn any_request() -> impl Strategy<Value = ModelInferRequest> {
    let name = prop_oneof![3 => Just("tiny".to_owned()), 1 => ".{0,5}"];
    let version = prop_oneof![Just(String::new()), Just("1".to_owned()), ".{0,2}"];
    let choice = prop_oneof![
        any::<i64>().prop_map(ParameterChoice::Int64Param),
        any::<u64>().prop_map(ParameterChoice::Uint64Param),
        any::<bool>().prop_map(ParameterChoice::BoolParam),
        (1..9i64).prop_map(ParameterChoice::Int64Param),
    ];
    let inputs = prop::collection::vec(any_tensor(), 0..3);
    let raw = prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..3);
    let output = prop::option::of(prop_oneof![Just("label"), Just("logits"), Just("other")]);
    (name, version, prop::option::of(choice), inputs, raw, output).prop_map(
        |(model_name, model_version, choice, inputs, raw_input_contents, output)| ModelInferRequest {
            model_name,
            model_version,
            inputs,
            raw_input_contents,
            parameters: choice
                .map(|c| ("top_k".to_owned(), InferParameter { parameter_choice: Some(c) }))
                .into_iter()
                .collect(),
            outputs: output
                .map(|name| InferRequestedOutputTensor { name: name.into(), ..Default::default() })
                .into_iter()
                .collect(),
            ..Default::default()
        },
    )
}

#[test]
fn no_message_gives_an_internal_error() {
    let server = start(|c| c.grpc_port = Some(0));
    let address = format!("http://{}", server.grpc.unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let channel = tonic::transport::Channel::from_shared(address).unwrap();
    let client = GrpcInferenceServiceClient::new(runtime.block_on(channel.connect()).unwrap());
    proptest!(ProptestConfig::with_cases(500), |(request in any_request())| {
        let mut client = client.clone();
        if let Err(status) = runtime.block_on(client.model_infer(request)) {
            let expected = [Code::InvalidArgument, Code::NotFound];
            prop_assert!(expected.contains(&status.code()), "{status:?}");
        }
    });
    assert_eq!(server.get("/health").status, 200);
}
